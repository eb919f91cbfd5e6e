"""Cutting: a unit leaves as columns of the module that reads it and as rows of those that make it.

    y = W[:, kept] x[kept] + b

is `y = W (m * x) + b` without the zeros, so nothing changes but how sums are rounded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..groups import Group
from .modeling_pruned import LayerConfig, set_parameter


# what modules remember of their size; it shrinks as the number of units does
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "all_head_size", "split_size")
_CHANNEL_COUNTS = ("intermediate_size",)


@torch.no_grad()
def cut(
    model: nn.Module,
    groups: Mapping[str, Group],
    kept: Mapping[str, torch.Tensor],
    *,
    round_to: int = 1,
    uniform: bool = False,
) -> dict[str, torch.Tensor]:
    """Cuts units out of a plain model, in place.

    Some that should go may stay as padding, with zeros in the columns that read them, so that they have no influence:
    a layer keeps one unit at least, and `round_to` and `uniform` keep more.

    Args:
        model: A model without adapters.
        groups: Its groups by name, of `find_groups`.
        kept: The indices of the units that stay, by group; a group that is not named keeps all.
        round_to: Feed-forward blocks keep a multiple of so many channels, or all.
        uniform: All layers of a kind keep the same share of their units: the largest that one of them needs. (Text
            and image layers of one model are different kinds.)

    Returns:
        The indices of the units that are left, padding included, by group.

    Raises:
        ValueError: `kept` names no group or no unit of it, `round_to` is not positive, or a weight is quantised.
    """
    _check(model, groups, kept, round_to)
    counts = {name: len(kept.get(name, range(group.units))) for name, group in groups.items()}
    towers = {name: (group.kind, group.tower) for name, group in groups.items()}
    sizes = _sizes(groups, counts, towers, round_to, uniform)
    stay = {}
    for name, group in groups.items():
        is_kept = torch.zeros(group.units, dtype=torch.bool)
        is_kept[kept.get(name, torch.arange(group.units)).cpu()] = True
        padding = (~is_kept).nonzero().flatten()[: sizes[name] - int(is_kept.sum())]
        columns_of(model.get_submodule(name))[:, _channels(padding, group.width)] = 0
        is_kept[padding] = True
        stay[name] = is_kept.nonzero().flatten()
    rows, columns = slices(groups, stay)
    for name, index in rows.items():
        _take(model.get_submodule(name), index, outputs=True)
    for name, index in columns.items():
        _take(model.get_submodule(name), index, outputs=False)
    for name, group in groups.items():
        for table in group.tables:
            owner, _, key = table.rpartition(".")
            module = model.get_submodule(owner)
            set_parameter(
                module, key, getattr(module, key).index_select(-1, stay[name].to(getattr(module, key).device))
            )
        _update_counts(model, group, len(stay[name]))
    return stay


def slices(
    groups: Mapping[str, Group], stay: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The rows and the columns that modules keep if these units stay, by the name of the module."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for name, group in groups.items():
        for part in group.rows:
            parts[part.module].append((part.start, part.start + _channels(stay[name], part.width)))
    rows = {name: torch.cat([index for _, index in sorted(found, key=_first)]) for name, found in parts.items()}
    return rows, {name: _channels(stay[name], group.width) for name, group in groups.items()}


def _first(part: tuple[int, torch.Tensor]) -> int:
    return part[0]


def _channels(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _check(model: nn.Module, groups: Mapping[str, Group], kept: Mapping[str, torch.Tensor], round_to: int) -> None:
    if not (isinstance(round_to, int) and round_to > 0):
        raise ValueError(f"`round_to` must be a positive integer, got {round_to!r}.")
    for name, units in kept.items():
        if name not in groups:
            raise ValueError(f"`kept` names {name!r}, which is no group of this model.")
        last = groups[name].units - 1
        if len(units.unique()) != len(units) or any(not 0 <= unit <= last for unit in units.tolist()):
            raise ValueError(
                f"The kept units of {name!r} must be different indices from 0 to {last}: {units.tolist()}"
            )
    for name in {part.module for group in groups.values() for part in group.rows} | set(groups):
        refuse_quantised(name, model.get_submodule(name))


def refuse_quantised(name: str, module: nn.Module) -> None:
    """Raises `ValueError` if the module is no Linear or Conv1D with a weight of floating-point numbers."""
    weight = getattr(module, "weight", None)
    plain = isinstance(module, (nn.Linear, Conv1D)) and isinstance(weight, torch.Tensor)
    if not (plain and weight.is_floating_point() and weight.element_size() > 1):  # type: ignore[union-attr]
        raise ValueError(
            f"The weight of {name!r}, a {type(module).__name__}, is quantised and cannot be cut. Dequantise first: load "
            "the base model with `dtype=torch.bfloat16` and no `quantization_config`, put the adapter on it with "
            "`PeftModel.from_pretrained(base, adapter)`, and prune that."
        )


def _sizes(
    groups: Mapping[str, Group],
    kept: Mapping[str, int],
    towers: Mapping[str, tuple[str, str]],
    round_to: int,
    uniform: bool,
) -> dict[str, int]:
    """How many units each group has after the cut; none can have zero, since there are no empty matrices."""
    multiples = {name: round_to if group.kind == "ffn" else 1 for name, group in groups.items()}
    sizes = {name: _rounded(max(kept[name], 1), multiples[name], groups[name].units) for name in groups}
    if uniform:
        for tower in set(towers.values()):
            names = [name for name in groups if towers[name] == tower]
            # in a hierarchical model the share is counted in units of the narrowest layer
            base = min(groups[name].units for name in names)
            share = max(math.ceil(sizes[name] * base / groups[name].units) for name in names)
            share = _rounded(share, multiples[names[0]], base)
            sizes |= {name: math.ceil(share * groups[name].units / base) for name in names}
    return sizes


def _rounded(count: int, multiple: int, most: int) -> int:
    return min(math.ceil(count / multiple) * multiple, most)


def columns_of(module: nn.Module) -> torch.Tensor:
    """The weight as `(outputs, inputs)`, sharing its memory."""
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def _take(module: nn.Module, index: torch.Tensor, outputs: bool) -> None:
    """Leaves these outputs, or inputs, of a linear module."""
    weight: Any = module.weight
    index = index.to(weight.device)
    set_parameter(module, "weight", weight.index_select(int(outputs == isinstance(module, Conv1D)), index))
    if outputs and module.bias is not None:
        set_parameter(module, "bias", module.bias.index_select(0, index))  # type: ignore[operator]


def _update_counts(model: nn.Module, group: Group, units: int) -> None:
    """Adapts what the modules around a group remember of its size, so that they agree with a stock model of it."""
    owner: Any = model.get_submodule(group.attention or group.rows[0].module.rpartition(".")[0])
    for key in _HEAD_COUNTS if group.kind == "heads" else _CHANNEL_COUNTS:
        if hasattr(owner, key):
            setattr(owner, key, getattr(owner, key) // group.units * units)
    is_joint = len({part.module for part in group.rows}) == 1
    if group.kind == "heads" and is_joint and not hasattr(owner, "split_size"):
        # Phi-3 takes where its keys begin from the config
        owner.config = LayerConfig(owner.config, num_attention_heads=units * group.width // group.head_dim)
