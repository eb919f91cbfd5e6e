"""VQT: learnt queries that read a frozen transformer, with no backward through it."""

from .cache import FrozenPassCache
from .config import VQTConfig
from .model import VQTLayer, VQTModel, attention_maps
from .selection import select_features


__all__ = ["FrozenPassCache", "VQTConfig", "VQTLayer", "VQTModel", "attention_maps", "select_features"]
