"""What methods need that read a frozen backbone into a head of their own; VQT is one."""

from .families import FAMILIES, HEAD_NAMES, Attention, Family, check_model, family_of
from .forwards import replaced_forward, run_as_before, run_without_compiler
from .layer import ReaderLayer


__all__ = [
    "FAMILIES",
    "HEAD_NAMES",
    "Attention",
    "Family",
    "ReaderLayer",
    "check_model",
    "family_of",
    "replaced_forward",
    "run_as_before",
    "run_without_compiler",
]
