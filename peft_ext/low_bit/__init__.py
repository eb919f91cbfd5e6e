r"""Matrices of 1 to 8 bits that are trained (Jie, Wang, Deng 2023, arXiv:2307.16867).

A latent matrix w in fp32 is trained; what acts is its quantised form. With mu and sd the mean and the (unbiased)
standard deviation of the whole matrix, and 2^b levels for numbers of the standard normal distribution:

    z = (w - mu) / (sd + 1e-5),    u = sd * (level(z) + z - stopgrad(z)) + mu

For the gradient G of u, with r = sd / (sd + 1e-5), the latent one is the derivative of this, and not just G:

    dL/dw_i = r G_i + (1 - r) mean(G) + (w_i - mu) / ((n - 1) sd) * sum_j G_j (level_j - r z_j)

A file holds the number of each level, b bits each, mu and sd: `(ceil(n b / 8),)` bytes and two floats.
"""

from .codebook import BITS, FULL, Coded, codebook, decode, encode, used_values
from .config import LowBitConfig
from .layer import LowBitLayer
from .leaf import FullMatrix, LowBitMatrix
from .reading import BIBTEX, COLUMNS, PAPER, figures, matrices, pictures


__all__ = [
    "BIBTEX",
    "BITS",
    "COLUMNS",
    "FULL",
    "PAPER",
    "Coded",
    "FullMatrix",
    "LowBitConfig",
    "LowBitLayer",
    "LowBitMatrix",
    "codebook",
    "decode",
    "encode",
    "figures",
    "matrices",
    "pictures",
    "used_values",
]
