"""Mean ranks of methods over tasks, with intervals: the better of two methods is the one that is ahead on more tasks.

On each task the methods are ranked by their mean score over the seeds that all of them have; equal scores share a rank.
An interval comes from a bootstrap: tasks are drawn with replacement, and on each of them its seeds, the same for all
methods, so that what is compared is paired in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


Scores = Mapping[str, Mapping[str, Mapping[int, float]]]  # by task, method and seed; more is better


@dataclass(frozen=True)
class Rank:
    """The mean rank of a method over the tasks, 1 being the best.

    Attributes:
        mean: Over the tasks.
        interval: Of the mean, 95 %.
        difference: Its mean rank minus the reference's; below zero is better.
        difference_interval: Of that, 95 %.
    """

    method: str
    mean: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """Ranks `(M,)` of scores `(M,)`: 1 for the largest; equal ones share the mean of their ranks."""
    above = (scores[None] > scores[:, None]).sum(1)
    equal = (scores[None] == scores[:, None]).sum(1)
    return 1 + above + (equal - 1) / 2


def complete(scores: Scores) -> list[str]:
    """The methods that have every task."""
    methods = dict.fromkeys(method for found in scores.values() for method in found)
    return [method for method in methods if all(found.get(method) for found in scores.values())]


def mean_ranks(scores: Scores, reference: str, draws: int = 2000) -> list[Rank]:
    """The methods that have every task, the best mean rank first.

    Raises:
        ValueError: The reference is not among them, or on a task they have no seed in common.
    """
    methods = complete(scores)
    if reference not in methods:
        raise ValueError(f"{reference} has not been run on all of {', '.join(scores)}: ranks are compared with its")
    tables = []
    for task, found in scores.items():
        seeds = sorted(set.intersection(*(set(found[method]) for method in methods)))
        if not seeds:
            raise ValueError(f"{', '.join(methods)} have no seed in common on {task}")
        tables.append(np.array([[found[method][seed] for seed in seeds] for method in methods]))
    rng = np.random.default_rng(0)
    place = methods.index(reference)
    ranks = np.mean([ranks_of(table.mean(1)) for table in tables], axis=0)
    drawn = np.empty((draws, len(methods)))
    for draw in range(draws):
        chosen = (tables[index] for index in rng.integers(len(tables), size=len(tables)))
        seeded = (table[:, rng.integers(table.shape[1], size=table.shape[1])] for table in chosen)
        drawn[draw] = np.mean([ranks_of(table.mean(1)) for table in seeded], axis=0)
    return [
        Rank(
            methods[index],
            float(ranks[index]),
            _interval(drawn[:, index]),
            float(ranks[index] - ranks[place]),
            _interval(drawn[:, index] - drawn[:, place]),
        )
        for index in np.argsort(ranks, kind="stable")
    ]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
