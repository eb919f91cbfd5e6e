r"""UniPT: universal parallel tuning (Diao, Wan, Zhang, Jia, Lu, Chen 2024, "UniPT: Universal Parallel Tuning for Transfer
Learning with Efficient Parameter and Memory", CVPR 2024, arXiv:2308.14316).

A frozen transformer has the states H_0 (its embeddings), ..., H_L, each `(B, N, D)`. A small side network of width d
reads them all, and what it makes takes the place of H_L; so the final norm, the pooler and whatever else lies before the
stock head read it. Nothing in the blocks needs a backward.

    a   = Down(H_L),  t_l = Down_l(H_l)                        l = 0, ..., L - 1
    S_l = relu(a t_l^T) / sum over tokens                      padding left out
    m_l = (S_l + I) t_l          identity="attention"          or  S_l t_l + t_l[first row]     identity="states"
    c   = softmax over l of gate(anchor * mean of t_l)         anchor: the mean of a, or its first row
    O   = H_L + Up(relu(a + Proj(sum of c_l m_l)))             or  H_L + Up(relu(sum of c_l m_l))

The two columns are two published variants (the authors' code for image-text retrieval, and for CLIP4Clip); the first
has no H_L in O. With Up = 0 the model starts as it was.
"""

from .about import ABOUT
from .config import UniPTConfig
from .layer import UniPTLayer
from .model import UniPTModel, layer_confidence


__all__ = ["ABOUT", "UniPTConfig", "UniPTLayer", "UniPTModel", "layer_confidence"]
