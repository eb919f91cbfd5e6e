r"""Sensitivity-aware parameter-efficient tuning, SPT (He et al. 2023, arXiv:2303.08566).

A sensitivity pass scores every weight, s_w = sum over batches of g_w^2, and a budget of trainable parameters goes where
the scores are: with n_t of the tau largest scores in tensor t,

    a vector of size c     is tuned whole if n_t >= c / beta,                             else its n_t weights are;
    a matrix               gets a structure (low rank, adapter) if n_t >= cost / alpha,   else its n_t weights are tuned,

and tau is the largest number for which the total stays within the budget. What is left of the budget, less than one
structure, goes to the next largest scores. A structured matrix has no sparse part:

    y = (W + S) x + b + s        or        y = W x + b + s + scale * DropPath(B A Dropout(x))

Parameters that are no Linear's weight, such as the experts of a mixture, are in `parameters.py`.
"""

from .about import ABOUT
from .allocation import Allocation, allocate
from .config import SPTConfig
from .model import SPTModel


__all__ = ["ABOUT", "Allocation", "SPTConfig", "SPTModel", "allocate"]
