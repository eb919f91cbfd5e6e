"""The tuner of UniPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...reading import ReaderModel, reader_of
from .layer import UniPTLayer


class UniPTModel(ReaderModel):
    """Puts the side network and the head beside a model; used through `get_peft_model(model, UniPTConfig(...))`."""

    prefix = "unipt_"
    tuner_layer_cls = UniPTLayer


def layer_confidence(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[int, torch.Tensor]:
    """By layer, how much its states count in what the side network makes of each sample, `(B,)`; they sum to one.

    Args:
        model: The model with the UniPT adapter.
        adapter_name: The adapter to look at; `None`: the active one.
        inputs: Keyword arguments of the model's `forward`, for example `pixel_values=...`.

    Raises:
        ValueError: The model has no such adapter.
    """
    layer, adapter = reader_of(model, adapter_name, UniPTLayer.method)
    found: dict[int, torch.Tensor] = layer.confidence(adapter, inputs)
    return found
