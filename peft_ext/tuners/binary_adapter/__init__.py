r"""Bi-AdaptFormer: bottleneck adapters of 1 to 8 bits (Jie, Wang, Deng 2023, arXiv:2307.16867).

    y = f(h) + scale * U dropout(act(D x))

`site="parallel"`: f is the feed-forward part of a block, h what it reads, and x the residual stream in front of its
norm (`before_norm`), or h itself. `site="sequential"`: x = f(h), for any f. D `(r, inputs)` and U `(outputs, r)` are the
quantised forms of trained latents, see `peft_ext.low_bit`; with `bits=32` they are a plain bottleneck adapter's.
"""

from .about import ABOUT
from .config import BinaryAdapterConfig
from .layer import BinaryAdapterLinear
from .model import BinaryAdapterModel


__all__ = ["ABOUT", "BinaryAdapterConfig", "BinaryAdapterLinear", "BinaryAdapterModel"]
