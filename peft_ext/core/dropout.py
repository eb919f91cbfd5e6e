"""The dropout of each adapter of a layer."""

from __future__ import annotations

from typing import Any

from torch import nn


class Dropouts(nn.ModuleDict):
    """An `nn.Dropout` for each adapter: what turns all dropout of a model off, as TRL's `disable_dropout`, looks for it."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training  # as the layer is, whose mode it takes from then on

    def put(self, adapter_name: str, probability: float) -> None:
        """The dropout of a new adapter, in the mode that this layer is in."""
        self[adapter_name] = nn.Dropout(probability).train(self.training)

    def acting(self, adapter_name: str) -> float:
        """The probability with which elements are dropped now: zero in evaluation."""
        module: Any = self[adapter_name]
        return float(module.p) if module.training else 0.0
