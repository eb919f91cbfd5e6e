"""What there is to say about S2FT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core import About, Adapter, Column, HeatMap, Picture, Reading, Site, Writer, layer_and_type
from ...lora_files import write_as_lora
from .layer import S2FTLinear


@dataclass(frozen=True)
class Block:
    """What is added to the weights of channels: values `(k, n)`, a row for each of the sorted `indices` `(k,)`."""

    values: torch.Tensor
    indices: torch.Tensor
    side: str

    def norm(self) -> float:
        """Its L2 norm."""
        return float(torch.linalg.norm(self.values))

    def dot(self, other: Any) -> float | None:
        """The inner product with another block on the same side, over the channels that both have."""
        if not isinstance(other, Block) or self.side != other.side:
            return None
        if self.values.shape[1] != other.values.shape[1]:
            return None
        ours, theirs = torch.isin(self.indices, other.indices), torch.isin(other.indices, self.indices)
        return float((self.values[ours] * other.values[theirs]).sum())


class S2FTAbout(About):
    """How the tensors are read, what the figure shows, and what an adapter can be made of."""

    columns = (Column("channels", "channels", "{:,}", adds_up=True),)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """How many channels are trained, and by how much they have moved."""
        weight, indices = site.leaves["block.weight"].double(), site.leaves["block.indices"].long()
        count = (adapter.config.get("num_channels_per_module") or {}).get(site.module, len(indices))
        if len(indices) != count or len(indices) not in weight.shape:
            raise adapter.misfit(f"{site.module!r} has {len(indices)} channels, and the config says {count}")
        side = (adapter.config.get("sides_per_module") or {}).get(site.module)  # older files have none
        is_column = len(indices) == weight.shape[1] if side is None else side == "inputs"
        if len(indices) != weight.shape[int(is_column)]:
            raise adapter.misfit(
                f"the block of {site.module!r} is {tuple(weight.shape)}, not of {len(indices)} {side}"
            )
        block = Block(weight.T if is_column else weight, indices, "inputs" if is_column else "outputs")
        return {"channels": len(indices)}, {"weight": block}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """How many channels of each module are trained, and how far they have moved.

        Raises:
            ValueError: The model has no such S2FT adapter.
        """
        layers = {
            layer_and_type(name): module.block(adapter_name)
            for name, module in model.named_modules()
            if isinstance(module, S2FTLinear) and adapter_name in module.s2ft_block
        }
        if not layers:
            raise ValueError(f"There is no S2FT adapter named {adapter_name!r} on this model.")
        counts = {place: float(len(block.indices)) for place, block in layers.items()}
        norms = {place: float(torch.linalg.norm(block().detach())) for place, block in layers.items()}
        return [HeatMap(counts, "trained channels"), HeatMap(norms, "norm of the update")]

    def exports(self) -> Mapping[str, Writer]:
        """It is a LoRA whose rank is the number of channels."""
        return {"lora": write_as_lora}


ABOUT = S2FTAbout(
    name="S2FT",
    idea="trains the weights of some chosen channels and attention heads in place, and leaves the others as they are.",
    paper="https://arxiv.org/abs/2412.06289",
    bibtex=r"""@inproceedings{yang2024s2ft,
  title = {{S$^2$FT}: Efficient, Scalable and Generalizable {LLM} Fine-tuning by Structured Sparsity},
  author = {Yang, Xinyu and Leng, Jixuan and Guo, Geyang and Zhao, Jiawei and Nakada, Ryumei and Zhang, Linjun and
    Yao, Huaxiu and Chen, Beidi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2412.06289}
}""",
    merges=True,
    headline=("ratios", "selection", "scope"),
    page="docs/s2ft.md",
    offsets=r"block\.weight",
)
