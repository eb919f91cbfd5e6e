"""What there is to say about LoRA-SB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core import About, Adapter, Column, HeatMap, LowRank, Picture, Reading, Site, Writer, layer_and_type
from ...lora_files import write_as_lora
from .layer import LoraSBLinear


class LoraSBAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (Column("rank", "rank"),)
    state = ("matrix.down", "matrix.up")

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The rank, and B R A."""
        down, core, up = (site.leaves[f"matrix.{part}"].double() for part in ("down", "weight", "up"))
        return {"rank": len(core)}, {"weight": LowRank(down, up @ core, 1.0)}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By layer and module: the norm of the update.

        Raises:
            ValueError: The model has no such LoRA-SB adapter.
        """
        norms: dict[tuple[int, str], float] = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraSBLinear) and module.present([adapter_name]):
                down, up = module.low_rank(adapter_name)
                norms[layer_and_type(name)] = float(torch.linalg.matrix_norm(up @ down))
        if not norms:
            raise ValueError(f"There is no LoRA-SB adapter named {adapter_name!r} on this model.")
        return [HeatMap(norms, "norm of the update")]

    def exports(self) -> Mapping[str, Writer]:
        """LoRA, with B R as its B."""
        return {"lora": write_as_lora}


ABOUT = LoraSBAbout(
    name="LoRA-SB",
    idea="trains an r x r matrix between two frozen factors, which approximate the first step of full fine-tuning.",
    paper="https://arxiv.org/abs/2411.19557",
    bibtex=r"""@article{ponkshe2024initialization,
  title = {Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning},
  author = {Ponkshe, Kaustubh and Singhal, Raghav and Gorbunov, Eduard and Tumanov, Alexey and Horvath, Samuel and Vepakomma, Praneeth},
  journal = {arXiv preprint arXiv:2411.19557},
  year = {2024},
  url = {https://arxiv.org/abs/2411.19557}
}""",
    merges=True,
    headline=("r", "init_weights"),
    page="docs/lora_sb.md",
    offsets=r"matrix\.weight",
)
