r"""PASTA: parameter-efficient tuning with special tokens (Yang, Huang, Zhou, Chen 2022, "Parameter-Efficient Tuning
with Special Token Adaptation", arXiv:2210.04382).

Layer l has vectors E_l `(m, D)`. Before the whole block, residual connection included, each special token gets one:

    h_i <- h_i + dropout(E_l[p(i)])        if token i is special, else h_i

p(i) says which. In a text encoder p counts the special tokens of the sample in reading order: [CLS] 0, the first [SEP]
1, the second 2. In a model that generates, which sees one token at a time, p is the kind of the token. In a vision
model p is the row: class token 0, registers (or the distillation token) after it.
"""

from .about import ABOUT
from .config import PASTAConfig
from .layer import PASTALayer
from .model import PASTAModel


__all__ = ["ABOUT", "PASTAConfig", "PASTALayer", "PASTAModel"]
