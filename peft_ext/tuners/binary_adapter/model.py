"""Bottleneck adapters on a whole model: where they go, and what they read."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ...architectures import BlockFeedForward, describe
from ...core import ExtLayer, ExtModel, linear_features, listener_between, matched_targets, warn_of_experts
from .config import BinaryAdapterConfig
from .layer import BinaryAdapterLinear


class BinaryAdapterModel(ExtModel):
    """Puts bottlenecks on the targets of a model; used through `get_peft_model(model, BinaryAdapterConfig(...))`."""

    prefix = "binary_adapter_"
    tuner_layer_cls = BinaryAdapterLinear

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """The last module of every feed-forward part.

        Raises:
            ValueError: The table of architectures does not know the model.
        """
        names = set(describe(model).modules(("down",)))
        warn_of_experts(config, model)
        return names

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`BinaryAdapterLinear`, or `TypeError` for what is not linear."""
        if linear_features(base_layer) is None:
            raise TypeError(f"bottleneck adapters go on Linear modules, this is a {type(base_layer).__name__}.")
        return BinaryAdapterLinear

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module) -> None:
        """Raises `ValueError`, too, if `before_norm` is set, and a norm is not known."""
        super().check_targets(config, model)
        if config.site == "sequential" or not config.before_norm:
            return
        parts = feed_forward_parts(model)
        for name, _ in matched_targets(config, model):
            if name not in parts or parts[name].norm is None:
                raise ValueError(
                    f"`before_norm=True`, but the table of architectures names no norm in front of {name!r}: leave "
                    "`before_norm` out, and the adapter reads what the feed-forward part reads."
                )

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: BinaryAdapterConfig) -> dict[str, Any]:
        """What the adapter on the module of this name reads, and how many features that has."""
        inputs, outputs = linear_features(base_layer) or (0, 0)
        if config.site == "sequential":
            return {"reads": "output", "width": outputs, "listen": None}
        parts = tuner.__dict__.get("_feed_forward")
        if parts is None:
            parts = tuner.__dict__["_feed_forward"] = feed_forward_parts(tuner.model)
        part: BlockFeedForward | None = parts.get(name)
        if part is None:
            return {"reads": "input", "width": inputs, "listen": None}
        first = part.gate or part.up
        reads = part.norm if part.norm is not None and config.before_norm is not False else first
        module = tuner.model.get_submodule(first)
        width = (linear_features(getattr(module, "get_base_layer", lambda: module)()) or (0, 0))[0]
        return {"reads": reads, "width": width, "listen": partial(listener_between, tuner.model, name, reads)}


def feed_forward_parts(model: nn.Module) -> dict[str, BlockFeedForward]:
    """The feed-forward parts of the blocks, by the name of the last module of each."""
    return {part.down: part for block in describe(model).blocks for part in block.ffn}
