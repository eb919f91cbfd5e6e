r"""SSF: scale and shift of features (Lian, Zhou, Feng, Wang 2022, arXiv:2210.08823).

After an operation with C output channels, two trained vectors act on each channel c (the paper's section 3.2):

    y_c = gamma_c * h_c + beta_c        h = op(x)

They start at gamma ~ N(1, 0.02) and beta ~ N(0, 0.02), and are merged into the operation for inference:

    W' = diag(gamma) W,    b' = gamma * b + beta

**Backward without keeping h.** The gradient of gamma needs h, which nothing else keeps, while y is kept anyway where
a non-linearity or an attention follows. So y is kept and h = (y - beta) / gamma recovered from it:

    d gamma = sum(dy * h) = (sum(dy * y) - beta * sum(dy)) / gamma,    d beta = sum(dy)

Channels whose gamma is too near zero to divide by keep their own h. On a Linear the two vectors are folded into the
weight for the forward, so that no pass over the features is added; on a norm they are folded into its affine
parameters, whose own backward gives both gradients from what a frozen norm keeps as well.
"""

from .about import ABOUT
from .config import SSFConfig
from .functional import ScaledLinear, ScaledRMSNorm, ScaleShift
from .layer import SSFLayer, SSFLinear
from .model import SSFModel


__all__ = [
    "ABOUT",
    "SSFConfig",
    "SSFLayer",
    "SSFLinear",
    "SSFModel",
    "ScaleShift",
    "ScaledLinear",
    "ScaledRMSNorm",
]
