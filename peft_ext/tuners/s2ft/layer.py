"""A linear module some of whose input or output channels have weights of the adapter's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...core import HALF, ChosenChannels, ExactLeaf, ExtLayer
from ...core.sharding import unwrapped
from .channels import Channels
from .config import S2FTConfig


class ChannelBlock(ChosenChannels, ExactLeaf):
    """What is added to the weights of chosen channels: `weight` and, of each channel, its place in `indices` `(k,)`.

    The weight is `(outputs, k)` for input channels, `(k, inputs)` for output channels, and starts at zero.

    Args:
        channels: Of the module.
        k: How many are chosen.
        indices: Which, sorted; `None` until a saved adapter is loaded.
    """

    def __init__(self, channels: Channels, k: int, indices: torch.Tensor | None) -> None:
        super().__init__()
        self.side = channels.side
        shape = (channels.outputs, k) if self.side == "inputs" else (k, channels.inputs)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.choose(k, channels.size, indices)

    def forward(self) -> torch.Tensor:
        """The weights, in fp32 at least, as a new tensor: FSDP frees its own when the leaf's forward ends."""
        return self.weight.float() if self.weight.dtype in HALF else self.weight.clone()

    def added(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`(..., outputs)` for input channels, `(..., k)` for output channels, of x `(..., inputs)`.

        The weight is what calling the leaf gives.

        Of the input, only what this product reads is kept for the backward: `(..., k)` of input channels.
        """
        weight = weight.to(x.dtype)
        return F.linear(x.index_select(-1, self.chosen()) if self.side == "inputs" else x, weight)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """y `(..., outputs)` with what the channels add; the weight is what calling the leaf gives."""
        added = self.added(x, weight).to(y.dtype)
        return y + added if self.side == "inputs" else y.index_add(-1, self.chosen(), added)

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as a product of two: A `(k, inputs)` and B `(outputs, k)`, one of which selects."""
        weight, indices = self().detach(), self.chosen().long()
        select = weight.new_zeros(len(indices), self.size)
        select[torch.arange(len(indices), device=indices.device), indices] = 1.0
        return (select, weight) if self.side == "inputs" else (weight, select.T)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} of {self.size} {self.side}"


class S2FTLinear(ExtLayer):
    """A Linear (or Conv1D) with `s2ft_block` added to the weights of chosen channels."""

    adds = True
    adapter_layer_names = ("s2ft_block",)
    supports_mixed_batches = True
    s2ft_block: nn.ModuleDict

    def update_layer(
        self, adapter_name: str, config: S2FTConfig, *, channels: Channels, k: int, indices: torch.Tensor | None
    ) -> None:
        """Creates the block of one adapter; see `ChannelBlock`."""
        self.s2ft_block[adapter_name] = ChannelBlock(channels, k, indices)
        self.finish_update(adapter_name, config)

    def block(self, adapter_name: str) -> ChannelBlock:
        """What an adapter adds here."""
        found = unwrapped(self.s2ft_block[adapter_name])
        assert isinstance(found, ChannelBlock)
        return found

    def _add_to(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        # what FSDP1 has wrapped gathers the weight only where the wrapper is called
        return self.block(adapter_name).add_to(y, x, self.s2ft_block[adapter_name]())

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y, x = self.base_layer(*args, **kwargs), args[0]
        for name in adapters:
            y = self._add_to(y, x, name)
        return y

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y, x = self.base_layer(*args, **kwargs), args[0]
        names = self.names_of_rows(adapter_names, len(x))
        for adapter in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=x.device)
            y = y.index_copy(0, rows, self._add_to(y[rows], x[rows], adapter))
        return y

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        block, weight = self.block(adapter_name), self.get_base_weight()
        added = self.s2ft_block[adapter_name]()
        is_transposed = isinstance(self.get_base_layer(), Conv1D)
        total = weight.to(torch.promote_types(weight.dtype, added.dtype), copy=True)
        dim = 1 if (block.side == "inputs") != is_transposed else 0
        total.index_add_(dim, block.chosen(), (added.T if is_transposed else added).to(total.dtype))
        return {"weight": total.to(weight.dtype)}
