"""What is where in each architecture: one table, and one way to ask it, [`describe`]."""

from .describe import ROLES, Block, BlockAttention, BlockFeedForward, Description, describe, is_norm
from .layout import Architecture, Attention, Classifier, FeedForward
from .patches import patch_inputs
from .table import ARCHITECTURES, architecture_of


__all__ = [
    "ARCHITECTURES",
    "ROLES",
    "Architecture",
    "Attention",
    "Block",
    "BlockAttention",
    "BlockFeedForward",
    "Classifier",
    "Description",
    "FeedForward",
    "architecture_of",
    "describe",
    "is_norm",
    "patch_inputs",
]
