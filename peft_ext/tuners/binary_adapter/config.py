"""The fields of bottleneck adapters of few bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...low_bit import LowBitConfig


SITES = ("parallel", "sequential")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


@dataclass
class BinaryAdapterConfig(LowBitConfig):
    """Configuration of bottleneck adapters of few bits; see also the common fields of [`ExtConfig`].

    Args:
        r: The width of the bottleneck.
        bits: Bits of each weight: 1 to 8. 32 quantises nothing and is a plain bottleneck adapter.
        scale: Factor of the adapter's output; the paper chooses it by task from 0.01, 0.1, 1, 10 and 100.
        dropout: Dropout behind the activation, as published.
        site: `"parallel"`: beside the feed-forward part of a block, as published, if the module is its last one; beside
            the module itself if it is another one. `"sequential"`: on the module's output.
        before_norm: Parallel adapters read the residual stream, as published, and not its norm, which the feed-forward
            part reads. `None`: where the table of architectures names that norm, in vision transformers.
        activation: `"relu"`, `"gelu"`, `"silu"` or `"tanh"`.
        init_weights: `True`: D uniform as in LoRA, U normal with a deviation of 0.001, cut off at twice that, so that the
            model starts close to its base; with `bits=32` U is zero. `False` further away, for tests.

    Raises:
        ValueError: A field has a value that cannot be used; the message names it.
    """

    METHOD: ClassVar[str] = "BINARY_ADAPTER"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("dropout",)

    site: str = field(default="parallel", metadata={"help": "'parallel' or 'sequential'."})
    before_norm: bool | None = field(
        default=None, metadata={"help": "Parallel: read the residual stream in front of the norm (None: if known)."}
    )
    activation: str = field(default="relu", metadata={"help": "'relu', 'gelu', 'silu' or 'tanh'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site not in SITES:
            raise ValueError(f"`site` must be {' or '.join(map(repr, SITES))}, got {self.site!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(map(repr, ACTIVATIONS))}, got {self.activation!r}."
            )
        if self.before_norm not in (None, True, False):
            raise ValueError(f"`before_norm` must be None, True or False, got {self.before_norm!r}.")
        if self.before_norm and self.site != "parallel":
            raise ValueError(
                "`before_norm` says what a parallel adapter reads: use `site='parallel'`, or leave it out."
            )
