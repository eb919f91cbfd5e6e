"""Figures of what an adapter has learnt. Needs matplotlib: `pip install "peft-ext[plots]"`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .core import layer_and_type
from .export.saving import dense_model, groups_of
from .tuners.mask_pruning import gates_of, keep_ratios
from .tuners.sparse_ft.model import deltas
from .tuners.spt.layer import SPTLayer
from .tuners.ssf.layer import SSFLayer
from .tuners.vqt.model import QueryHead, active_adapter_of, attention_maps, layer_of
from .tuners.vqt.selection import feature_sources


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('Figures need matplotlib: `pip install "peft-ext[plots]"`.') from error
    return pyplot


def layer_shares(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """How much of the head's squared weight reads the class token (`"class_token"`) and each layer (`"layer_0"`).

    The features of each source have unit length together, so the weights can be compared.
    """
    layer = layer_of(model)
    adapter = active_adapter_of(layer, adapter_name)
    head = layer.vqt_head[adapter]
    assert isinstance(head, QueryHead)
    squares = head.weight.detach().float().square().sum(0).cpu()
    columns = torch.arange(len(squares)) if head.columns is None else head.columns.cpu()
    total = squares.sum().item()
    return {
        name: squares[(columns >= start) & (columns < end)].sum().item() / total
        for name, (start, end) in feature_sources(layer, adapter).items()
    }


def plot_layers(model: nn.Module, adapter_name: str | None = None) -> Figure:
    """A bar for the class token and for each layer: the part of the head's squared weight that reads it."""
    return bars_of_layers(layer_shares(model, adapter_name))


def bars_of_layers(shares: Mapping[str, float]) -> Figure:
    """The same figure, of what `layer_shares` returns."""
    figure, axes = _pyplot().subplots(figsize=(1.5 + 0.5 * len(shares), 3), layout="constrained")
    axes.bar(["class" if name == "class_token" else name.removeprefix("layer_") for name in shares], shares.values())
    axes.set_xlabel("class token, and queries of layer")
    axes.set_ylabel("share of the head's squared weight")
    return figure


def plot_attention(
    model: nn.Module, adapter_name: str | None = None, sample: int = 0, query: int | None = None, **inputs: Any
) -> Figure:
    """Where the queries of each layer look in one image, mean over heads, beside the image.

    Args:
        model: The model with the VQT adapter; its tokens must form a square grid behind any class or register tokens.
        adapter_name: The adapter; `None`: the active one.
        sample: Which image of the batch.
        query: Which query; `None`: the mean over all.
        inputs: Keyword arguments of the model's `forward`, with `pixel_values`.

    Raises:
        ValueError: The tokens form no square grid.
    """
    pyplot = _pyplot()
    maps = attention_maps(model, adapter_name, **inputs)
    pixels = inputs["pixel_values"][sample].float().cpu().movedim(0, -1)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    figure, axes = pyplot.subplots(1, len(maps) + 1, figsize=(1.6 * (len(maps) + 1), 1.9), layout="constrained")
    axes[0].imshow(pixels.numpy())
    axes[0].set_title("image")
    for axis, (index, weights) in zip(axes[1:], maps.items(), strict=True):
        chosen = weights[sample].mean(0)  # (T, N)
        axis.imshow(token_grid(chosen.mean(0) if query is None else chosen[query]).numpy(), cmap="viridis")
        axis.set_title(f"layer {index}")
    for axis in axes:
        axis.set_axis_off()
    return figure


def token_grid(weights: torch.Tensor) -> torch.Tensor:
    """The weights `(N,)` of the patch tokens as a square, without the class and register tokens before them."""
    side = math.isqrt(len(weights))
    extra = len(weights) - side * side
    if extra > 8:  # a class token, a distillation token, a few registers
        raise ValueError(f"{len(weights)} tokens form no square grid; plot the maps of `attention_maps` yourself.")
    return weights[extra:].float().cpu().reshape(side, side)


def _heat_map(axes: Any, values: Mapping[tuple[int, str], float], title: str) -> None:
    """Layers from above to below, types of module from left to right; white where there is no value."""
    layers = sorted({layer for layer, _ in values})
    types = list(dict.fromkeys(kind for _, kind in values))
    grid = [[values.get((layer, kind), math.nan) for kind in types] for layer in layers]
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    short = [".".join(kind.split(".")[-2:]) for kind in types]  # outside layers, full names would fill the figure
    labels = [kind if short.count(label) > 1 else label for kind, label in zip(types, short, strict=True)]
    axes.set_xticks(range(len(types)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "-" for layer in layers])
    axes.set(ylabel="layer", title=title)
    axes.figure.colorbar(image, ax=axes)


def ssf_offsets(model: nn.Module, adapter_name: str = "default") -> Figure:
    """A figure of what SSF changes, by layer (rows) and module (columns): how far, in the quadratic mean over channels,
    the scales are from one (above) and the shifts from zero (below).

    Raises:
        ValueError: The model has no such SSF adapter.
    """
    offsets: dict[str, dict[tuple[int, str], float]] = {"scale - 1": {}, "shift": {}}
    for name, module in model.named_modules():
        if isinstance(module, SSFLayer):
            for title, leaves in zip(offsets, (module.ssf_scale, module.ssf_shift), strict=True):
                if adapter_name in leaves:  # the scale is stored as its offset from one
                    mean_square = leaves[adapter_name].get_parameter("weight").detach().float().square().mean()
                    offsets[title][layer_and_type(name)] = float(mean_square.sqrt())
    if not offsets["scale - 1"]:
        raise ValueError(f"There is no SSF adapter named {adapter_name!r} on this model.")
    found = {title: values for title, values in offsets.items() if values}
    figure, axes = _pyplot().subplots(
        len(found), 1, figsize=(8, 3.5 * len(found)), layout="constrained", squeeze=False
    )
    for axis, (title, values) in zip(axes[:, 0], found.items(), strict=True):
        _heat_map(axis, values, f"quadratic mean of {title}")
    return figure


def spt_allocation(model: nn.Module, adapter_name: str = "default") -> Figure:
    """A figure of where the budget of an SPT adapter went: trained parameters by layer (rows) and module (columns).

    Raises:
        ValueError: The model has no such SPT adapter.
    """
    trained: dict[tuple[int, str], float] = {}
    for name, module in model.named_modules():
        if isinstance(module, SPTLayer) and adapter_name in module.present([adapter_name]):
            leaves = [
                getattr(module, key)[adapter_name]
                for key in module.adapter_layer_names
                if adapter_name in getattr(module, key)
            ]
            trained[layer_and_type(name)] = float(sum(p.numel() for leaf in leaves for p in leaf.parameters()))
    if not trained:
        raise ValueError(f"There is no SPT adapter named {adapter_name!r} on this model.")
    return heat_map(trained, "trained parameters")


def heat_map(values: Mapping[tuple[int, str], float], title: str) -> Figure:
    """A figure of a number for each module, by its layer and type, as `layer_and_type` gives them."""
    figure, axes = _pyplot().subplots(figsize=(8, 4), layout="constrained")
    _heat_map(axes, values, title)
    return figure


def sparse_support(model: nn.Module, adapter_name: str = "default") -> Figure:
    """A figure of a sparse adapter: where its delta lives, layer by layer, and how its support turned over.

    Left: the norm of the delta by layer (rows) and kind of module (columns). Right: the fraction of the support that
    each reselection replaced; empty for a fixed support, or after loading.

    Raises:
        ValueError: The model has no such sparse adapter.
    """
    leaves = dict(deltas(model, adapter_name))
    if not leaves:
        raise ValueError(f"There is no sparse adapter named {adapter_name!r} on this model.")
    norms: dict[tuple[int, str], float] = {}
    turnover: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for name, leaf in leaves.items():
        norms[layer_and_type(name)] = float(leaf.weight.detach().norm())
        for step, moved in leaf.tracker.reselections if leaf.tracker is not None else ():
            turnover[step][0] += moved
            turnover[step][1] += leaf.weight.numel()
    figure, (where, when) = _pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    _heat_map(where, norms, "norm of the delta")
    steps = sorted(turnover)
    when.plot(steps, [turnover[step][0] / turnover[step][1] for step in steps], marker="o")
    when.set(xlabel="optimizer step", ylabel="fraction replaced", title="turnover of the support")
    when.set_ylim(bottom=0)
    return figure


def kept_shares(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, tuple[float, int]]]:
    """How many units each group keeps, and of how many, by kind and name of the group.

    Args:
        model: A model with a mask-pruning adapter, its masks decided or not (then in expectation); or one that was cut.
        adapter_name: The adapter; `None`: the active one.

    Raises:
        ValueError: It is neither.
    """
    shares: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
    if isinstance(model, PeftModel):
        ratios = keep_ratios(model, adapter_name)
        for name in (adapter_name and [adapter_name]) or model.active_adapters:
            for key, gate in gates_of(model, name).items():
                shares[gate.group.kind][key] = (round(ratios[key] * gate.group.units, 3), gate.group.units)
    elif isinstance(model, PreTrainedModel):
        after = groups_of(model)
        for key, group in groups_of(dense_model(model)).items():
            shares[group.kind][key] = (after[key].units, group.units)
    if not shares:
        raise ValueError(
            f"This {type(model).__name__} has no masks, and nothing is cut out of it that could be shown."
        )
    return dict(shares)


def kept_channels(model: nn.Module, adapter_name: str | None = None) -> Figure:
    """A figure for each kind of channels: a bar for every layer, filled as far as it keeps them.

    Raises:
        ValueError: See `kept_shares`.
    """
    return bars_of_kept(kept_shares(model, adapter_name))


def bars_of_kept(shares: Mapping[str, Mapping[str, tuple[float, int]]]) -> Figure:
    """The same figure, of what `kept_shares` returns."""
    titles = {"ffn": "feed-forward channels", "heads": "attention heads (with their keys)"}
    figure, axes = _pyplot().subplots(
        1, len(shares), figsize=(5 * len(shares), 3), layout="constrained", squeeze=False
    )
    for axis, (kind, layers) in zip(axes[0], shares.items(), strict=True):
        axis.bar(range(len(layers)), [units for _, units in layers.values()], color="lightgrey", label="cut")
        axis.bar(range(len(layers)), [kept for kept, _ in layers.values()], label="kept")
        axis.set(xlabel="layer", title=titles.get(kind, kind))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return figure
