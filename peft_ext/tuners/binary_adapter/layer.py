"""A module with a bottleneck beside or behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core import Listener, linear_features
from ...low_bit import LowBitLayer
from .config import BinaryAdapterConfig


class BinaryAdapterLinear(LowBitLayer):
    """`y = base(h) + scale * U dropout(act(D x))`; what x is depends on the adapter."""

    adapter_layer_names = ("binary_adapter_down", "binary_adapter_up")
    other_param_names: tuple[str, ...] = ("scale", "dropout", "activation", "reads")
    binary_adapter_down: nn.ModuleDict
    binary_adapter_up: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.activation: dict[str, str] = {}
        self.reads: dict[str, str] = {}  # "output", "input", or the name of the module whose input it is
        self.listeners: dict[str, Listener] = {}  # by that name

    def update_layer(
        self,
        adapter_name: str,
        config: BinaryAdapterConfig,
        *,
        reads: str,
        width: int,
        listen: Callable[[], Listener] | None,
    ) -> None:
        """Creates the matrices of one adapter; it reads `width` features: what `listen` hears, if that is given."""
        self.activation[adapter_name] = config.activation
        self.reads[adapter_name] = reads
        if listen is not None and reads not in self.listeners:
            self.listeners[reads] = listen()
        features = linear_features(self.get_base_layer())
        assert features is not None
        self.add_matrices(adapter_name, config, width, features[1])

    def leave(self, model: nn.Module) -> None:
        """Takes the hooks away."""
        for listener in self.listeners.values():
            listener.stop(model)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output with what its active adapters add."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            for listener in self.listeners.values():
                listener.value = None

    def adds_alone(self, adapter_name: str) -> bool:
        """One that stands behind its module reads what other adapters have added to that."""
        return self.reads[adapter_name] != "output"

    def activate(self, adapter_name: str, hidden: torch.Tensor) -> torch.Tensor:
        """The activation between the two matrices."""
        activation = self.activation[adapter_name]
        return torch.tanh(hidden) if activation == "tanh" else getattr(F, activation)(hidden)

    def input_of(self, adapter_name: str, output: torch.Tensor, args: Any) -> torch.Tensor:
        """The module's output, its input, or what another module of the block has read.

        Raises:
            ValueError: That other module was not called before this one.
        """
        reads = self.reads[adapter_name]
        if reads in ("output", "input"):
            return output if reads == "output" else args[0]
        value = self.listeners[reads].value
        if value is None:
            raise ValueError(
                f"The adapter {adapter_name!r} reads what {reads!r} reads, which was not called before the module that it "
                "is on. If the base was dequantised under the adapter, save it and load it on the dequantised base; else "
                "use `site='sequential'` on this model."
            )
        return value

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Raises `ValueError`: there is a nonlinearity in it."""
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: a bottleneck with a nonlinearity is no change of a weight. Keep it "
            "unmerged, or train a `BinaryLoraConfig`, which merges."
        )
