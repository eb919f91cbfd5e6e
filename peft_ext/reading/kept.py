"""What a frozen pass leaves behind of a batch, in the form in which a cache holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass
class Kept:
    """What a reader needs of the samples of a batch, so that their frozen pass need not be run again.

    Args:
        states: `(B, S, N, W)`: S tensors of N tokens each, for example the keys and values of all layers.
        dtype: Of the backbone's hidden states.
        class_token: `(B, F)`, what the stock head reads; F is 0 for a reader that has no use for it.
        mask: `(B, ..., N)`, of any dtype; `None`: there is none.
        calls: What else belongs to each layer and is the same for all samples, in words of JSON.
    """

    states: torch.Tensor
    dtype: torch.dtype
    class_token: torch.Tensor
    mask: torch.Tensor | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)


class KeptPass(Protocol):
    """Frozen passes that were run earlier, such as those of a `FrozenPassCache`."""

    def look_up(self, layer: Any, adapter: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kept | None:
        """What the pass with these arguments of the backbone left behind; `None`: not known."""
