"""VPT: prompts for transformers that take no token embeddings, with E2VPT's key-value rows and pruning as options."""

from .about import ABOUT, attention_to_prompts
from .config import VPTConfig
from .layer import VPTLayer
from .model import VPTModel
from .prune import PrunedPrompts, prune_prompts


__all__ = [
    "ABOUT",
    "PrunedPrompts",
    "VPTConfig",
    "VPTLayer",
    "VPTModel",
    "attention_to_prompts",
    "prune_prompts",
]
