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
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    PreTrainedModel,
)

import peft_ext
from peft_ext.core import about_of
from peft_ext.training.toys import kept_for_backward


sys.path.insert(0, str(Path(__file__).resolve().parent))
from cost_methods import FROZEN, LORA, METHODS, adapt, head_name
from cost_tables import RESULTS, table, write_tables
from workloads import PRESETS, Workload, hub_workload


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
