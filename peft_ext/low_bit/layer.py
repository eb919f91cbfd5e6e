"""A module with a bottleneck of two such matrices beside it: what low-rank updates and adapters share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core import Dropouts, ExtLayer
from .codebook import FULL
from .leaf import FullMatrix, LowBitMatrix


UP_STD = 1e-3  # of the published start of a quantised up-projection, cut off at twice that


class LowBitLayer(ExtLayer):
    """A module to whose output `scale * up(act(down(x)))` is added; subclasses name the containers and say what x is.

    `adapter_layer_names` are those of down and up.
    """

    other_param_names: tuple[str, ...] = ("scale", "dropout")
    supports_mixed_batches = True

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.scale: dict[str, float] = {}
        self.dropout = Dropouts(self.training)

    def add_matrices(self, adapter_name: str, config: Any, inputs: int, outputs: int) -> None:
        """Creates the two matrices `(r, inputs)` and `(outputs, r)` of one adapter, with the published start."""
        down: nn.Module
        up: nn.Module
        if config.bits == FULL:
            down, up = FullMatrix(config.r, inputs), FullMatrix(outputs, config.r)
        else:
            down = LowBitMatrix(config.r, inputs, config.bits)
            up = LowBitMatrix(outputs, config.r, config.bits)
            nn.init.trunc_normal_(up.weight, std=UP_STD, a=-2 * UP_STD, b=2 * UP_STD)
        nn.init.kaiming_uniform_(down.get_parameter("weight"), a=5**0.5)
        for container, leaf in zip(self.adapter_layer_names, (down, up), strict=True):
            getattr(self, container)[adapter_name] = leaf
        self.scale[adapter_name] = config.scale
        self.dropout.put(adapter_name, config.dropout)
        self.finish_update(adapter_name, config)

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What acts: down `(r, inputs)` and up `(outputs, r)`."""
        down, up = (getattr(self, container)[adapter_name]() for container in self.adapter_layer_names)
        return down, up

    def activate(self, adapter_name: str, hidden: torch.Tensor) -> torch.Tensor:
        """What happens between the two matrices, `(..., r)`; nothing here."""
        return hidden

    def branch(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """`scale * up(dropout(act(down(x))))` for x `(..., inputs)`, `(..., outputs)`."""
        down, up = self.matrices(adapter_name)
        hidden = self.activate(adapter_name, F.linear(self._cast_input_dtype(x, down.dtype), down))
        hidden = self.dropout[adapter_name](hidden)
        return F.linear(hidden * self.scale[adapter_name], up)

    def input_of(self, adapter_name: str, output: torch.Tensor, args: Any) -> torch.Tensor:
        """What an adapter reads, from what the module got and has put out."""
        return args[0]

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.base_layer(*args, **kwargs)
        for name in adapters:
            output = output + self.branch(name, self.input_of(name, output, args)).to(output.dtype)
        return output

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.base_layer(*args, **kwargs)
        of_rows = self.names_of_rows(adapter_names, len(output))
        for name in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([i for i, own in enumerate(of_rows) if own == name], device=output.device)
            change = self.branch(name, self.input_of(name, output, args)[rows])
            output = output.index_add(0, rows, change.to(output.dtype))
        return output
