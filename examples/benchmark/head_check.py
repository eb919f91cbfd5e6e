"""What a fitted head changes: five methods from a fresh head and from one that `peft_ext.linear_probe` has fitted.

    python examples/benchmark/head_check.py                              # TREC and sign digits; stops and goes on
    python examples/benchmark/head_check.py --write docs/linear_probe.md # the table, between its markers

The probe comes before any calibration, so that methods which look at gradients first look at those of a fitted head.
With a fresh head the rate is what `compare.jsonl` has chosen; with a fitted one that or a third of it, by the validation
split with the first seed. Lines go to `results/head-check.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import torch
from methods import title
from resumable import Job, caption, chosen, jobs, lines_of, markdown, parsed, parser, score, train, work, write_between
from tasks import Prepared
from torch.utils.data import DataLoader

import peft_ext


FRESH, FITTED = "fresh head", "fitted head"
METHODS = ("lora", "ssf", "spt", "spiel-ag", "mask-25")


def run(job: Job, args: argparse.Namespace, made: Prepared) -> dict[str, Any]:
    def before(model: Any) -> dict[str, Any]:
        if job.variant == FRESH:
            return {}
        start = time.perf_counter()
        batches = DataLoader(made.data["train"], batch_size=32, collate_fn=made.collate)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):  # the adapter starts as from a fresh head
            probe = peft_ext.linear_probe(model, batches, seed=job.seed)
        return {"probe": {"C": probe.C, "held_out": probe.score, "seconds": round(time.perf_counter() - start, 1)}}

    return train(job, args, made, before).row


def todo(args: argparse.Namespace) -> Iterator[Job]:
    """Fresh heads at the known rate, then fitted ones, with the first seed at two rates."""
    for task, method in product(args.tasks, args.methods):
        one = argparse.Namespace(**vars(args) | {"tasks": [task]})
        fresh = jobs(one, [(method, FRESH)])  # each asks for its rate when the one before is done
        first = next(fresh)
        yield first
        yield from fresh
        one.rates = args.rates or [first.learning_rate, float(f"{first.learning_rate / 3:.2g}")]
        yield from jobs(one, [(method, FITTED)])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores on test from both heads, and the difference with the same seeds."""
    cells = chosen(rows)
    lines = []
    for (task, settings, method, variant), fresh in cells.items():
        fitted = cells.get((task, settings, method, FITTED), {})
        common = sorted(fresh.keys() & fitted.keys())
        if variant != FRESH or not common:
            continue
        pair = [[row[seed]["test"] for seed in common] for row in (fresh, fitted)]
        probe = score([fitted[seed]["probe"]["held_out"] for seed in common])
        change = sum(b - a for a, b in zip(*pair, strict=True)) / len(common)
        rates = [f"{next(iter(row.values()))['learning_rate']:g}" for row in (fresh, fitted)]
        scores = [f"{score(values)} at {rate}" for values, rate in zip(pair, rates, strict=True)]
        lines.append((task, title(method), str(len(common)), *scores, f"{change:+.3f}", probe))
    lines.sort()
    head = (
        "task",
        "method",
        "seeds",
        "fresh head, at rate",
        "fitted head, at rate",
        "difference",
        "the probe alone, held out",
    )
    return f"{markdown(head, lines, 2)}\n\n{caption(rows)}"


def main() -> None:
    made = parser(__doc__, ("trec", "signdigits"))
    made.add_argument("--methods", nargs="+", default=METHODS)
    args = parsed(made, "head-check.jsonl")
    args.plain = dict.fromkeys(args.methods, FRESH)
    work(args, todo(args), run)
    if args.write:
        write_between(args.write, {"heads": table(lines_of(args))})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
