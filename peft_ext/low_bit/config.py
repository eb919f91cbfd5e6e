"""The fields that methods with low-bit matrices share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..core import ExtConfig
from .codebook import BITS, FULL


@dataclass
class LowBitConfig(ExtConfig):
    """Rank, bits, scale and dropout.

    Raises:
        ValueError: A field has a value that cannot be used; the message names it.
    """

    r: int = field(default=32, metadata={"help": "Rank: the width between the two matrices."})
    bits: int = field(default=1, metadata={"help": "Bits of a weight: 1 to 8, or 32 for no quantisation."})
    scale: float = field(default=1.0, metadata={"help": "Factor of what is added."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout between the two matrices."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}.")
        if type(self.bits) is not int or self.bits not in (*BITS, FULL):
            raise ValueError(
                f"`bits` must be {BITS[0]} to {BITS[-1]}, or {FULL} for weights that are not quantised, got {self.bits!r}."
            )
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, (int, float))
            or not (math.isfinite(self.scale) and self.scale)
        ):
            raise ValueError(f"`scale` must be a finite number other than 0, got {self.scale!r}.")
        if isinstance(self.dropout, bool) or not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout!r}.")
