"""The head of a reader."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ReaderHead(nn.Module):
    """The linear head: `weight` `(C, F)`, `bias` `(C,)`.

    No `nn.Linear`, so that `target_modules="all-linear"` of another method does not take it for part of the model.
    """

    def __init__(self, features: int, classes: int, read: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features if read is None else read))
        self.bias = nn.Parameter(torch.empty(classes))
        self.features = features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features `(B, F)`; returns `(B, C)`."""
        if features.shape[-1] != self.features:
            raise ValueError(
                f"The head was made for {self.features} features and got {features.shape[-1]}: the model is not the "
                "one that the adapter was made for. Load the adapter on its own base model."
            )
        return F.linear(self.read(features).to(self.weight.dtype), self.weight, self.bias)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """The features that the head reads: all of them."""
        return features

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
