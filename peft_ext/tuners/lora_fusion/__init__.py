r"""LoRAFusion (Guo, Ali, Yang, Fan 2025, doi:10.1145/3716368.3735213): LoRAs of one base are fused.

With the given LoRAs s_i B_i A_i of a module, and w_i their coefficients in the block that it is in, the update is

    "deltas":   Delta W = sum_i w_i s_i B_i A_i                       any ranks; linear in w
    "factors":  Delta W = s (sum_i w_i B_i) (sum_i w_i A_i)           as published; quadratic in w, with cross terms

and W' = W + Delta W. With magnitudes, each row of that gets a trained length, as in DoRA:

    W' = diag(m / ||W + Delta W||) (W + Delta W),                     the norms being those of the rows

All A_i and B_i are frozen, and saved with the fused adapter.
"""

from .about import ABOUT
from .config import LoraFusionConfig
from .layer import LoraFusionLinear
from .model import LoraFusionModel


__all__ = ["ABOUT", "LoraFusionConfig", "LoraFusionLinear", "LoraFusionModel"]
