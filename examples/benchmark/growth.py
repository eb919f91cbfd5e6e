"""How the cost of a step grows with width, depth, modules and budget, beside LoRA's.

    python examples/benchmark/growth.py --threads 2                     # what is in the results is not run again
    python examples/benchmark/growth.py --sweeps width --methods lora ssf
    python examples/benchmark/growth.py --write docs/results.md --output docs/figures

A point is a Llama of random weights; all methods take turns in one run, and a ratio compares two steps of the same
round. Three sweeps change one thing each, the fourth goes from a tiny model to 1B parameters (bf16). The budget is
counted in LoRA ranks: all that can choose have that of LoRA with this rank on the adapted modules. Lines go to
`results/growth.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from chosen_runs import load_results
from configs import Setting
from cost import Settings, copy_model, machine
from methods import CONFIGS, LORA, title
from resumable import FOLDER, markdown, write_between


RESULTS = FOLDER / "growth.jsonl"
ATTENTION = ("q_proj", "v_proj")
METHODS = ("lora", "ssf", "random", "spiel-ag", "spt-random", "mask-25", "s2ft", "wegeft", "bi-lora", "adapter",
           "lora-xs", "snell", "pasta")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A model and a budget."""

    width: int = 512
    depth: int = 4
    rank: int = 8
    modules: str = "all Linears"
    dtype: str = "float32"
    tokens: int = 128


MIDDLE = Point()
SWEEPS: dict[str, list[Point]] = {
    "width": [replace(MIDDLE, width=width) for width in (128, 256, 512, 1024, 2048)],
    "depth": [replace(MIDDLE, depth=depth) for depth in (1, 2, 4, 8, 16)],
    "rank": [replace(MIDDLE, rank=rank) for rank in (1, 4, 8, 16, 64)],
    "modules": [replace(MIDDLE, modules=modules) for modules in ("queries and values", "all Linears")],
    "size": [
        Point(128, 2, dtype="bfloat16"),
        Point(512, 8, dtype="bfloat16"),
        Point(1024, 16, dtype="bfloat16"),
        Point(2048, 16, dtype="bfloat16"),  # 1B
    ],
}


def built(point: Point) -> nn.Module:
    config = LlamaConfig(
        vocab_size=128256 if point.width == 2048 and point.depth == 16 else 4096,
        hidden_size=point.width,
        intermediate_size=4 * point.width,
        num_hidden_layers=point.depth,
        num_attention_heads=max(2, point.width // 64),
        num_key_value_heads=max(1, point.width // 256),
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, point.dtype))


class Targeted(Setting):
    """A setting that adapts a part of the Linear modules."""

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {name: linear for name, linear in super().linears.items() if name.endswith(ATTENTION)}


def stepper(model: Any, tokens: torch.Tensor) -> Any:
    """A function that makes a training step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def measure(point: Point, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of each round by method, and what is trained; of a method that does not apply, why."""
    torch.manual_seed(0)
    base = built(point)
    tokens = torch.randint(1, 4000, (1, point.tokens))
    steps, trained, skipped = {}, {}, {}
    for method in methods:
        model = copy_model(base, share=True)
        kind = Setting if point.modules == "all Linears" else Targeted
        try:
            adapted = get_peft_model(model, CONFIGS[method](kind(model, "CAUSAL_LM", point.rank / 8, 10**6, 0)))  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError) as error:  # KeyError: a method looks for modules that are not adapted
            skipped[method] = f"{type(error).__name__}: {error}"[:200]
            continue
        adapted.train()
        trained[method] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        steps[method] = stepper(adapted, tokens)
    found: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(rounds + 1):
        for method, step in steps.items():
            seconds = step()
            if number:  # the first warms up
                found[method].append(seconds)
    return {
        "point": asdict(point),
        "parameters": sum(p.numel() for p in base.parameters()),
        "seconds": found,
        "trained": trained,
        "skipped": skipped,
    }


def ratio(row: dict[str, Any], method: str) -> float | None:
    """The median over the rounds of the ratio to LoRA's step."""
    own, lora = row["seconds"].get(method), row["seconds"]["lora"]
    return statistics.median(a / b for a, b in zip(own, lora, strict=True)) if own else None


def axis(sweep: str, row: dict[str, Any]) -> Any:
    return row["parameters"] if sweep == "size" else row["point"][sweep]


def table(sweep: str, rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """Ratios to LoRA's step of the same round, a column for each point."""
    names = [f"{row['parameters'] / 1e6:,.0f} M" if sweep == "size" else str(axis(sweep, row)) for row in rows]
    lines = []
    for method in methods:
        cells = [ratio(row, method) for row in rows]
        lines.append((title(method), *("" if cell is None else f"{cell:.2f}" for cell in cells)))
    lora = [f"{1000 * statistics.median(row['seconds']['lora']):,.0f}" for row in rows]
    return markdown((f"step / LoRA's, by {sweep}", *names), [*lines, ("LoRA's step, ms", *lora)], 1)


def draw(found: dict[str, list[dict[str, Any]]], methods: Sequence[str], folder: Path) -> None:
    """Ratios over width, depth, rank and size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [sweep for sweep in ("width", "depth", "rank", "size") if sweep in found]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 4.4), sharey=True, layout="constrained")
    for panel, sweep in zip([panels] if len(shown) == 1 else panels, shown, strict=True):
        for number, method in enumerate(methods):
            pairs = [(axis(sweep, row), ratio(row, method)) for row in found[sweep]]
            known = [(x, y) for x, y in pairs if y is not None]
            if known:
                marker, color = "osv^D*"[number % 6], pyplot.get_cmap("tab20")(number)
                panel.plot(*zip(*known, strict=True), marker=marker, label=title(method), color=color)
        panel.set(xscale="log", yscale="log", xlabel="parameters" if sweep == "size" else sweep)
        if sweep != "size":
            places = [axis(sweep, row) for row in found[sweep]]
            panel.set_xticks(places, [str(place) for place in places])
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("time of a step, in multiples of LoRA's")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "growth.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS, metavar="SWEEP")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables between their markers; runs nothing"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the figure goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if not options.write:
        methods = tuple(dict.fromkeys([LORA, *options.methods]))
        for sweep in options.sweeps:
            for point in SWEEPS[sweep]:
                if any(row["point"] == asdict(point) for row in load_results(options.results)):
                    continue
                row = measure(point, methods, options.rounds) | {"machine": machine(Settings(threads=options.threads))}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(sweep, point, {method: round(ratio(row, method) or 0, 2) for method in methods}, flush=True)
    rows = {json.dumps(row["point"], sort_keys=True): row for row in load_results(options.results)}
    keys = {sweep: [json.dumps(asdict(point), sort_keys=True) for point in points] for sweep, points in SWEEPS.items()}
    found = {sweep: [rows[key] for key in own if key in rows] for sweep, own in keys.items()}
    found = {sweep: own for sweep, own in found.items() if own}
    if options.write:
        write_between(options.write, {f"growth-{sweep}": table(sweep, own, METHODS) for sweep, own in found.items()})
    if options.output:
        draw(found, METHODS, options.output)


if __name__ == "__main__":
    main()
