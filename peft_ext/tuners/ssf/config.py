"""The fields of SSF."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core import ExtConfig


@dataclass
class SSFConfig(ExtConfig):
    """Configuration of SSF; see also the common fields of [`ExtConfig`].

    Args:
        shift: Where beta is trained. `None`: wherever a merged model can carry it, that is, on modules with a bias
            and on those to which the architecture gives one by a config flag (`attention_bias`, `mlp_bias`), which
            is set on merging. `False`: nowhere. `True`: everywhere, also where the result cannot be merged.
        init_weights: `True` starts at gamma ~ N(1, 0.02) and beta ~ N(0, 0.02), as published; `"identity"` at exactly
            gamma = 1 and beta = 0, so that training starts from the base model's own output; `False` further away, for
            tests.
        recover: Recover the features before the scale from those after it, instead of keeping them for the backward.
            `False` needs more memory; it is for second derivatives.

    Raises:
        ValueError: A field has a value that SSF cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "SSF"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("recover",)
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("identity",)

    shift: bool | None = field(
        default=None, metadata={"help": "Train a shift: everywhere, nowhere, or (None) where a merged model has it."}
    )
    recover: bool = field(default=True, metadata={"help": "Recover features in the backward instead of keeping them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift not in (None, True, False):
            raise ValueError(f"`shift` must be None, True or False, got {self.shift!r}.")
        if self.recover not in (True, False):
            raise ValueError(f"`recover` must be True or False, got {self.recover!r}.")
