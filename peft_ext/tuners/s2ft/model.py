"""S2FT on a whole model: its targets, and the choice of channels over all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...channel_norms import ChannelSite
from ...core import (
    ExtConfig,
    ExtLayer,
    ExtModel,
    Row,
    backbone_linears,
    layer_and_type,
    layers_by_name,
    linear_features,
    matched_targets,
    warn_of_experts,
    weight_of,
)
from ...lora_files import lora_of
from .channels import Channels, Layout
from .config import BY_DATA, S2FTConfig
from .layer import S2FTLinear
from .selection import (
    Groups,
    all_channels,
    check_count,
    choose,
    choose_counted,
    chosen_without_data,
    key_and_kind,
    key_of,
    squares_by_channel,
    weight_squares,
)


class S2FTModel(ExtModel):
    """Trains chosen channels of a model; used through `get_peft_model(model, S2FTConfig(...))`."""

    prefix = "s2ft_"
    tuner_layer_cls = S2FTLinear

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what the method cannot adapt."""
        if linear_features(base_layer) is None:
            raise TypeError(f"S2FT trains channels of Linear modules, this is a {type(base_layer).__name__}.")
        return S2FTLinear

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """The linear modules of the backbone that `ratios` names, by role or name; for a number, those of `"down"`.

        Raises:
            ValueError: A key of `ratios` names none.
        """
        warn_of_experts(config, model)
        layout, linears = Layout(model), backbone_linears(model)
        roles = {name: layout.description.role_of(name) for name in linears}
        if not isinstance(config.ratios, dict):
            config = S2FTConfig(ratios={"down": config.ratios})
        by_key: dict[str, set[str]] = {key: set() for key in config.ratios}
        for name in linears:
            key = key_of(config, name, roles[name])
            if key is not None:
                by_key[key].add(name)
        for key, names in by_key.items():
            if not names:
                there = sorted({role for own in roles.values() for role in own})
                raise ValueError(
                    f"`ratios` names {key!r}, which is no kind or name of a Linear module of this "
                    f"{type(model).__name__}: it has {', '.join(there) or 'no kinds that are known'}. Name modules, "
                    "for example `ratios={'fc2': 0.03}`."
                )
        return set().union(*by_key.values())

    @classmethod
    def channels(cls, config: Any, model: nn.Module) -> Groups:
        """The channels of the targets by the key of `ratios` that they go by, in the order of the model.

        Raises:
            ValueError: `ratios` has nothing for a target.
        """
        layout = Layout(model)
        groups: Groups = {}
        for name, _ in matched_targets(config, model):
            key, kind = key_and_kind(config, layout, name)
            groups.setdefault(key, {})[name] = layout.channels(name, kind)
        return groups

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Also chooses the channels, while the model is still as it was.

        Raises:
            ValueError: The shares or numbers do not fit the model, or the choice needs data.
        """
        assert isinstance(config, S2FTConfig)
        cls.check_modules(config, model)
        groups = cls.channels(config, model)
        channels = all_channels(groups)
        if not channels:
            return  # PEFT itself says so
        if config.support is None:
            config.support = chosen_without_data(config, model, groups)
        if config.support is not None:
            config.num_channels_per_module = {name: len(indices) for name, indices in config.support.items()}
        for name, count in (config.num_channels_per_module or {}).items():
            check_count(name, count, channels)
        config.sides_per_module = {name: channels[name].side for name in config.num_channels_per_module or ()}
        config.channels = channels

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The channels of the module, how many of them are chosen, and which if that is known."""
        return {
            "channels": config.channels[name],
            "k": config.num_channels_per_module[name],
            "indices": None if config.support is None else config.support[name],
        }

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Forgets what only the injection had to know."""
        config.channels = None

    @classmethod
    def inject_layer(
        cls, tuner: Any, config: ExtConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """As for every method, but modules of which no channel was chosen are left alone."""
        assert isinstance(config, S2FTConfig)
        if name not in (config.num_channels_per_module or {}):
            return None
        return super().inject_layer(tuner, config, adapter_name, target, name)

    # Choosing by data

    @classmethod
    def kind_for(cls, config: Any) -> str:
        """Activations or gradients, as `selection` says.

        Raises:
            ValueError: It looks at no data.
        """
        if config.selection not in BY_DATA:
            raise ValueError(
                f"`selection={config.selection!r}` looks at no data: give the config to `get_peft_model` as it is, or "
                f"choose one of {', '.join(BY_DATA)}."
            )
        return "sensitivity" if config.selection == "gradient" else "activation"

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the target modules, of whose gradients the squares are summed."""
        return cls.target_weights(config, model)

    @classmethod
    def channel_sites(cls, config: Any, model: nn.Module) -> dict[str, Any]:
        """What goes into, or comes out of, the target modules."""
        config = cls._resolved(config, model)
        return {name: ChannelSite(name, own.side) for name, own in all_channels(cls.channels(config, model)).items()}

    @classmethod
    def _resolved(cls, config: S2FTConfig, model: nn.Module) -> S2FTConfig:
        """A copy whose `target_modules` are full names."""
        own = copy.copy(config)
        own.target_modules = set(cls.resolved_targets(config, model))
        own.layers_to_transform = own.layers_pattern = None
        return own

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """Chooses the channels by what was measured."""
        modules = cls.resolved_targets(config, model)

        def score(name: str, channels: Channels) -> torch.Tensor:
            if config.selection == "gradient":
                shape = weight_of(modules[name]).shape
                squares = squares_by_channel(scores.of(name).view(shape), modules[name], channels.side)
                return channels.by_unit(squares)
            norms = channels.by_unit(scores.of(name).square())
            if config.selection == "product":
                norms = norms * channels.by_unit(weight_squares(name, modules[name], channels.side))
            return norms

        groups = cls.channels(cls._resolved(config, model), model)
        if config.num_channels_per_module is not None and config.support is None:  # given by hand
            config.support = choose_counted(config, all_channels(groups), score)
        else:
            config.support = choose(config, groups, score)
        config.num_channels_per_module = {name: len(indices) for name, indices in config.support.items()}

    @classmethod
    def calibration_report(cls, config: Any, full: bool) -> tuple[str, list[Row]]:
        """How many channels of each module, or of each name of module, were chosen."""
        counts: dict[str, int] = config.num_channels_per_module
        if full:
            return "Chosen channels", [{"module": name, "channels": count} for name, count in counts.items()]
        totals: dict[str, Row] = {}
        for name, count in counts.items():
            kind = layer_and_type(name)[1] or name
            row = totals.setdefault(kind, {"modules": kind, "with channels": 0, "channels": 0})
            row["with channels"] += 1
            row["channels"] += count
        return "Chosen channels", list(totals.values())

    # What can be made of an adapter

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The same function: of each pair one matrix is trained, and the other selects the channels; r is their number."""
        layers = layers_by_name(model, S2FTLinear, adapter_name)
        products = {name: layer.block(adapter_name).low_rank() for name, layer in layers.items()}
        is_transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        return lora_of({name: len(down) for name, (down, _) in products.items()}, is_transposed), products
