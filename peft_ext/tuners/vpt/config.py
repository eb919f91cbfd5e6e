"""The config of VPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...core import CalibratedConfig


CLASS_TOKENS = "class-tokens"
SEGMENTS = 16  # of a prompt, as published: segment j holds the channels j, j + 16, j + 32, ...


@dataclass
class VPTConfig(CalibratedConfig):
    """The config of visual prompt tuning (VPT), which works on text encoders too.

    The head is not part of the method: name a fresh one in `modules_to_save` (images), or set `task_type` (text).

    Args:
        num_tokens: Number of prompts, T.
        deep: Whether each layer has prompts of its own, whose outputs are dropped (VPT-deep), or the prompts enter
            before the first layer and travel on (VPT-shallow).
        share_layers: Whether all layers use the same prompts, and the same key-value rows.
        project_dim: Width of the prompts as they are stored; a learnt linear layer, one for all layers, widens them to
            that of the model. `None`: they have the model's width.
        prompt_dropout: Probability with which an element of a prompt is dropped during training.
        kv_tokens: Number of learnt rows that every attention gets behind its projections, as further keys and values
            (E2VPT).
        share_kv: Whether those rows are keys and values at once, as published, or each has rows of its own.
        pruned_segments: The segments of each prompt that are fixed at zero; written by [`prune_prompts`].
        init_weights: `True` is the published initialisation; `False` adds noise to it, for tests. A directory or the
            name of a repository on the Hub: the prompts of that VPT adapter, averaged in groups where it has more.
            `"class-tokens"`: a prompt for each class, the mean class token of its samples behind that layer, for which
            [`calibrate`] is needed.
        layers_to_transform: Index, or indices, of the layers that get prompts, for example `range(6)`; `None`: all.
        target_modules: The blocks by name, instead of `layers_to_transform`; for a model with several towers.

    Raises:
        TypeError, ValueError: A field has a value that VPT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "VPT"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("prompt_dropout",)
    SIZES: ClassVar[tuple[str, ...]] = ("num_tokens", "project_dim")
    STARTS_FROM_ADAPTER: ClassVar[bool] = True
    NAMED_STARTS: ClassVar[tuple[str, ...]] = (CLASS_TOKENS,)

    num_tokens: int = field(default=10, metadata={"help": "Number of prompts (per layer)."})
    deep: bool = field(default=True, metadata={"help": "Prompts of its own for each layer, or one set that travels."})
    share_layers: bool = field(default=False, metadata={"help": "The same prompts in all layers."})
    project_dim: int | None = field(default=None, metadata={"help": "Width of the stored prompts; None: the model's."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout of the prompts."})
    kv_tokens: int = field(default=0, metadata={"help": "Number of learnt key-value rows per attention (E2VPT)."})
    share_kv: bool = field(default=True, metadata={"help": "Whether these are keys and values at once."})
    pruned_segments: list[list[int]] | None = field(
        default=None, metadata={"help": "Segments of each prompt that are zero; written by prune_prompts."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.layers_to_transform, (range, tuple)):
            self.layers_to_transform = list(self.layers_to_transform)
        super().__post_init__()
        for name, least in (("num_tokens", 1), ("kv_tokens", 0), ("project_dim", 1)):
            value = getattr(self, name)
            if value is None and name == "project_dim":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer, got {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        for name in ("deep", "share_layers", "share_kv"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"`prompt_dropout` must be at least 0 and below 1, got {self.prompt_dropout!r}.")
        self._check_combinations()
        self._check_segments()

    def _check_combinations(self) -> None:
        if not self.deep and self.share_layers:
            raise ValueError("`share_layers` has no use with `deep=False`, where there is one set of prompts anyway.")
        if not self.deep and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` has no use with `deep=False`: the prompts enter before the first layer and "
                "travel through all. Use `deep=True` to choose layers."
            )
        if not self.share_kv and not self.kv_tokens:
            raise ValueError("`share_kv=False` has no use without `kv_tokens`, which is 0.")
        if self.init_weights == CLASS_TOKENS and self.project_dim is not None:
            raise ValueError(
                f"`init_weights={CLASS_TOKENS!r}` gives prompts of the model's width: leave `project_dim` out."
            )
        if self.layers_pattern is not None:
            raise ValueError("`layers_pattern` has no use for VPT, which knows the layers; use `layers_to_transform`.")

    def _check_segments(self) -> None:
        if self.pruned_segments is None:
            return
        fits = len(self.pruned_segments) == self.num_tokens
        if not fits or any(not 0 <= segment < SEGMENTS for row in self.pruned_segments for segment in row):
            raise ValueError(
                f"`pruned_segments` must be a list of segments from 0 to {SEGMENTS - 1} for each of the "
                f"{self.num_tokens} prompts, got {self.pruned_segments!r}. It is written by `peft_ext.prune_prompts`."
            )

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if the class tokens of the file `where` cannot be prompts of this config."""
        for name, rows in support.items():
            if rows.ndim != 2 or len(rows) != self.num_tokens or not bool(rows.isfinite().all()):
                raise ValueError(
                    f"The calibration in {where} is damaged: {name!r} is no {self.num_tokens} rows of finite numbers."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        values = super().to_dict()
        if isinstance(self.layers_to_transform, set):
            values["layers_to_transform"] = sorted(self.layers_to_transform)
        return values
