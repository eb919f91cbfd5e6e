"""Where to start with a method: the learning rates that were best on validation data, beside LoRA's.

    python examples/benchmark/recipes.py                          # prints the table
    python examples/benchmark/recipes.py --write docs/recipes.md  # puts the tables between their markers

It reads what `compare.py` has run (`results/compare.jsonl`): the rate with the first seed that was best on the
validation split, at LoRA r=8's budget or the method's own size. Test scores are not looked at. A rate at the end of
what was tried is marked: the best may lie beyond.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from chosen_runs import RESULTS, is_open, load_results, tried
from compare_tables import names_of
from methods import LORA, METHODS, title
from resumable import markdown, write_between
from tasks import find_task


MODELS = {  # by the model of the task
    "minilm": "MiniLM, text",
    "models/vit-tiny-imagenet32": "small ViT",
    "dinov2-small": "DINOv2-S",
    "smollm2": "SmolLM2-135M",
}

VARIANTS = (  # what differs, and the methods of the comparison that differ in it
    ("a support at random; of the largest scores", ("random", "sensitivity")),
    ("a budget by sensitivity; by chance", ("spt", "spt-random")),
    ("moves every 20 steps; every 100", ("spiel-ag", "spiel-ag-100")),
    ("the first move replaces all; a fifth", ("spiel-ag", "spiel-ag-cosine")),
    ("the second layers; all kinds of module", ("s2ft", "s2ft-everywhere")),
    ("from the first step; from the weights", ("lora-sb", "lora-xs")),
    ("prompts at random; from class tokens", ("vpt", "vpt-class-tokens")),
    ("behind the attention; the feed-forward part", ("sct", "sct-mlp")),
    ("32 bits; one", ("adapter", "bi-adaptformer")),
)


def rates(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, tuple[float, bool]]]:
    """By model and method, and by task: the best rate on validation, and whether nothing beyond it was tried.

    Where one rate alone was run, it counts only if the method has no task on this model with several.
    """
    tasks: dict[tuple[str, str], dict[str, dict[float, Any]]] = {}
    for task, method, settings in dict.fromkeys((row["task"], row["method"], row["settings"]) for row in rows):
        runs = tried(rows, task, method, 1.0, settings)
        if runs and method in METHODS and (model := find_task(task).model) in MODELS:
            tasks.setdefault((model, method), {})[f"{task}, {settings}"] = runs
    found = {}
    for key, own in tasks.items():
        chosen = {task: runs for task, runs in own.items() if len(runs) > 1} or own
        found[key] = {task: (next(iter(runs)), is_open(runs)) for task, runs in chosen.items()}
    return found


def cell(own: dict[str, tuple[float, bool]], lora: dict[str, tuple[float, bool]]) -> str:
    """The rates from the smallest to the largest, and in brackets their ratio to LoRA's on the same tasks."""
    values = sorted({rate for rate, _ in own.values()})
    text = " to ".join(f"{rate:g}" for rate in dict.fromkeys((values[0], values[-1])))
    ratios = [rate / lora[task][0] for task, (rate, _) in own.items() if task in lora]
    text += " *" if any(is_end for _, is_end in own.values()) else ""
    return f"{text} ({geometric_mean(ratios):.2g})" if ratios else text


def table(rows: Sequence[dict[str, Any]], methods: Iterable[str] = METHODS) -> str:
    found = rates(rows)
    models = [model for model in MODELS if any(key[0] == model for key in found)]
    lines = []
    for method in methods:
        own = [found.get((model, method), {}) for model in models]
        if any(own):
            cells = [
                cell(one, found.get((model, LORA), {})) if one else "" for model, one in zip(models, own, strict=True)
            ]
            lines.append((title(method), *cells))
    return markdown(("method", *(MODELS[model] for model in models)), lines, 1)


def variants_table(rows: Sequence[dict[str, Any]]) -> str:
    """The best validation score of each of two variants with the first seed, on the tasks where both were run."""
    lines = []
    for text, methods in VARIANTS:
        runs = {
            (task, settings): [tried(rows, task, method, 1.0, settings) for method in methods]
            for task, settings in dict.fromkeys((row["task"], row["settings"]) for row in rows)
        }
        runs = {key: found for key, found in runs.items() if all(len(one) > 1 for one in found)}  # more than one rate
        for (task, settings), name in names_of(list(runs)).items():
            scores = "; ".join(f"{next(iter(one.values()))['validation']:.3f}" for one in runs[task, settings])
            lines.append((title(methods[0]), text, f"{name}{' (loss)' * find_task(task).less_is_better}", scores))
    return markdown(("method", "variants", "task", "validation"), lines, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = load_results(RESULTS)
    made = {"rates": table(rows), "variants": variants_table(rows)}
    if options.write:
        write_between(options.write, made)
    else:
        print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
