"""Runs the examples, small enough for two CPU cores, and keeps the cards of what they saved in `model_cards/`.

    python examples/model_cards.py                        # what has no card yet
    python examples/model_cards.py quickstart --again

A card comes with `results.json`, which the example writes: all its numbers, the command, the machine, the versions.
Weights are not kept. Where an example saves more than one thing, each has its card.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import console

import peft_ext  # noqa: F401  (registers the methods)
from peft_ext.core import methods


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
OWN_EXAMPLE = ("SSF", "VQT", "SPARSE_FT", "SPT", "MASK_PRUNING")  # the other methods have the one for any method
ON_DIGITS = [name.lower() for name in methods() if name not in OWN_EXAMPLE]
# how each example is called, and where it saves what gets the card of that name
PLAN: dict[str, tuple[str, dict[str, str]]] = {
    "quickstart": ("", {"quickstart": "quickstart/SSF/adapter"}),
    "image_classification": ("", {"image_classification": "image_classification/SSF/adapter"}),
    "vqt_image_classification": ("--model digits", {"vqt_image_classification": "vqt/adapter-digits-5-9"}),
    "spt_image_classification": ("", {"spt_image_classification": "spt_image_classification/adapter"}),
    "lt_sft": (
        "",
        {
            "lt_sft_sentiment": "lt_sft/sentiment",
            "lt_sft_length": "lt_sft/length",
            "lt_sft_composed": "lt_sft/composed/sentiment-without-length",
        },
    ),
    "prune_text_classification": (
        "",
        {
            "prune_text_classification_adapter": "prune_text_classification/adapter",
            "prune_text_classification": "prune_text_classification/pruned",
        },
    ),
    "prune_image_classification": (
        "",
        {
            "prune_image_classification_adapter": "prune_image_classification/adapter",
            "prune_image_classification": "prune_image_classification/pruned",
        },
    ),
    "sft": ("--max-steps 24 --batch-size 4 --max-length 64 --held-out 32 --samples 2", {"sft": "sft/adapter"}),
    "sparse_sft": (
        "--max-steps 24 --batch-size 4 --max-length 64 --held-out 32",
        {"sparse_sft": "sparse_sft/adapter"},
    ),
    "spt_sft": (
        "--max-steps 24 --batch-size 4 --max-length 64 --held-out 32",
        {"spt_sft": "spt_sft/adapter"},
    ),
    "prune_sft": (
        "--max-steps 60 --batch-size 4 --max-length 64 --held-out 32",
        {"prune_sft_adapter": "prune_sft/adapter", "prune_sft": "prune_sft/pruned"},
    ),
    "trainer_text_classification": ("", {"trainer_text_classification": "trainer_text_classification/adapter"}),
    **{f"any_method {name}": ("", {name: f"any_method/{name}/adapter"}) for name in ON_DIGITS},
}


def run(example: str, again: bool) -> None:
    """Runs an example and copies its cards, unless they are there."""
    arguments, saved = PLAN[example]
    script, *positional = example.split()
    if not again and all((CARDS / name / "README.md").is_file() for name in saved):
        console.print(f"{example}: has its card")
        return
    for source in saved.values():  # a card of an earlier run would be merged with the new one
        shutil.rmtree(ROOT / "runs" / source, ignore_errors=True)
    command = [sys.executable, f"examples/{script}.py", *positional, *arguments.split()]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": search}, check=True)
    for name, source in saved.items():
        (CARDS / name).mkdir(parents=True, exist_ok=True)
        for file in ("README.md", "results.json"):
            shutil.copyfile(ROOT / "runs" / source / file, CARDS / name / file)
        console.print(f"[green]model_cards/{name}[/green]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", default=list(PLAN), help=f"default: {', '.join(PLAN)}")
    parser.add_argument("--again", action="store_true", help="also where the card is there")
    args = parser.parse_args()
    for example in args.examples:
        if example not in PLAN:
            parser.error(f"no plan for {example}; there are {', '.join(PLAN)}")
        run(example, args.again)


if __name__ == "__main__":
    main()
