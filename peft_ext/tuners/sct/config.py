"""The fields of SCT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...core import CalibratedConfig


SITES = ("attn", "mlp", "qkv")


@dataclass
class SCTConfig(CalibratedConfig):
    """Configuration of SCT; see also the common fields of [`ExtConfig`].

    Args:
        num_channels: K, the channels of each site that are tuned. `None`: an eighth of them.
        site: What the maps act on. `"attn"`: the residual stream after the attention of a block, as published; it
            cannot be merged. `"mlp"`: the output of the last layer of its feed-forward part. `"qkv"`: the outputs of
            the query and value projections, with a map each. The last two can be merged, and `target_modules` may
            name other Linear modules for them.
        init_weights: `True`: maps start at N(0, 0.02), cut off at 2, as published, which is not quite the base model.
            `"identity"`: at zero, so that it is. `False`: further away, for tests.
        calibrated: Whether the channels were chosen by a calibration; filled in by it.

    Raises:
        ValueError: A field has a value that SCT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "SCT"
    SIZES: ClassVar[tuple[str, ...]] = ("num_channels",)
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("identity",)
    # no field, so not in the JSON
    places = None  # type: object  # where the maps go, while the adapter is put on

    num_channels: int | None = field(default=None, metadata={"help": "Tuned channels of each site."})
    site: str = field(default="attn", metadata={"help": f"What the maps act on: one of {', '.join(SITES)}."})
    calibrated: bool = field(
        default=False, metadata={"help": "Whether channels were chosen by `calibrate`; leave it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_channels is not None and (type(self.num_channels) is not int or self.num_channels < 1):
            raise ValueError(f"`num_channels` must be a whole number of at least 1, got {self.num_channels!r}.")
        if self.site not in SITES:
            raise ValueError(f"`site` must be one of {', '.join(map(repr, SITES))}, got {self.site!r}.")
        if self.calibrated not in (True, False):
            raise ValueError(f"`calibrated` must be True or False, got {self.calibrated!r}.")

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not the indices of so many channels."""
        faults = []
        for name, indices in sorted(support.items()):
            count = len(indices) if self.num_channels is None else self.num_channels
            fits = indices.dtype == torch.int32 and indices.shape == (count,) and count > 0
            if not fits or int(indices[0]) < 0 or bool((indices.diff() <= 0).any()):
                faults.append(f"{name} has no {count} distinct, sorted channels of int32")
        if faults or not support:
            listed = "\n    ".join(faults[:8] or ["it is empty"])
            raise ValueError(f"The calibration in {where} is damaged:\n    {listed}")
