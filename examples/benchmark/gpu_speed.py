"""What only a GPU can show: routes of the sparse gradient, models that were cut, compiled steps, 4-bit bases, waits.

    python examples/benchmark/gpu_speed.py routes --device cuda      # results/gpu/speed-routes.json
    python examples/benchmark/gpu_speed.py cut compiled four-bit waits operations
    python examples/benchmark/gpu_speed.py routes --device cpu --quick      # tries it; nothing is kept
    python examples/benchmark/gpu_speed.py --write docs/gpu.md       # the tables, between their markers

- **routes**: milliseconds for the gradient of k values of a weight, by the dense product of which k entries are read,
  and by a sampled product; and for the product with the sparse delta, dense or in CSR. Median of rounds in turns.
- **cut**: a quarter of the channels and heads of each layer is cut; latency of the smaller model over that of the whole
  one, beside the ratio of their FLOPs.
- **compiled**: a training step under `torch.compile`, over the same step without, and over LoRA's compiled one.
- **four-bit**: a training step on a base in bitsandbytes' NF4, and its peak of memory, beside LoRA's.
- **waits**: how often the host waits for the GPU in one training step, as `torch.cuda.set_sync_debug_mode` sees it.
- **operations**: how many operations, views aside, a training step of each method starts, which is what a small model on
  a large GPU costs; counted on the CPU too, SSF as it works on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cost
import torch
from cost_methods import FROZEN, LORA, METHODS
from cost_tables import paired, spread, write_tables
from prune_cost import quarter_cut
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workloads import MIB, PRESETS, Workload

from peft_ext.export import report
from peft_ext.sparse import LinearOperation, csr, random_indices
from peft_ext.tuners.ssf import functional as ssf_functional


RESULTS = Path(__file__).parent / "results" / "gpu"
COMPILED = [LORA, "SSF", "S2FT", "WeGeFT"]
FOUR_BIT = [LORA, "SSF", "SpIEL-AG", "S2FT", "WeGeFT", "SPT, at random", "mask-pruning LoRA r=8"]
SHAPES = [(1024, 1024), (4096, 4096)]  # of weights
DENSITIES = [0.001, 0.01]
ROWS = [64, 512, 4096]  # of inputs
WAYS = ["gradient, dense", "gradient, sampled", "product, dense", "product, CSR"]


def in_turns(calls: dict[str, Callable[[], Any]], device: str, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, one for each round, in an order shuffled anew."""
    order, rng = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        rng.shuffle(order)
        for name in order:
            clock = cost.Clock(device)
            calls[name]()
            clock.lap("call")
            if number >= warmup:
                seconds[name].append(clock.laps["call"])
    return seconds


# The parts


def ways(shape: tuple[int, int], density: float, rows: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """The products of one layer whose weight has a sparse delta of `density`, each in two ways."""
    operation = LinearOperation(shape)
    k = round(density * operation.n)
    indices = random_indices(operation.n, k, torch.Generator().manual_seed(0)).to(device)
    values = torch.randn(k, device=device)
    pattern = csr(indices, torch.zeros(k, device=device), shape)
    x, grad = (torch.randn(rows, size, device=device) for size in reversed(shape))
    calls = [
        lambda: (grad.T @ x).reshape(-1).index_select(0, indices),
        lambda: torch.sparse.sampled_addmm(pattern, grad.T, x, beta=0.0).values(),
        lambda: x @ operation.dense(values, indices, x.dtype).T,
        lambda: (csr(indices, values, shape) @ x.T).T,
    ]
    return dict(zip(WAYS, calls, strict=True))


def routes(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each shape, density and number of rows."""
    found = []
    for shape, density, rows in itertools.product(SHAPES, DENSITIES, ROWS):
        if quick and (shape, rows) != (SHAPES[0], ROWS[0]):
            continue
        seconds = in_turns(ways(shape, density, rows, device), device, 2 if quick else 30)
        milliseconds = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
        found.append({"shape": shape, "density": density, "rows": rows, "milliseconds": milliseconds})
    return found


def cuts(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each model and batch."""
    found = []
    for name, dtype in [("vit-b16", torch.float16), ("bert-base", torch.float16), ("llama-1b", torch.bfloat16)]:
        if quick and name == "llama-1b":
            continue
        workload = PRESETS[name]
        torch.manual_seed(0)
        with torch.device(device):
            model = workload.build().to(dtype).eval()
        smaller = quarter_cut(model, 0.25, 1)
        inputs = {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in workload.inputs(model.config).items()
        }
        with torch.no_grad():
            figures = report(
                model, smaller, inputs, batch_sizes=[1] if quick else [1, 32], seconds=0.2 if quick else 0.8, rounds=4
            )
        for run in figures["runs"]:
            flops, latency = (run[key]["after"] / run[key]["before"] for key in ("flops", "seconds"))
            found.append(
                {
                    "model": workload.about,
                    "batch": run["batch_size"],
                    "flops_ratio": flops,
                    "time_ratio": latency,
                    **run,
                }
            )
    return found


def compiled(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each method. Compiling takes up to a minute for each."""
    workload = replace(PRESETS["vit-6x384"], batch=1 if quick else 32)
    settings = cost.Settings(device=device, autocast="bfloat16")
    base, inputs = built(workload, device)
    found = []
    for method in COMPILED[:2] if quick else COMPILED:
        plain, fast = (cost.Job(method, base, inputs, workload, settings, share=False) for _ in range(2))
        fast.model.compile(backend="aot_eager" if device == "cpu" else "inductor")
        start = time.perf_counter()
        for _ in range(3):
            fast.step()
        compiling = time.perf_counter() - start
        seconds = in_turns({"plain": plain.step, "compiled": fast.step}, device, 2 if quick else 20)
        found.append(
            {
                "model": workload.about,
                "method": method,
                "compiling_seconds": compiling,
                "milliseconds": {key: 1000 * statistics.median(times) for key, times in seconds.items()},
                "compiled_over_plain": paired(seconds["compiled"], seconds["plain"]),
            }
        )
        print(found[-1], flush=True)
        del plain, fast
        torch._dynamo.reset()
        gc.collect()
    return found


def four_bit(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each method."""
    preset = "smollm2-135m" if quick else "llama-1b"
    workload = replace(PRESETS[preset], batch=1, length=16 if quick else 256)
    settings = cost.Settings(device=device, autocast="bfloat16")
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        with torch.device(device):
            workload.build().to(torch.bfloat16).save_pretrained(directory)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        base = AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=config, device_map={"": device}, dtype=torch.bfloat16
        )
    base.config.use_cache = False
    inputs = {key: value.to(device) for key, value in workload.inputs(base.config).items()}
    jobs: dict[str, cost.Job] = {}
    found: dict[str, dict[str, Any]] = {}
    for method in FOUR_BIT[:2] if quick else FOUR_BIT:
        try:
            jobs[method] = cost.Job(method, base.train(), inputs, workload, settings, share=False)
        except ValueError as error:
            found[method] = {"method": method, "refused": str(error)}
            continue
        found[method] = {"method": method, "trained": jobs[method].counts()[0]}
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            found[method]["peak_mib_over_idle"] = (jobs[method].cuda_peak() - before) / MIB
    seconds = in_turns({name: job.step for name, job in jobs.items()}, device, 2 if quick else 20)
    for name in jobs:
        found[name]["milliseconds"] = 1000 * statistics.median(seconds[name])
        found[name]["over_lora"] = paired(seconds[name], seconds[LORA])
    return list(found.values())


def waits(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each method: what `set_sync_debug_mode` warns of in the fourth step."""
    workload = replace(PRESETS["vit-b16"], batch=1)
    settings = cost.Settings(device=device)
    methods = [FROZEN, LORA, "SSF"] if quick else [name for name in METHODS if "VPT, 50" not in name]
    found = []
    for method, job in warm_jobs(methods, workload, settings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            job.loss().backward()
            if job.optimizer is not None:
                job.optimizer.step()
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
        found.append({"method": method, "waits": len(places), "places": sorted(set(places))})
    return found


class Operations(TorchDispatchMode):
    """Counts what is dispatched to the device, apart from views and memory that is not filled."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        name = function.overloadpacket.__name__
        self.count += not (is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach")))
        return function(*args, **(kwargs or {}))


@patch.object(ssf_functional, "watches_sparingly", lambda output: True)
def operations(device: str, quick: bool) -> list[dict[str, Any]]:
    """One entry for each method: operations of the forward, of the backward and of both over LoRA's."""
    workload = replace(PRESETS["vit-6x384" if quick else "vit-b16"], batch=1)
    settings = cost.Settings(device=device, autocast="bfloat16")
    methods = COMPILED if quick else [name for name in METHODS if name not in ("SHiRA r=8", "AdaLoRA")]
    found: list[dict[str, Any]] = []
    for method, job in warm_jobs(methods, workload, settings):
        with Operations() as forward:
            loss = job.loss()
        with Operations() as backward:
            loss.backward()
        found.append({"method": method, "forward": forward.count, "backward": backward.count})
    lora = next(row for row in found if row["method"] == LORA)
    for row in found:
        row["over_lora"] = (row["forward"] + row["backward"]) / (lora["forward"] + lora["backward"])
    return found


def warm_jobs(methods: Iterable[str], workload: Workload, settings: cost.Settings) -> Iterator[tuple[str, cost.Job]]:
    """Each method that applies to the model, after three steps, one after the other."""
    base, inputs = built(workload, settings.device)
    for method in methods:
        try:
            job = cost.Job(method, base, inputs, workload, settings, share=True)
        except ValueError:
            continue
        for _ in range(3):
            job.step()
        yield method, job
        gc.collect()


def built(workload: Workload, device: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model in training mode, and a batch, both on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        base = workload.build().train()
    return base, {key: value.to(device) for key, value in workload.inputs(base.config).items()}


PARTS: dict[str, Callable[[str, bool], list[dict[str, Any]]]] = {
    "routes": routes,
    "cut": cuts,
    "compiled": compiled,
    "four-bit": four_bit,
    "waits": waits,
    "operations": operations,
}


# The tables


def lines_of(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of one part."""
    head, line = {
        "routes": (
            ["weight", "density", "rows", *(f"{name}, ms" for name in WAYS)],
            lambda row: [
                " x ".join(map(str, row["shape"])),
                f"{row['density']:.1%}",
                row["rows"],
                *(f"{row['milliseconds'][name]:.3f}" for name in WAYS),
            ],
        ),
        "cut": (
            ["model", "batch", "FLOPs", "time", "ms before", "ms after"],
            lambda row: [
                *(row["model"], row["batch"], f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}"),
                *(f"{1000 * row['seconds'][key]:.2f}" for key in ("before", "after")),
            ],
        ),
        "compiled": (
            ["model", "method", "ms", "ms compiled", "compiled over plain (quartiles)"],
            lambda row: [
                *(row["model"], row["method"]),
                *(f"{row['milliseconds'][key]:.1f}" for key in ("plain", "compiled")),
                spread(row["compiled_over_plain"]),
            ],
        ),
        "four-bit": (
            ["method", "trained", "ms", "step over LoRA's (quartiles)", "peak of a step, MiB"],
            lambda row: [
                *(
                    row["method"],
                    f"{row['trained']:,}",
                    f"{row['milliseconds']:.1f}",
                    spread(row["over_lora"]),
                ),
                f"{row['peak_mib_over_idle']:,.0f}" if "peak_mib_over_idle" in row else "",
            ],
        ),
        "waits": (
            ["method", "waits in a step", "where"],
            lambda row: [row["method"], row["waits"], ", ".join(row["places"])],
        ),
        "operations": (
            ["method", "forward", "backward", "both over LoRA's"],
            lambda row: [row["method"], row["forward"], row["backward"], f"{row['over_lora']:.2f}"],
        ),
    }[part]
    refused = [f"| {row['method']} | refused: {row['refused']} |" for row in rows if "refused" in row]
    cells = [[str(cell) for cell in line(row)] for row in rows if "refused" not in row]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)] + refused


def write(file: Path) -> None:
    """Between `<!-- gpu:PART -->` and `<!-- /gpu:PART -->`; and the tables of `cost.py` from here."""
    write_tables(file, RESULTS)
    text = file.read_text()
    for part in PARTS:
        results = RESULTS / f"speed-{part}.json"
        if results.exists():
            kept = json.loads(results.read_text())
            where = f"{kept['gpu'].upper() if kept['gpu'] == 'cpu' else kept['gpu']}, torch {kept['torch']}."
            body = "\n".join([where, "", *lines_of(part, kept["rows"])])
            pattern = rf"(<!-- gpu:{part} -->)\n.*?(<!-- /gpu:{part} -->)"
            text = re.sub(pattern, lambda match, body=body: f"{match[1]}\n{body}\n{match[2]}", text, flags=re.DOTALL)
    file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; nothing is kept")
    parser.add_argument("--write", type=Path, help="a file with markers for the tables")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for part in args.parts:
        rows = PARTS[part](args.device, args.quick)
        print("\n".join(lines_of(part, rows)), flush=True)
        if not args.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            kept = {"part": part, "gpu": gpu, "torch": torch.__version__, "rows": rows}
            (RESULTS / f"speed-{part}.json").write_text(json.dumps(kept, indent=1) + "\n")
    if args.write:
        write(args.write)


if __name__ == "__main__":
    main()
