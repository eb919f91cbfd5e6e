"""The deltas of an adapter on a model, and the largest of many values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ...core.sharding import plain_named_modules, unwrapped
from ...delta import SparseDelta
from ...sparse import top_indices
from .layer import SparseFTLayer


def deltas(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseDelta]]:
    """The deltas of an adapter by the name of the module that they are on (`"<module>.bias"` for a bias's)."""
    for name, module in plain_named_modules(model):
        if isinstance(module, SparseFTLayer):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            for container, suffix in ((module.deltas, ""), (module.bias_deltas, ".bias")):
                if adapter_name in container:
                    leaf = unwrapped(container[adapter_name])
                    assert isinstance(leaf, SparseDelta)
                    yield name + suffix, leaf


def best_of_all(scores: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """The flat indices of the k largest scores of all tensors together, by tensor; those without any are left out."""
    starts = [0]
    for tensor in scores.values():
        starts.append(starts[-1] + tensor.numel())

    def piece(start: int, stop: int) -> torch.Tensor:
        parts = []
        for tensor, first, last in zip(scores.values(), starts, starts[1:], strict=False):
            if first < stop and last > start:
                parts.append(tensor[max(0, start - first) : stop - first].float())
        return torch.cat([part.to(parts[0].device) for part in parts])

    chosen = top_indices(piece, starts[-1], k)
    found = {}
    for name, first, last in zip(scores, starts, starts[1:], strict=False):
        own = chosen[torch.searchsorted(chosen, first) : torch.searchsorted(chosen, last)] - first
        if len(own):
            found[name] = own
    return found
