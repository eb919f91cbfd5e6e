"""What there is to say about mask-pruning LoRA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core import (
    About,
    Adapter,
    Column,
    Figures,
    Fillings,
    LowRank,
    Picture,
    Reading,
    Row,
    Site,
    Update,
    lora_scale,
)
from ...groups import TITLES
from .model import gates_of, keep_ratios


UNDECIDED = -1  # in the masks of an adapter whose training is not done


class MaskLoraAbout(About):
    """How the tensors are read, and what the figures show."""

    state = ("gate.kept", "gate.progress")
    columns = (
        Column("rank", "rank"),
        Column("units", "units", "{:,}", adds_up=True, within="type"),
        Column("kept", "kept", "{:,g}", adds_up=True, within="type"),
        Column("keep_ratio", "keep ratio", "{:.1%}", ratio=("kept", "units")),
    )

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """Rank, units, and how many are kept (in expectation before the masks are decided)."""
        config = adapter.config
        figures: Figures = {}
        updates: dict[str, Update] = {}
        down = site.matrix("down.weight")
        keep = None
        if (kept := site.leaves.get("gate.kept")) is not None:
            is_decided = bool((kept != UNDECIDED).all())
            logits = site.leaves["gate.weight"].double() * config.get("mask_lr_ratio", 1.0)
            keep = kept.double() if is_decided else (logits > 0).double()
            expected = keep if is_decided else logits.sigmoid()
            figures |= {"units": len(kept), "kept": round(expected.sum().item(), 3), "decided": is_decided}
        if down is not None:
            scale = lora_scale(config, len(down), config.get("lora_alpha"))
            figures["rank"] = len(down)
            if keep is not None and down.shape[1] % len(keep) == 0:  # masked inputs do not reach the update
                down = down * keep.repeat_interleave(down.shape[1] // len(keep))
            if (up := site.matrix("up.weight")) is not None:
                updates["weight"] = LowRank(down, up, scale)
        return figures, updates

    def figures(self, adapter: Adapter, rows: Sequence[Row]) -> Figures:
        """Whether all masks are decided, and after how many steps."""
        steps = {
            int(site.leaves["gate.progress"]) for site in adapter.sites.values() if "gate.progress" in site.leaves
        }
        return {"decided": all(row["decided"] for row in rows if "decided" in row), "steps": max(steps, default=0)}

    def pictures_of_rows(self, rows: Sequence[Row]) -> list[Picture]:
        """A bar for every layer, filled as far as it keeps its channels or heads."""
        shares: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        for row in rows:
            if "units" in row:
                shares[row["type"]][row["module"]] = (row["kept"], row["units"])
        return [Fillings(values, title) for title, values in shares.items()]

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The same of a model."""
        return [Fillings(v, TITLES.get(kind, kind)) for kind, v in kept_shares(model, adapter_name).items()]


def kept_shares(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, tuple[float, float]]]:
    """How many units each group keeps, and of how many, by kind and name of the group.

    Args:
        model: A model with a mask-pruning adapter; before its masks are decided, the number is an expectation.
        adapter_name: The adapter; `None`: the active one.

    Raises:
        ValueError: The model has no such adapter.
    """
    shares: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    ratios = keep_ratios(model, adapter_name)
    names = [adapter_name] if adapter_name else getattr(model, "active_adapters", ["default"])
    for name in names:
        for key, gate in gates_of(model, name).items():
            shares[gate.group.kind][key] = (round(ratios[key] * gate.group.units, 3), gate.group.units)
    return dict(shares)


ABOUT = MaskLoraAbout(
    name="Mask-pruning LoRA",
    idea="trains LoRA together with binary masks over feed-forward channels and attention heads; what is masked "
    "can be cut out, which leaves a smaller and faster model.",
    paper="https://par.nsf.gov/biblio/10616373",
    bibtex=r"""@misc{learning2025prune,
  title = {Learning to Prune and Low-Rank Adaptation for Compact Language Model Deployment},
  year = {2025},
  url = {https://par.nsf.gov/biblio/10616373}
}""",
    merges=True,
    limits=("Merged, it keeps the size of its base model; `peft_ext.prune_and_unload(model)` cuts it.",),
    headline=("r", "lora_alpha", "target_sparsity", "penalty"),
    page="docs/mask_pruning.md",
    instead={
        "binarized": "its masks go by the order of scores, which rounding would change",
        "lora": "its masks are no part of LoRA: `--to pruned` cuts them out, and in Python "
        "`prune_and_unload(model, keep_lora=True)` leaves a LoRA adapter on the smaller base",
    },
)
