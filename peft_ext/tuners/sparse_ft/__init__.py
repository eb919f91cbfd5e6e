"""Sparse fine-tuning: SpIEL, LT-SFT and fixed supports."""

from .about import ABOUT
from .callback import SparseFTCallback
from .compose import graft, import_lt_sft, overlap
from .config import SparseFTConfig
from .lt_sft import lt_sft
from .model import SparseFTModel


__all__ = [
    "ABOUT",
    "SparseFTCallback",
    "SparseFTConfig",
    "SparseFTModel",
    "graft",
    "import_lt_sft",
    "lt_sft",
    "overlap",
]
