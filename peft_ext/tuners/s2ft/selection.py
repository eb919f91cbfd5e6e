"""Which channels are trained: how many of each kind, and by what they are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import dequantised, is_named, stable_generator, unadapted_modules
from .channels import Channels, Layout
from .config import BY_DATA, S2FTConfig


Groups = dict[str, dict[str, Channels]]  # by the key of `ratios`, the channels of its modules by name
Score = Callable[[str, Channels], torch.Tensor]  # of each unit of a module, `(units,)`


def key_of(config: S2FTConfig, name: str, kinds: tuple[str, ...]) -> str | None:
    """The key of `ratios` that a module with these roles goes by; a name goes before a role, a longer name first.

    Raises:
        ValueError: Two roles of one module are in `ratios`.
    """
    assert isinstance(config.ratios, dict)
    named = [key for key in config.ratios if is_named(key, [name])]
    if named:
        return max(named, key=len)
    found = [key for key in config.ratios if key in kinds]
    if len(found) > 1:
        raise ValueError(
            f"{name!r} is one module for {' and '.join(found)}: of these, `ratios` can have one, got {config.ratios!r}."
        )
    return found[0] if found else None


def choose(config: S2FTConfig, groups: Groups, score: Score | None) -> dict[str, torch.Tensor]:
    """The chosen channels of each module, sorted int32; without a score, at random. Modules may get none.

    Heads and single channels are compared by the mean over their channels.

    Raises:
        ValueError: A share leaves no unit.
    """
    chosen: dict[str, torch.Tensor] = {}
    for key, modules in groups.items():
        ratio = config.ratios[key] if isinstance(config.ratios, dict) else config.ratios
        parts = [[name] for name in modules] if config.scope == "per_layer" else [list(modules)]
        for names in parts:
            sizes = [modules[name].units for name in names]
            seed = names[0] if config.scope == "per_layer" else key
            scores = (
                None
                if score is None
                else torch.cat([score(name, modules[name]) / modules[name].width for name in names])
            )
            units = _pick(config, count_of(ratio, key, names, sum(sizes)), sum(sizes), scores, seed)
            end = 0
            for name, size in zip(names, sizes, strict=True):
                start, end = end, end + size
                own = units[(units >= start) & (units < end)] - start
                if len(own):
                    chosen[name] = modules[name].indices(own)
    return chosen


def choose_counted(
    config: S2FTConfig, channels: Mapping[str, Channels], score: Score | None
) -> dict[str, torch.Tensor]:
    """The same where `num_channels_per_module` says how many.

    Raises:
        ValueError: It names another module, more channels than there are, or no whole heads.
    """
    chosen = {}
    for name, count in (config.num_channels_per_module or {}).items():
        check_count(name, count, channels)
        own = channels[name]
        if count % own.width:
            raise ValueError(
                f"`num_channels_per_module` says {count} for {name!r}, which are no whole heads of {own.width} channels."
            )
        scores = None if score is None else score(name, own)
        chosen[name] = own.indices(_pick(config, count // own.width, own.units, scores, name))
    return chosen


def check_count(name: str, count: int, channels: Mapping[str, Channels]) -> None:
    """`ValueError` if a module is no target, or has not so many channels."""
    if name not in channels:
        raise ValueError(
            f"`num_channels_per_module` names {name!r}, which is not among the target modules: it was made for another "
            "model or other `target_modules`."
        )
    there = channels[name].units * channels[name].width
    if count > there:
        raise ValueError(f"`num_channels_per_module` says {count} for {name!r}, which has {there} channels.")


def count_of(ratio: float, key: str, names: list[str], units: int) -> int:
    """How many of the units are chosen, rounded down as published.

    Raises:
        ValueError: None.
    """
    count = math.floor(ratio * units + 1e-9)  # .29 of 100 is 28.999999999999996
    if count == 0:
        where = repr(names[0]) if len(names) == 1 else f"{len(names)} modules"
        raise ValueError(
            f"`ratios` gives {key!r} a share of {ratio}, which leaves none of the {units} channels or heads of {where}: "
            f"give it {1 / units:.2g} or more, or leave it out."
        )
    return count


def _pick(config: S2FTConfig, count: int, units: int, scores: torch.Tensor | None, name: str) -> torch.Tensor:
    if scores is None:
        return torch.randperm(units, generator=stable_generator(config.seed, name))[:count].sort().values
    order = scores.cpu().sort(descending=config.largest, stable=True).indices  # ties go to the first
    return order[:count].sort().values


def weight_squares(name: str, module: nn.Module, side: str) -> torch.Tensor:
    """The sum of the squares of each channel's weights, `(size,)`.

    Raises:
        ValueError: The weight is not loaded, or its quantisation cannot be undone.
    """
    weight = dequantised(name, module)
    if weight.is_meta:
        raise ValueError(
            f"The weight of {name!r} is not loaded, so its channels cannot be chosen by their norm: load the model's "
            "weights first, or take `selection='random'`."
        )
    return squares_by_channel(weight.square(), module, side)


def squares_by_channel(squares: torch.Tensor, module: nn.Module, side: str) -> torch.Tensor:
    """Squares in the shape of a module's weight, summed by channel of one side."""
    is_transposed = isinstance(module, Conv1D)
    return squares.sum(dim=0 if (side == "inputs") != is_transposed else 1, dtype=torch.float64).cpu()


def key_and_kind(config: S2FTConfig, layout: Layout, name: str) -> tuple[str, str]:
    """The key of `ratios` that a target goes by, and as which kind of module it is taken.

    Raises:
        ValueError: There is none.
    """
    kind, roles = layout.kind(name), layout.description.role_of(name)
    if not isinstance(config.ratios, dict):
        return kind, kind
    key = key_of(config, name, roles)
    if key is None:
        raise ValueError(
            f"`ratios` says nothing about the target {name!r}: add {kind!r} to it, or a name, or give one number for "
            f"all targets. It has {', '.join(map(repr, config.ratios))}."
        )
    return key, key if key in roles else kind


def all_channels(groups: Groups) -> dict[str, Channels]:
    """The channels of all modules, by name."""
    return {name: own for modules in groups.values() for name, own in modules.items()}


def chosen_without_data(config: S2FTConfig, model: nn.Module, groups: Groups) -> dict[str, torch.Tensor] | None:
    """The channels that are chosen at random or by weight; `None` if those of a saved adapter will be loaded.

    Raises:
        ValueError: The choice needs data, and nothing says how many channels a saved adapter would have.
    """
    counts = config.num_channels_per_module
    if config.selection in BY_DATA and counts is None:
        raise ValueError(
            f"`selection={config.selection!r}` looks at data first; before `get_peft_model`:\n"
            "    config = peft_ext.calibrate(model, config, dataloader)"
        )
    will_load = config.inference_mode or config.awaits_weights
    if counts is not None and (config.selection in BY_DATA or (config.selection == "weight" and will_load)):
        return None
    modules = dict(unadapted_modules(model))

    def by_weight(name: str, channels: Channels) -> torch.Tensor:
        return channels.by_unit(weight_squares(name, modules[name], channels.side))

    score = by_weight if config.selection == "weight" else None
    return choose(config, groups, score) if counts is None else choose_counted(config, all_channels(groups), score)
