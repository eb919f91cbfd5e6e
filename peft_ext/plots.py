"""Figures of what an adapter has learnt. Needs matplotlib: `pip install "peft-ext[plots]"`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .core import Bars, Curve, Fillings, HeatMap, Image, Picture, about_of
from .export import kept_shares


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> Figure:
    """A figure of what an adapter has learnt, or of what was cut out of a pruned model.

    What it shows depends on the method, whose page has an example.

    Args:
        model: A model with an adapter, or one that `prune_and_unload` or `load_pruned` made.
        adapter_name: The adapter; `None`: the active one.
        inputs: What the method's figure needs besides; for some, keyword arguments of the model's `forward`.

    Raises:
        ValueError: There is no such adapter, its method has no figure, or nothing was cut.
    """
    return draw(pictures_of(model, adapter_name, **inputs))


def pictures_of(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> list[Picture]:
    """What `plot` draws, as data.

    Raises:
        ValueError: See `plot`.
    """
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    if configs is None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"This {type(model).__name__} has no adapters, and was not pruned.")
        return [Fillings(parts, title) for title, parts in kept_shares(model).items()]
    if adapter_name is None:
        active = getattr(model, "active_adapters", list(configs))
        names = active() if callable(active) else active
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active ({', '.join(names)}): name one as `adapter_name`.")
        adapter_name = names[0]
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter named {adapter_name!r} on this model; it has {', '.join(configs)}.")
    return about_of(configs[adapter_name].peft_type.value).pictures(model, adapter_name, **inputs)


def draw(pictures: Sequence[Picture]) -> Figure:
    """A figure of pictures: heat maps from above to below, all else side by side.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    if not pictures:
        raise ValueError("There is nothing to draw.")
    stacked = all(isinstance(picture, HeatMap) for picture in pictures)
    sizes = [_size(picture) for picture in pictures]
    widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
    grid = (len(pictures), 1) if stacked else (1, len(pictures))
    size = (max(widths), sum(heights)) if stacked else (sum(widths), max(heights))
    ratios: dict[str, Any] = {"height_ratios": heights} if stacked else {"width_ratios": widths}
    figure, axes = _pyplot().subplots(*grid, figsize=size, layout="constrained", squeeze=False, gridspec_kw=ratios)
    for axis, picture in zip(axes.flat, pictures, strict=True):
        _draw(axis, picture)
    return figure


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('Figures need matplotlib: `pip install "peft-ext[plots]"`.') from error
    return pyplot


def _size(picture: Picture) -> tuple[float, float]:
    """Width and height in inches."""
    if isinstance(picture, HeatMap):
        layers, types = (len(set(part)) for part in zip(*picture.values, strict=True)) if picture.values else (1, 1)
        return max(4.5, 2.5 + 0.6 * types), max(2.6, 1.4 + 0.24 * layers)
    if isinstance(picture, Bars):
        return 1.5 + 0.5 * len(picture.values), 3
    return (1.6, 1.9) if isinstance(picture, Image) else (5, 3)


def _draw(axes: Any, picture: Picture) -> None:
    if isinstance(picture, HeatMap):
        _heat_map(axes, picture)
    elif isinstance(picture, Bars):
        axes.bar(list(picture.values), list(picture.values.values()))
        axes.set(title=picture.title, xlabel=picture.xlabel, ylabel=picture.ylabel)
    elif isinstance(picture, Fillings):
        _fillings(axes, picture)
    elif isinstance(picture, Curve):
        axes.plot(picture.x, picture.y, marker="o")
        axes.set(title=picture.title, xlabel=picture.xlabel, ylabel=picture.ylabel)
        axes.set_ylim(bottom=0)
    else:
        axes.imshow(picture.pixels.numpy())
        axes.set_title(picture.title)
        axes.set_axis_off()


def _heat_map(axes: Any, picture: HeatMap) -> None:
    """Layers from above to below, types of module from left to right; white where there is no value."""
    layers = sorted({layer for layer, _ in picture.values})
    types = list(dict.fromkeys(kind for _, kind in picture.values))
    grid = [[picture.values.get((layer, kind), math.nan) for kind in types] for layer in layers]
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    short = [".".join(kind.split(".")[-2:]) for kind in types]  # outside layers, full names would fill the figure
    labels = [kind if short.count(label) > 1 else label for kind, label in zip(types, short, strict=True)]
    axes.set_xticks(range(len(types)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "none" for layer in layers])
    axes.set(xlabel="module", ylabel="layer", title=picture.title)
    axes.figure.colorbar(image, ax=axes)


def _fillings(axes: Any, picture: Fillings) -> None:
    """Bars that stand behind others; the legend is beside them."""
    parts = list(picture.values.values())
    axes.bar(range(len(parts)), [whole for _, whole in parts], color="lightgrey", label=picture.rest)
    axes.bar(range(len(parts)), [part for part, _ in parts], label=picture.part)
    axes.set(xlabel="layer", ylabel=picture.title, title="")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
