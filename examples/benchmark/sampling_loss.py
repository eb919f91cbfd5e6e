"""What layer sampling learns: LISA and half fine-tuning beside LoRA and full fine-tuning at equal steps, on gsm8k text.

    python examples/benchmark/sampling_loss.py                           # stops and goes on
    python examples/benchmark/sampling_loss.py --write docs/training.md  # the table, between its markers

48 steps of SmolLM2-135M, the loss of the answers. Layers are drawn anew twelve times. The rate of each way is the best
of `--rates` by the validation loss with the first seed. Lines go to `results/sampling-loss.jsonl`; what `compare.jsonl`
has already of LoRA is taken from there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from compare import steps_of
from resumable import (
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
from torch import nn

import peft_ext


DRAWS = 12  # in a training
LORA, FULL = "LoRA r=8", "full fine-tuning"
SAMPLED: dict[str, dict[str, Any]] = {
    "LISA, 2 blocks": {"blocks": 2},
    "LISA, 2 blocks, embeddings and head frozen": {"blocks": 2, "always": ("norm",)},
    "HFT, half of the matrices": {"unit": "matrix", "share": 0.5},
}
WAYS = (LORA, FULL, *SAMPLED)


def run(job: Job, args: argparse.Namespace, made: Prepared) -> dict[str, Any]:
    def around(model: nn.Module) -> AbstractContextManager[Any]:
        if job.variant not in SAMPLED:
            return nullcontext()
        every = max(1, steps_of(args, made) // DRAWS)
        return closing(peft_ext.layer_sampling(model, every=every, seed=job.seed, **SAMPLED[job.variant]))

    return train(job, args, made, around=around).row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Losses on test."""
    lines = [
        (variant, f"{next(iter(seeds.values()))['learning_rate']:g}", str(len(seeds)), score([r["test"] for r in seeds.values()]))
        for (_, _, _, variant), seeds in sorted(chosen(rows).items(), key=lambda cell: WAYS.index(cell[0][3]))
    ]  # fmt: skip
    return f"{markdown(('way', 'learning rate', 'seeds', 'loss on test'), lines, 1)}\n\n{caption(rows)}"


def main() -> None:
    made = parser(__doc__, ("gsm8k",))
    made.add_argument("--variants", nargs="+", default=WAYS[1:], choices=WAYS, metavar="WAY")
    made.set_defaults(rates=[1e-4, 3e-4], plain={"lora": LORA, "full": FULL})
    args = parsed(made, "sampling-loss.jsonl")
    work(args, jobs(args, [("lora" if way == LORA else "full", way) for way in args.variants]), run)
    if args.write:
        write_between(args.write, {"sampling": table(lines_of(args))})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
