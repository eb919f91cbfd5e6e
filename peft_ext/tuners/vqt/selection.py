"""Feature selection by group lasso, as the paper does it: train, keep the columns of the head that matter, retrain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .layer import active_adapter_of, layer_of


Model = TypeVar("Model", bound=nn.Module)


def select_features(
    model: Model,
    train: Callable[[Model], Any],
    fraction: float = 0.7,
    penalty: float = 1e-4,
    adapter_name: str | None = None,
) -> dict[str, int]:
    """Trains with a group lasso over the feature columns, keeps the strongest ones, and trains anew on these.

    ```py
    def train(model):
        Trainer(model, args, train_dataset=train_set).train()

    kept = peft_ext.select_features(model, train, fraction=0.7)
    ```

    Args:
        model: The model with the VQT adapter.
        train: Trains the model; called twice. It must make its own optimizer, since the head is replaced in between,
            and pass labels to the model, whose loss carries the penalty.
        fraction: The part of the feature columns that is kept.
        penalty: Weight of the sum of the columns' L2 norms in the first training.
        adapter_name: The adapter; `None`: the active one.

    Returns:
        How many columns were kept of the class token's features (`"class_token"`) and of each layer's (`"layer_0"`).

    Raises:
        ValueError: `fraction` or `penalty` is out of range, or `train` took no step with the penalty.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction!r}.")
    if penalty <= 0:
        raise ValueError(f"`penalty` must be above 0, got {penalty!r}.")
    layer = layer_of(model)
    adapter = active_adapter_of(layer, adapter_name)
    head: Any = layer.vqt_head[adapter]
    if head.columns is not None:
        raise ValueError(f"The adapter {adapter!r} reads selected features already; select them on a fresh adapter.")
    config, steps = layer.configs[adapter], layer.penalised_steps
    before, config.group_lasso = config.group_lasso, penalty
    try:
        train(model)
    finally:
        config.group_lasso = before
    if layer.penalised_steps == steps:
        raise ValueError("`train` computed no loss with labels while the model was in training mode.")
    norms = layer.vqt_head[adapter].weight.detach().norm(dim=0)  # type: ignore[union-attr,operator]
    columns = norms.topk(max(1, round(fraction * len(norms)))).indices.sort().values
    layer.select_columns(adapter, columns)
    train(model)
    return count_by_source(layer, adapter, columns)


def count_by_source(layer: Any, adapter: str, columns: torch.Tensor) -> dict[str, int]:
    """How many of `columns` lie in the features of the class token and of each layer."""
    sources = feature_sources(layer, adapter)
    return {name: int(((columns >= start) & (columns < end)).sum()) for name, (start, end) in sources.items()}


def feature_sources(layer: Any, adapter: str) -> dict[str, tuple[int, int]]:
    """Where, among the features, those of the class token and of each layer lie: first column and end."""
    _, queries, width = layer.vqt_queries[adapter].weight.shape
    first = width * layer.family.class_tokens
    size = width * (queries if layer.configs[adapter].pooling == "concatenate" else 1)
    sources = {"class_token": (0, first)}
    for place, index in enumerate(layer.blocks(adapter)):
        sources[f"layer_{index}"] = (first + place * size, first + (place + 1) * size)
    return sources
