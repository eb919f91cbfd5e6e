"""What there is to say about SCT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core import About, Adapter, Column, HeatMap, Picture, Reading, Site, layer_and_type
from .layer import SCTLayer


@dataclass(frozen=True)
class OnChannels:
    """The matrix E M E^T: M `(K, K)` on the sorted `indices` `(K,)`."""

    matrix: torch.Tensor
    indices: torch.Tensor

    def norm(self) -> float:
        """Its L2 norm."""
        return float(torch.linalg.norm(self.matrix))

    def dot(self, other: Any) -> float | None:
        """The inner product with another one, over the channels that both have."""
        if not isinstance(other, OnChannels):
            return None
        ours, theirs = torch.isin(self.indices, other.indices), torch.isin(other.indices, self.indices)
        return float((self.matrix[ours][:, ours] * other.matrix[theirs][:, theirs]).sum())


class SCTAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (Column("channels", "channels", "{:,}"),)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """How many channels are mapped, and the map as a change of the identity."""
        matrix, indices = site.leaves["map.weight"].double(), site.leaves["map.indices"].long()
        if matrix.shape != (len(indices), len(indices)):
            raise adapter.misfit(f"the map of {site.module!r} is {tuple(matrix.shape)}, for {len(indices)} channels")
        return {"channels": len(indices)}, {"channels": OnChannels(matrix, indices)}

    def merges_with(self, config: Mapping[str, Any]) -> bool:
        """Not at the residual stream."""
        return config.get("site", "attn") != "attn"

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The norm of each map, and in how many layers a channel is tuned that is tuned in this one.

        Raises:
            ValueError: The model has no such SCT adapter.
        """
        maps: dict[tuple[int, str], Any] = {
            layer_and_type(name): module.sct_map[adapter_name]
            for name, module in model.named_modules()
            if isinstance(module, SCTLayer) and module.present([adapter_name])
        }
        if not maps:
            raise ValueError(f"There is no SCT adapter named {adapter_name!r} on this model.")
        norms = {place: float(leaf.weight.detach().norm()) for place, leaf in maps.items()}
        kinds = {kind: [leaf for (_, other), leaf in maps.items() if other == kind] for _, kind in maps}
        shared = {
            place: float(sum(torch.isin(leaf.indices, other.indices).sum() for other in kinds[place[1]]))
            / (len(leaf.indices) * len(kinds[place[1]]))
            for place, leaf in maps.items()
        }
        return [HeatMap(norms, "norm of the map"), HeatMap(shared, "share of layers that tune the same channel")]


ABOUT = SCTAbout(
    name="SCT",
    idea="maps the channels with the largest activations, an eighth of them, by a small matrix in each layer.",
    paper="https://arxiv.org/abs/2309.08513",
    bibtex=r"""@article{zhao2023sct,
  title = {{SCT}: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels},
  author = {Zhao, Henry Hengyuan and Wang, Pichao and Zhao, Yuyang and Luo, Hao and Wang, Fan and Shou, Mike Zheng},
  journal = {International Journal of Computer Vision},
  year = {2023},
  url = {https://arxiv.org/abs/2309.08513}
}""",
    merges=True,
    limits=('At `site="attn"`, its default, it cannot be merged: no weight makes the residual stream.',),
    headline=("num_channels", "site"),
    page="docs/sct.md",
    instead={"lora": "a map has a vector, which no LoRA carries: merge it, which `site='mlp'` and `site='qkv'` allow"},
)
