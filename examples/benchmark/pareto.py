"""Figures of what a score costs: score against parameters, memory for the backward, step time and inference time.

    python examples/benchmark/pareto.py --output docs/figures       # pareto-TASK.png for every task with results

It joins the scores of `compare.py` (`results/compare.jsonl`) with the costs of `cost.py` (`results/cost-*.json`), the
latter measured on a model of the same shape in one interleaved run. Points on the grey line are those that nothing
else beats in both respects. An error bar is the standard deviation over the seeds. The linear probe, which costs next
to nothing of most things, is a dashed line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from chosen_runs import RESULTS, best_rate, load_results
from methods import BUILT_IN, COST_NAMES, PROBE, title
from tasks import find_task


COSTS = {
    "minilm": "minilm",
    "models/vit-tiny-imagenet32": "vit-tiny",
    "smollm2": "smollm2-135m",
    "dinov2-small": "dinov2-small",
}
LIKE = {  # they cost the same
    "spt": "spt-random",
    "spiel-ma": "spiel-ag",
    "mask-50": "mask-25",
    "lora-sb": "lora-xs",
    "s2ft-everywhere": "s2ft",
    "vpt-class-tokens": "vpt",
}
AXES = {
    "parameters": "trained parameters, head included",
    "memory": "kept for the backward, MiB",
    "step": "time of a training step, in multiples of LoRA's",
    "inference": "time of a forward as it is served, in multiples of the base's",
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
    """Four panels, one for each cost, and a legend above them."""
    kind = find_task(task)
    figure, panels = pyplot.subplots(2, 2, figsize=(14, 11), sharey=True, layout="constrained")
    probe = next((point for point in found if point.method == PROBE), None)
    for panel, (axis, label) in zip(panels.flat, AXES.items(), strict=True):
        shown = [point for point in found if axis in point.costs and point is not probe]
        pairs = [(point.costs[axis], point.score) for point in shown]
        panel.plot(*zip(*front(pairs, kind.less_is_better), strict=True), color="0.8", zorder=0)
        for point in shown:
            style = {"fmt": "o", "color": "C0"} if is_ours(point.method) else {"fmt": "s", "color": "C1"}
            panel.errorbar(
                point.costs[axis], point.score, yerr=point.spread, elinewidth=0.6, ecolor="0.75", markersize=5, **style
            )
        panel.set_xscale("log")
        panel.margins(0.12, 0.08)
        panel.set_xlabel(label)
        _plain_ticks(panel.xaxis)
    if probe is not None:
        _probe_lines(panels, probe.score)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"{task}: {kind.metric.replace('_', ' ')}, test")
    _legend(figure, probe is not None)
    figure.canvas.draw()  # settles the layout, which the places of the labels depend on
    figure.set_layout_engine("none")
    for panel, axis in zip(panels.flat, AXES, strict=True):
        shown = [point for point in found if axis in point.costs and point is not probe]
        place_labels(panel, [(point.costs[axis], point.score, title(point.method)) for point in shown])
    return figure


def _probe_lines(panels: Any, score: float) -> None:
    """A dashed line in each panel; at its edge, with the number, where the others would have no room left."""
    low, high = panels[0, 0].get_ylim()
    margin = 0.5 * (high - low)
    is_near = low - margin < score < high + margin
    edge = low + 0.02 * (high - low) if score < low else high - 0.02 * (high - low)
    for panel in panels.flat:
        panel.axhline(score if is_near else edge, color="0.4", linestyle="--", linewidth=0.9, zorder=0)
        if not is_near:
            where = "far below" if score < low else "far above"
            panel.annotate(
                f"linear probe: {score:.3f}, {where}",
                (0.01, edge),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                fontsize=8,
                color="0.4",
            )
    if not is_near:
        panels[0, 0].set_ylim(low, high)


def is_ours(method: str) -> bool:
    """Whether it is of this package, and not PEFT's or a control."""
    is_control = method.startswith(("magnitude-", "random-"))
    return method not in BUILT_IN and not is_control


def _plain_ticks(axis: Any) -> None:
    """Numbers such as 30 or 100,000 in the place of powers, and enough of them where an axis spans less than a decade."""
    low, high = axis.get_view_interval()
    form = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set_major_formatter(form)
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5))
    elif high / low < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, has_probe: bool) -> None:
    handles = [
        Line2D([], [], color="C0", marker="o", linestyle="", label="peft-ext"),
        Line2D([], [], color="C1", marker="s", linestyle="", label="PEFT"),
        Line2D([], [], color="0.8", label="nothing else is better and cheaper"),
    ]
    if has_probe:
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="linear probe"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def place_labels(panel: Any, points_: Sequence[tuple[float, float, str]], fontsize: float = 8.5) -> list[Any]:
    """Writes a name beside each point `(x, y, name)`, where it covers no other name and no point and is not cut.

    Each name takes the nearest free place on rings around its point, the points with the most neighbours first; a thin
    line leads back to the point from farther away.
    """
    renderer = panel.figure.canvas.get_renderer()
    frame = panel.get_window_extent(renderer)
    at = [tuple(panel.transData.transform((x, y))) for x, y, _ in points_]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    points_a_pixel = 72 / panel.figure.dpi
    crowd = [sum(math.dist(one, other) < 80 for other in at) for one in at]
    texts = []
    for index in sorted(range(len(at)), key=lambda index: -crowd[index]):
        (x, y), name = at[index], points_[index][2]
        text = panel.annotate(name, (0, 0), xycoords="figure pixels", fontsize=fontsize, ha="left", va="bottom")
        size = text.get_window_extent(renderer)
        box, far = _free_place(x, y, size.width, size.height, taken, frame)
        text.remove()
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None
        texts.append(
            panel.annotate(
                name,
                xy=points_[index][:2],
                xytext=((box.x0 - x) * points_a_pixel, (box.y0 - y) * points_a_pixel),  # whatever the figure's dpi
                textcoords="offset points",
                fontsize=fontsize,
                ha="left",
                va="bottom",
                arrowprops=line,
            )
        )
        taken.append(box)
    return texts


def _free_place(
    x: float, y: float, width: float, height: float, taken: Sequence[Bbox], frame: Bbox
) -> tuple[Bbox, bool]:
    """The nearest box of a size around a point that overlaps none of `taken` and lies in `frame`; and whether it is far."""
    best: tuple[float, Bbox, bool] | None = None
    for ring in range(6, 240, 6):
        for turn in range(24):
            angle = 2 * math.pi * turn / 24
            across, up = math.cos(angle), math.sin(angle)
            box = Bbox.from_bounds(
                x + ring * across - width * (1 - across) / 2, y + ring * up - height * (1 - up) / 2, width, height
            )
            outside = not (frame.x0 + 2 < box.x0 and box.x1 < frame.x1 - 2)
            outside |= not (frame.y0 + 2 < box.y0 and box.y1 < frame.y1 - 2)
            overlaps = sum(_area(box.padded(1), other) for other in taken)
            if not outside and not overlaps:
                return box, ring > 12
            if not outside and (best is None or overlaps < best[0]):
                best = overlaps, box, ring > 12
    assert best is not None, "a name is wider than the panel"
    return best[1], best[2]


def _area(first: Bbox, second: Bbox) -> float:
    both = Bbox.intersection(first, second)
    return 0.0 if both is None else both.width * both.height


def write(figure: Any, path: Path) -> None:
    """As a PNG with few colours, which makes it half as large."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=80)
    Image.open(buffer).convert("RGB").quantize(32).save(path, optimize=True)


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
        model = find_task(task).model
        file = RESULTS.parent / f"cost-{COSTS.get(model)}-cpu.json"
        if not file.exists():
            print(f"{task}: what the methods cost on {model} was not measured, so there is no figure")
            continue
        found = points(task, rows, json.loads(file.read_text()))
        if len(found) > 2:
            path = args.output / f"pareto-{task.replace('@', '-')}.png"
            write(draw(task, found), path)
            print(path)


if __name__ == "__main__":
    main()
