"""The layer of sparse fine-tuning: which indices a delta starts at, and who moves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core import onloaded, stable_generator
from ...core.schedule import listen_to_steps
from ...delta import DeltaLayer, SparseDelta
from ...sparse import random_indices, top_indices
from .config import SPIEL, UNBUDGETED, SparseFTConfig
from .gradual import BelowTracker, GrowingTracker
from .spiel import AgTracker, MaTracker
from .tracker import Tracker


TRACKERS: dict[str, type[Tracker]] = {  # who moves the indices, or says which of them take part
    "spiel-ag": AgTracker,
    "spiel-ma": MaTracker,
    "below": BelowTracker,
    "growing": GrowingTracker,
}


class SparseFTLayer(DeltaLayer):
    """A module whose weight is W + S: `sparse_ft_delta` holds S, `sparse_ft_bias` the same for the bias."""

    adapter_layer_names = delta_names = ("sparse_ft_delta", "sparse_ft_bias")
    sparse_ft_delta: nn.ModuleDict
    sparse_ft_bias: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: SparseFTConfig, *, name: str, said: set[str]) -> None:
        """Chooses the indices of one adapter and starts its values at zero."""
        per_module = config.num_weights_per_module or {}
        for container, key in ((self.sparse_ft_delta, name), (self.sparse_ft_bias, f"{name}.bias")):
            if not per_module.get(key, 0):
                continue
            of_weight = key == name
            size = self._size(of_weight)
            indices, placeholder = self._initial_indices(config, key, per_module[key], size, of_weight)
            leaf = SparseDelta(indices, size, placeholder)
            if config.selection == "lt-sft":
                leaf.exempt_from_decay()  # as published; a decay would pull the values to the base
            # also of an adapter that is loaded for inference: `set_adapter` makes it trainable
            if config.selection in TRACKERS and of_weight:
                leaf.track(TRACKERS[config.selection](config, self.op, said, key))
            elif placeholder and not config.inference_mode:
                listen_to_steps(leaf)
            container[adapter_name] = leaf
        self.finish_update(adapter_name, config)

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module with W + S for the weight, S being the sum over the adapters."""
        for name in adapters:
            tracker = getattr(self.deltas[name], "tracker", None) if name in self.deltas else None
            if tracker is not None and not torch.compiler.is_compiling():
                tracker.enter(self)
        return super().adapted_forward(adapters, *args, **kwargs)

    def _initial_indices(
        self, config: SparseFTConfig, key: str, k: int, n: int, of_weight: bool
    ) -> tuple[torch.Tensor, bool]:
        """k indices among n, and whether they only hold the shape until a saved adapter is loaded."""
        if config.support is not None:
            return config.support[key], False
        if config.inference_mode or config.selection in ("given", "lt-sft", "sensitivity"):
            return torch.arange(k), True
        if config.selection in ("random", "growing", *SPIEL):
            return random_indices(k, n, stable_generator(config.seed, key)), False
        weight = (self.get_base_weight() if of_weight else self._base_bias()).detach().reshape(-1)
        if config.selection in UNBUDGETED:
            is_in = weight != 0 if config.threshold is None else weight.float().abs() < config.threshold
            indices = is_in.nonzero().squeeze(1)
            # a saved adapter has its own, also where the base was loaded in another type
            return (indices, False) if len(indices) == k else (torch.arange(k), True)
        smallest = config.selection == "smallest"
        return top_indices(lambda start, stop: weight[start:stop].abs(), n, k, smallest), False

    def _base_bias(self) -> torch.Tensor:
        base: Any = self.get_base_layer()
        with onloaded(base):
            return base.bias


class SparseFTLinear(SparseFTLayer):
    """The same on a linear module; PEFT's "all-linear" finds adapted modules by this word in their class's name."""
