"""The layer: LoRA on a linear module, and a mask on its input."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import Dropouts, ExtLayer, adapted_in_groups, linear_features
from ...groups import Group
from .config import MaskLoraConfig
from .distillation import Distillation
from .gate import MaskGate


class Down(nn.Linear):
    """A of LoRA, with a mask on its columns instead of on its input, so that the input is kept once for both."""

    def __init__(self, inputs: int, config: MaskLoraConfig) -> None:
        super().__init__(inputs, config.r, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.scale = config.scale

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, cast: bool = True, dropout: float = 0.0
    ) -> torch.Tensor:
        """x `(..., inputs)`, mask `(inputs,)`; returns `scale * A (mask * dropout(x))`, `(..., r)`."""
        x = F.dropout(x.to(self.weight.dtype) if cast else x, dropout)
        weight = self.weight * self.scale
        return F.linear(x, weight if mask is None else weight * mask.to(weight.dtype))


class MaskLoraLayer(ExtLayer):
    """`y = W (m * x) + b + scale B A (m * x)`; without a group of its own m is one, and some layers have no LoRA."""

    adapter_layer_names = ("mask_pruning_down", "mask_pruning_up", "mask_pruning_gate")
    other_param_names = ("dropout",)
    supports_mixed_batches = True
    mask_pruning_down: nn.ModuleDict
    mask_pruning_up: nn.ModuleDict
    mask_pruning_gate: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.dropout = Dropouts(self.training)

    def update_layer(
        self, adapter_name: str, config: MaskLoraConfig, *, group: Group | None, with_lora: bool, logits: Any
    ) -> None:
        """Puts LoRA on the layer, the gate of `group` with these first `logits`, or both."""
        features = linear_features(self.get_base_layer())
        assert features is not None
        if with_lora:
            self.mask_pruning_down[adapter_name] = Down(features[0], config)
            self.dropout.put(adapter_name, config.lora_dropout)
            up = nn.Linear(config.r, features[1], bias=False)
            nn.init.zeros_(up.weight)
            self.mask_pruning_up[adapter_name] = up
        if group is not None:
            self.mask_pruning_gate[adapter_name] = MaskGate(group, config.mask_lr_ratio, logits)
        self.finish_update(adapter_name, config)

    def leave(self, model: nn.Module) -> None:
        Distillation.leave(model)

    def present(self, adapters: Any) -> list[str]:
        """Those of `adapters` that this layer has."""
        return [name for name in adapters if name in self.mask_pruning_down or name in self.mask_pruning_gate]

    def _columns(self, gate: MaskGate, mask: torch.Tensor) -> torch.Tensor:
        """The mask of units as one of input features."""
        return mask if gate.group.width == 1 else mask.repeat_interleave(gate.group.width)

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # merged one after the other, an adapter's LoRA is masked by its own mask and by those that come later
        mask: torch.Tensor | None = None
        added: list[tuple[str, torch.Tensor | None]] = []
        for name in reversed(adapters):
            if name in self.mask_pruning_gate:
                gate = self.mask_pruning_gate[name]
                units = gate()
                if units is not None:
                    columns = self._columns(gate, units)  # type: ignore[arg-type]
                    mask = columns if mask is None else mask * columns
            if name in self.mask_pruning_down:
                added.append((name, mask))
        output: torch.Tensor = self.base_layer(x if mask is None else x * mask.to(x.dtype), *args, **kwargs)
        for name, seen in reversed(added):
            low = self.mask_pruning_down[name](x, seen, self.cast_input_dtype_enabled, self.dropout.acting(name))
            branch = self.mask_pruning_up[name](low)
            output = output + branch.to(output.dtype)
        return output

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Sample `i` is masked and adapted by `adapter_names[i]` alone."""
        return adapted_in_groups(self, adapter_names, *args, **kwargs)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The weight with LoRA in it and zeros in the columns that the mask of evaluation cuts."""
        weight = self.get_base_weight()
        transposed = isinstance(self.get_base_layer(), Conv1D)
        weight = weight.T if transposed else weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if adapter_name in self.mask_pruning_down:
            down, up = self.mask_pruning_down[adapter_name], self.mask_pruning_up[adapter_name]
            weight = weight + up.weight.to(weight.dtype) @ (down.weight * down.scale).to(weight.dtype)  # type: ignore
        if adapter_name in self.mask_pruning_gate:
            gate = self.mask_pruning_gate[adapter_name]
            columns = self._columns(gate, gate.hard())  # type: ignore[arg-type, operator]
            # what is cut is zero, also where it was not finite
            weight = (weight * columns.to(weight.dtype)).masked_fill(columns == 0, 0)
        return {"weight": weight.T.contiguous() if transposed else weight}


class MaskLoraLinear(MaskLoraLayer):
    """The same on a linear module; PEFT's "all-linear" finds adapted modules by this word in their class's name."""
