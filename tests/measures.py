"""What several tests measure of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes kept for the backward: storages that are no parameter or buffer, each counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values())
    loss.backward()
    return total
