"""What there is to say about WeGeFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...core import About, Adapter, Column, HeatMap, Picture, Reading, Site, Writer, layer_and_type
from ...lora_files import write_as_lora
from .layer import WeGeFTLinear


class WeGeFTAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (Column("rank", "rank"),)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The rank, and P^T Q^T: what is added to the identity on the input of the modules."""
        edit = site.low_rank(("down.weight",), ("up.weight",), 1.0)
        if edit is None:
            raise adapter.misfit(f"{site.module!r} has no pair of maps of one rank")
        return {"rank": len(edit.down)}, {"edit": edit}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By layer and module: the norm of the update of the weight, relative to the weight's own.

        Raises:
            ValueError: The model has no such WeGeFT adapter.
        """
        shares: dict[tuple[int, str], float] = {}
        for name, module in model.named_modules():
            if isinstance(module, WeGeFTLinear) and module.present([adapter_name]):
                down, up = module.factors(adapter_name)
                shares[layer_and_type(name)] = float((up @ down).norm() / module.unmerged_weight().norm())
        if not shares:
            raise ValueError(f"There is no WeGeFT adapter named {adapter_name!r} on this model.")
        return [HeatMap(shares, "norm of the update / norm of the weight")]

    def exports(self) -> Mapping[str, Writer]:
        """LoRA: the update of each weight is a product of two matrices."""
        return {"lora": write_as_lora}


ABOUT = WeGeFTAbout(
    name="WeGeFT",
    idea="makes the updates of the frozen weights from the weights themselves, by two linear maps that the layers of a "
    "model share.",
    paper="https://arxiv.org/abs/2312.00700",
    bibtex=r"""@inproceedings{savadikar2025wegeft,
  title = {{WeGeFT}: Weight-Generative Fine-Tuning for Multi-Faceted Efficient Adaptation of Large Models},
  author = {Savadikar, Chinmay and Song, Xi and Wu, Tianfu},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  url = {https://arxiv.org/abs/2312.00700}
}""",
    merges=True,
    headline=("r", "share"),
    page="docs/wegeft.md",
    offsets=r"(down|up)\.weight",
)
