"""Sparse fine-tuning: SpIEL, LT-SFT and fixed supports."""

from .config import SparseFTConfig
from .model import SparseFTModel


__all__ = ["SparseFTConfig", "SparseFTModel"]
