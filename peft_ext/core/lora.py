"""PEFT's LoRA in the words of a description, so that its adapters are inspected and compared beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .about import About
from .files import Adapter, Column, Reading, Site
from .updates import lora_scale


def scale_at(config: Mapping[str, Any], module: str, r: int) -> float:
    """The factor of the update that a LoRA of the fields `config` makes, with rank `r`, on a module."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    return lora_scale(config, r, config.get("lora_alpha") if alpha is None else alpha)


class LoraAbout(About):
    """How LoRA's tensors are read."""

    columns = (Column("rank", "rank"),)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The rank, and the update where it is nothing but low-rank."""
        config = adapter.config
        down, up = ("A.weight", "embedding_A"), ("B.weight", "embedding_B")
        first = site.matrix(*down)
        if first is None:
            return {}, {}
        update = site.low_rank(down, up, scale_at(config, site.module, len(first)))
        # a leaf besides the two (the magnitude of DoRA, a bias) makes the update another one
        is_plain = update is not None and set(site.leaves) <= {*down, *up}
        return {"rank": len(first)}, {"weight": update} if is_plain and update is not None else {}


OFFSETS = r"[AB]\.weight|embedding_[AB]"  # not the magnitudes of DoRA
LORA = LoraAbout(
    "LoRA", headline=("r", "lora_alpha"), instead={"lora": "it is a LoRA adapter already"}, offsets=OFFSETS
)
