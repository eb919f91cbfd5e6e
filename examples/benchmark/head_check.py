"""What a fitted head changes: five methods from a fresh head and from one that `peft_ext.linear_probe` has fitted.

    python examples/benchmark/head_check.py                              # TREC and sign digits; stops and goes on
    python examples/benchmark/head_check.py --write docs/linear_probe.md # the table, between its markers

The probe comes before any calibration, so that methods which look at gradients first look at those of a fitted head.
Both variants have the rate that `compare.jsonl` has chosen with a fresh head. Lines go to `results/head-check.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
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
        probe = peft_ext.linear_probe(model, batches, seed=job.seed)
        return {"probe": {"C": probe.C, "held_out": probe.score, "seconds": round(time.perf_counter() - start, 1)}}

    return train(job, args, made, before).row


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
        lines.append((task, title(method), str(len(common)), score(pair[0]), score(pair[1]), f"{change:+.3f}", probe))
    head = ("task", "method", "seeds", "fresh head", "fitted head", "difference", "the probe alone, held out")
    return f"{markdown(head, lines, 2)}\n\n{caption(rows)}"


def main() -> None:
    made = parser(__doc__, ("trec", "signdigits"))
    made.add_argument("--methods", nargs="+", default=METHODS)
    args = parsed(made, "head-check.jsonl")
    args.plain = dict.fromkeys(args.methods, FRESH)
    work(args, jobs(args, [(method, head) for method in args.methods for head in (FRESH, FITTED)]), run)
    if args.write:
        write_between(args.write, {"heads": table(lines_of(args))})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
