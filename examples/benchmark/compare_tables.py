"""The tables of the comparison: scores with their difference from LoRA, mean ranks, and where they go in a file."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent)]
from chosen_runs import chosen, is_open, of_most_methods, tried, without_lone_references
from methods import LORA, OF_THEIR_OWN_SIZE
from ranks import complete, mean_ranks


def rank_table(rows: Sequence[dict[str, Any]], budget: float = 1.0) -> str:
    """In Markdown: the mean rank of each method over the tasks on test, and its difference from LoRA's, with intervals.

    Raises:
        ValueError: LoRA was not run on all tasks.
    """
    cells = chosen(of_most_methods(rows))
    names = names_of([(task, settings) for task, _, _, settings in cells])
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for (task, method, share, settings), seeds in cells.items():
        if share == budget or method in OF_THEIR_OWN_SIZE:
            found = scores.setdefault(names[task, settings], {})
            found[method] = {
                seed: -row["test"] if row["metric"] == "loss" else row["test"] for seed, row in seeds.items()
            }
    lines = ["| method | mean rank | minus LoRA's |", "|---|---:|---:|"]
    for rank in mean_ranks(scores, LORA):
        low, high = rank.interval
        against = ""
        if rank.method != LORA:
            bounds = "{:+.1f} to {:+.1f}".format(*rank.difference_interval)
            against = f"{rank.difference:+.1f} ({bounds})"
        lines.append(f"| {rank.method} | {rank.mean:.1f} ({low:.1f} to {high:.1f}) | {against} |")
    all_methods = dict.fromkeys(method for found in scores.values() for method in found)
    ranked = complete(scores)
    missing = [method for method in all_methods if method not in ranked]
    caption = (
        f"Mean rank of {len(ranked)} methods on {', '.join(scores)} (test, budget x {budget:g}; 1 is the best). In "
        "brackets a 95 % bootstrap interval over tasks and, within them, over the seeds that all methods have."
        + (f" Not on all tasks, and so left out: {', '.join(missing)}." if missing else "")
    )
    return "\n".join([caption, "", *lines])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: mean and standard deviation over the seeds on test, and the paired difference from LoRA."""
    cells = chosen(rows)
    lines = [
        "| task (metric) | method | trained with head | learning rate | test | minus LoRA, same seeds | seconds per run |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    notes: dict[str, list[str]] = {}
    names = names_of([(task, settings) for task, _, _, settings in cells])
    most = max((len(seeds) for seeds in cells.values()), default=0)
    for (task, method, budget, settings), seeds in cells.items():
        lora = {} if method == LORA else cells.get((task, LORA, budget, settings), {})
        first = next(iter(seeds.values()))
        mark = " *" if is_open(tried(rows, task, method, budget, settings)) else ""
        share = "" if budget == 1.0 or method in OF_THEIR_OWN_SIZE else f", budget x {budget:g}"
        seconds = mean(row["seconds"] for row in seeds.values())
        lines.append(
            f"| {names[task, settings]} ({first['metric']}) | {method}{share} | {first['trained']:,} | "
            f"{first['learning_rate']:g}{mark} | {_scored(seeds, most)} | {_against(seeds, lora)} | {seconds:.0f} |"
        )
        where = ", ".join(f"{size} {split}" for split, size in first["sizes"].items())
        notes.setdefault(f"{settings} ({where})", []).append(names[task, settings])
    text = "; ".join(f"{', '.join(dict.fromkeys(tasks))}: {note}" for note, tasks in notes.items())
    rates = sorted({row["learning_rate"] for row in rows})
    several = f"Mean ± standard deviation over {most} seeds unless another number is said (no ±: one seed)"
    caption = (
        f"{several if most > 1 else 'One seed'}; learning rate of "
        f"{', '.join(f'{r:g}' for r in rates)} by the validation split with the first seed (*: the smallest or the largest "
        "that was tried). In brackets a 95 % bootstrap interval over the seeds. The seconds are those of a shared machine. "
        f"{text}."
    )
    return "\n".join([caption, "", *lines])


def _scored(seeds: Mapping[int, dict[str, Any]], most: int) -> str:
    """The mean of the test scores, with their standard deviation."""
    values = [row["test"] for row in seeds.values()]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}" + (f" ({len(values)} seeds)" if 1 < len(values) < most else "")


def _against(seeds: Mapping[int, dict[str, Any]], lora: Mapping[int, dict[str, Any]]) -> str:
    """The mean difference from LoRA over the seeds that both have, with its interval."""
    differences = [seeds[seed]["test"] - lora[seed]["test"] for seed in sorted(set(seeds) & set(lora))]
    if len(differences) < 2:
        return "".join(f"{difference:+.3f}" for difference in differences)
    low, high = bootstrap(differences)
    return f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"


def names_of(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What a table calls each task with its settings: the task, and in which settings it differs from itself."""
    names = {}
    for task, settings in pairs:
        others = [other.split(", ") for name, other in pairs if name == task]
        own = [part for part in settings.split(", ") if not all(part in other for other in others)]
        names[task, settings] = ", ".join([task, *own])
    return names


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval for the mean."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts tables between `<!-- compare:TASK,TASK:METHOD,METHOD -->` and `<!-- /compare -->`; `*` takes all.

    Between `<!-- ranks:TASKS:METHODS:BUDGET -->` and `<!-- /ranks -->` the mean ranks are put.
    """

    def own_of(which: str, who: str) -> list[dict[str, Any]]:
        tasks, methods = which.split(","), who.split(",")
        own = [
            row
            for row in rows
            if (row["task"] in tasks or tasks == ["*"]) and (row["method"] in methods or methods == ["*"])
        ]
        if "*" not in tasks + methods:  # in the order in which the marker names them
            own.sort(key=lambda row: (tasks.index(row["task"]), methods.index(row["method"]), -row["budget"]))
        return without_lone_references(own)

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(own_of(match[2], match[3]))}\n{match[4]}"

    def ranked(match: re.Match[str]) -> str:
        return f"{match[1]}\n{rank_table(own_of(match[2], match[3]), float(match[4]))}\n{match[5]}"

    text = file.read_text(encoding="utf-8")
    found = 0
    for pattern, fill in (
        (r"(<!-- compare:([^\s:]+):([^\s:]+) -->)\n.*?(<!-- /compare -->)", filled),
        (r"(<!-- ranks:([^\s:]+):([^\s:]+):([\d.]+) -->)\n.*?(<!-- /ranks -->)", ranked),
    ):
        text, count = re.subn(pattern, fill, text, flags=re.DOTALL)
        found += count
    if not found:
        raise ValueError(f"{file} has no line `<!-- compare:TASKS:METHODS -->` followed by `<!-- /compare -->`")
    file.write_text(text, encoding="utf-8")
