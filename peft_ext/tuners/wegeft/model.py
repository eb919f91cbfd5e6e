"""WeGeFT on a whole model: its targets, and which of them share maps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures import describe
from ...core import (
    ExtLayer,
    SharingModel,
    StandIn,
    backbone_linears,
    group_key,
    layers_by_name,
    linear_features,
    matched_targets,
    warn_of_experts,
)
from ...lora_files import lora_of
from .config import WeGeFTConfig
from .layer import SHARED, WeGeFTLayer, WeGeFTLinear, check_linear


class WeGeFTModel(SharingModel):
    """Puts the maps on the targets of a model; used through `get_peft_model(model, WeGeFTConfig(...))`."""

    prefix = "wegeft_"
    tuner_layer_cls = WeGeFTLayer
    shared = SHARED

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """Queries and values, as published for texts; on images the output projections of the attention.

        Raises:
            ValueError: The table of architectures does not say which these are.
        """
        reads_images = getattr(model, "main_input_name", "") == "pixel_values"
        warn_of_experts(config, model)
        named = describe(model).modules(("o",) if reads_images else ("q", "v"))
        return set(named) & backbone_linears(model)

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is no linear module."""
        if isinstance(base_layer, StandIn):
            return WeGeFTLayer
        check_linear(base_layer)
        return WeGeFTLinear

    @classmethod
    def check_targets(cls, config: WeGeFTConfig, model: nn.Module) -> None:
        """Raises `ValueError`, too, if targets of unequal width are to share one pair of maps."""
        super().check_targets(config, model)
        if config.share != "all":
            return
        widths: dict[int, list[str]] = defaultdict(list)
        for name, module in matched_targets(config, model):
            widths[width_of(module)].append(name)
        if len(widths) > 1:
            found = ", ".join(f"{width} (such as {names[0]!r})" for width, names in sorted(widths.items()))
            raise ValueError(
                f"With `share='all'` one pair of maps edits what all targets read, and these read vectors of unequal "
                f"width: {found}. Use `share='target'`, or leave the targets of other widths out."
            )

    @classmethod
    def group_of(cls, name: str, base_layer: nn.Module, config: Any) -> str | None:
        """By `share`; modules of unequal width never share maps."""
        if config.share == "none":
            return None
        names = [part for part in name.split(".") if not part.isdecimal()] if config.share == "target" else ["all"]
        return group_key([*names, str(width_of(base_layer))])

    @classmethod
    def stand_in(cls, base_layer: nn.Module) -> StandIn:
        """Reads vectors of the modules' width."""
        return StandIn(width_of(base_layer))

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The shared maps of this module, if it has no own ones."""
        if isinstance(base_layer, StandIn):
            return {}
        return {"maps": cls.shared_layer(tuner.model, name, base_layer, config)}

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The same updates, one for each module, as products of two matrices."""
        config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr, index]
        layers = layers_by_name(model, WeGeFTLinear, adapter_name)
        transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        lora = lora_of(dict.fromkeys(layers, config.r), transposed, lora_dropout=config.dropout)
        return lora, {name: layer.factors(adapter_name) for name, layer in layers.items()}


def width_of(module: nn.Module) -> int:
    """How long the vectors are that a linear module reads."""
    check_linear(module)
    features = linear_features(module)
    assert features is not None
    return features[0]
