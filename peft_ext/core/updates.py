"""Changes of the base's tensors, as far as an adapter's files tell them: what `inspect` and `compare` work with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


Support = tuple[torch.Tensor, torch.Tensor]  # sorted flat indices (k,) and their values (k,)


class Update(Protocol):
    """A change of one tensor of the base."""

    def norm(self) -> float:
        """Its L2 norm."""

    def dot(self, other: Any) -> float | None:
        """Its inner product with another one of the same tensor, `None` where that cannot be told."""


@dataclass(frozen=True)
class LowRank:
    """`scale * up @ down`, of down `(r, inputs)` and up `(outputs, r)`, never multiplied out."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def norm(self) -> float:
        """Its L2 norm."""
        return math.sqrt(max(self.dot(self) or 0.0, 0.0))

    def dot(self, other: Any) -> float | None:
        """The inner product with another low-rank update of the same shape."""
        if not isinstance(other, LowRank) or self.down.shape[1:] != other.down.shape[1:]:
            return None
        if len(self.up) != len(other.up):
            return None
        inner = (self.up.T @ other.up) * (self.down @ other.down.T)
        return self.scale * other.scale * inner.sum().item()


@dataclass(frozen=True)
class Sparse:
    """Values `(k,)` at the sorted flat `indices` `(k,)`, `None` if these can be read in several ways."""

    values: torch.Tensor
    indices: torch.Tensor | None

    def norm(self) -> float:
        """Its L2 norm."""
        return self.values.norm().item()

    def dot(self, other: Any) -> float | None:
        """The inner product with another sparse update, over the indices that both have."""
        if not isinstance(other, Sparse) or self.indices is None or other.indices is None:
            return None
        ours, theirs = torch.isin(self.indices, other.indices), torch.isin(other.indices, self.indices)
        return (self.values[ours] @ other.values[theirs]).item()  # indices are sorted in both


@dataclass(frozen=True)
class Vector:
    """A value for every channel."""

    values: torch.Tensor

    def norm(self) -> float:
        """Its L2 norm."""
        return self.values.norm().item()

    def dot(self, other: Any) -> float | None:
        """The inner product with another vector of the same length."""
        if not isinstance(other, Vector) or self.values.shape != other.values.shape:
            return None
        return (self.values @ other.values).item()


def lora_scale(config: Mapping[str, Any], r: int, alpha: float | None) -> float:
    """The factor of a low-rank update: alpha / r, or alpha / sqrt(r) with `use_rslora`; 1 without an alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


@dataclass(frozen=True)
class Overlap:
    """How two sparse adapters relate, on one module or all together.

    Args:
        first, second: Tuned weights of each.
        shared: Weights that both tune.
        same_sign: Shared weights that both move in the same direction.
    """

    first: int
    second: int
    shared: int
    same_sign: int

    @property
    def jaccard(self) -> float:
        """Shared weights as a fraction of all that either tunes."""
        return self.shared / max(1, self.first + self.second - self.shared)


def overlap_of(ours: Mapping[str, Support], theirs: Mapping[str, Support]) -> dict[str, Overlap]:
    """How the supports of two adapters overlap: by module, and in all (`""`)."""
    found = {}
    nothing = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
    for module in dict.fromkeys([*ours, *theirs]):
        (indices, values), (others, other_values) = (
            tuple(tensor.cpu() for tensor in side.get(module, nothing)) for side in (ours, theirs)
        )
        mine, their = torch.isin(indices, others), torch.isin(others, indices)
        same_sign = int((values[mine].sign() == other_values[their].sign()).sum())  # both sides are sorted
        found[module] = Overlap(len(indices), len(others), int(mine.sum()), same_sign)
    parts = list(found.values())
    found[""] = Overlap(*(sum(getattr(part, key) for part in parts) for key in Overlap.__dataclass_fields__))
    return found
