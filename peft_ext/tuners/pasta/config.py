"""The fields of PASTA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core import ExtConfig


@dataclass
class PASTAConfig(ExtConfig):
    """Configuration of PASTA; see also the common fields of [`ExtConfig`].

    Args:
        special_tokens: Ids of the special tokens, for example `[tokenizer.cls_token_id, tokenizer.sep_token_id]`.
            `None`: those that the model's config names (beginning and end of a text, CLS, SEP). Of no use for images,
            whose class token and registers stand in known rows.
        num_vectors: m, the vectors of a layer. `None`: in a text encoder 2, for the CLS and SEP of one sentence (pairs
            have 3, RoBERTa's pairs 4); elsewhere one for each of `special_tokens`, or for each class and register row.
        by_token: Whether a token's vector is that of its id, however often it occurs, instead of that of its rank
            among the special tokens of the sample. `None`: in models that generate, which cannot count.
        dropout: Probability with which an element of an added vector is dropped during training.
        layers_to_transform: Index, or indices, of the layers that get vectors; `None`: all.
        init_weights: `True` starts at zero, so that training starts from the base model's own output; `"normal"` at
            N(0, 0.02), as published; `False` further away, for tests.

    Raises:
        TypeError, ValueError: A field has a value that PASTA cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "PASTA"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("dropout",)
    SIZES: ClassVar[tuple[str, ...]] = ("num_vectors",)
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("normal",)

    special_tokens: list[int] | None = field(
        default=None, metadata={"help": "Ids of the special tokens; None: those that the model's config names."}
    )
    num_vectors: int | None = field(default=None, metadata={"help": "Vectors per layer."})
    by_token: bool | None = field(
        default=None, metadata={"help": "One vector for each id instead of for each rank in the sample."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the added vectors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.special_tokens
        if ids is not None:
            if not (isinstance(ids, (list, tuple)) and all(type(token) is int for token in ids)):
                raise TypeError(
                    f"`special_tokens` must be a list of token ids, got {ids!r}; write "
                    "[tokenizer.cls_token_id, tokenizer.sep_token_id]."
                )
            if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
                raise ValueError(f"`special_tokens` must hold at least one id, each once and none below 0, got {ids}.")
            self.special_tokens = list(ids)
        if self.num_vectors is not None:
            if type(self.num_vectors) is not int:
                raise TypeError(f"`num_vectors` must be an integer, got {self.num_vectors!r}.")
            if self.num_vectors < 1:
                raise ValueError(f"`num_vectors` must be at least 1, got {self.num_vectors}.")
        if self.by_token not in (None, True, False):
            raise ValueError(f"`by_token` must be None, True or False, got {self.by_token!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout!r}.")
        for name in ("layers_pattern", "exclude_modules"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` has no use for PASTA; choose layers with `layers_to_transform`.")
