"""VQT: learnt queries that read a frozen transformer, with no backward through it."""

from ...reading import FrozenPassCache
from .about import ABOUT, layer_shares
from .config import VQTConfig
from .layer import VQTLayer
from .model import VQTModel, attention_maps
from .selection import select_features


__all__ = [
    "ABOUT",
    "FrozenPassCache",
    "VQTConfig",
    "VQTLayer",
    "VQTModel",
    "attention_maps",
    "layer_shares",
    "select_features",
]
