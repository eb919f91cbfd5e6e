"""What VPT trains: prompts, the layer that widens them, and rows of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .config import SEGMENTS


class Rows(nn.Module):
    """Trained rows, `weight` `(T, D)`, or `(heads, T, head size)`; calling it gives a new tensor of them."""

    def __init__(self, *shape: int, pruned_segments: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.pruned_segments = pruned_segments

    def forward(self) -> torch.Tensor:
        if self.pruned_segments is None:
            return self.weight.clone()  # a copy: FSDP frees the gathered weight when this returns
        return self.weight * segment_mask(self.pruned_segments, self.weight.shape[-1]).to(self.weight)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class Elsewhere(nn.Module):
    """Stands for a leaf that another layer holds, since all layers share it."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self._leaf = (leaf,)  # in a tuple, which hides it from nn.Module

    def forward(self) -> Any:
        return self._leaf[0]()


class Widening(nn.Module):
    """The linear layer that widens prompts: `weight` `(D, d)`, `bias` `(D,)`.

    No `nn.Linear`, so that `target_modules="all-linear"` of another method does not take it for part of the model.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(wide, narrow))
        self.bias = nn.Parameter(torch.empty(wide))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows `(T, d)`; returns `(T, D)`."""
        return F.linear(rows, self.weight, self.bias)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def segment_mask(pruned: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """`(T, width)`: 0 where a prompt's segment is pruned, else 1; segment j holds the channels j, j + 16, ..."""
    mask = torch.ones(len(pruned), SEGMENTS)
    for row, segments in zip(mask, pruned, strict=True):
        row[list(segments)] = 0
    return mask.repeat(1, -(-width // SEGMENTS))[:, :width]


@torch.no_grad()
def start_rows(weight: torch.Tensor, patch_inputs: int) -> None:
    """The published start of prompts: uniform, by the inputs of the patch embedding and the prompts' width."""
    limit = math.sqrt(6 / (patch_inputs + weight.shape[-1]))
    nn.init.uniform_(weight, -limit, limit)


@torch.no_grad()
def start_key_values(weight: torch.Tensor) -> None:
    """The published start of key-value rows `(heads, T, head size)`: Kaiming-uniform."""
    nn.init.kaiming_uniform_(weight)


@torch.no_grad()
def start_widening(leaf: Widening) -> None:
    """The published start: Kaiming-normal over the outputs; the bias as in any Linear."""
    nn.init.kaiming_normal_(leaf.weight, mode="fan_out")
    limit = leaf.weight.shape[1] ** -0.5
    nn.init.uniform_(leaf.bias, -limit, limit)
