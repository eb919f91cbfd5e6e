"""The fields of Bi-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...low_bit import LowBitConfig


@dataclass
class BinaryLoraConfig(LowBitConfig):
    """Configuration of low-rank updates with factors of few bits; see also the common fields of [`ExtConfig`].

    Args:
        r: The rank. At 1 bit, rank 32 has the bytes of a rank of 1 in fp32.
        bits: Bits of each weight of the factors: 1 to 8. 32 quantises nothing and is a plain LoRA.
        scale: Factor of the update; the paper chooses it by task from 0.01, 0.1, 1, 10 and 100.
        dropout: Dropout on the r numbers between the factors, as published.
        init_weights: `True`: D uniform as in LoRA, U normal with a deviation of 0.001, cut off at twice that, so that the
            model starts close to its base; with `bits=32` U is zero. `False` further away, for tests.

    Raises:
        ValueError: A field has a value that cannot be used; the message names it.
    """

    METHOD: ClassVar[str] = "BINARY_LOW_RANK"  # PEFT matches prefixes as substrings in places, and `lora_` is LoRA's
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("dropout",)
