"""Cutting masked channels out, and saving and loading what is left."""

from .cut import cut
from .loading import load_pruned
from .lora import save_as_lora
from .packing import FORMS, PackedAdapter, binarize, compress
from .prune import prune_and_unload
from .report import card_rows, markdown, report
from .saving import kept_shares, push_pruned_to_hub, save_pruned


__all__ = [
    "FORMS",
    "PackedAdapter",
    "binarize",
    "card_rows",
    "compress",
    "cut",
    "kept_shares",
    "load_pruned",
    "markdown",
    "prune_and_unload",
    "push_pruned_to_hub",
    "report",
    "save_as_lora",
    "save_pruned",
]
