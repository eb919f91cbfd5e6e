"""Which modules the stock class of a model would load with a bias: what a merge may add without its being lost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


# config flags with which a transformers class gives a bias to modules that have none by default
BIAS_FLAGS = ("attention_bias", "mlp_bias")


def _configs(config: Any) -> list[PreTrainedConfig]:
    return [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]


def bias_flags(model: nn.Module) -> dict[str, str]:
    """Which config flag, now off, would give which module a bias: `{"model.layers.0.self_attn.q_proj": "attention_bias"}`.

    The architecture itself is asked: its class is built without memory, once as it is and once with each flag.
    """
    if not isinstance(model, PreTrainedModel):
        return {}

    def biased(flag: str | None) -> set[str]:
        config = copy.deepcopy(model.config)
        for part in _configs(config):
            if flag is not None and getattr(part, flag, None) is False:
                setattr(part, flag, True)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            twin = type(model)(config)
        return {name for name, module in twin.named_modules() if getattr(module, "bias", None) is not None}

    off = [flag for flag in BIAS_FLAGS if any(getattr(part, flag, None) is False for part in _configs(model.config))]
    if not off:
        return {}
    without = biased(None)
    return {name: flag for flag in off for name in biased(flag) - without}


def set_bias_flags(model: nn.Module) -> None:
    """Turns on the config flags of modules that have got a bias; the others under the same flag get a zero bias."""
    flags = bias_flags(model)
    governed = {name: model.get_submodule(name) for name in flags}
    needed = {flags[name] for name, module in governed.items() if module.bias is not None}
    for flag in needed:
        for part in _configs(model.config):
            if getattr(part, flag, None) is False:
                setattr(part, flag, True)
    for name, module in governed.items():
        if flags[name] in needed and module.bias is None:
            like = next(
                other.bias for other in governed.values() if other.bias is not None
            )  # weights may be quantised
            zeros = torch.zeros(module.out_features, device=like.device, dtype=like.dtype)
            module.bias = nn.Parameter(zeros, requires_grad=False)
