"""The fields of LoRA-SB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...core import CalibratedConfig


DOWN, UP, CORE = "down", "up", "core"  # A, B, and R at the start, of what a calibration finds for a module


@dataclass
class LoraSBConfig(CalibratedConfig):
    """Configuration of LoRA-SB and LoRA-XS; see also the common fields of [`ExtConfig`].

    Args:
        r: Side of the trained matrix. No target may have fewer inputs or outputs.
        step_size: By how much the first step, which the start approximates, moves each weight: a learning rate over the
            number of warm-up steps, as published.
        init_weights: `True`: at the best approximation of the first step, for which `calibrate` is needed. `"weights"`:
            the factors are those of the weights, and R is next to nothing: LoRA-XS, without calibration. `False`: the
            same with a large R, for tests.
        calibrated: Whether the factors were found by a calibration; filled in by it.

    Raises:
        ValueError: A field has a value that LoRA-SB cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "LOW_RANK_CORE"
    SIZES: ClassVar[tuple[str, ...]] = ("r",)
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("weights",)

    r: int = field(default=32, metadata={"help": "Side of the trained matrix."})
    step_size: float = field(
        default=4e-6, metadata={"help": "How far the first step, which the start approximates, moves each weight."}
    )
    calibrated: bool = field(default=False, metadata={"help": "Whether factors were found by `calibrate`; leave it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}.")
        if isinstance(self.step_size, bool) or not 0 < self.step_size < float("inf"):
            raise ValueError(f"`step_size` must be above 0 and finite, got {self.step_size!r}.")
        if self.init_weights == "weights" and self.step_size != type(self).step_size:
            raise ValueError(
                "`step_size` has no effect with `init_weights='weights'`, which takes no step: leave it out."
            )
        if self.calibrated not in (True, False):
            raise ValueError(f"`calibrated` must be True or False, got {self.calibrated!r}.")

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not factors of rank `r`, three for each module."""
        faults = []
        for name in sorted({key.rpartition(".")[0] for key in support}):
            parts = [support.get(f"{name}.{part}", torch.empty(0)) for part in (DOWN, CORE, UP)]
            down, core, up = (part.shape for part in parts)
            fits = len(down) == len(up) == 2 and down[0] == up[1] == self.r and core == (self.r, self.r)
            if not (fits and all(part.is_floating_point() and bool(part.isfinite().all()) for part in parts)):
                faults.append(f"{name} has no factors of rank {self.r} with finite values")
        if faults or not support:
            listed = "\n    ".join(faults[:8] or ["it is empty"])
            raise ValueError(f"The calibration in {where} is damaged:\n    {listed}")
