"""Where the maps of a model go, and where what they read can be seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...architectures import Description, describe
from ...channel_norms import ChannelSite
from ...core import backbone_linears, bias_flags, features_of, linear_features, unadapted_modules, warn_of_experts
from .config import SCTConfig


@dataclass(frozen=True)
class Place:
    """Where one map goes.

    Attributes:
        seen: The activations that the map reads.
        width: Their channels.
        reader: The norm whose input must be added to the module's output to get them; `None`: they are that output.
        has_bias: Whether there is a vector c.
    """

    seen: ChannelSite
    width: int
    reader: str | None = None
    has_bias: bool = True

    def count(self, config: SCTConfig) -> int:
        """How many of the channels are tuned.

        Raises:
            ValueError: There are not so many.
        """
        if config.num_channels is not None and config.num_channels > self.width:
            raise ValueError(
                f"`num_channels` is {config.num_channels}, and {self.seen.module!r} has {self.width} channels: lower "
                "it, or leave it out for an eighth of them."
            )
        return config.num_channels or max(1, self.width // 8)


def default_names(config: SCTConfig, model: nn.Module) -> set[str]:
    """The modules that the maps of a site go on if the user names none.

    Raises:
        ValueError: The model has none that are known, or one module makes queries and values.
    """
    if config.site == "attn":
        return set(streams(model))
    description = describe(model)
    if config.site == "mlp":
        warn_of_experts(config, model)
        return set(description.modules(("down",))) & backbone_linears(model)
    for block in description.blocks:
        for attention in block.attention:
            if attention.q == attention.v:
                raise ValueError(
                    f"{attention.q!r} makes queries, keys and values in one: `site='qkv'` has a map each for two of "
                    "them. Use `site='mlp'`, or name the module in `target_modules` for one map on all it makes."
                )
    return set(description.modules(("q", "v"))) & backbone_linears(model)


def places_of(config: SCTConfig, model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """The places on the modules of these names.

    Raises:
        ValueError: At `site="attn"`, a module is none whose output joins the residual stream.
        TypeError: At another, it is none that is linear.
    """
    names = list(names)
    if config.site == "attn":
        found = streams(model)
        if unknown := [name for name in names if name not in found]:
            raise ValueError(
                f"At `site='attn'` a map goes where the attention of a block has joined the residual stream, and "
                f"{unknown[0]!r} is no such module; {next(iter(found))!r} is. Leave `target_modules` out, and choose "
                "layers with `layers_to_transform`."
            )
        return {name: found[name] for name in names}
    modules, skips = dict(unadapted_modules(model)), _Skips(describe(model), model)
    flags: dict[str, str] | None = None
    found = {}
    for name in names:
        features = linear_features(modules[name])
        if features is None:
            raise TypeError(
                f"Target module {name!r}: at `site={config.site!r}` SCT changes what Linear modules (and GPT-2's "
                f"Conv1D) put out, this is a {type(modules[name]).__name__}. Leave it out of `target_modules`, or list "
                "it in `exclude_modules`."
            )
        has_bias = getattr(modules[name], "bias", None) is not None or not isinstance(model, PreTrainedModel)
        if not has_bias:
            flags = bias_flags(model) if flags is None else flags
        has_bias = has_bias or name in (flags or ())
        found[name] = Place(ChannelSite(name, "outputs", skips.of(name), by_class=True), features[1], None, has_bias)
    return found


def streams(model: nn.Module) -> dict[str, Place]:
    """By the module that the map goes on, the places where the residual stream has just got the attention of a block.

    Raises:
        ValueError: It is not known where they are.
    """
    description, modules = describe(model), dict(unadapted_modules(model))
    skips = _Skips(description, model)
    found = {}
    for block in description.blocks:
        for attention in block.attention:
            names = attention.names
            seen = f"{block.name}.{names.stream}"
            joins = f"{block.name}.{names.joins}" if names.joins else attention.o
            reader = f"{block.name}.{names.enters or names.norm}"
            if not names.stream or names.is_cross or not {seen, joins} <= modules.keys():
                continue
            width, side = features_of(modules[seen])[0], "outputs" if names.norm == "" else "inputs"
            place = ChannelSite(seen, side, skips.of(block.name), by_class=True)
            if side == "outputs":
                found[seen] = Place(place, width)
            else:
                found[joins] = Place(place, width, reader)
            break
    if not found:
        raise ValueError(
            f"It is not known where attention joins the residual stream in a model of type {description.model_type!r}, "
            "or it does so in another way than by adding: use `site='mlp'` or `site='qkv'`, which can be merged, too."
        )
    return found


class _Skips:
    """How many rows at the beginning stand for a whole image, and do not count; by module."""

    def __init__(self, description: Description, model: nn.Module) -> None:
        architecture, config = description.architecture, getattr(model, "config", None)
        self.rows = architecture.leading_rows if architecture is not None else 0
        self.texts = architecture.causal_towers if architecture is not None else ()
        vision: Any = getattr(config, "vision_config", config)
        if self.rows:
            self.rows += getattr(vision, "num_register_tokens", 0)

    def of(self, name: str) -> int:
        """Of the module of this name."""
        return 0 if set(self.texts) & set(name.split(".")) else self.rows
