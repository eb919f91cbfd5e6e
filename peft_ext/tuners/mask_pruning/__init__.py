"""Mask-pruning LoRA: LoRA with learnt binary masks over groups of channels, which can then be cut out."""

from .about import ABOUT, kept_shares
from .callback import MaskLoraCallback
from .config import MaskLoraConfig
from .gate import MaskGate
from .layer import MaskLoraLayer
from .model import MaskLoraModel, fix_masks, gates_of, keep_ratios, kept_units


__all__ = [
    "ABOUT",
    "MaskGate",
    "MaskLoraCallback",
    "MaskLoraConfig",
    "MaskLoraLayer",
    "MaskLoraModel",
    "fix_masks",
    "gates_of",
    "keep_ratios",
    "kept_shares",
    "kept_units",
]
