"""What sparse fine-tuning costs beside LoRA, SHiRA and Super-Tuning at equal numbers of trained parameters.

    python examples/benchmark/sparse_cost.py linear-8x1024 --json       # results/sparse-cost-linear-8x1024.json
    python examples/benchmark/sparse_cost.py smollm2-135m --rounds 4 --json
    python examples/benchmark/sparse_cost.py --write docs/sparse.md     # put the tables into a file

- **saved for backward**: bytes of the distinct storages that autograd keeps, without parameters and buffers.
- **step**: forward, backward, fused AdamW. The methods take turns in rounds of shuffled order, and a ratio compares
  two times of the same round, so that a slow minute of the machine touches all alike; the median is given, and the
  mean, to which the few steps that gather gradients or reselect count.
- **reselection**: most bytes alive during a step that gathers gradients or reselects, less those of another step.
- **file**: bytes of `adapter_model.safetensors` by weight, and of the tensors in it alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peft_ext import SparseFTConfig
from peft_ext.tuners.sparse_ft.deltas import deltas


sys.path.insert(0, str(Path(__file__).resolve().parent))
from workloads import PRESETS


RESULTS = Path(__file__).parent / "results"


def workload(name: str, length: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and a batch for it."""
    torch.manual_seed(0)
    if name == "linear-8x1024":
        return PRESETS[name].build(), {"x": torch.randn(64, 1024)}
    tokens = torch.randint(1000, 49152, (4, length))
    return PRESETS["smollm2-135m"].build(), {"input_ids": tokens, "labels": tokens}


def methods(budget: int, targeted: int) -> dict[str, Any]:
    """A config of each, of `budget` trained parameters where they can be chosen."""
    from peft import SupertuningConfig

    common: dict[str, Any] = {"target_modules": "all-linear"}
    spiel: dict[str, Any] = {**common, "num_tunable_weights": budget, "total_steps": 100_000}
    return {
        "LoRA r=8": LoraConfig(r=8, **common),
        "SHiRA r=8": ShiraConfig(r=8, random_seed=0, **common),
        "Super-Tuning": SupertuningConfig(sparsity=1 - budget / targeted, **common),
        "sparse, fixed": SparseFTConfig(selection="random", num_tunable_weights=budget, **common),
        "SpIEL-AG": SparseFTConfig(selection="spiel-ag", **spiel),
        "SpIEL-MA": SparseFTConfig(selection="spiel-ma", **spiel),
        "sparse, fixed, 1 %": SparseFTConfig(selection="random", num_tunable_weights=targeted // 100, **common),
    }


class Job:
    """A method on its copy of the model, whose frozen weights share the memory of the original."""

    def __init__(self, base: nn.Module, config: Any, inputs: dict[str, torch.Tensor]) -> None:
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in base.parameters()}
        self.model = get_peft_model(copy.deepcopy(base, memo), config).train()  # type: ignore[arg-type]
        self.inputs = inputs
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self) -> float:
        """One training step; returns its seconds."""
        start = time.perf_counter()
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        """Bytes that the backward keeps."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        own |= {leaf.indices().untyped_storage().data_ptr() for _, leaf in deltas(self.model, "default")}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            for part in [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]:
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.zero_grad()
        return sum(seen.values())


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that are made inside and still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_iter(args) if _is_plain(t)}
        for tensor in tree_iter(out):
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and id(storage) not in given:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def reselection_bytes(job: Job) -> dict[str, int]:
    """Most bytes alive in a plain step, in one that gathers, and in one that reselects (a later one)."""
    found: dict[str, int] = {}
    for step in range(1, 27):
        with Alive() as alive:
            job.step()
        name = {12: "plain", 20: "first of a phase", 25: "reselection"}.get(step)
        if name:
            found[name] = alive.peak
    return found


def bytes_per_weight(base: nn.Module, inputs: dict[str, torch.Tensor], targeted: int) -> list[dict[str, Any]]:
    """Bytes on disk at three densities of the targets, in fp32 and bf16."""
    rows = []
    for density in (0.01, 0.001, 0.0001):
        for dtype in ("float32", "bfloat16"):
            config = SparseFTConfig(
                selection="random",
                num_tunable_weights=int(density * targeted),
                target_modules="all-linear",
                save_dtype=dtype,
            )
            job = Job(base, config, inputs)
            with tempfile.TemporaryDirectory() as directory:
                job.model.save_pretrained(directory, save_embedding_layers=False)
                file = Path(directory, "adapter_model.safetensors")
                payload = sum(tensor.nbytes for tensor in load_file(file).values())
                size = file.stat().st_size
            rows.append({"density": density, "dtype": dtype, "weights": job.trained})
            rows[-1] |= {"payload_per_weight": payload / job.trained, "file_per_weight": size / job.trained}
    return rows


def table(result: dict[str, Any]) -> str:
    """The results of one workload in Markdown."""
    machine, methods = result["machine"], result["methods"]
    lines = [
        (
            f"{result['workload']}: {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
            f"{machine['rounds']} rounds in turns. Mean counts the steps that gather and reselect."
        ),
        "",
        "| method | trained | kept for the backward, MiB | step over LoRA's, median | mean |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in methods.items():
        lines.append(
            f"| {name} | {row['trained']:,} | {row['saved_bytes'] / 2**20:,.2f} | {row['step_over_lora']:.2f} | "
            f"{row['mean_step_over_lora']:.2f} |"
        )
    lines += ["", "| density of the targets | values | bytes a weight: tensors | file |", "|---|---|---:|---:|"]
    for size in result["files"]:
        lines.append(
            f"| {100 * size['density']:g} % | {size['dtype']} | {size['payload_per_weight']:.2f} | "
            f"{size['file_per_weight']:.2f} |"
        )
    largest = result["largest_gradient_bytes"]
    extra = {
        name: max(found[step] - found["plain"] for step in found) / largest
        for name, found in result["reselection_bytes"].items()
    }
    words = ", ".join(f"{name} {value:.2f}" for name, value in extra.items())
    return "\n".join([*lines, "", f"Extra memory of a reselection, in gradients of the largest layer: {words}."])


def write_tables(file: Path) -> None:
    """Puts the tables between `<!-- sparse-cost:WORKLOAD -->` and `<!-- /sparse-cost -->`."""

    def filled(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"sparse-cost-{match[2]}.json").read_text())
        return f"{match[1]}\n{table(result)}\n{match[3]}"

    pattern = r"(<!-- sparse-cost:(\S+) -->)\n.*?(<!-- /sparse-cost -->)"
    text, count = re.subn(pattern, filled, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not count:
        raise ValueError(f"{file} has no line `<!-- sparse-cost:WORKLOAD -->` followed by `<!-- /sparse-cost -->`")
    file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["linear-8x1024", "smollm2-135m"], nargs="?")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables of the results in there")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--length", type=int, default=128, help="tokens, of the language model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="write the results beside this program")
    parser.add_argument("--note", default="", help="on the circumstances; goes into the JSON")
    args = parser.parse_args()
    if args.write:
        write_tables(args.write)
    if not args.workload:
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    base, inputs = workload(args.workload, args.length)
    heads = ("lm_head", "embed_tokens")
    linears = [m for name, m in base.named_modules() if isinstance(m, nn.Linear) and name not in heads]
    targeted = sum(linear.weight.numel() for linear in linears)
    budget = sum(8 * (linear.in_features + linear.out_features) for linear in linears)
    jobs = {name: Job(base, config, inputs) for name, config in methods(budget, targeted).items()}
    rows: dict[str, dict[str, Any]] = {
        name: {"trained": job.trained, "saved_bytes": job.saved_bytes()} for name, job in jobs.items()
    }
    memory = {name: reselection_bytes(jobs[name]) for name in ("SpIEL-AG", "SpIEL-MA")}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    rng = random.Random(0)
    for number in range(args.rounds + 1):
        for name in rng.sample(list(jobs), len(jobs)):
            seconds = jobs[name].step()
            if number:
                times[name].append(seconds)
    for name, row in rows.items():
        row["step_ms"] = 1000 * median(times[name])
        row["step_over_lora"] = median(a / b for a, b in zip(times[name], times["LoRA r=8"], strict=True))
        row["mean_step_over_lora"] = sum(times[name]) / sum(times["LoRA r=8"])
    for name, row in rows.items():
        print(f"{name:20} {row['trained']:9,} {row['saved_bytes'] / 2**20:8.2f} MiB {row['step_ms']:8.1f} ms", end="")
        print(f" {row['step_over_lora']:6.2f} {row['mean_step_over_lora']:6.2f}")
    largest = max(linear.weight.numel() for linear in linears) * 4
    for name, found in memory.items():
        extra = {key: (found[key] - found["plain"]) / largest for key in ("first of a phase", "reselection")}
        print(name, {key: f"{value:.2f} of the largest layer's gradient" for key, value in extra.items()})
    sizes = bytes_per_weight(base, inputs, targeted)
    for size in sizes:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in size.items()})
    if args.json:
        machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
        machine |= {"threads": args.threads, "load_average": os.getloadavg()[0], "rounds": args.rounds}
        result = {"workload": args.workload, "machine": machine, "note": args.note, "methods": rows}
        result |= {"largest_gradient_bytes": largest, "reselection_bytes": memory, "files": sizes}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"sparse-cost-{args.workload}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
