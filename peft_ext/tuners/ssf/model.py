"""SSF on a whole model: its targets, and which biases a merged model can carry."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...architectures import architecture_of
from ...core import (
    ExtLayer,
    ExtModel,
    backbone_modules,
    bias_flags,
    linear_out_features,
    set_bias_flags,
    warn_of_experts,
)
from .config import SSFConfig
from .layer import SSFLayer, SSFLinear
from .sites import is_operation, site_of


class SSFModel(ExtModel):
    """Puts scale and shift on the targets of a model; used through `get_peft_model(model, SSFConfig(...))`."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """Every operation of the backbone, as published: Linear modules, convolutions and norms.

        No embedding table, no module whose weight is computed from others, which no merge could change, and nothing
        that the heads of the architecture do not read. Experts that are no modules are left out, and a warning says so.

        Raises:
            ValueError: There are none, or the model is none of transformers, so that its head is not known.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(  # noqa: TRY004  # what PEFT raises where there is no default
                f"Please specify `target_modules` in `peft_config`: SSF has no default targets for this "
                f"{type(model).__name__}, which is no model of transformers, so what its head is is not known."
            )
        architecture = architecture_of(getattr(model.config, "model_type", None))
        unread = None
        if architecture is not None:
            unread = architecture.unread_by.get(type(model).__name__, architecture.unread)
        names = {
            name
            for name, module in backbone_modules(model)
            if is_operation(module) and not (unread and re.fullmatch(unread, name))
        }
        if not names:
            raise ValueError(
                f"SSF has no default targets on this {type(model).__name__}: outside its head it has no Linear module, "
                "no convolution and no norm. Name modules in `target_modules`."
            )
        warn_of_experts(config, model)
        return names

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`SSFLinear` for dense layers, `SSFLayer` for the rest; `TypeError` for what SSF cannot adapt."""
        site_of(base_layer)
        is_linear = linear_out_features(base_layer) is not None
        return SSFLinear if is_linear else SSFLayer

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: SSFConfig) -> dict[str, Any]:
        """Whether this site gets a shift, and what, if anything, stands in the way of merging it."""
        flags = tuner.__dict__.setdefault("_ssf_bias_flags", None)
        if flags is None:
            flags = tuner.__dict__["_ssf_bias_flags"] = bias_flags(tuner.model)
        bias_key = site_of(base_layer).bias_key
        carries = bias_key == "weight" or getattr(base_layer, "bias", None) is not None
        carries = carries or (bias_key == "bias" and name in flags)
        shift = carries if config.shift is None else config.shift
        return {"shift": shift, "obstacle": cls._obstacle(tuner.model, name, base_layer, shift and not carries)}

    @staticmethod
    def _obstacle(model: nn.Module, name: str, base_layer: nn.Module, shift_is_lost: bool) -> str | None:
        kind = type(base_layer).__name__
        remedy = "Train with `shift=None`, which shifts only where a merged model can carry it, or:"
        if shift_is_lost and site_of(base_layer).bias_key is None:
            return f"it shifts {name!r}, and a {kind} has no place for a shift. {remedy}"
        if not isinstance(model, PreTrainedModel):
            return None  # whoever writes the class can load what merging adds
        if shift_is_lost:
            return (
                f"it shifts {name!r}, a {kind} without bias, and {type(model).__name__} has no config flag that "
                f"gives it one, so loading the merged model would drop the shift without an error. {remedy}"
            )
        if getattr(base_layer, "weight", True) is None:
            return (
                f"{name!r} is a {kind} without affine parameters, so loading the merged model would drop the scale "
                "without an error."
            )
        return None

    @classmethod
    def finish_merge(cls, model: nn.Module) -> None:
        """Sets the config flags of the biases that the merge has added, so that the stock class loads them."""
        set_bias_flags(model)
