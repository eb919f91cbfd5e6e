"""WeGeFT on a whole model: its targets, and which of them share maps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures import describe
from ...core import ExtLayer, ExtModel, backbone_linears, linear_features, matched_targets
from .config import WeGeFTConfig
from .layer import SHARED, Reader, WeGeFTLayer, WeGeFTLinear, check_linear


class WeGeFTModel(ExtModel):
    """Puts the maps on the targets of a model; used through `get_peft_model(model, WeGeFTConfig(...))`."""

    prefix = "wegeft_"
    tuner_layer_cls = WeGeFTLayer

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """Queries and values, as published for texts; on images the output projections of the attention.

        Raises:
            ValueError: The table of architectures does not say which these are.
        """
        reads_images = getattr(model, "main_input_name", "") == "pixel_values"
        named = describe(model).modules(("o",) if reads_images else ("q", "v"))
        return set(named) & backbone_linears(model)

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is no linear module."""
        if isinstance(base_layer, Reader):
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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model.

        Which modules it is on is read from the config, also where PEFT would read it from a file's keys: of modules
        that share maps these say nothing.
        """
        super().inject_adapter(model, adapter_name, *args, **{**kwargs, "state_dict": None})

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """Of a module that shares its maps, puts these on the model first, if they are not there."""
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        group = None if isinstance(base_layer, Reader) else group_of(name, base_layer, config)
        if group is not None:
            groups = getattr(tuner.model, SHARED, None)
            if groups is None:
                groups = nn.ModuleDict()
                setattr(tuner.model, SHARED, groups)
            maps = groups[group] if group in groups else Reader(width_of(base_layer))
            if not (isinstance(maps, WeGeFTLayer) and adapter_name in maps.wegeft_down):
                layer = super().inject_layer(tuner, config, adapter_name, maps, f"{SHARED}.{group}")
                groups[group] = maps if layer is None else layer
        return super().inject_layer(tuner, config, adapter_name, target, name)

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The shared maps of this module, if it has no own ones."""
        if isinstance(base_layer, Reader):
            return {}
        group = group_of(name, base_layer, config)
        return {"maps": None if group is None else getattr(tuner.model, SHARED)[group]}

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The same updates, one for each module, as products of two matrices."""
        config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr, index]
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, WeGeFTLinear) and module.present([adapter_name])
        }
        transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.r,
            lora_dropout=config.dropout,
            target_modules=list(layers),
            fan_in_fan_out=transposed,
        )
        return lora, {name: layer.factors(adapter_name) for name, layer in layers.items()}


def group_of(name: str, module: nn.Module, config: WeGeFTConfig) -> str | None:
    """The group of modules with which this one shares its maps, a name without dots; `None` if with no other."""
    if config.share == "none":
        return None
    names = [part for part in name.split(".") if not part.isdecimal()] if config.share == "target" else ["all"]
    return "-".join([*names, str(width_of(module))])


def width_of(module: nn.Module) -> int:
    """How long the vectors are that a linear module reads."""
    check_linear(module)
    features = linear_features(module)
    assert features is not None
    return features[0]
