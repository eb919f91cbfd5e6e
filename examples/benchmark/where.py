"""Where the largest gradients are: how the weights that a sensitivity pass finds are spread over layers and columns.

    python examples/benchmark/where.py trec signdigits --json     # into results/where.json

Of as many weights as LoRA r=8 trains, those with the largest scores (`peft_ext.calibrate`), for the models and data of
`compare.py`: the share in the first and in the last layer, and which share of a module's columns (its inputs) and rows
holds half of what is chosen in it, as the median over the modules. A choice at random is spread evenly.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import set_seed


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from configs import Setting
from tasks import Limits, find_task, prepare

from peft_ext.calibrate import measure


RESULTS = Path(__file__).parent / "results" / "where.json"


def holds_half(chosen: torch.Tensor, size: int) -> float:
    """The share of `size` rows or columns that has half of the chosen places `(k,)`, the fullest first."""
    counts = torch.bincount(chosen, minlength=size).sort(descending=True).values.cumsum(0)
    return (int((2 * counts < counts[-1]).sum()) + 1) / size


def spread(name: str, data: Path) -> dict[str, Any]:
    """What the table shows of one task."""
    made = prepare(find_task(name), Limits(1000, 500, 40), data)
    set_seed(0)  # of the new head
    batches = DataLoader(made.data["train"], batch_size=32, collate_fn=made.collate)  # type: ignore[arg-type]
    setting = Setting(made.make_model(), "SEQ_CLS", 1.0, steps=1, seed=0, batches=batches)
    weights = {name: linear.weight for name, linear in setting.linears.items()}
    top = measure(setting.model, weights, batches, num_batches=16, progress=False).top(setting.budget)
    layers: dict[int, int] = {}
    for module, places in top.items():
        number = int(re.findall(r"\.(\d+)\.", module)[0])
        layers[number] = layers.get(number, 0) + len(places)
    widths = {module: weights[module].shape[1] for module in top}
    return {
        "chosen": setting.budget,
        "of": sum(weight.numel() for weight in weights.values()),
        "layers": {number: layers[number] / setting.budget for number in sorted(layers)},
        "columns": median(holds_half(places % widths[m], widths[m]) for m, places in top.items()),
        "rows": median(holds_half(places // widths[m], weights[m].shape[0]) for m, places in top.items()),
        "modules_without": len(weights) - len(top),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = {name: spread(name, args.data) for name in args.tasks}
    print(
        "| task | chosen | first layer | last layer | half in columns | half in rows |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, result in found.items():
        first, *_, last = result["layers"].values()
        share = result["chosen"] / result["of"]
        print(f"| {name} | {share:.1%} | {first:.0%} | {last:.0%} | {result['columns']:.1%} | {result['rows']:.1%} |")
    if args.json:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
