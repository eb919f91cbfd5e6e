"""Channel gains: y = (1 + g) * (W x + b), with one trained gain g for each output channel of a Linear module.

Merged, W' = diag(1 + g) W and b' = (1 + g) b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.core import (
    About,
    Adapter,
    AdapterVector,
    Column,
    ExtConfig,
    ExtLayer,
    ExtModel,
    Reading,
    Site,
    Vector,
    backbone_linears,
    is_admitted,
    linear_out_features,
    register_method,
)


@dataclass
class GainConfig(ExtConfig):
    """Has the fields of every method and none of its own. `init_weights=True` starts at the identity, g = 0."""

    METHOD = "GAIN"


class GainLinear(ExtLayer):
    """A Linear module with a gain for each of its outputs; "Linear" in the name lets PEFT's "all-linear" find it."""

    adapter_layer_names = ("gain_vector",)
    gain_vector: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: GainConfig, **kwargs: Any) -> None:
        """Adds the gains of one adapter, `(outputs,)`."""
        gain = AdapterVector(linear_out_features(self.get_base_layer()) or 0, offset=1.0)
        if not config.init_weights:
            nn.init.normal_(gain.weight, std=0.3)
        self.gain_vector[adapter_name] = gain
        self.finish_update(adapter_name, config)

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x `(..., inputs)`; returns `(..., outputs)`."""
        output = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            output = (output * self.gain_vector[name]()).to(output.dtype)
        return output

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Weight and bias, scaled row by row."""
        base: Any = self.get_base_layer()
        gain = self.gain_vector[adapter_name]()
        weight = self.get_base_weight()
        merged = {"weight": weight * (gain if isinstance(base, Conv1D) else gain[:, None])}
        return merged if base.bias is None else merged | {"bias": base.bias * gain}


class GainModel(ExtModel):
    """Puts gains on the Linear modules of the backbone."""

    prefix = "gain_"
    tuner_layer_cls = GainLinear

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is not linear."""
        if linear_out_features(base_layer) is None:
            raise TypeError(f"Gains are for Linear modules, not for a {type(base_layer).__name__}.")
        return GainLinear

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], model: nn.Module) -> Any:
        """All Linear modules but the heads."""
        if config.target_modules is None:  # full names pass PEFT's check of `layers_to_transform`, so it is asked here
            config.target_modules = {name for name in backbone_linears(model) if is_admitted(config, name)}
        return config


class GainAbout(About):
    """How the tensors are read."""

    columns = (Column("gain_mean", "g mean", "{:+.4f}"),)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The mean of g; as an update, the vector itself."""
        gain = site.leaves["vector.weight"].double()
        return {"gain_mean": gain.mean().item()}, {"gain": Vector(gain)}


register_method("gain", GainConfig, GainModel, about=GainAbout("Channel gains", "trains a gain for every output."))
