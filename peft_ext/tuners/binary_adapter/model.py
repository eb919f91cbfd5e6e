"""Bottleneck adapters on a whole model: where they go, and what they read."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...architectures import BlockFeedForward, describe
from ...core import ExtLayer, ExtModel, linear_features, warn_of_experts
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
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: BinaryAdapterConfig) -> dict[str, Any]:
        """What the adapter on the module of this name reads, and how many features that has.

        Raises:
            ValueError: `before_norm` is set, and the norm is not known.
        """
        inputs, outputs = linear_features(base_layer) or (0, 0)
        if config.site == "sequential":
            return {"reads": "output", "width": outputs, "module": None}
        parts = tuner.__dict__.get("_feed_forward")
        if parts is None:
            described = describe(tuner.model)
            parts = tuner.__dict__["_feed_forward"] = {part.down: part for b in described.blocks for part in b.ffn}
        part: BlockFeedForward | None = parts.get(name)
        if config.before_norm and (part is None or part.norm is None):
            raise ValueError(
                f"`before_norm=True`, but the table of architectures names no norm in front of {name!r}: leave "
                "`before_norm` out, and the adapter reads what the feed-forward part reads."
            )
        if part is None:
            return {"reads": "input", "width": inputs, "module": None}
        first = part.gate or part.up
        reads = part.norm if part.norm is not None and config.before_norm is not False else first
        module, width = _base(tuner.model.get_submodule(first)), 0
        width = (linear_features(module) or (0, 0))[0]
        return {"reads": reads, "width": width, "module": _base(tuner.model.get_submodule(reads))}


def _base(module: nn.Module) -> nn.Module:
    """The module without adapters that are on it."""
    return getattr(module, "get_base_layer", lambda: module)()
