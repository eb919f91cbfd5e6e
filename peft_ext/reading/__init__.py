"""What methods need that read a frozen backbone into a head of their own.

A reader is a `ReaderConfig`, a `ReaderLayer` and a `ReaderModel`. Its layer picks up keys and values
(`KeysValuesCapture`) or hidden states (`StatesCapture`) of the frozen pass, a `FrozenPassCache` keeps them on disk, and
with gradient checkpointing the backward runs the pass again (`with_backward`).
"""

from .cache import FrozenPassCache
from .config import ReaderConfig
from .families import FAMILIES, HEAD_NAMES, Attention, Family, check_model, family_of
from .forwards import (
    AllFound,
    are_tokens,
    may_be_cut_short,
    records_outputs,
    replaced_forward,
    rows_of_a_reader,
    run_as_before,
    run_without_compiler,
    without_checkpointing,
)
from .head import ReaderHead
from .kept import Kept, KeptPass
from .keys_values import Frozen, KeysValuesCapture, query_mask
from .layer import BackboneCall, ReaderLayer, Reading, reader_of
from .model import ReaderModel
from .rerun import recomputed, same_autocast, split_call, with_backward
from .states import StatesCapture, padding_mask, skipped_blocks


__all__ = [
    "FAMILIES",
    "HEAD_NAMES",
    "AllFound",
    "Attention",
    "BackboneCall",
    "Family",
    "Frozen",
    "FrozenPassCache",
    "Kept",
    "KeptPass",
    "KeysValuesCapture",
    "ReaderConfig",
    "ReaderHead",
    "ReaderLayer",
    "ReaderModel",
    "Reading",
    "StatesCapture",
    "are_tokens",
    "check_model",
    "family_of",
    "may_be_cut_short",
    "padding_mask",
    "query_mask",
    "reader_of",
    "recomputed",
    "records_outputs",
    "replaced_forward",
    "rows_of_a_reader",
    "run_as_before",
    "run_without_compiler",
    "same_autocast",
    "skipped_blocks",
    "split_call",
    "with_backward",
    "without_checkpointing",
]
