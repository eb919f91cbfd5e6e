"""Checks of arguments that public functions share."""

from __future__ import annotations

from typing import Any

from torch import nn


def require_model(model: Any, argument: str = "model") -> None:
    """`TypeError` that names the argument if it is no model, as from a function that does not return it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{argument}` must be a model (`torch.nn.Module`), got {type(model).__name__}.")
