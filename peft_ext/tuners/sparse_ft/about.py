"""What there is to say about sparse fine-tuning."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from ...core import About, Adapter, Curve, HeatMap, Picture, Reading, Site, layer_and_type
from ...sparse_files import COLUMNS, read_deltas
from .deltas import deltas


class SparseFTAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = COLUMNS

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """Tuned weights and density."""
        return read_deltas(adapter, site)

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """Where the delta lives: its norm by layer and module; and, while it trains, how its support turned over.

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
        where = HeatMap(norms, "norm of the delta")
        if not turnover:
            return [where]
        steps = sorted(turnover)
        shares = [turnover[step][0] / turnover[step][1] for step in steps]
        return [where, Curve(steps, shares, "turnover of the support", "optimizer step", "fraction replaced")]


ABOUT = SparseFTAbout(
    name="Sparse fine-tuning",
    idea="changes a small share of the weights and leaves the others as they are; which ones is chosen by SpIEL "
    "while it trains, by LT-SFT, or beforehand.",
    paper="https://arxiv.org/abs/2401.16405",
    bibtex=r"""@article{ansell2024scaling,
  title = {Scaling Sparse Fine-Tuning to Large Language Models},
  author = {Ansell, Alan and Vuli{\'c}, Ivan and Sterz, Hannah and Korhonen, Anna and Ponti, Edoardo M.},
  journal = {arXiv preprint arXiv:2401.16405},
  year = {2024},
  url = {https://arxiv.org/abs/2401.16405}
}""",
    merges=True,
    limits=("It is not merged into a quantised base model, whose grid would swallow the small changes.",),
    headline=("selection", "density", "num_tunable_weights"),
    page="docs/sparse.md",
    offsets=r"(delta|bias)\.weight",
)
