"""Sparse fine-tuning: SpIEL, LT-SFT and fixed supports."""

from .callback import SparseFTCallback
from .config import SparseFTConfig
from .model import SparseFTModel


__all__ = ["SparseFTCallback", "SparseFTConfig", "SparseFTModel"]
