"""The weighted sum of sparse adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core import ExtModel, Support, carry_over
from ...core.copies import keeping_configs
from .config import SparseFTConfig
from .deltas import deltas


def add_weighted_adapter(
    tuner: ExtModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See [`SparseFTModel.add_weighted_adapter`]."""
    if combination_type not in ("linear", "ties"):
        raise ValueError(f"`combination_type` must be 'linear' or 'ties', got {combination_type!r}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: give one weight per adapter.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"An adapter named {adapter_name!r} exists: choose another name, or delete it first.")
    sparse = {name for name, config in tuner.peft_config.items() if isinstance(config, SparseFTConfig)}
    if missing := [name for name in adapters if name not in sparse]:
        raise ValueError(f"There is no sparse adapter named {missing[0]!r} on this model.")
    parts = [tensors_of(tuner.model, name) for name in adapters]
    combined = {}
    for module in dict.fromkeys(key for part in parts for key in part):
        own = [(part[module], weight) for part, weight in zip(parts, weights, strict=True) if module in part]
        combined[module] = combine([delta for delta, _ in own], [weight for _, weight in own], combination_type)
    carry = carry_over(tuner.model, tuner.peft_config, adapters)
    config = _of_the_sum(copy.deepcopy(tuner.peft_config[adapters[0]]), combined)
    with keeping_configs(tuner.model):
        tuner.peft_config[adapter_name] = config
        tuner.inject_adapter(tuner.model, adapter_name)
    set_values(tuner.model, adapter_name, combined)
    new: Any = tuner.peft_config[adapter_name]
    carry(adapter_name, new)
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def _of_the_sum(config: Any, combined: Mapping[str, Support]) -> SparseFTConfig:
    """The config of one of the adapters, made that of their sum: on the modules that have a support, and no others."""
    config.filled_in = None  # what is said here is asked for, also where it equals what was filled in
    config.target_modules = {name.removesuffix(".bias") for name in combined}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.selection, config.density, config.num_tunable_weights = "given", None, None
    config.support, config.num_weights_per_module = None, None
    config.threshold, config.reselect_at = None, None
    return config.use_support({name: indices for name, (indices, _) in combined.items()})


def combine(parts: Sequence[Support], weights: Sequence[float], combination_type: str = "linear") -> Support:
    """The weighted sum of sparse deltas on one weight, on the union of their indices.

    With `"ties"`, each place keeps only the values whose sign is that of the weighted sum there, and becomes their
    weighted mean: values that contradict each other no longer cancel.
    """
    union = torch.cat([indices.long() for indices, _ in parts]).unique()
    rows = torch.zeros(len(parts), len(union), dtype=torch.float64, device=union.device)
    for row, (indices, values), weight in zip(rows, parts, weights, strict=True):
        row[torch.searchsorted(union, indices.long())] = weight * values.double()
    total = rows.sum(0)
    if combination_type == "ties":
        agrees = (rows.sign() == total.sign()) & (rows != 0)
        strengths = torch.tensor(weights, dtype=torch.float64, device=union.device).abs().unsqueeze(1)
        strength = (agrees * strengths).sum(0)
        total = torch.where(strength > 0, (rows * agrees).sum(0) / strength.clamp(min=1e-300), 0.0)
    return union, total.float()


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Support]:
    return {name: (leaf.indices().long(), leaf().detach()) for name, leaf in deltas(model, adapter_name)}


@torch.no_grad()
def set_values(model: nn.Module, adapter_name: str, tensors: Mapping[str, Support]) -> None:
    for name, leaf in deltas(model, adapter_name):
        leaf.weight.copy_(tensors[name][1])
