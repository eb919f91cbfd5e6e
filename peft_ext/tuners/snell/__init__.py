r"""SNELL: sparse tuning with kernelised low-rank updates (Shen, Sun, Ji, Huang, Wang 2024, arXiv:2411.01800).

The rows and columns of a weight are points, P_o in `(2, out, r/2)` and P_i in `(2, in, r/2)`, and its update is made of
their distances, which has full rank:

    D_oi = 0.1 (|P_o[0, o] - P_i[0, i]| - |P_o[1, o] - P_i[1, i]|)
    W' = W + D * g(D)

**Gate.** With t the quantile of |D| at `sparsity`, that share of the update is zero. `"shrink"`, as in the paper:
g(D) = max(|D| - t, 0). `"weight"`, as in its code: g(D) = |D| where |D| > t. `"none"`: one everywhere, a kernelised LoRA.
No gradient goes through the gate: that of D is g(D) times that of the update.

**Memory.** The update is made in chunks of rows, in the forward and again in the backward; what is kept for the backward
is the input, the points, and t.

**Allocation** (`allocation="adaptive"`, SNELLA; Shen, Sun, Wang, Huang 2025, arXiv:2510.24037). The share of zeros of all
modules together rises from 0.01 to `sparsity`, and a module gets of what stays in proportion to the sensitivity of its
points: the mean over them of the moving average of |p dL/dp| times the moving average of its deviation.
"""

from .about import ABOUT
from .config import SNELLConfig
from .layer import Points, SNELLLinear
from .model import SNELLModel


__all__ = ["ABOUT", "Points", "SNELLConfig", "SNELLLinear", "SNELLModel"]
