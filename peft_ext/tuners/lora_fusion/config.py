"""The fields of LoRAFusion."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

from ...core import ExtConfig


if TYPE_CHECKING:
    from .given import Given

MODES = ("deltas", "factors")
SHARED_BY = ("block", "all", "none")


@dataclass
class LoraFusionConfig(ExtConfig):
    """Configuration of LoRAFusion; see also the common fields of [`ExtConfig`].

    Args:
        adapters: The LoRAs to be fused: names of adapters on the model, directories or names on the Hub. All of one
            base. They are read when the adapter is made; a saved one has a copy of them in its own file.
        mode: `"deltas"` adds up the updates, which may have any ranks and modules. `"factors"`, as published, adds up
            the A and the B of all LoRAs before they are multiplied; these must have equal ranks and the same modules.
        magnitude: Whether the length of each row of the changed weight is trained too.
        share: Which modules share coefficients: those of one `"block"`, as published, `"all"`, or `"none"`.
        init_weights: `True`: every coefficient is one over the number of LoRAs. `"xavier"`: as published, about zero, half
            of them below. `"zero"`: the base model; not with `"factors"`, where the gradient is zero there. `False`: away
            from these, for tests.
        ranks: The ranks of the LoRAs; filled in.
        other_ranks: The ranks in modules where they are others, 0 for a LoRA that leaves the module out; filled in.

    Raises:
        TypeError, ValueError: A field has a value that LoRAFusion cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "FUSED_LOW_RANK"  # PEFT matches prefixes as substrings in places, and `lora_` is LoRA's
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("xavier", "zero")
    # no field: what was read of the LoRAs, until the adapter is on the model
    given = cast("Given | None", None)

    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "The LoRAs: names of adapters on the model, directories or on the Hub."},
    )
    mode: str = field(default="deltas", metadata={"help": "Whether 'deltas' or 'factors' are added up."})
    magnitude: bool = field(default=False, metadata={"help": "Whether the lengths of the weight's rows are trained."})
    share: str = field(
        default="block", metadata={"help": "Which modules share coefficients: of one 'block', 'all' or 'none'."}
    )
    ranks: list[int] | None = field(default=None, metadata={"help": "The ranks of the LoRAs; leave it."})
    other_ranks: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "The ranks in modules where they are others; leave it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.adapters
        if not (isinstance(names, (list, tuple)) and all(isinstance(name, (str, os.PathLike)) for name in names)):
            raise TypeError(f"`adapters` must be a list of names or directories, got {names!r}.")
        self.adapters = [os.fspath(name) for name in names]
        if len(set(self.adapters)) < len(names):
            raise ValueError(f"`adapters` names one of them twice: {self.adapters}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be 'deltas' or 'factors', got {self.mode!r}.")
        if self.magnitude not in (True, False):
            raise ValueError(f"`magnitude` must be True or False, got {self.magnitude!r}.")
        if self.share not in SHARED_BY:
            raise ValueError(f"`share` must be 'block', 'all' or 'none', got {self.share!r}.")
        if self.mode == "factors" and self.init_weights == "zero":
            raise ValueError(
                "`init_weights='zero'` cannot be trained with `mode='factors'`: the update is a product of two sums, "
                "whose gradient is zero there. Use `mode='deltas'`, or another start."
            )
        self._check_ranks()

    def _check_ranks(self) -> None:
        if self.ranks is None and self.other_ranks is None:
            return
        others = {} if self.other_ranks is None else self.other_ranks
        for ranks in (self.ranks, *(others.values() if isinstance(others, dict) else (others,))):
            is_list = isinstance(ranks, list) and len(ranks) == len(self.adapters)
            if not (is_list and all(type(rank) is int and rank >= 0 for rank in ranks or ()) and any(ranks or ())):
                raise ValueError(
                    f"`ranks` and `other_ranks` must have a rank for each of the {len(self.adapters)} adapters, got "
                    f"{ranks!r}. They are filled in; leave them out of a config of your own."
                )

    def ranks_at(self, module: str) -> list[int]:
        """The rank of each LoRA in a module, by the module's full name."""
        assert self.ranks is not None
        return (self.other_ranks or {}).get(module, self.ranks)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """The stacked factors have as many rows as all ranks together."""
        if self.ranks is not None:
            for ranks in (self.ranks, *(self.other_ranks or {}).values()):
                yield "ranks", sum(ranks)

    @property
    def labels(self) -> list[str]:
        """The last part of each adapter's name; the whole name where two would be called alike."""
        short = [re.split(r"[/\\]", name.rstrip("/\\"))[-1] for name in self.adapters]
        return short if len(set(short)) == len(short) else list(self.adapters)
