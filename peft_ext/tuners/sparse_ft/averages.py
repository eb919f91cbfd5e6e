"""Copies of a model that average its training (EMA, SWA), while the support of the original moves.

Nobody says that a copy is to be an average. It is taken for one once it is written to by others than a loader or an
optimizer of its own; then the indices of its values are those of the original, or the values mean nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from ...delta import SparseDelta


@dataclass
class _Copy:
    """What a copy was when it was made."""

    original: weakref.ref[SparseDelta]
    values: torch.Tensor
    code: torch.Tensor

    def is_untouched(self, leaf: SparseDelta) -> bool:
        return torch.equal(leaf.weight.data, self.values.to(leaf.weight)) and torch.equal(
            leaf.index, self.code.to(leaf.index.device)
        )


_copies: weakref.WeakKeyDictionary[SparseDelta, _Copy] = weakref.WeakKeyDictionary()


def note_copy(leaf: SparseDelta, copied: SparseDelta) -> None:
    """`copied` is a deep copy of `leaf`."""
    _copies[copied] = _Copy(weakref.ref(leaf), leaf.weight.detach().clone(), leaf.index.clone())


def forget(leaf: SparseDelta) -> None:
    """The leaf goes its own way: it was loaded, or is trained itself."""
    _copies.pop(leaf, None)


def averages_of(leaf: SparseDelta) -> list[SparseDelta]:
    """The copies that are averages, on the same indices; to be called before these move."""
    return [
        copied
        for copied, record in list(_copies.items())
        if record.original() is leaf and not record.is_untouched(copied) and _on_the_same_places(copied, leaf)
    ]


def _on_the_same_places(copied: SparseDelta, leaf: SparseDelta) -> bool:
    return torch.equal(copied.index, leaf.index.to(copied.index.device))


@torch.no_grad()
def move_along(copied: SparseDelta, dropped: torch.Tensor, order: torch.Tensor, indices: torch.Tensor) -> None:
    """Moves an average with its original: what is dropped leaves it, and what grows starts at zero, as it was."""
    device = copied.weight.device
    moved = copied.weight.data.clone()
    moved[dropped.to(device)] = 0.0
    copied.weight.data.copy_(moved[order.to(device)])
    copied.set_indices(indices.to(device))


def refuse_mixture(leaf: SparseDelta) -> bool:
    """Whether a copy was written to behind its back, so that its indices must be decoded anew.

    Raises:
        ValueError: It is an average of values that belonged to other indices than it says.
    """
    record = _copies.get(leaf)
    if record is None or leaf.index.is_meta or record.is_untouched(leaf):
        return False
    original = record.original()
    if original is None:
        forget(leaf)
        return True
    if not _on_the_same_places(leaf, original):
        raise ValueError(
            "This model is an average (EMA, SWA) of a sparse adapter whose support has moved, so its values belong to "
            "several weights each, or its buffers were averaged. Average the parameters and copy the buffers "
            "(`torch.optim.swa_utils.AveragedModel(model, ...)` with `use_buffers=False`, its default) from the model "
            "that it is a copy of, or begin to average after the last reselection."
        )
    return True
