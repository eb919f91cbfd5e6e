r"""LoRA-SB (Ponkshe, Singhal et al. 2024, arXiv:2411.19557) and LoRA-XS (Balazy, Banaei et al. 2024, arXiv:2405.17604).

Between two frozen factors, B `(out, r)` and A `(r, in)`, a small matrix R `(r, r)` is trained, and nothing else:

    W' = W + B R A

**LoRA-SB.** With g the gradient of the loss in W, summed over some batches, and eta the size of one step, the first step
of full fine-tuning with a sign-based optimizer is U = -eta sign(g). B and A are its first r left and right singular
vectors, and R starts as the diagonal of the singular values, so that B R A is the best approximation of U of rank r. The
model therefore does not start as the base. B and A are orthonormal: the gradient of R is B^T g A^T, and a step of R
moves W by the projection of g on their spaces, B B^T g A^T A; no scaling is needed.

**LoRA-XS** (`init_weights="weights"`). A = S_r V_r^T and B = U_r are of the singular value decomposition of W itself, and
R starts at N(0, 1e-5), next to nothing.
"""

from .about import ABOUT
from .config import LoraSBConfig
from .layer import LoraSBLinear
from .model import LoraSBModel


__all__ = ["ABOUT", "LoraSBConfig", "LoraSBLinear", "LoraSBModel"]
