"""What there is to say about VQT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...core import ADAPTER_WEIGHTS, About, Adapter, BadInput, Bars, Column, Image, Picture, Row, Site, is_trained
from ...reading import FAMILIES
from .layer import active_adapter_of, layer_of
from .model import attention_maps
from .queries import QueryHead
from .selection import feature_sources


class VQTAbout(About):
    """How the tensors are read, and what the figures show."""

    columns = (
        Column("queries", "queries", adds_up=True),
        Column("features", "features", "{:,}", adds_up=True),
        Column("kept_features", "kept", "{:,}", adds_up=True),
        Column("head_share", "share of head", "{:.1%}"),
    )

    def rows(self, adapter: Adapter) -> list[Row]:
        """VQT adapts no module: a row is a layer whose keys and values the queries read, or the class token."""
        site = next(iter(adapter.sites.values()))
        try:
            queries, head = site.leaves["queries.weight"].double(), site.leaves["head.weight"].double()
            layers, count, width = queries.shape
            features = _features(adapter, site, layers, count, width)
        except (KeyError, ValueError) as error:
            raise BadInput(
                f"{ADAPTER_WEIGHTS} of {adapter.source} does not fit a VQT adapter ({error}): restore the file that "
                "was saved."
            ) from None
        columns = site.leaves.get("head.columns", torch.arange(head.shape[1]))
        squares = head.square().sum(0)
        chosen = adapter.config.get("layers_to_transform")
        indices = range(layers) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(set(chosen))
        rows = []
        for place, (start, end) in enumerate(features):
            own = (columns >= start) & (columns < end)
            row: Row = {"module": "class token", "layer": -1, "type": "class token", "parameters": 0}
            if place:
                index = indices[place - 1]
                row = {"module": f"layer {index}", "layer": index, "type": "queries", "parameters": count * width}
                row |= {"queries": count, "norm": queries[place - 1].norm().item()}
            kept = int(own.sum())
            share = (squares[own].sum() / squares.sum()).item() if squares.any() else 0.0
            rows.append(row | {"features": end - start, "kept_features": kept, "head_share": share})
        head_row = {"module": "head", "layer": -1, "type": "head", "shapes": {"head.weight": list(head.shape)}}
        trained = sum(is_trained(leaf) * leaf.numel() for leaf in site.leaves.values()) - queries.numel()
        return [*rows, {**head_row, "parameters": trained}]

    def pictures_of_rows(self, rows: Sequence[Row]) -> list[Picture]:
        """The part of the head's squared weight that reads the class token and each layer."""
        return [_bars({row["module"].replace(" ", "_"): row["head_share"] for row in rows if "head_share" in row})]

    def pictures(
        self, model: nn.Module, adapter_name: str, sample: int = 0, query: int | None = None, **inputs: Any
    ) -> list[Picture]:
        """The same of a model; or, with `pixel_values`, where the queries of each layer look in one image.

        Args:
            model: The model with the VQT adapter.
            adapter_name: The adapter.
            sample: Which image of the batch.
            query: Which query; `None`: the mean over all. Heads are averaged.
            inputs: Keyword arguments of the model's `forward`; the tokens must form a square grid behind any class or
                register tokens.

        Raises:
            ValueError: There is no such adapter, or the tokens form no square grid.
        """
        if not inputs:
            return [_bars(layer_shares(model, adapter_name))]
        pixels = inputs["pixel_values"][sample].float().cpu().movedim(0, -1)
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
        pictures: list[Picture] = [Image(pixels, "image")]
        for index, weights in attention_maps(model, adapter_name, **inputs).items():
            chosen = weights[sample].mean(0)  # (T, N)
            grid = token_grid(chosen.mean(0) if query is None else chosen[query])
            pictures.append(Image(grid, f"layer {index}"))
        return pictures


def _features(adapter: Adapter, site: Site, layers: int, count: int, width: int) -> list[tuple[int, int]]:
    """First and last column of the class token and of each layer, among all features."""
    families = {family.model: family.class_tokens for family in FAMILIES.values()}
    first = width * families.get(adapter.base_class or "", 1)
    size = width * (count if adapter.config.get("pooling") == "concatenate" else 1)
    total, columns = first + layers * size, site.leaves.get("head.columns")
    read = site.leaves["head.weight"].shape[1] if columns is None else len(columns)
    if read > total or (columns is None and read != total):
        raise ValueError(f"its head reads {read} features, {layers} layers make {total}")
    return [(0, first), *((first + i * size, first + (i + 1) * size) for i in range(layers))]


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


def _bars(shares: dict[str, float]) -> Bars:
    return Bars(
        {"class" if name == "class_token" else name.removeprefix("layer_"): share for name, share in shares.items()},
        xlabel="class token, and queries of layer",
        ylabel="share of the head's squared weight",
    )


def token_grid(weights: torch.Tensor) -> torch.Tensor:
    """The weights `(N,)` of the patch tokens as a square, without the class and register tokens before them.

    Raises:
        ValueError: They form no square.
    """
    side = math.isqrt(len(weights))
    extra = len(weights) - side * side
    if extra > 8:  # a class token, a distillation token, a few registers
        raise ValueError(f"{len(weights)} tokens form no square grid; plot the maps of `attention_maps` yourself.")
    return weights[extra:].float().cpu().reshape(side, side)


ABOUT = VQTAbout(
    name="VQT",
    idea="trains query tokens that read the keys and values of every layer of the frozen model, and a linear head "
    "on what they read; the model's own output stays as it is.",
    paper="https://arxiv.org/abs/2212.03220",
    bibtex=r"""@inproceedings{tu2023visual,
  title = {Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory
           Efficient Transfer Learning},
  author = {Tu, Cheng-Hao and Mai, Zheda and Chao, Wei-Lun},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023},
  url = {https://arxiv.org/abs/2212.03220}
}""",
    merges=False,
    limits=("It classifies only, with a head of its own, and cannot be merged into the weights.",),
    headline=("num_queries", "pooling", "num_selected_features"),
    page="docs/vqt.md",
    instead={
        "binarized": "its head would be rounded, too",
        "lora": "it has a head of its own and changes no weight: load it as an adapter, with `peft_ext.load`",
    },
)
