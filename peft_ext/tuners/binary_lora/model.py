"""Bi-LoRA on a whole model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ...architectures import describe
from ...core import ExtLayer, ExtModel, layers_by_name, linear_features, warn_of_experts
from .layer import BinaryLoraLinear


class BinaryLoraModel(ExtModel):
    """Puts low-rank updates of few bits on the targets; used through `get_peft_model(model, BinaryLoraConfig(...))`."""

    prefix = "binary_low_rank_"
    tuner_layer_cls = BinaryLoraLinear

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """Queries and values of every attention, as published.

        Raises:
            ValueError: The table of architectures does not know the model.
        """
        warn_of_experts(config, model)
        return set(describe(model).modules(("q", "v")))

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`BinaryLoraLinear`, or `TypeError` for what is not linear."""
        if linear_features(base_layer) is None:
            raise TypeError(f"low-rank updates go on Linear modules, this is a {type(base_layer).__name__}.")
        return BinaryLoraLinear

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The quantised factors as a LoRA of the same rank."""
        config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr, index]
        layers = layers_by_name(model, BinaryLoraLinear, adapter_name)
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.scale * config.r,
            lora_dropout=config.dropout,
            target_modules=list(layers),
            fan_in_fan_out=any(layer.is_transposed for layer in layers.values()),
        )
        with torch.no_grad():
            return lora, {name: layer.matrices(adapter_name) for name, layer in layers.items()}
