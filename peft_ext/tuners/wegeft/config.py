"""The fields of WeGeFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core import ExtConfig


SHARED_BY = ("target", "all", "none")


@dataclass
class WeGeFTConfig(ExtConfig):
    """Configuration of WeGeFT; see also the common fields of [`ExtConfig`].

    Args:
        r: Rank of the update: outputs of the first map and inputs of the second.
        share: Which modules share a pair of maps. `"target"`: those of one name in all layers, as long as they read
            vectors of one width (a model whose stages differ has a pair for each width). `"all"`: all targets, which
            must read vectors of one width. `"none"`: each module has its own.
        dropout: Dropout on what the maps read.
        init_weights: `True` starts at the base model: Q at zero, P as `nn.Linear`. `False` further away, for tests.

    Raises:
        ValueError: A field has a value that WeGeFT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "WEGEFT"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("dropout",)
    SIZES: ClassVar[tuple[str, ...]] = ("r",)

    r: int = field(default=64, metadata={"help": "Rank of the update."})
    share: str = field(
        default="target", metadata={"help": "Which modules share maps: those of one 'target' name, 'all' or 'none'."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on what the maps read."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"`r` must be a whole number of at least 1, got {self.r!r}.")
        if self.share not in SHARED_BY:
            raise ValueError(f"`share` must be 'target', 'all' or 'none', got {self.share!r}.")
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout!r}.")
