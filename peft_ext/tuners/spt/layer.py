"""The layer: sparse deltas on weight and bias, or a structure on the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import Dropouts
from ...core.schedule import listen_to_steps
from ...delta import DeltaLayer, SparseDelta
from ...sparse import add_product
from .config import SPTConfig
from .structures import LEAVES, STRUCTURES, Structure


class SPTLayer(DeltaLayer):
    """`spt_delta` and `spt_bias` hold the tuned weights and biases, the others the leaves of structures."""

    adapter_layer_names = ("spt_delta", "spt_bias", *(f"spt_{leaf}" for leaf in LEAVES))
    other_param_names: tuple[str, ...] = ("structures", "dropout")
    delta_names = ("spt_delta", "spt_bias")
    spt_delta: nn.ModuleDict
    spt_bias: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.structures: dict[str, Structure] = {}
        self.dropout = Dropouts(self.training)

    def update_layer(self, adapter_name: str, config: SPTConfig, *, name: str) -> None:
        """Puts on what the config's allocation has for the module `name`."""
        counts, ranks = config.counts or {}, config.ranks or {}
        for container, key in ((self.spt_delta, f"{name}.weight"), (self.spt_bias, f"{name}.bias")):
            if not counts.get(key):
                continue
            size = self._size(of_weight=container is self.spt_delta)
            is_whole = (config.kinds or {})[key] == "whole"
            support = torch.arange(size) if is_whole else (config.support or {}).get(key)
            placeholder = support is None
            leaf = SparseDelta(torch.arange(counts[key]) if support is None else support, size, placeholder)
            if placeholder and not config.inference_mode:
                listen_to_steps(leaf)  # so that it is not trained by mistake
            container[adapter_name] = leaf
        if f"{name}.weight" in ranks:
            outputs, inputs = self.op.shape if not self._is_transposed() else self.op.shape[::-1]  # type: ignore[union-attr]
            structure = STRUCTURES[(config.kinds or {})[f"{name}.weight"]](config)
            weight = self._matrix() if structure.needs_weight else None
            for leaf_name, leaf_module in structure.make(inputs, outputs, ranks[f"{name}.weight"], weight).items():
                getattr(self, f"spt_{leaf_name}")[adapter_name] = leaf_module
            self.structures[adapter_name] = structure
            self.dropout.put(adapter_name, config.dropout)
        self.finish_update(adapter_name, config)

    def leaves(self, adapter_name: str) -> dict[str, nn.Module]:
        """The leaves of an adapter's structure, by the names of `LEAVES`."""
        containers = {leaf: getattr(self, f"spt_{leaf}") for leaf in LEAVES}
        return {leaf: container[adapter_name] for leaf, container in containers.items() if adapter_name in container}

    def _is_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def _matrix(self) -> torch.Tensor:
        """The weight as `(outputs, inputs)`, dequantised."""
        base: Any = self.get_base_layer()
        # exporters refuse the `data` that PEFT reads
        is_there = self.quantization_backend is None and not base.weight.is_meta
        weight = base.weight.detach() if is_there else self.get_base_weight()
        return weight.T if self._is_transposed() else weight

    def _with_weight(self, adapters: list[str], x: torch.Tensor) -> torch.Tensor:
        """Deltas, then structures; from an adapter on that needs the weight before it, adapter by adapter as merged."""
        first = next((i for i, name in enumerate(adapters) if self._needs_weight(name)), len(adapters))
        output = super()._with_weight(adapters[:first], x)
        bias = getattr(self.get_base_layer(), "bias", None)
        for name in adapters[:first]:
            output = self._structured(name, x, output, None, bias)
        for i, name in enumerate(adapters[first:], start=first):
            if name in self.deltas:
                leaf: Any = self.deltas[name]
                output = add_product(self.op, x, output, leaf(), leaf.indices())  # type: ignore[arg-type]
            weight = self._weight_after(adapters[:i]) if self._needs_weight(name) else None
            output = self._structured(name, x, output, weight, bias)
        return output

    def _needs_weight(self, name: str) -> bool:
        return name in self.structures and self.structures[name].needs_weight

    def _structured(
        self, name: str, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The output with an adapter's structure, if it has one."""
        structure = self.structures.get(name)
        if structure is None:
            return output
        leaves = {**self.leaves(name), "dropout": self.dropout[name]}
        down: Any = leaves["down"]  # under FSDP its weight is a view, and no parameter
        x = self._cast_input_dtype(x, down.weight.dtype)
        return structure.apply(leaves, x, output, weight, bias)

    @torch.no_grad()
    def _weight_after(self, adapters: list[str]) -> torch.Tensor:
        """The weight `(outputs, inputs)` once these adapters are in it.

        Raises:
            ValueError: An adapter between the weight and this one, of another method or a bottleneck, is in no weight.
        """
        others = self.active_inside() + [name for name in adapters if not self._is_mergeable(name)]
        if others:
            raise ValueError(
                f"An SPT adapter with `structured='dora'` takes the norm of the weight that it changes, which {others[0]!r} "
                "cannot be written into while it is active: merge that adapter first, or activate one of the two alone."
            )
        weight = self._matrix()
        for name in adapters:
            weight = self._changed_weight(name, weight)
        return weight

    def _is_mergeable(self, name: str) -> bool:
        return name not in self.structures or self.structures[name].mergeable

    def _changed_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight `(outputs, inputs)` with one adapter in it, in fp32 at least."""
        if name in self.structures:
            return self.structures[name].merged(self.leaves(name), weight)
        if name in self.deltas:
            leaf: Any = self.deltas[name]
            flat = (weight.T if self._is_transposed() else weight).reshape(-1)
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            flat = flat.index_add(0, leaf.indices(), leaf().to(flat.dtype))
            return flat.view(weight.shape[::-1]).T if self._is_transposed() else flat.view(weight.shape)
        return weight

    def adds_alone(self, adapter_name: str) -> bool:
        """Deltas and LoRAs; a bottleneck reads the output, and DoRA the weight."""
        structure = self.structures.get(adapter_name)
        return structure is None or (structure.mergeable and not structure.needs_weight)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The weight with delta or structure, and the bias with its delta.

        Raises:
            ValueError: The structure cannot be merged, or the base is quantised.
        """
        merged = super().merged_tensors(adapter_name)
        if adapter_name not in self.structures:
            return merged
        if not self._is_mergeable(adapter_name):
            raise ValueError(
                f"The SPT adapter {adapter_name!r} has `structured='adapter'`: a bottleneck with a nonlinearity cannot "
                "be merged into a weight. Keep it as an adapter, or calibrate with `structured='lora'`."
            )
        weight = self._changed_weight(adapter_name, self._matrix())
        merged["weight"] = weight.T.contiguous() if self._is_transposed() else weight
        return merged


class SPTLinear(SPTLayer):
    """The same on a linear module; PEFT's "all-linear" finds adapted modules by this word in their class's name."""
