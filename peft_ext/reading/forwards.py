"""Forwards of a model that a reader changes for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `module` runs `forward` in the place of its own."""
    own = module.__dict__.get("forward")  # accelerate and others put one here too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_without_compiler(model: nn.Module) -> None:
    """Lets `torch.compile` end its graph at the forward of `model`, inside of which hooks and forwards come and go."""
    own = model.__dict__.get("forward")  # accelerate puts one here
    # a bound method, so that a copy of the model runs itself and not `model`
    eager = (
        MethodType(torch.compiler.disable(type(model).forward), model) if own is None else torch.compiler.disable(own)
    )
    model.forward = eager  # type: ignore[method-assign]


def run_as_before(model: nn.Module) -> None:
    """Undoes `run_without_compiler`."""
    eager: Any = model.__dict__.get("forward")
    if isinstance(eager, MethodType):
        del model.forward
    elif hasattr(eager, "_torchdynamo_orig_callable"):
        model.forward = eager._torchdynamo_orig_callable
