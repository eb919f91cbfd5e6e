"""A linear module with a low-rank update of few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import linear_features
from ...low_bit import LowBitLayer
from .config import BinaryLoraConfig


class BinaryLoraLinear(LowBitLayer):
    """`y = base(x) + scale * U dropout(D x)`, on Linear modules, quantised ones too, and GPT-2's Conv1D."""

    adds = True
    adapter_layer_names = ("binary_low_rank_down", "binary_low_rank_up")
    binary_low_rank_down: nn.ModuleDict
    binary_low_rank_up: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: BinaryLoraConfig, **kwargs: Any) -> None:
        """Creates the factors of one adapter."""
        inputs, outputs = linear_features(self.get_base_layer()) or (0, 0)
        self.add_matrices(adapter_name, config, inputs, outputs)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is kept as `(inputs, outputs)`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """`W + scale * U D`, summed in fp32 at least."""
        down, up = self.matrices(adapter_name)
        update = self.scale[adapter_name] * up @ down
        weight = self.get_base_weight()
        return {"weight": weight.to(update.dtype) + (update.T if self.is_transposed else update).to(weight.device)}
