"""The runs of the comparison as they stand in `results/compare.jsonl`, and what was chosen among them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent)]
from methods import LORA


RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
Cell = tuple[str, str, float, str]  # task, method, budget, settings


def load_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tried(
    rows: Sequence[dict[str, Any]], task: str, method: str, budget: float, settings: str
) -> dict[float, dict[str, Any]]:
    """The runs with the first seed by learning rate, the best by the validation split first."""
    own = [
        row
        for row in rows
        if (row["task"], row["method"], row["budget"], row["settings"], row["seed"])
        == (task, method, budget, settings, 0)
    ]
    sign = -1 if own and own[0]["metric"] == "loss" else 1
    return {row["learning_rate"]: row for row in sorted(own, key=lambda row: -sign * row["validation"])}


def best_rate(rows: Sequence[dict[str, Any]], *cell: Any) -> float | None:
    """The learning rate of the best validation score with the first seed; `None` if there is no run."""
    return next(iter(tried(rows, *cell)), None)


def is_open(runs: Mapping[float, Any]) -> bool:
    """Whether the best rate (the first) is the smallest or the largest that was tried: a better one may lie beyond."""
    return next(iter(runs)) in (min(runs), max(runs))


def chosen(rows: Sequence[dict[str, Any]]) -> dict[Cell, dict[int, dict[str, Any]]]:
    """The runs with the learning rate that was chosen, by cell and seed."""
    cells: dict[Cell, dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["method"], row["budget"], row["settings"])
        if row["learning_rate"] == best_rate(rows, *key):
            cells.setdefault(key, {})[row["seed"]] = row
    return cells


def methods_by_settings(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, set[str]]]:
    """Which methods were run, by task and settings."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault(row["settings"], set()).add(row["method"])
    return found


def of_most_methods(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task the rows in the settings that most methods were run in."""
    kept = {task: max(found, key=lambda s: len(found[s])) for task, found in methods_by_settings(rows).items()}
    return [row for row in rows if row["settings"] == kept[row["task"]]]


def without_lone_references(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without settings in which LoRA alone was run, where the task has others."""
    found = methods_by_settings(rows)
    return [row for row in rows if len(found[row["task"]]) == 1 or found[row["task"]][row["settings"]] != {LORA}]
