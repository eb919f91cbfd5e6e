"""What there is to say about Bi-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...core import About, Adapter, Column, LowRank, Picture, Reading, Site, Writer
from ...lora_files import write_as_lora
from ...low_bit import BIBTEX, COLUMNS, PAPER, figures, matrices, pictures


class BinaryLoraAbout(About):
    """How the tensors are read."""

    columns = (Column("rank", "rank"), *COLUMNS)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """Rank, bits and bytes, and the update."""
        found = matrices(adapter, site)
        row = figures(adapter, site, found)
        return row, {} if found is None else {"weight": LowRank(*found, float(adapter.config.get("scale", 1.0)))}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The norm of the update by layer and module."""
        return pictures(model, adapter_name, "binary_low_rank_")

    def exports(self) -> Mapping[str, Writer]:
        """The quantised factors are those of a plain LoRA."""
        return {"lora": write_as_lora}


ABOUT = BinaryLoraAbout(
    name="Bi-LoRA",
    idea="trains low-rank updates whose weights have one bit, or a few, while they act; on disk these take a thirty-second of "
    "LoRA's at the same rank.",
    paper=PAPER,
    bibtex=BIBTEX,
    merges=True,
    limits=(
        "A published adapter holds no latents: training that goes on from it starts with others of the same codes.",
    ),
    headline=("r", "bits", "scale"),
    page="docs/binary_lora.md",
    instead={"compressed": "its weights are packed already", "binarized": "its weights are packed already"},
)
