"""The configuration of UniPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...reading import ReaderConfig


IDENTITIES = ("attention", "states")


@dataclass
class UniPTConfig(ReaderConfig):
    """Configuration of UniPT; see also the common fields of [`ExtConfig`].

    Args:
        reduction_factor: The side network has D / `reduction_factor` channels; it must divide the model's width D.
            Published: 2 for retrieval, 1 for CLIP4Clip.
        identity: Which of the two published variants. `"attention"` (retrieval) adds the identity matrix to the weights
            with which the last layer's tokens read an earlier layer, and normalises what is read; `"states"`
            (CLIP4Clip) adds that layer's first token to what was read.
        residual: Whether the last hidden state is added to what the side network makes. Published: `False` for
            `identity="attention"`, `True` for `"states"`.
        id2label: Names of the classes of this adapter's own head; `None` takes those of the model.
        layers_to_transform: Index, or indices, of the layers whose input is read besides the last layer's output;
            `None`: all.
        init_weights: `True` starts as the model itself: what the stock head reads is the same, and so are the logits
            where that head is one linear map of as many classes. `"published"` starts at random, and `False` adds noise
            to `True`, for tests.

    Raises:
        TypeError, ValueError: A field has a value that UniPT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "UNIPT"
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("published",)

    reduction_factor: int = field(default=2, metadata={"help": "The side network has D / reduction_factor channels."})
    identity: str = field(default="attention", metadata={"help": f"Where the identity term stands: {IDENTITIES}."})
    residual: bool = field(default=True, metadata={"help": "Whether the last hidden state is added to the output."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.reduction_factor) is not int:
            raise TypeError(f"`reduction_factor` must be an integer, got {self.reduction_factor!r}.")
        if self.reduction_factor < 1:
            raise ValueError(f"`reduction_factor` must be at least 1, got {self.reduction_factor}.")
        if self.identity not in IDENTITIES:
            raise ValueError(f"`identity` must be one of {', '.join(map(repr, IDENTITIES))}, got {self.identity!r}.")
        if type(self.residual) is not bool:
            raise TypeError(f"`residual` must be True or False, got {self.residual!r}.")
        if self.init_weights is True and not self.residual:
            raise ValueError(
                "`init_weights=True` starts as the model itself, which `residual=False` rules out: set "
                '`init_weights="published"`, or `residual=True`.'
            )
