"""Reading low-bit matrices from a file alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import Adapter, Column, HeatMap, LowRank, Picture, Site, layer_and_type
from .codebook import FULL, Coded, coded_size, decode
from .layer import LowBitLayer


PAPER = "https://arxiv.org/abs/2307.16867"
BIBTEX = r"""@inproceedings{jie2023revisiting,
  title = {Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy},
  author = {Jie, Shibo and Wang, Haoqing and Deng, Zhi-Hong},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023},
  url = {https://arxiv.org/abs/2307.16867}
}"""
COLUMNS = (Column("bits", "bits"), Column("bytes", "bytes", "{:,}", adds_up=True))


def matrices(adapter: Adapter, site: Site) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Down `(r, inputs)` and up `(outputs, r)` of a site in fp64, `None` if they do not fit the config."""
    r, bits = adapter.config.get("r"), adapter.config.get("bits")
    found = []
    for leaf, is_up in (("down", False), ("up", True)):
        if bits == FULL:
            matrix = site.matrix(f"{leaf}.weight")
        else:
            matrix = _decoded(site.leaves[f"{leaf}.codes"], site.leaves[f"{leaf}.stats"], r, bits, is_up)
        if matrix is None or matrix.shape[1 if is_up else 0] != r:
            return None
        found.append(matrix)
    return found[0], found[1]


def _decoded(codes: torch.Tensor, stats: torch.Tensor, r: Any, bits: Any, is_up: bool) -> torch.Tensor | None:
    """A matrix; `None` if the number of bytes does not tell its other side, as for few rows of few bits."""
    if not (type(r) is int and type(bits) is int and r > 0 and 1 <= bits <= 8):
        return None
    width = 8 * len(codes) // (bits * r)
    if width < 1 or coded_size(width * r, bits) != len(codes) or coded_size((width - 1) * r, bits) == len(codes):
        return None
    return decode(Coded(codes, stats.float()), bits, (width, r) if is_up else (r, width)).double()


def figures(adapter: Adapter, site: Site, found: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, Any]:
    """The row of a site: rank, bits, parameters, and bytes on disk."""
    row: dict[str, Any] = {"rank": adapter.config.get("r"), "bits": adapter.config.get("bits")}
    row["bytes"] = sum(leaf.numel() * leaf.element_size() for leaf in site.leaves.values())
    if found is not None:
        row["parameters"] = found[0].numel() + found[1].numel()
    return row


@torch.no_grad()
def pictures(model: nn.Module, adapter_name: str, prefix: str) -> list[Picture]:
    """The norm of `scale * U D` by layer and module.

    Raises:
        ValueError: The model has no such adapter of the method with this prefix.
    """
    norms = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowBitLayer) and layer.adapter_layer_names[0].startswith(prefix):
            for adapter in layer.present([adapter_name]):
                norms[layer_and_type(name)] = LowRank(*layer.matrices(adapter), layer.scale[adapter]).norm()
    if not norms:
        raise ValueError(f"There is no such adapter named {adapter_name!r} on this model.")
    return [HeatMap(norms, "norm of scale * U D")]
