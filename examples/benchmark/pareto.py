"""Figures of what a score costs: score against parameters, memory for the backward, step time and inference time.

    python examples/benchmark/pareto.py --output docs/figures       # pareto-TASK.png for every task with results

It joins the scores of `compare.py` (`results/compare.jsonl`) with the costs of `cost.py` (`results/cost-*.json`), the
latter measured on a model of the same shape in one interleaved run. Points on the grey line are those that nothing
else beats in both respects. An error bar is the standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from compare import RESULTS, best_rate, load_results
from methods import COST_NAMES
from tasks import find_task


COSTS = {"minilm": "minilm", "models/vit-tiny-imagenet32": "vit-tiny", "smollm2": "smollm2-135m"}
LIKE = {"spt": "spt-random", "spiel-ma": "spiel-ag", "mask-50": "mask-25"}  # they cost the same
AXES = {
    "parameters": "trained parameters, with head",
    "memory": "saved for the backward, MiB",
    "step": "training step, in LoRA's",
    "inference": "forward as it is served, in the base's",
}


@dataclass(frozen=True)
class Point:
    """A method on a task: its score over the seeds, and what it costs; what was not measured is missing."""

    method: str
    score: float
    spread: float
    costs: dict[str, float]


def points(task: str, rows: Sequence[dict[str, Any]], costs: dict[str, Any]) -> list[Point]:
    """All methods at LoRA r=8's budget or at their own size."""
    found = []
    own = [row for row in rows if row["task"] == task and row["budget"] == 1.0]
    for method in dict.fromkeys(row["method"] for row in own):
        settings = next(row["settings"] for row in own if row["method"] == method)
        rate = best_rate(own, task, method, 1.0, settings)
        runs = [row for row in own if (row["method"], row["settings"]) == (method, settings)]
        runs = [row for row in runs if row["learning_rate"] == rate]
        scores = [row["test"] for row in runs]
        point = {"parameters": float(runs[0]["trained"]), **cost(LIKE.get(method, method), costs)}
        found.append(Point(method, mean(scores), stdev(scores) if len(scores) > 1 else 0.0, point))
    return found


def cost(method: str, costs: dict[str, Any]) -> dict[str, float]:
    """Memory in MiB; step over LoRA's and forward over the base's, medians of the ratios; what merges is served merged."""
    row = costs["rows"].get(COST_NAMES.get(method, ""))
    if row is None:
        return {}
    seconds, lora = row["seconds"], costs["rows"][COST_NAMES["lora"]]["seconds"]
    found = {"memory": row["saved_bytes"] / 2**20, "step": _ratio(seconds["step"], lora["step"])}
    served = seconds.get("merged") or seconds.get("unmerged")
    return {**found, "inference": _ratio(served, costs["base_seconds"])} if served else {**found, "inference": 1.0}


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def front(pairs: Sequence[tuple[float, float]], less_is_better: bool) -> list[tuple[float, float]]:
    """The pairs (cost, score) that no other beats in both, from the cheapest on."""
    best: list[tuple[float, float]] = []
    sign = -1 if less_is_better else 1
    for cost_of, score in sorted(pairs, key=lambda pair: (pair[0], -sign * pair[1])):
        if not best or sign * score > sign * best[-1][1]:
            best.append((cost_of, score))
    return best


def draw(task: str, found: Sequence[Point]) -> Any:
    """Four panels, one for each cost."""
    kind = find_task(task)
    figure, panels = pyplot.subplots(1, 4, figsize=(16, 4), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        shown = [point for point in found if axis in point.costs]
        pairs = [(point.costs[axis], point.score) for point in shown]
        panel.plot(*zip(*front(pairs, kind.less_is_better), strict=True), color="0.8", zorder=0)
        for point in shown:
            ours = point.method.startswith(("ssf", "vqt", "sp", "lt", "mask", "random", "smallest"))
            style = {"fmt": "o" if ours else "s", "color": "C0" if ours else "C7", "markersize": 4}
            panel.errorbar(point.costs[axis], point.score, yerr=point.spread, elinewidth=0.7, **style)
            panel.annotate(
                point.method,
                (point.costs[axis], point.score),
                fontsize=7,
                xytext=(3, 3),
                textcoords="offset points",
            )
        panel.set_xlabel(label)
        if axis == "parameters":
            panel.set_xscale("log")
        if axis == "memory":
            panel.set_xscale("symlog")
    panels[0].set_ylabel(f"{task}: {kind.metric.replace('_', ' ')}, test")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="default: all with a linear probe or LoRA in the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    matplotlib.use("Agg")
    rows = load_results(args.results)
    args.output.mkdir(parents=True, exist_ok=True)
    for task in args.tasks or dict.fromkeys(row["task"] for row in rows):
        file = RESULTS.parent / f"cost-{COSTS[find_task(task).model]}-cpu.json"
        found = points(task, rows, json.loads(file.read_text()))
        if len(found) > 2:
            draw(task, found).savefig(args.output / f"pareto-{task}.png", dpi=72)
            print(args.output / f"pareto-{task}.png")


if __name__ == "__main__":
    main()
