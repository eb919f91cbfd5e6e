"""What there is to say about bottleneck adapters of few bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core import About, Adapter, Column, Picture, Reading, Site
from ...low_bit import BIBTEX, COLUMNS, PAPER, figures, matrices, pictures


class BinaryAdapterAbout(About):
    """How the tensors are read."""

    columns = (Column("rank", "width"), *COLUMNS)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """Width, bits and bytes."""
        return figures(adapter, site, matrices(adapter, site)), {}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The norm of the two matrices' product by layer and module."""
        return pictures(model, adapter_name, "binary_adapter_")


ABOUT = BinaryAdapterAbout(
    name="Bi-AdaptFormer",
    idea="puts a small bottleneck beside the feed-forward part of each block, with weights of one bit, or a few, while "
    "they act.",
    paper=PAPER,
    bibtex=BIBTEX,
    merges=False,
    limits=(
        "A bottleneck with a nonlinearity is no change of a weight.",
        "A published adapter holds no latents: training that goes on from it starts with others of the same codes.",
    ),
    headline=("r", "bits", "site"),
    page="docs/binary_adapter.md",
    instead={
        "lora": "it has a nonlinearity; `BinaryLoraConfig` trains updates that are",
        "compressed": "its weights are packed already",
        "binarized": "its weights are packed already",
    },
)
