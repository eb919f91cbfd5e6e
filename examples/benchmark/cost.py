"""What a method costs: memory kept for the backward, time of a training step and of a forward, bytes on disk.

    python examples/benchmark/cost.py vit-6x384 --table             # print the table
    python examples/benchmark/cost.py all --threads 2 --json        # write results/cost-PRESET-DEVICE.json
    python examples/benchmark/cost.py --write docs/results.md             # put the tables of the results into a file
    python examples/benchmark/cost.py FacebookAI/roberta-base --batch 16 --length 128 --table

All methods take turns in one run: a round is one training step of each, one forward of each, one forward of each
merged, in an order shuffled anew, and a ratio compares two times of the same round. So a slow minute of the machine
touches every method alike.

- **saved for backward**: bytes of the distinct storages that autograd keeps after the forward, in train mode, as
  `torch.autograd.graph.saved_tensors_hooks` sees them; parameters and buffers do not count. The yardstick is the
  frozen backbone that only passes gradients through, to its pixels or to its token embeddings.
- **step**: forward, backward, AdamW (fused, as in `Trainer`) and clearing the gradients; the parts are in the JSON.
- **forward**: in eval mode under `no_grad`, over that of the model without adapter; *merged* after
  `merge_and_unload()`.
- **file**: the adapter as `save_pretrained` writes it, the head included; for the methods that are no adapter the
  trained tensors.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    Dinov2Config,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

import peft_ext
from peft_ext import BinaryLoraConfig, MaskLoraConfig, PASTAConfig, SSFConfig
from peft_ext.architectures import describe
from peft_ext.core import about_of
from peft_ext.training.toys import kept_for_backward


sys.path.insert(0, str(Path(__file__).resolve().parent))
from methods import CONFIGS, COST_NAMES, PROMPTS, REGISTERED, Setting


RESULTS = Path(__file__).parent / "results"
FROZEN, LORA = "frozen backbone", "LoRA r=8"  # what the ratios refer to
MIB = 2**20


# What is run


class Stack(nn.Sequential):
    """Linear layers in a row; its loss is the mean square of what comes out."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=super().forward(x).square().mean())


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch.

    Args:
        name: How the results are called.
        build: Makes the model; called under the seed.
        kind: `image`, `text` or `causal` for transformers models, `stack` for a [`Stack`].
        batch: Samples.
        length: Tokens of a text; for a stack its width.
        image_size: Height and width of an image.
        about: For the table's caption.
    """

    name: str
    build: Callable[[], nn.Module]
    kind: str
    batch: int
    length: int = 0
    image_size: int = 0
    about: str = ""

    @property
    def size(self) -> str:
        """The batch in words."""
        if self.kind == "image":
            return f"{self.batch} images of {self.image_size} x {self.image_size}"
        return f"{self.batch} x {self.length} {'features' if self.kind == 'stack' else 'tokens'}"

    @property
    def common(self) -> dict[str, Any]:
        """What every adapter's config is given."""
        return {"task_type": {"image": "SEQ_CLS", "text": "SEQ_CLS", "causal": "CAUSAL_LM"}.get(self.kind)}

    def inputs(self, config: Any) -> dict[str, torch.Tensor]:
        """A random batch with labels."""
        if self.kind == "stack":
            return {"x": torch.randn(self.batch, self.length)}
        if self.kind == "image":
            pixels = torch.randn(self.batch, config.num_channels, self.image_size, self.image_size)
            return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (self.batch,))}
        # token ids of special meaning come first; a classifier finds the end of a text by its padding
        tokens = torch.randint(min(1000, config.vocab_size // 2), config.vocab_size, (self.batch, self.length))
        labels = tokens.clone() if self.kind == "causal" else torch.randint(config.num_labels, (self.batch,))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _vit_6x384() -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    }
    return AutoModelForImageClassification.from_config(ViTConfig(**shape, num_labels=10, **NO_DROPOUT))


def _vit_tiny() -> nn.Module:
    """In the shape of the small pretrained one that the comparison adapts."""
    shape: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 32,
        "patch_size": 8,
    }
    return AutoModelForImageClassification.from_config(ViTConfig(**shape, num_labels=10, **NO_DROPOUT))


def _dinov2_small() -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = Dinov2Config(**shape, image_size=518, patch_size=14, num_labels=10, **NO_DROPOUT)
    return AutoModelForImageClassification.from_config(config)


def _vit_b16() -> nn.Module:
    return AutoModelForImageClassification.from_config(ViTConfig(num_labels=100, **NO_DROPOUT))


def _smollm2() -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


def _minilm() -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return AutoModelForSequenceClassification.from_config(BertConfig(**shape, num_labels=2, **NO_DROPOUT))


def _bert_base() -> nn.Module:
    return AutoModelForSequenceClassification.from_config(BertConfig(num_labels=2, **NO_DROPOUT))


def _llama_1b() -> nn.Module:
    """In the shape of Llama-3.2-1B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


PRESETS = {
    workload.name: workload
    for workload in (
        Workload(
            "vit-6x384", _vit_6x384, "image", 8, image_size=224, about="ViT, 6 layers of width 384, 16-px patches"
        ),
        Workload("vit-b16", _vit_b16, "image", 4, image_size=224, about="ViT-B/16"),
        Workload("dinov2-small", _dinov2_small, "image", 8, image_size=98, about="DINOv2-S/14, 49 patches"),
        Workload("smollm2-135m", _smollm2, "causal", 4, length=128, about="Llama in the shape of SmolLM2-135M"),
        Workload("vit-tiny", _vit_tiny, "image", 16, image_size=32, about="ViT, 6 layers of width 192, 8-px patches"),
        Workload("minilm", _minilm, "text", 32, length=64, about="BERT, 6 layers of width 384, as MiniLM-L6"),
        Workload("bert-base", _bert_base, "text", 8, length=128, about="BERT-base"),
        Workload("llama-1b", _llama_1b, "causal", 1, length=256, about="Llama in the shape of Llama-3.2-1B, bf16"),
        Workload("linear-8x1024", lambda: Stack(8, 1024), "stack", 64, length=1024, about="8 x Linear(1024, 1024)"),
    )
}


def hub_workload(name: str, kind: str | None, batch: int, length: int, image_size: int | None) -> Workload:
    """Any model on the Hub or on disk, with its weights; its kind is read off its config unless given."""
    config: Any = AutoConfig.from_pretrained(name)
    if kind is None:
        causal = any(architecture.endswith("CausalLM") for architecture in config.architectures or ())
        kind = "causal" if causal else "image" if hasattr(config, "image_size") else "text"
    auto: Any = {
        "causal": AutoModelForCausalLM,
        "image": AutoModelForImageClassification,
        "text": AutoModelForSequenceClassification,
    }[kind]
    if image_size is None:
        image_size = getattr(config, "image_size", 224)
    label = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return Workload(
        label, lambda: auto.from_pretrained(name, dtype=torch.float32), kind, batch, length, int(image_size), name
    )


# The methods


def head_name(model: nn.Module) -> str | None:
    """The classification head, which every method trains; `None` for a model without one."""
    return next((name for name in ("classifier", "score") if hasattr(model, name)), None)


def freeze_all_but_head(model: nn.Module) -> nn.Module:
    head = head_name(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head is not None and head in name.split("."))
    return model


def linear_probe(model: nn.Module) -> nn.Module:
    if head_name(model) is None:
        raise ValueError("the model has no head to train")
    return freeze_all_but_head(model)


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


INSERTED = 50  # prompts of the next


def prompts_as_rows(model: nn.Module) -> nn.Module:
    """VPT-deep as published: prompts stand behind the tokens of every block, with queries and a feed-forward part too.

    `VPTConfig` gives the same outputs without computing those; this row is what it is measured against.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "patch_size"):
        raise ValueError("it is for vision transformers here, which have no attention mask that would have to grow")

    def insert(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat([args[0], block.prompt_rows.expand(len(args[0]), -1, -1)], 1), *args[1:])

    def drop(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-INSERTED], *output[1:])
        return output[:, :-INSERTED]

    freeze_all_but_head(model)
    for described in describe(model).blocks:
        block = model.get_submodule(described.name)
        rows = nn.Parameter(torch.empty(INSERTED, config.hidden_size, device=next(block.parameters()).device))
        block.register_parameter("prompt_rows", nn.init.uniform_(rows, -0.1, 0.1))
        block.register_forward_pre_hook(insert)
        block.register_forward_hook(drop)
    return model


REFERENCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    FROZEN: freeze_all_but_head,
    "linear probe": linear_probe,
    "full fine-tuning": full,
    f"VPT, {INSERTED} prompts as rows": prompts_as_rows,
}


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def _ia3_targets(model: nn.Module) -> dict[str, Any]:
    """Keys, values and the second layer of the MLP, as published, where PEFT does not know them itself."""
    if isinstance(model, Stack):
        return {"target_modules": "all-linear", "feedforward_modules": []}
    if any(name.endswith("mlp.fc2") for name, _ in model.named_modules()):
        return {"target_modules": ["k_proj", "v_proj", "mlp.fc2"], "feedforward_modules": ["mlp.fc2"]}
    return {}


def _compared(name: str) -> Callable[[nn.Module, dict[str, Any]], PeftConfig]:
    """As the comparison of `compare.py` has it, at the size of LoRA r=8 where it can choose."""

    def config(model: nn.Module, common: dict[str, Any]) -> PeftConfig:
        if common["task_type"] is None:
            raise ValueError("it is for transformers models here, not for a stack of layers")
        return CONFIGS[name](Setting(model, str(common["task_type"]), share=1.0, steps=1_000_000, seed=0))

    return config


def _ssf_targets(model: nn.Module) -> dict[str, Any]:
    return {"target_modules": "all-linear"} if isinstance(model, Stack) else {}


def _pasta(model: nn.Module, common: dict[str, Any]) -> PeftConfig:
    """The inputs are drawn at random, so that a sample of a text may have any number of special tokens."""
    text = {"special_tokens": [1, 2], "by_token": True} if hasattr(model, "bert") else {}
    return PASTAConfig(**text, **common)


COMPARED = (  # configured as in the comparison, for models of transformers only
    *(
        "dora",
        "adalora",
        "super-tuning",
        "spiel-ag",
        "s2ft",
        "spt-random",
        "vqt",
        "unipt",
        "lora-xs",
        "sct",
        "sct-mlp",
        "snell",
    ),
    *PROMPTS,
    *REGISTERED,
)
# `common` holds the task type; registered methods that have no line here come with their defaults
ADAPTERS: dict[str, Callable[[nn.Module, dict[str, Any]], PeftConfig]] = {
    LORA: lambda model, common: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **common),
    "IA3": lambda model, common: IA3Config(**_ia3_targets(model), **common),
    "SHiRA r=8": lambda model, common: ShiraConfig(r=8, target_modules="all-linear", random_seed=0, **common),
    "LN-tuning": lambda model, common: LNTuningConfig(target_modules=_norms(model), **common),
    "SSF": lambda model, common: SSFConfig(**_ssf_targets(model), **common),
    "SSF, recover=False": lambda model, common: SSFConfig(recover=False, **_ssf_targets(model), **common),
    "Bi-LoRA r=8": lambda model, common: BinaryLoraConfig(r=8, target_modules="all-linear", **common),
    # in the phase in which it costs most: the masks are drawn and learn
    "mask-pruning LoRA r=8": lambda model, common: MaskLoraConfig(
        target_sparsity=0.25, total_steps=1_000_000, warmup_ratio=0.0, **common
    ),
    **{COST_NAMES[name]: _compared(name) for name in COMPARED},
    COST_NAMES["pasta"]: _pasta,
}
METHODS = (*REFERENCES, *ADAPTERS)


def adapt(model: nn.Module, method: str, workload: Workload) -> nn.Module:
    """Puts `method` on `model`.

    Raises:
        ValueError: It does not apply to this model.
    """
    if method in REFERENCES:
        return REFERENCES[method](model)
    return get_peft_model(model, ADAPTERS[method](model, workload.common))  # type: ignore[arg-type]


# One method at work


def copy_model(model: nn.Module, share: bool) -> nn.Module:
    """A copy; with `share` its parameters are its own, but the memory behind them is the original's."""
    memo = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()} if share else {}
    return copy.deepcopy(model, memo)


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Job:
    """A method on its copy of the model, with its optimizer.

    Args:
        share: Frozen weights stay in the memory of `base`; trained ones are always the job's own.
    """

    def __init__(
        self,
        method: str,
        base: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        workload: Workload,
        settings: Settings,
        share: bool,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.head = head_name(base)
        self.settings = settings
        self.inputs = dict(inputs)
        self.model = adapt(copy_model(base, share), method, workload).to(settings.device).train()
        borrowed = storages(base.parameters())
        for parameter in self.trained().values():
            if parameter.untyped_storage().data_ptr() in borrowed:
                parameter.data = parameter.data.clone()
        if method == FROZEN:
            self._ask_for_input_gradients()
        trained = list(self.trained().values())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True) if trained else None

    def _ask_for_input_gradients(self) -> None:
        floats = [name for name, value in self.inputs.items() if value.is_floating_point()]
        for name in floats:
            self.inputs[name] = self.inputs[name].detach().requires_grad_()
        if not floats and isinstance(self.model, PreTrainedModel):
            self.model.enable_input_require_grads()

    def trained(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self.settings.device, getattr(torch, self.settings.autocast))

    def loss(self) -> torch.Tensor:
        with self._autocast():
            return self.model(**self.inputs).loss

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for value in self.inputs.values():
            value.grad = None

    def step(self) -> dict[str, float]:
        """One training step; returns the seconds of its parts."""
        clock = Clock(self.settings.device)
        loss = self.loss()
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        if self.optimizer is not None:
            self.optimizer.step()
        self._clear()
        clock.lap("optimizer")
        return {"step": sum(clock.laps.values()), **clock.laps}

    def evaluate(self, model: nn.Module | None = None) -> float:
        """Seconds of a forward without gradients, of `model` instead of the trained one if given."""
        model = self.model if model is None else model
        model.eval()
        with torch.no_grad(), self._autocast():
            clock = Clock(self.settings.device)
            model(**self.inputs)
            clock.lap("forward")
        self.model.train()
        return clock.laps["forward"]

    def merged(self) -> nn.Module | None:
        """A merged copy; `None` for what is no adapter or cannot be merged."""
        if not isinstance(self.model, PeftModel):
            return None
        if not about_of(self.model.peft_type).merges_with(vars(self.model.active_peft_config)):
            return None
        return copy.deepcopy(self.model).merge_and_unload()

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages that the backward keeps, besides parameters and buffers."""
        total, loss = kept_for_backward(self.model, self.loss)
        loss.backward()
        self._clear()
        return total

    def cuda_peak(self) -> int:
        """Most bytes allocated during a step, weights and optimizer states included; alone on the GPU."""
        for _ in range(2):
            self.step()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()

    def file_bytes(self) -> int:
        """Size of the file of weights that is written."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "adapter_model.safetensors")
            if isinstance(self.model, PeftModel):
                self.model.save_pretrained(directory, save_embedding_layers=False)
            else:
                save_file({name: p.detach().contiguous() for name, p in self.trained().items()}, file)
            return file.stat().st_size

    def counts(self) -> tuple[int, int]:
        """Numbers of trainable parameters, without and with the head."""
        sizes = {name: p.numel() for name, p in self.trained().items()}
        in_head = sum(size for name, size in sizes.items() if self.head in name.split("."))
        return sum(sizes.values()) - in_head, sum(sizes.values())


class Clock:
    """Seconds between laps, with the GPU's work done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name], self.last = now - self.last, now


# The run


@dataclass(frozen=True)
class Settings:
    """How it is run.

    Args:
        rounds: Rounds that count.
        warmup: Rounds before them.
        seed: Of weights, data, adapters and the order within the rounds.
        device: `cpu` or `cuda`.
        threads: Of torch on the CPU; `None` leaves them as they are.
        autocast: Name of a dtype for `torch.autocast`.
    """

    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    autocast: str | None = None


@dataclass
class Row:
    """What was found of one method; times in seconds, one entry a round."""

    trainable: int
    trainable_with_head: int
    saved_bytes: int
    file_bytes: int
    cuda_peak_bytes: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def machine(settings: Settings) -> dict[str, Any]:
    """What the times depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = match[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device.startswith("cuda") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_ext": peft_ext.__version__,
    }


@contextmanager
def no_foreign_warnings() -> Iterator[None]:
    """Keeps quiet what PEFT's own methods warn of on correct use."""
    with warnings.catch_warnings():
        for message in (
            "`is_gradient_checkpointing` is deprecated",
            "Sparse invariant checks are implicitly disabled",  # SHiRA
            "Unsupported layer type .*Norm",  # LN-tuning
            "Could not find a config file",  # the model has random weights, and so no name
            "The support of the sparse adapter",  # saved before its first reselection
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def log(message: str, passing: bool = False) -> None:
    """Prints to stderr; a `passing` message is overwritten by the next where stderr is a terminal."""
    is_terminal = sys.stderr.isatty()
    start, end = ("\r\033[K", "" if passing else "\n") if is_terminal else ("", "\n")
    print(f"{start}{message}", file=sys.stderr, end=end, flush=True)


@no_foreign_warnings()
def measure(
    workload: Workload, methods: Sequence[str] = METHODS, settings: Settings | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Runs `methods` on `workload`; returns what the JSON holds. The two that ratios refer to are always run."""
    settings = settings or Settings()

    def report(message: str) -> None:
        if not quiet:
            log(message, passing=True)

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    gc.freeze()  # what is there already is not looked at by each collection
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):  # a billion weights are drawn in seconds there
        base = workload.build()
    base.cpu().train()
    inputs = workload.inputs(getattr(base, "config", None))
    inputs = {name: value.to(settings.device) for name, value in inputs.items()}

    rows: dict[str, Row] = {}
    skipped: dict[str, str] = {}
    for method in [name for name in METHODS if name in {FROZEN, LORA, *methods}]:
        report(f"{workload.name}: memory of {method}")
        try:
            job = Job(method, base, inputs, workload, settings, share=False)
        except ValueError as error:
            skipped[method] = str(error)
            continue
        without_head, with_head = job.counts()
        peak = job.cuda_peak() if settings.device.startswith("cuda") else None
        rows[method] = Row(without_head, with_head, job.saved_bytes(), job.file_bytes(), peak)
        del job
        gc.collect()

    base.to(settings.device)
    base_seconds = _time(base, rows, inputs, workload, settings, report)
    gc.unfreeze()
    return {
        "workload": {key: value for key, value in asdict(workload).items() if key != "build"}
        | {"size": workload.size},
        "parameters": sum(p.numel() for p in base.parameters()),
        "settings": asdict(settings),
        "machine": machine(settings),
        "base_seconds": base_seconds,
        "rows": {method: asdict(row) for method, row in rows.items()},
        "skipped": skipped,
    }


def _time(
    base: nn.Module,
    rows: dict[str, Row],
    inputs: Mapping[str, torch.Tensor],
    workload: Workload,
    settings: Settings,
    report: Callable[[str], None],
) -> list[float]:
    """Fills in the times of `rows`; returns those of the forward of `base`."""
    jobs = {method: Job(method, base, inputs, workload, settings, share=True) for method in rows}
    adapters = {method: job for method, job in jobs.items() if isinstance(job.model, PeftModel)}
    merged = {method: job.merged() for method, job in adapters.items()}
    turns: list[tuple[str, str]] = [("step", method) for method in jobs]
    turns += [("unmerged", method) for method in adapters]
    turns += [("merged", method) for method in adapters if merged[method] is not None]
    turns.append(("base", ""))
    rng = random.Random(settings.seed)
    base_seconds: list[float] = []
    start = time.perf_counter()
    for index in range(settings.warmup + settings.rounds):
        rng.shuffle(turns)
        counts = index >= settings.warmup
        with no_garbage_collection():
            for kind, method in turns:
                if kind == "base":
                    times = {"base": jobs[FROZEN].evaluate(base)}
                elif kind == "step":
                    times = jobs[method].step()
                else:
                    times = {kind: jobs[method].evaluate(merged[method] if kind == "merged" else None)}
                if counts and kind == "base":
                    base_seconds.append(times["base"])
                elif counts:
                    for key, value in times.items():
                        rows[method].seconds.setdefault(key, []).append(value)
        spent = time.perf_counter() - start
        report(f"{workload.name}: round {index + 1} of {settings.warmup + settings.rounds}, {spent:.0f} s")
    return base_seconds


# The table


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return middle.item(), low.item(), high.item()


def paired(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio, round by round."""
    return quartiles([a / b for a, b in zip(values, reference, strict=True)])


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per method what the table shows: ratios of times as (median, lower quartile, upper quartile)."""
    rows = results["rows"]
    found: dict[str, dict[str, Any]] = {}
    for method, row in rows.items():
        seconds = row["seconds"]
        found[method] = {
            "saved_ratio": row["saved_bytes"] / rows[FROZEN]["saved_bytes"],
            "step_seconds": quartiles(seconds["step"])[0],
            "step_ratio": paired(seconds["step"], rows[LORA]["seconds"]["step"]),
            **{
                f"{kind}_ratio": paired(seconds[kind], results["base_seconds"])
                for kind in ("unmerged", "merged")
                if kind in seconds
            },
        }
    return found


def spread(values: tuple[float, float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def _size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count >= MIB else f"{count / 1024:,.1f} KiB"


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    has_peak = results["machine"]["gpu"] is not None
    header = [
        "method",
        "trainable",
        "saved for backward, MiB",
        "over frozen",
        *(["CUDA peak, MiB"] if has_peak else []),
    ]
    header += ["step, ms", "step over LoRA", "forward over base", "merged over base", "file"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for method, found in summary(results).items():
        row = results["rows"][method]
        peak = [f"{row['cuda_peak_bytes'] / MIB:,.1f}"] if has_peak else []
        lines.append(
            [
                method,
                f"{row['trainable']:,}",
                f"{row['saved_bytes'] / MIB:,.1f}",
                f"{found['saved_ratio']:.2f}",
                *peak,
                f"{found['step_seconds'] * 1000:,.1f}",
                spread(found["step_ratio"]),
                spread(found.get("unmerged_ratio")),
                spread(found.get("merged_ratio")),
                _size(row["file_bytes"]) if row["trainable_with_head"] else "",
            ]
        )
    return "\n".join([caption(results), "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def caption(results: Mapping[str, Any]) -> str:
    """What was run, on what."""
    work, computer, settings = results["workload"], results["machine"], results["settings"]
    head = max(row["trainable_with_head"] - row["trainable"] for row in results["rows"].values())
    where = computer["gpu"] or f"{computer['cpu']}, {computer['threads']} threads"
    precision = f"autocast to {settings['autocast']}" if settings["autocast"] else "float32"
    return (
        f"{work['about']} ({results['parameters']:,} parameters), batch of {work['size']}, {precision}; {where}, "
        f"torch {computer['torch']}. Median of {settings['rounds']} rounds (quartiles)."
        + (f" A head of {head:,} parameters comes on top of the trainable ones." if head else "")
    )


def write_tables(file: Path, results: Path = RESULTS) -> list[str]:
    """Puts the tables of `results/cost-NAME-*.json` between `<!-- cost:NAME -->` and `<!-- /cost:NAME -->` in `file`.

    Returns:
        The names that were found.

    Raises:
        ValueError: The file has no such markers, or there are no results for one.
    """
    written: list[str] = []

    def tables(match: re.Match[str]) -> str:
        name = match[2]
        sources = [results / f"cost-{name}-{device}.json" for device in ("cpu", "cuda")]
        found = [table(json.loads(source.read_text())) for source in sources if source.exists()]
        if not found:
            raise ValueError(f"{file} wants the costs of {name!r}, and there are no results: {sources[0]}")
        written.append(name)
        return "\n".join([match[1], "\n\n".join(found), match[3]])

    pattern = r"(<!-- cost:(\S+) -->)\n.*?(<!-- /cost:\2 -->)"
    text = re.sub(pattern, tables, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not written:
        raise ValueError(f"{file} has no line `<!-- cost:NAME -->` followed by a line `<!-- /cost:NAME -->`")
    file.write_text(text, encoding="utf-8")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"{', '.join(PRESETS)}, all, or models on the Hub or on disk")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help=f"{METHODS}")
    parser.add_argument("--batch", type=int, help="samples; default: the preset's, else 8")
    parser.add_argument("--length", type=int, help="tokens of a text; default: the preset's, else 128")
    parser.add_argument("--image-size", type=int, help="pixels; default: the model's")
    parser.add_argument("--kind", choices=["image", "text", "causal"], help="of a model on the Hub, if not as it says")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--autocast", choices=["bfloat16"], help="mixed precision")
    parser.add_argument(
        "--json", nargs="?", const=RESULTS, type=Path, help="file or directory; default: results/cost-NAME-DEVICE.json"
    )
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--write", nargs="+", type=Path, default=[], metavar="FILE", help="put the tables in there")
    args = parser.parse_args(arguments)
    if not (args.models or args.write):
        parser.error("name a model, or a file to --write the tables into")
    settings = Settings(args.rounds, args.warmup, args.seed, args.device, args.threads, args.autocast)
    transformers.logging.set_verbosity_error()
    for name in PRESETS if args.models == ["all"] else args.models:
        workload = PRESETS.get(name) or hub_workload(name, args.kind, 8, 128, args.image_size)
        sizes = {"batch": args.batch, "length": args.length, "image_size": args.image_size}
        workload = replace(workload, **{key: value for key, value in sizes.items() if value is not None})
        results = measure(workload, args.methods, settings)
        for method, reason in results["skipped"].items():
            log(f"{workload.name}: without {method}: {reason}")
        if args.json:
            path = args.json / f"cost-{workload.name}-{args.device}.json" if not args.json.suffix else args.json
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
        if args.table:
            print(f"\n{table(results)}\n")
    for file in args.write:
        log(f"{file}: {', '.join(write_tables(file))}")


if __name__ == "__main__":
    main()
