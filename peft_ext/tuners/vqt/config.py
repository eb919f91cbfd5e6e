"""The configuration of VQT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...reading import ReaderConfig


POOLINGS = ("concatenate", "mean", "weighted")


@dataclass
class VQTConfig(ReaderConfig):
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
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("dropout", "embedding_dropout", "group_lasso")
    SIZES: ClassVar[tuple[str, ...]] = ("num_queries",)

    num_queries: int = field(default=10, metadata={"help": "Number of learnt queries per layer."})
    pooling: str = field(default="concatenate", metadata={"help": f"How a layer's outputs are pooled: {POOLINGS}."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the queries."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout of the backbone's embeddings."})
    group_lasso: float = field(default=0.0, metadata={"help": "Weight of the group lasso over feature columns."})
    num_selected_features: int | None = field(
        default=None, metadata={"help": "How many feature columns the head reads; written by select_features."}
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
