"""The configuration of VQT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import TaskType

from ...core import ExtConfig
from ...reading import HEAD_NAMES


POOLINGS = ("concatenate", "mean", "weighted")
# PEFT adds the head to `modules_to_save` of every sequence classifier and then needs the list not to be empty. VQT
# brings its own head, so what PEFT added is replaced by a name that no module has; it is never written to disk.
NO_MODULE = "no module of the base model"


@dataclass
class VQTConfig(ExtConfig):
    """Configuration of VQT; see also the common fields of [`ExtConfig`].

    Args:
        num_queries: T, the number of learnt queries per layer.
        pooling: How the T outputs of a layer become features: `"concatenate"` (T * D features, as published),
            `"mean"` (D) or `"weighted"` (D, a learnt weighted sum that starts as the plain sum).
        dropout: Probability with which an element of a query is dropped during training.
        embedding_dropout: Probability with which an element of the backbone's embeddings is dropped during training.
            The published training keeps the dropout of ViT's embeddings on, which is 0.1 there.
        group_lasso: Weight of the sum of the L2 norms of the head's columns (one per feature), which is added to the
            loss during training; [`select_features`] sets it.
        num_selected_features: How many feature columns the head reads; `None`: all. Written by [`select_features`].
        id2label: Names of the classes of this adapter's own head; `None` takes those of the model.
        layers_to_transform: Index, or indices, of the layers that get queries; `None`: all.
        init_weights: `True` is the published initialisation; `False` adds noise to it, for tests.

    Raises:
        TypeError, ValueError: A field has a value that VQT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "VQT"
    SIZES: ClassVar[tuple[str, ...]] = ("num_queries",)

    num_queries: int = field(default=10, metadata={"help": "Number of learnt queries per layer."})
    pooling: str = field(default="concatenate", metadata={"help": f"How a layer's outputs are pooled: {POOLINGS}."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the queries."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout of the backbone's embeddings."})
    group_lasso: float = field(default=0.0, metadata={"help": "Weight of the group lasso over feature columns."})
    num_selected_features: int | None = field(
        default=None, metadata={"help": "How many feature columns the head reads; written by select_features."}
    )
    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Names of the classes of this adapter's head; None: the model's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_queries", "num_selected_features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not ((value is None and name != "num_queries") or isinstance(value, int)):
                raise TypeError(f"`{name}` must be an integer, got {value!r}.")
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(map(repr, POOLINGS))}, got {self.pooling!r}.")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)!r}.")
        if self.group_lasso < 0:
            raise ValueError(f"`group_lasso` must not be negative, got {self.group_lasso!r}.")
        if self.id2label is not None:
            if not isinstance(self.id2label, dict):
                raise TypeError(f"`id2label` must be names by class, got {self.id2label!r}.")
            self.id2label = {int(key): str(value) for key, value in self.id2label.items()}  # JSON has string keys
            if sorted(self.id2label) != list(range(len(self.id2label))) or not self.id2label:
                raise ValueError(f"`id2label` must name the classes 0, 1, 2, ..., got {self.id2label!r}.")
        self._check_common_fields()

    def _check_common_fields(self) -> None:
        if self.task_type not in (None, TaskType.SEQ_CLS):
            raise ValueError(
                f"`task_type` {self.task_type!r} has no use for VQT, which only classifies: leave it out for images "
                "and audio, or use 'SEQ_CLS' for text."
            )
        heads = sorted(HEAD_NAMES.intersection(self.modules_to_save or ()))
        if heads:
            raise ValueError(
                f"`modules_to_save` names the head {heads[0]!r}, but VQT trains and saves a head of its own "
                "(`vqt_head`) in its place. Leave it out."
            )
        if self.layers_pattern is not None:
            raise ValueError("`layers_pattern` has no use for VQT, which knows the layers; use `layers_to_transform`.")
        if self.exclude_modules is not None:
            raise ValueError(
                "`exclude_modules` has no use for VQT, which adapts no module; use `layers_to_transform` to choose "
                "the layers that get queries."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        values = super().to_dict()
        kept = [name for name in self.modules_to_save or () if name != NO_MODULE]
        return {**values, "modules_to_save": kept or None}
