"""The documentation is true: its Python runs, its links lead somewhere, its tables say what the code says.

The blocks of a page run in order and share their names, in a second process whose Hub is the server of `hub_server.py`
(see `test_hub.py` for why). Models lie under the names that the pages use as directories of tiny random ones, which
`from_pretrained` finds from the working directory. What a reader has of their own (`args`, `train_set`, `dataloader`,
`loader`, `accuracy`, `pixels`) is put into the page's names; nothing of this package or its dependencies is replaced.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import capabilities
import hub_server
import pytest
import torch
from hub_server import HubServer, only_local
from models import tiny
from peft import LoraConfig, PeftConfig, get_peft_model
from test_conformance import METHODS
from test_integrations import WORDS, tokenizer
from test_sparse_ft import lt_sft_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
    ViTModel,
    set_seed,
)

import peft_ext


ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", *DOCS]
METHOD_PAGES = {
    "ssf": peft_ext.SSFConfig,
    "vqt": peft_ext.VQTConfig,
    "unipt": peft_ext.UniPTConfig,
    "vpt": peft_ext.VPTConfig,
    "sparse": peft_ext.SparseFTConfig,
    "spt": peft_ext.SPTConfig,
    "s2ft": peft_ext.S2FTConfig,
    "mask_pruning": peft_ext.MaskLoraConfig,
    "wegeft": peft_ext.WeGeFTConfig,
    "binary_lora": peft_ext.BinaryLoraConfig,
    "binary_adapter": peft_ext.BinaryAdapterConfig,
    "pasta": peft_ext.PASTAConfig,
    "lora_sb": peft_ext.LoraSBConfig,
    "sct": peft_ext.SCTConfig,
    "snell": peft_ext.SNELLConfig,
    "lora_fusion": peft_ext.LoraFusionConfig,
}
# what the rows of a reader's data are
IMAGES, TOKENS, SENTENCES = "images", "tokens", "sentences"
DATA = {
    "docs/ssf.md": IMAGES,
    "docs/vqt.md": IMAGES,
    "docs/unipt.md": IMAGES,
    "docs/sparse.md": TOKENS,
    "docs/s2ft.md": TOKENS,
    "docs/vpt.md": IMAGES,
    "docs/sct.md": IMAGES,
    "docs/snell.md": IMAGES,
}  # all others: SENTENCES
DATA |= {"docs/binary_lora.md": IMAGES, "docs/binary_adapter.md": IMAGES}
DATA["docs/linear_probe.md"] = IMAGES
DATA |= {"docs/tutorials/images.md": IMAGES, "docs/tutorials/several_adapters.md": TOKENS}
CONTINUES = {"docs/export.md": "docs/mask_pruning.md"}  # it begins with what that page has saved
# Blocks that cannot run here: (page, first line of the block): reason
SKIPPED: dict[tuple[str, str], str] = {}

# huggingface_hub 1.x uploads with what its own httpx has deprecated
THIRD_PARTY = ["ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"]

BERT, VIT, LLAMA = "google-bert/bert-base-uncased", "google/vit-base-patch16-224-in21k", "HuggingFaceTB/SmolLM2-135M"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r'^```py title="([\w.]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)  # written, and not run


def blocks(page: str, text: str | None = None) -> list[tuple[str, int, str]]:
    """Language, number of the first line, and content of each fenced block."""
    text = (ROOT / page).read_text() if text is None else text
    text = FILE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]) for match in BLOCK.finditer(text)]


def files(page: str) -> dict[str, str]:
    """The files that a page tells one to write."""
    return dict(FILE.findall((ROOT / page).read_text()))


def python_blocks(page: str) -> list[tuple[int, str]]:
    return [(line, code) for language, line, code in blocks(page) if language in ("py", "python")]


# what runs in the second process


def prepare(data: str) -> dict[str, Any]:
    """Writes the models that the pages name into the working directory, and returns what a reader brings along."""
    set_seed(0)
    # so large that the budgets on SPT's page, shares of the model, hold a low-rank update
    tiny("bert", hidden_size=256, intermediate_size=512).save_pretrained(BERT)
    of_bert = tokenizer()
    of_bert.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    of_bert.save_pretrained(BERT)
    vit = tiny("vit")
    backbone = ViTModel(vit.config, add_pooling_layer=False)  # the published checkpoint has no head either
    backbone.load_state_dict(vit.vit.state_dict())
    backbone.save_pretrained(VIT)
    llama, tuned = (tiny("llama", hidden_size=64, intermediate_size=96, seed=seed) for seed in (0, 1))
    llama.save_pretrained(LLAMA)
    tokenizer().save_pretrained(LLAMA)
    kept = {key: value for key, value in llama.state_dict().items() if "_proj" not in key}
    tuned.load_state_dict(kept, strict=False)  # else `graft` would warn, as it does of the two on the Hub
    tuned.save_pretrained(f"{LLAMA}-Instruct")
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    experts = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    MixtralForCausalLM(experts).save_pretrained("mistralai/Mixtral-8x7B-v0.1")
    lt_sft_file(Path("pytorch_diff.bin"), llama, tuned, "lm_head")
    german = peft_ext.SparseFTConfig(selection="random", density=0.01, task_type="CAUSAL_LM")
    get_peft_model(llama, german).save_pretrained("me/sft-german")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(vit, lora).save_pretrained("my-lora")
    for name, r in (("reviews", 4), ("news", 8)):
        lora = LoraConfig(r=r, target_modules=["query", "value"], init_lora_weights=False)
        get_peft_model(AutoModelForSequenceClassification.from_pretrained(BERT), lora).save_pretrained(
            f"me/lora-{name}"
        )

    train_set = rows(data)
    args = TrainingArguments(
        "runs", max_steps=12, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    loader = DataLoader(train_set, batch_size=4)  # type: ignore[arg-type]
    names = {"args": args, "train_set": train_set, "dataloader": loader, "loader": loader, "accuracy": accuracy}
    if data == IMAGES:
        names["pixels"] = train_set[0]["pixel_values"][None]
    return names


def rows(data: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if data == IMAGES:
        return [
            {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 2)}
            for i in range(16)
        ]
    texts = torch.randint(4, 40, (16, 7), generator=generator)
    texts[:, 0], texts[:, -1] = (WORDS.index(word) for word in ("<s>", "</s>"))
    labels = texts if data == TOKENS else torch.arange(16) % 2
    return [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(
    steps: list[tuple[str, int, str]], data: str, directory: str, filters: list[str], files: dict[str, str]
) -> str:
    """Runs blocks (page, line, code) with common names; returns the traceback of the first that fails, or nothing."""
    Path(directory).mkdir(parents=True)
    os.chdir(directory)
    for name, content in files.items():
        Path(name).write_text(content)
    sys.path.insert(0, directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = prepare(data)
        apply(filters)
        for page, line, code in steps:
            try:
                # the empty lines make tracebacks name the line of the page
                exec(compile("\n" * (line - 1) + code, page, "exec"), names)  # noqa: S102
            except BaseException:  # noqa: BLE001
                return traceback.format_exc()
    return ""


def apply(filters: list[str]) -> None:
    """pytest's filters for warnings, without pytest."""
    for entry in filters:
        action, message, category = [*entry.split(":"), "", ""][:3]
        warnings.filterwarnings(action, message, getattr(builtins, category or "Warning"))


# fixtures


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub_server.TOKENS, "hf_me", "me")  # the pages push to me/...
        yield server


@pytest.fixture(scope="module")
def execute(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[[list[tuple[str, int, str]], str], str]]:
    """`run` in the second process, in a new directory for each call."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": "hf_me", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_MODULES_CACHE": home / "modules", "OMP_NUM_THREADS": 1, "MPLBACKEND": "agg"}
    settings |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), 1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, str(value))
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=only_local)
        pool.submit(int).result()  # the process starts here, and keeps this environment
    filters = [*filter(None, pytestconfig.getini("filterwarnings")), *THIRD_PARTY]
    with pool:
        yield lambda steps, data, files=None: pool.submit(
            run, steps, data, str(tmp_path_factory.mktemp("page") / "work"), filters, files or {}
        ).result()


# code


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_runs(page: str, execute: Callable[..., str], hub: HubServer) -> None:
    steps = []
    for source in filter(None, (CONTINUES.get(page), page)):
        for line, code in python_blocks(source):
            if (source, code.splitlines()[0]) not in SKIPPED:
                # the reader's own arguments
                steps.append((source, line, code.replace("(model, ...", "(model, args, train_dataset=train_set")))
    error = execute(steps, DATA.get(page, SENTENCES), files(page))
    assert not error, error
    code = re.sub(r"#.*", "", "".join(code for _, code in python_blocks(page)))
    for repo_id in re.findall(r"to_hub\((?:\w+, )?\"(.+?)\"", code):
        pushed = hub.repos[repo_id].find("main").files
        assert "README.md" in pushed and any(name.endswith(".safetensors") for name in pushed)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = 1\n\nx.typo\n", r'docs/none.md", line 12(?s:.*)AttributeError'),
        ("import warnings\nwarnings.warn('odd', stacklevel=1)\n", "UserWarning: odd"),
        ("from peft import get_peft_model\nget_peft_model(nothing)\n", "NameError"),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('me/nowhere')\n", "me/nowhere"),
    ],
)
def test_blocks_can_fail(code: str, error: str, execute: Callable[..., str]) -> None:
    assert re.search(error, execute([("docs/none.md", 10, code)], SENTENCES))


def test_skipped_blocks_exist() -> None:
    there = {(page, code.splitlines()[0]) for page in PAGES for _, code in python_blocks(page)}
    assert set(SKIPPED) <= there and all(SKIPPED.values())


def test_every_page_says_in_which_language_its_python_is() -> None:
    """A block without a language would not be run."""
    for page in PAGES:
        for language, line, code in blocks(page):
            if not language:
                assert not re.search(r"^(import|from) \w+", code, re.MULTILINE), f"{page}, line {line}"


# commands, links, images


def shell_problems(page: str, text: str | None = None) -> list[str]:
    """Scripts and make targets that a page tells one to run and that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / page).read_text() if text is None else text
    code = [code for language, _, code in blocks(page, text) if language in ("", "bash", "sh", "console")]
    code += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    problems = []
    for command in code:
        problems += [path for path in re.findall(r"[\w./-]+\.py\b", command) if "/" in path and not exists(path)]
        problems += [
            f"make {name}" for name in re.findall(r"^make ([a-z-]+)", command, re.MULTILINE) if name not in targets
        ]
    return problems


def exists(path: str) -> bool:
    """In the repository, or, as the pages write it for short, in the package, a tuner's folder or the benchmark."""
    return any((ROOT / folder / path).exists() for folder in ("", "peft_ext", "peft_ext/tuners", "examples/benchmark"))


def link_problems(page: str, text: str | None = None) -> list[str]:
    """Relative links and images that lead nowhere, headings included."""
    text = FILE.sub("", (ROOT / page).read_text() if text is None else text)
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)) + re.findall(r"src=\"([^\"]+)\"", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if "://" in link:
            continue
        if not target.exists() or (heading and heading not in headings(target.read_text() if path else text)):
            problems.append(link)
    return problems


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_links_lead_somewhere(page: str) -> None:
    assert shell_problems(page) == []
    assert link_problems(page) == []


def test_broken_commands_and_links_are_found() -> None:
    text = "# A page\n[a](nowhere.md) ![b](c.png) [d](#a-page) [e](#other) [f](https://x.y)\n"
    text += "Run `python examples/gone.py`, or `examples/sft.py`:\n```bash\nmake cake\npython docs/gone.py\n```\n"
    assert link_problems("docs/README.md", text) == ["nowhere.md", "c.png", "#other"]
    assert set(shell_problems("docs/README.md", text)) == {"make cake", "docs/gone.py", "examples/gone.py"}


def test_figures_are_small_and_shown() -> None:
    text = "".join((ROOT / page).read_text() for page in PAGES)
    for figure in (ROOT / "docs").glob("*.png"):
        assert figure.stat().st_size < 60_000, figure
        assert f"({figure.name})" in text or f"docs/{figure.name}" in text, figure


# the order of the pages, their tables


@pytest.mark.parametrize("name", METHOD_PAGES)
def test_every_method_page_has_the_same_order(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    assert re.match(r"# .+\n\nPapers?: \[", text)
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert found[:5] == ["Idea", "Pros and cons", "Usage", "Parameters", "Figure"]
    idea, _, figure = (text.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in ("Idea", "Usage", "Figure"))
    assert "```\n" in idea and "![" in figure and "peft_ext.plots" in figure
    assert python_blocks(f"docs/{name}.md")


SUMMARY = runpy.run_path(str(ROOT / "docs" / "summary.py"))
PARAMETERS = runpy.run_path(str(ROOT / "docs" / "parameters.py"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_tables_of_parameters_are_those_of_the_configs(page: str) -> None:
    text = (ROOT / page).read_text()
    assert PARAMETERS["updated"](text) == text, "run `python docs/parameters.py`"
    name = METHOD_PAGES.get(Path(page).stem)
    assert name is None or f"<!-- parameters:{name.__name__} -->\n" in text


@pytest.mark.parametrize("config", [peft_ext.ExtConfig, *METHOD_PAGES.values()])
def test_every_field_is_in_the_table(config: type[peft_ext.ExtConfig]) -> None:
    """Read back from the page, against the config that one gets without arguments, where that is possible."""
    page = next((page for page, other in METHOD_PAGES.items() if other is config), "README")
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| .+ \|$", text, re.MULTILINE))
    parent = PeftConfig if config is peft_ext.ExtConfig else peft_ext.ExtConfig
    own = {field.name for field in fields(config)} - {field.name for field in fields(parent)}
    assert own <= set(found) <= {field.name for field in fields(config)}
    for field in fields(config):
        if field.name in found:
            value = field.default if field.default_factory is MISSING else field.default_factory()
            assert ast.literal_eval(found[field.name]) == value


def test_stale_tables_and_undocumented_fields_are_found() -> None:
    page = (ROOT / "docs" / "ssf.md").read_text()
    stale = page.replace("| `recover` | `True` |", "| `recover` | `False` |")
    assert stale != page and PARAMETERS["updated"](stale) == page

    @dataclass
    class Undocumented(peft_ext.ExtConfig):
        """One more field.

        Args:
            there: It is.
        """

        there: int = 0
        missing: int = 0

    with pytest.raises(ValueError, match="Undocumented and its fields differ in missing"):
        PARAMETERS["table"](Undocumented)


# the README's table of results, the site


def test_readme_is_short_and_its_table_is_that_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    assert SUMMARY["updated"](text) == text, "run `python docs/summary.py`"
    stale = re.sub(r"\| SSF \| [\d.]+", "| SSF | 0.999", text)
    assert stale != text and SUMMARY["updated"](stale) == text


def test_method_of_the_tutorial_passes_the_kit(tmp_path: Path) -> None:
    for name, content in files("docs/tutorials/own_method.md").items():
        (tmp_path / name).write_text(content)
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_rank_one.py", "-k", "vit or gpt2"]
    ran = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.removeprefix("docs/") for page in DOCS}


# the table of capabilities


def test_table_of_capabilities_is_what_the_tests_show() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert capabilities.updated(text) == text, f"run `python tests/capabilities.py --write {page}`"


def test_stale_table_of_capabilities_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- capabilities -->\n| merge | - |\n<!-- /capabilities -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["capabilities.py", "--write", str(file)])
    capabilities.main()
    text = file.read_text()
    assert text.startswith("before\n<!-- capabilities -->\n| | SSF | VQT |") and text.endswith(
        "capabilities -->\nafter\n"
    )
    assert capabilities.updated(text) == text
    stale = text.replace("| merge | ✓ |", "| merge | - |")
    assert stale != text and capabilities.updated(stale) == text


def test_capabilities_come_from_marks_and_rows() -> None:
    matrix = pytest.mark.parametrize(("method", "name"), [("ssf", "bert"), ("ssf", "vit"), ("spt", "bert")])

    @pytest.mark.capability("mixes")
    @matrix
    def test_matrix() -> None: ...

    @pytest.mark.capability("alone", "vqt", refused=True)
    @pytest.mark.parametrize("name", ["beit"])
    def test_alone() -> None: ...

    @pytest.mark.capability("mixes", "spt", refused=True)
    def test_contradiction() -> None: ...

    @pytest.mark.capability("mixes", "ssff")
    def test_typo() -> None: ...

    found = capabilities.Capabilities()
    found.add(test_matrix)
    found.add(test_alone)
    assert found.cells == {"mixes": {"ssf": "✓", "spt": "✓"}, "alone": {"vqt": "refused"}}
    assert found.models == {"ssf": {"bert", "vit"}, "spt": {"bert"}, "vqt": {"beit"}}
    table = found.table()
    assert "| mixes | ✓ | - | - | ✓ | - |" in table and "| alone | - | refused | - | - | - |" in table
    with pytest.raises(ValueError, match="test_contradiction contradicts another test on 'mixes' of 'spt'"):
        found.add(test_contradiction)
    with pytest.raises(ValueError, match="'ssff', which is no method"):
        found.add(test_typo)


def test_capabilities_of_the_kit_come_from_its_tests_and_a_methods_claims() -> None:
    found = capabilities.Capabilities()
    for method in ("ssf", "spt", "vqt"):
        found.add_kit(METHODS[method])
    assert found.cells["merge"] == {"ssf": "✓", "spt": "✓"}
    assert found.cells["several adapters in one batch"] == {"ssf": "✓", "spt": "✓", "vqt": "refused"}
    assert found.models["vqt"] == {"bert", "roberta", "vit"}
