"""A linear module whose input is edited by two maps, and the maps that several of them share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import Dropouts, SharedLayer, SharedLeaf, linear_features
from .config import WeGeFTConfig


class WeGeFTLayer(SharedLayer):
    """Two maps: `wegeft_down` holds Q^T `(r, in)`, `wegeft_up` P^T `(in, r)`, as weights of `nn.Linear`.

    Of this class itself are the shared ones, in the model's `shared_maps`; their own forward is never run.
    """

    adapter_layer_names = ("wegeft_down", "wegeft_up")
    other_param_names: tuple[str, ...] = ()
    supports_mixed_batches = True
    wegeft_down: nn.ModuleDict
    wegeft_up: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: WeGeFTConfig, **kwargs: Any) -> None:
        """Makes the maps: the update is zero, and its gradient reaches the first map only."""
        inputs: int = self.in_features
        down, up = nn.Linear(inputs, config.r, bias=False), nn.Linear(config.r, inputs, bias=False)
        with torch.no_grad():
            down.weight.zero_()
            up.weight.uniform_(-1, 1).div_(math.sqrt(inputs))  # of `nn.Linear(inputs, r)`, as P is in the paper's code
        self.wegeft_down[adapter_name], self.wegeft_up[adapter_name] = down, up
        self.finish_update(adapter_name, config)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Nothing: shared maps are merged where they are used."""
        return {}

    def leave(self, model: nn.Module) -> None:
        """Takes the shared maps off the model."""
        if hasattr(model, SHARED):
            delattr(model, SHARED)


SHARED = "shared_maps"  # the child of the model that holds shared maps, by group


class WeGeFTLinear(WeGeFTLayer):
    """A linear module with maps on its input, its own or links to shared ones."""

    other_param_names = ("dropout",)

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.dropout = Dropouts(self.training)

    def update_layer(self, adapter_name: str, config: WeGeFTConfig, *, maps: WeGeFTLayer | None) -> None:
        """With `maps`, which have the adapter already, links to theirs."""
        self.dropout.put(adapter_name, config.dropout)
        if maps is None:
            super().update_layer(adapter_name, config)
            return
        self.wegeft_down[adapter_name] = SharedLeaf(maps.wegeft_down, adapter_name)
        self.wegeft_up[adapter_name] = SharedLeaf(maps.wegeft_up, adapter_name)
        self.finish_update(adapter_name, config)

    def edit(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """P^T Q^T x `(..., in)`, in the dtype of x."""
        down, up = self.wegeft_down[adapter_name], self.wegeft_up[adapter_name]
        read = self._cast_input_dtype(x, SharedLeaf.owned(down).weight.dtype)
        read = self.dropout[adapter_name](read)
        edited: torch.Tensor = up(down(read))
        return edited.to(x.dtype)

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x `(..., in)`; all adapters edit the same x."""
        edited = x
        for name in adapters:
            edited = edited + self.edit(name, x)
        output: torch.Tensor = self.base_layer(edited, *args, **kwargs)
        return output

    def mixed_batch_forward(
        self, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x `(B, ..., in)`: each sample is edited by its own adapter."""
        names = self.names_of_rows(adapter_names, len(x))
        edited = x
        for name in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            own = x.index_select(0, rows)
            edited = edited.index_copy(0, rows, own + self.edit(name, own))
        output: torch.Tensor = self.base_layer(edited, *args, **kwargs)
        return output

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The update as B A: A = Q^T `(r, in)` and B = W P^T `(out, r)`, in fp32 at least."""
        down = SharedLeaf.owned(self.wegeft_down[adapter_name]).weight.detach()
        up = SharedLeaf.owned(self.wegeft_up[adapter_name]).weight.detach()
        weight = self._as_matrix(self.unmerged_weight())
        dtype = torch.promote_types(torch.promote_types(weight.dtype, down.dtype), torch.float32)
        down, up = (leaf.to(weight.device, dtype) for leaf in (down, up))
        return down, weight.to(dtype) @ up

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """W + (W P^T) Q^T, the W in the product being that before any adapter was merged."""
        down, up = self.factors(adapter_name)
        return {"weight": self.get_base_weight().to(down.dtype) + self._as_matrix(up @ down)}

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out, in)`, of what the base keeps; and back. GPT-2's Conv1D keeps `(in, out)`."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight


def check_linear(base_layer: nn.Module) -> None:
    """Raises `TypeError` if the input of the module is no vector that maps could edit."""
    if linear_features(base_layer) is None:
        raise TypeError(
            f"WeGeFT edits what Linear modules (and GPT-2's Conv1D) read, not a {type(base_layer).__name__}."
        )
