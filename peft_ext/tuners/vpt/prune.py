"""E2VPT's pruning: prompts, and segments of prompts, that the loss depends on least, leave before a second training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...calibrate import mean_gradients
from ...core import require_model
from .config import SEGMENTS
from .layer import VPTLayer
from .leaves import Rows


@dataclass(frozen=True)
class PrunedPrompts:
    """What [`prune_prompts`] decided.

    Attributes:
        kept: The prompts that stay, by their number before.
        segments: The segments that are zero from now on, for each of them.
        token_importance: `(T,)`, of all prompts.
        segment_importance: `(T, 16)`, of all their segments.
    """

    kept: list[int]
    segments: list[list[int]]
    token_importance: torch.Tensor
    segment_importance: torch.Tensor


def prune_prompts(
    model: nn.Module,
    dataloader: Iterable[Any],
    tokens: float = 0.5,
    segments: float = 0.0,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int | None = None,
    rewind: bool = True,
    adapter_name: str | None = None,
) -> PrunedPrompts:
    """Removes the least important prompts of a trained VPT adapter, and sets segments of the others to zero.

    The importance of a prompt is the size of the loss's derivative by a factor on it, of a segment likewise: with the
    mean gradient g over the batches, `|sum P_t g_t|`, summed over the layers too, since all layers keep the same
    prompts. Prompts that go are taken out of the tensors; train the adapter again afterwards, with a new optimizer.

    Args:
        model: The model with the adapter, after a first training.
        dataloader: Batches of the training data.
        tokens: The share of the prompts to remove; at least one stays.
        segments: The share of each remaining prompt's 16 segments to set to zero; at least four stay. Segment j holds
            the channels j, j + 16, j + 32, ...
        loss_fn: `loss_fn(model, batch)`, where the model's own loss will not do.
        num_batches: How many batches to look at; `None`: all.
        rewind: Whether what stays starts anew from the published initialisation, as published; key-value rows too.
        adapter_name: `None`: the active adapter.

    Returns:
        What was removed, and the importances.

    Raises:
        ValueError: A share is not in [0, 1), there is no such adapter, or it was pruned before; see `calibrate` for
            what may be wrong with the batches.
    """
    for name, share in (("tokens", tokens), ("segments", segments)):
        if not 0 <= share < 1:
            raise ValueError(f"`{name}` must be at least 0 and below 1, got {share!r}.")
    layers, adapter = _layers_with(model, adapter_name)
    config = next(iter(layers.values())).configs[adapter]
    if config.pruned_segments is not None:
        raise ValueError(f"Segments of adapter {adapter!r} are pruned already; prune tokens and segments in one call.")
    leaves = {name: layer.vpt_prompts[adapter] for name, layer in layers.items()}
    weights: dict[str, Any] = {name: leaf.weight for name, leaf in leaves.items() if isinstance(leaf, Rows)}
    gradients = mean_gradients(model, weights, dataloader, loss_fn, num_batches)
    width = next(iter(weights.values())).shape[-1]
    if segments and width % SEGMENTS:
        raise ValueError(f"`segments` needs prompts whose width, {width}, is a multiple of {SEGMENTS}.")
    products = sum((weight.detach() * gradients[name]).double().cpu() for name, weight in weights.items())
    assert isinstance(products, torch.Tensor)
    padded = torch.nn.functional.pad(products, (0, -width % SEGMENTS))
    by_segment = padded.view(len(products), -1, SEGMENTS).sum(1)  # signed: what a factor on the segment would do
    by_token, by_segment = products.sum(1).abs(), by_segment.abs()
    kept = sorted(by_token.topk(max(1, len(by_token) - int(tokens * len(by_token)))).indices.tolist())
    removed = min(int(segments * SEGMENTS), SEGMENTS - 4)
    pruned = [sorted(by_segment[t].topk(removed, largest=False).indices.tolist()) for t in kept]
    _keep(layers, adapter, kept, pruned if removed else None)
    if rewind:
        for layer in layers.values():
            layer.reset_parameters(adapter)
    return PrunedPrompts(kept, pruned, by_token, by_segment)


def _layers_with(model: nn.Module, adapter_name: str | None) -> tuple[dict[str, VPTLayer], str]:
    require_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, VPTLayer)}
    known = sorted({adapter for layer in layers.values() for adapter in layer.configs})
    active = sorted({adapter for layer in layers.values() for adapter in layer.active_names()})
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"Name the adapter in `adapter_name`: the active VPT adapters are {active}.")
    adapter = active[0] if adapter_name is None else adapter_name
    if adapter not in known:
        raise ValueError(f"There is no VPT adapter {adapter!r} on the model; it has {known}.")
    if adapter not in active:
        raise ValueError(f"The VPT adapter {adapter!r} is not active: call `set_adapter({adapter!r})` first.")
    return {name: layer for name, layer in layers.items() if adapter in layer.configs}, adapter


@torch.no_grad()
def _keep(layers: dict[str, VPTLayer], adapter: str, kept: list[int], pruned: list[list[int]] | None) -> None:
    """Takes the other rows out of the tensors, and the config along."""
    for layer in layers.values():
        leaf = layer.vpt_prompts[adapter]
        layer.configs[adapter].num_tokens = len(kept)
        layer.configs[adapter].pruned_segments = pruned
        if isinstance(leaf, Rows):
            trained = leaf.weight.requires_grad
            leaf.weight = nn.Parameter(leaf.weight[kept].clone(), requires_grad=trained)
            leaf.pruned_segments = pruned
