"""What the configs of readers have in common: a head of their own, and no modules that they adapt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import TaskType

from ..core import ExtConfig
from .families import HEAD_NAMES


# PEFT adds the head to `modules_to_save` of every sequence classifier and then needs the list not to be empty. A reader
# brings its own head, so what PEFT added is replaced by a name that no module has; it is never written to disk.
NO_MODULE = "no module of the base model"


@dataclass
class ReaderConfig(ExtConfig):
    """Configuration of a method that reads a frozen backbone into a head of its own.

    Args:
        id2label: Names of the classes of this adapter's own head; `None` takes those of the model.

    Raises:
        TypeError, ValueError: A field has a value that no reader can use; the message names it.
    """

    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Names of the classes of this adapter's head; None: the model's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.id2label is not None:
            if not isinstance(self.id2label, dict):
                raise TypeError(f"`id2label` must be names by class, got {self.id2label!r}.")
            self.id2label = {int(key): str(value) for key, value in self.id2label.items()}  # JSON has string keys
            if sorted(self.id2label) != list(range(len(self.id2label))) or not self.id2label:
                raise ValueError(f"`id2label` must name the classes 0, 1, 2, ..., got {self.id2label!r}.")
        method = self.METHOD
        if self.task_type not in (None, TaskType.SEQ_CLS):
            raise ValueError(
                f"`task_type` {self.task_type!r} has no use for {method}, which only classifies: leave it out for "
                "images and audio, or use 'SEQ_CLS' for text."
            )
        heads = sorted(HEAD_NAMES.intersection(self.modules_to_save or ()))
        if heads:
            raise ValueError(
                f"`modules_to_save` names the head {heads[0]!r}, but {method} trains and saves a head of its own "
                f"(`{method.lower()}_head`) in its place. Leave it out."
            )
        if self.layers_pattern is not None:
            raise ValueError(
                f"`layers_pattern` has no use for {method}, which knows the layers; use `layers_to_transform`."
            )
        if self.exclude_modules is not None:
            raise ValueError(
                f"`exclude_modules` has no use for {method}, which adapts no module; use `layers_to_transform` to "
                "choose the layers that are read."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        values = super().to_dict()
        kept = [name for name in self.modules_to_save or () if name != NO_MODULE]
        return {**values, "modules_to_save": kept or None}
