"""Where a budget goes, given the scores of all weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...scores import Scores
from ...sparse import CHUNK
from .config import SPTConfig
from .structures import STRUCTURES


LEVELS = ((20, 11), (9, 11), (0, 9))  # shift and width: the bits of non-negative floats, which sort like the floats


@dataclass(frozen=True)
class Allocation:
    """What each tensor gets.

    Attributes:
        kinds: `"sparse"`, `"whole"`, or the name of a structure, by tensor; tensors that get nothing are left out.
        counts: Tuned weights of the tensors that are sparse or whole.
        ranks: Rank or width of the structured ones.
        support: The flat indices of the tuned weights of the sparse ones.
        sensitive: How many of the most sensitive weights each tensor has.
        total: Trainable parameters in all.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    support: dict[str, torch.Tensor] = field(default_factory=dict)
    sensitive: dict[str, int] = field(default_factory=dict)
    total: int = 0


class Prices:
    """What a tensor costs if it has so many sensitive weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: SPTConfig) -> None:
        """`shapes` are `(outputs, inputs)` of matrices and `(size,)` of vectors."""
        self.names = list(shapes)
        sizes, thresholds, whole = [], [], []
        for shape in shapes.values():
            size = shape[0] if len(shape) == 1 else shape[0] * shape[1]
            if len(shape) == 1:
                cost: float = size
                threshold = float("inf") if config.vector_threshold is None else size / config.vector_threshold
            elif config.structured is not None:
                cost = STRUCTURES[config.structured].cost(shape[1], shape[0], config.r)
                threshold = cost / config.matrix_threshold
                if cost >= size:  # a small matrix: its weights themselves are cheaper
                    threshold = float("inf")
            else:
                cost, threshold = size, float("inf")
            sizes.append(size)
            thresholds.append(threshold)
            whole.append(cost)
        self.sizes, self.thresholds = torch.tensor(sizes), torch.tensor(thresholds, dtype=torch.float64)
        self.whole = torch.tensor(whole, dtype=torch.long)
        self.is_single_tuned = config.unstructured

    def of(self, sensitive: torch.Tensor) -> torch.Tensor:
        """The parameters of each tensor, in the shape of `sensitive` `(tensors, ...)`."""
        shape = (-1,) + (1,) * (sensitive.ndim - 1)
        passes = sensitive >= self.thresholds.view(shape)
        single = sensitive if self.is_single_tuned else torch.zeros_like(sensitive)
        return torch.where(passes, self.whole.view(shape), single)


def allocate(scores: Scores, shapes: Mapping[str, tuple[int, ...]], config: SPTConfig, budget: int) -> Allocation:
    """Spends `budget` trainable parameters by the scores.

    Args:
        shapes: Of the tensors of `scores`: `(outputs, inputs)` of a matrix, `(size,)` of a vector.

    Raises:
        ValueError: The budget is too small for anything, or larger than what there is.
    """
    prices = Prices(shapes, config)
    most = int(prices.of(prices.sizes).sum())
    if budget > most:
        raise ValueError(
            f"`budget` asks for {budget:,} trainable parameters, the targets take {most:,} at most: lower it, raise "
            "`r`, or target more modules."
        )
    sensitive = _sensitive_within(scores, prices, budget)
    passes = sensitive >= prices.thresholds
    result = Allocation(sensitive=dict(zip(prices.names, sensitive.tolist(), strict=True)))
    spent = 0
    left: list[str] = []
    for name, structured, cost, size in zip(
        prices.names, passes.tolist(), prices.whole.tolist(), prices.sizes.tolist(), strict=True
    ):
        if not structured:
            left.append(name)
        elif len(shapes[name]) == 1:
            result.kinds[name], result.counts[name] = "whole", size
            spent += cost
        else:
            assert config.structured is not None
            result.kinds[name], result.ranks[name] = config.structured, config.r
            spent += cost
    if config.unstructured and budget > spent:
        single = min(budget - spent, sum(scores.sizes[name] for name in left))
        for name, places in scores.top(single, left).items():
            result.kinds[name], result.counts[name], result.support[name] = "sparse", len(places), places
            spent += len(places)
    if not result.kinds:
        raise ValueError(
            f"`budget` of {budget:,} is smaller than one structure of rank {config.r}: raise it, or lower `r`."
        )
    kinds = {name: result.kinds[name] for name in prices.names if name in result.kinds}  # in the order of the model
    return Allocation(kinds, result.counts, result.ranks, result.support, result.sensitive, spent)


def _sensitive_within(scores: Scores, prices: Prices, budget: int) -> torch.Tensor:
    """How many of the tau largest scores each tensor has, for the largest tau whose total is within the budget."""
    above = torch.zeros(len(prices.names), dtype=torch.long)
    prefix = 0  # of the bits of the smallest of those scores
    for shift, width in LEVELS:
        counts = torch.stack([_histogram(scores.of(name), prefix, shift, width) for name in prices.names])
        reached = above.unsqueeze(1) + counts.flip(1).cumsum(1)  # sensitive weights with a threshold at each bin
        fitting = int((prices.of(reached).sum(0) <= budget).sum())  # totals never fall
        if fitting:
            above = reached[:, fitting - 1]
        if fitting == 1 << width:
            break
        prefix = (prefix << width) | ((1 << width) - 1 - fitting)
    return above


def _histogram(scores: torch.Tensor, prefix: int, shift: int, width: int) -> torch.Tensor:
    """Of the scores whose bits begin with `prefix`, how many have each value of the `width` bits above `shift`."""
    counts = torch.zeros(1 << width, dtype=torch.long)
    for part in scores.split(CHUNK):
        keys = part[part > 0].float().contiguous().view(torch.int32)
        keys = keys[keys >> (shift + width) == prefix]
        counts += (keys >> shift & (1 << width) - 1).bincount(minlength=1 << width)
    return counts
