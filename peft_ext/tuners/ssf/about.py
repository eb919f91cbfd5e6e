"""What there is to say about SSF."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...core import (
    About,
    Adapter,
    Column,
    Figures,
    HeatMap,
    Picture,
    Reading,
    Row,
    Site,
    Update,
    Vector,
    layer_and_type,
    spread,
)
from .layer import SSFLayer


LEAVES = ("scale", "shift")  # as they are stored: gamma - 1, and beta


class SSFAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (
        Column("scale_mean", "gamma-1 mean", "{:+.4f}"),
        Column("scale_std", "std", "{:.4f}"),
        Column("shift_mean", "beta mean", "{:+.4f}"),
        Column("shift_std", "std", "{:.4f}"),
    )
    labels: ClassVar[Mapping[str, str]] = {"scale": "gamma - 1", "shift": "beta"}

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """Mean and spread of gamma - 1 and of beta."""
        figures: Figures = {}
        updates: dict[str, Update] = {}
        for leaf in LEAVES:
            values = site.leaves.get(f"{leaf}.weight")
            if values is not None:
                updates[leaf] = Vector(values.double())
                figures |= {f"{leaf}_mean": values.double().mean().item(), f"{leaf}_std": spread(values)}
        return figures, updates

    def figures(self, adapter: Adapter, rows: Sequence[Row]) -> Figures:
        """The same over all modules, with the extremes."""
        leaves = defaultdict(list)
        for site in adapter.sites.values():
            for leaf in LEAVES:
                if f"{leaf}.weight" in site.leaves:
                    leaves[leaf].append(site.leaves[f"{leaf}.weight"].double())
        joined = {leaf: torch.cat(values) for leaf, values in leaves.items()}
        return {
            leaf: {"mean": v.mean().item(), "std": spread(v), "min": v.min().item(), "max": v.max().item()}
            for leaf, v in joined.items()
        }

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By layer and module: how far, in the quadratic mean over channels, scales are from one and shifts from zero.

        Raises:
            ValueError: The model has no such SSF adapter.
        """
        offsets: dict[str, dict[tuple[int, str], float]] = {"scale - 1": {}, "shift": {}}
        for name, module in model.named_modules():
            if isinstance(module, SSFLayer):
                for title, leaves in zip(offsets, (module.ssf_scale, module.ssf_shift), strict=True):
                    if adapter_name in leaves:  # the scale is stored as its offset from one
                        mean_square = leaves[adapter_name].get_parameter("weight").detach().float().square().mean()
                        offsets[title][layer_and_type(name)] = float(mean_square.sqrt())
        if not any(offsets.values()):
            raise ValueError(f"There is no SSF adapter named {adapter_name!r} on this model.")
        return [HeatMap(values, f"quadratic mean of {title}") for title, values in offsets.items() if values]


ABOUT = SSFAbout(
    name="SSF",
    idea="trains a scale and a shift for every channel of the frozen model's features; both are folded into the "
    "weights for inference.",
    paper="https://arxiv.org/abs/2210.08823",
    bibtex=r"""@inproceedings{lian2022scaling,
  title = {Scaling \& Shifting Your Features: A New Baseline for Efficient Model Tuning},
  author = {Lian, Dongze and Zhou, Daquan and Feng, Jiashi and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  url = {https://arxiv.org/abs/2210.08823}
}""",
    merges=True,
    limits=("A shift on a module that cannot have a bias, such as an RMSNorm, works only while not merged.",),
    page="docs/ssf.md",
    offsets=r"(scale|shift)\.weight",
)
