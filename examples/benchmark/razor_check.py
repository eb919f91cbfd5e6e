"""What sparsified activations change: scores with full fine-tuning and LoRA, and the time of a step.

    python examples/benchmark/razor_check.py                             # TREC and sign digits; stops and goes on
    python examples/benchmark/razor_check.py --steps 30                  # 30 rounds of steps, interleaved, no scores
    python examples/benchmark/razor_check.py --write docs/training.md    # both tables, between their markers

A run keeps a tenth, three tenths or all of what Linears keep for the backward, at the rate that `compare.jsonl` has
chosen for all. Lines go to `results/razor-check.jsonl`. Steps are those of a ViT (`cost.py`), dense, sparsified and with
gradient checkpointing by turns; their ratios to the dense step of the same round go to `results/razor-steps.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import torch
from activations import adapted
from cost import Settings as CostSettings
from cost import machine
from methods import title
from resumable import (
    FOLDER,
    Job,
    caption,
    chosen,
    jobs,
    lines_of,
    markdown,
    parsed,
    parser,
    score,
    train,
    work,
    write_between,
)
from tasks import Prepared
from workloads import MIB, PRESETS

from peft_ext import activation_report, sparse_activations


METHODS = ("full", "lora")
KEEPS = {"dense": 1.0, "keep 0.3": 0.3, "keep 0.1": 0.1}
WAYS: dict[str, dict[str, Any] | None] = {  # of a step; `None` is gradient checkpointing
    "dense": {"keep": 1.0},
    "keep 0.1": {"keep": 0.1},
    "keep 0.1, sampled threshold": {"keep": 0.1, "exact": False},
    "gradient checkpointing": None,
}
STEPS = FOLDER / "razor-steps.json"


def run(job: Job, args: argparse.Namespace, made: Prepared) -> dict[str, Any]:
    def around(model: Any) -> AbstractContextManager[Any]:
        keep = KEEPS[job.variant]
        return nullcontext() if keep == 1 else sparse_activations(model, keep)

    return train(job, args, made, around=around).row


def measure_steps(preset: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of a step of each way, one of each in every round, and what it keeps for the backward."""
    torch.manual_seed(0)
    workload = PRESETS[preset]
    base = workload.build()
    batch = workload.inputs(base.config)
    turns = {}
    for method in ("full fine-tuning", "LoRA r=8"):
        model: Any = adapted(base, method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
        turns |= {(method, way): (model, optimizer) for way in WAYS}
    rows = {turn: {"method": turn[0], "way": turn[1], "seconds": []} for turn in turns}
    for number in range(rounds + 1):
        for (method, way), (model, optimizer) in turns.items():
            fields = WAYS[way]
            model.gradient_checkpointing_enable() if fields is None else model.gradient_checkpointing_disable()
            start = time.perf_counter()
            with nullcontext() if fields is None else sparse_activations(model, **fields):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            if number:  # the first is for warming up
                rows[method, way]["seconds"].append(seconds)
                continue
            with nullcontext() if fields is None else sparse_activations(model, **fields):
                rows[method, way]["bytes"] = activation_report(model, batch).bytes
    return {
        "preset": preset,
        "about": f"{workload.about}, {workload.size}",
        "machine": machine(CostSettings(threads=threads)),
        "rows": list(rows.values()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores on test, and their differences from dense with the same seeds."""
    cells = chosen(rows)
    lines = []
    for (task, settings, method, variant), seeds in cells.items():
        dense = cells.get((task, settings, method, "dense"), {})
        common = sorted(seeds.keys() & dense.keys())
        if not common:
            continue
        differences = [seeds[seed]["test"] - dense[seed]["test"] for seed in common]
        change = "" if variant == "dense" else f"{statistics.mean(differences):+.3f}"
        values = score([seeds[seed]["test"] for seed in common])
        lines.append((task, title(method), variant, str(len(common)), values, change))
    lines.sort(key=lambda line: (line[0], line[1], list(KEEPS).index(line[2])))
    head = ("task", "method", "kept", "seeds", "test", "minus dense, same seeds")
    return f"{markdown(head, lines, 3)}\n\n{caption(rows)}"


def steps_table(results: dict[str, Any]) -> str:
    """Median and quartiles of the ratios to the dense step of the same round."""
    dense = {row["method"]: row for row in results["rows"] if row["way"] == "dense"}
    lines = []
    for row in results["rows"]:
        pairs = zip(row["seconds"], dense[row["method"]]["seconds"], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        ratio = "" if row["way"] == "dense" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append((row["method"], row["way"], f"{row['bytes'] / MIB:.1f}", ratio))
    head = ("method", "way", "kept for the backward, MiB", "step over dense (quartiles)")
    rounds = len(results["rows"][0]["seconds"])
    return (
        f"{markdown(head, lines, 2)}\n\n{results['about']}; {rounds} rounds on {results['machine']['threads']} thread."
    )


def main() -> None:
    made = parser(__doc__, ("trec", "signdigits"))
    made.add_argument("--methods", nargs="+", default=METHODS)
    made.add_argument("--variants", nargs="+", default=KEEPS, choices=KEEPS, metavar="KEEP")
    made.add_argument("--steps", type=int, metavar="ROUNDS", help="time steps, and train nothing")
    made.add_argument("--preset", default="vit-6x384", choices=PRESETS, help="of the steps")
    args = parsed(made, "razor-check.jsonl")
    args.plain = dict.fromkeys(args.methods, "dense")
    if args.steps:
        STEPS.write_text(json.dumps(measure_steps(args.preset, args.steps, args.threads), indent=1) + "\n")
        print(steps_table(json.loads(STEPS.read_text())))
    else:
        work(args, jobs(args, [(method, keep) for method in args.methods for keep in args.variants]), run)
    if args.write:
        tables = {"razor": table(rows)} if (rows := lines_of(args)) else {}
        if STEPS.exists():
            tables["razor-steps"] = steps_table(json.loads(STEPS.read_text()))
        write_between(args.write, tables)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
