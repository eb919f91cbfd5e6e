"""What a figure shows, without a drawing library: a method's description returns these, and `plots` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeatMap:
    """A number for each module, by its layer and type, as `layer_and_type` gives them."""

    values: Mapping[tuple[int, str], float]
    title: str


@dataclass(frozen=True)
class Bars:
    """A bar for each name."""

    values: Mapping[str, float]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""


@dataclass(frozen=True)
class Fillings:
    """A bar for each layer, filled as far as a part of it stays: `(part, whole)` by name; the title names the units."""

    values: Mapping[str, tuple[float, float]]
    title: str
    part: str = "kept"
    rest: str = "cut"


@dataclass(frozen=True)
class Curve:
    """A line through points."""

    x: Sequence[float]
    y: Sequence[float]
    title: str
    xlabel: str
    ylabel: str


@dataclass(frozen=True)
class Image:
    """Pixels `(H, W)` or `(H, W, 3)`, on the CPU in fp32."""

    pixels: torch.Tensor
    title: str


Picture = HeatMap | Bars | Fillings | Curve | Image
