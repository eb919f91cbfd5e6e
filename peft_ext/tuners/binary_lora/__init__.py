r"""Bi-LoRA: low-rank updates whose factors have 1 to 8 bits (Jie, Wang, Deng 2023, arXiv:2307.16867).

    y = W x + b + scale * U dropout(D x),    merged: W' = W + scale * U D

D `(r, inputs)` and U `(outputs, r)` are the quantised forms of trained latents; see `peft_ext.low_bit` for the levels,
for the gradient of the latents, and for what is in a file. With `bits=32` nothing is quantised.
"""

from .about import ABOUT
from .config import BinaryLoraConfig
from .layer import BinaryLoraLinear
from .model import BinaryLoraModel


__all__ = ["ABOUT", "BinaryLoraConfig", "BinaryLoraLinear", "BinaryLoraModel"]
