"""Bases that accelerate keeps on the host or on disk: their parameters are on `meta` between the forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def working_device(module: nn.Module, device: torch.device) -> torch.device:
    """Where a module computes whose parameters are on `device`: for an offloaded one, where accelerate takes it to."""
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        found = getattr(part, "execution_device", None)
        if found is not None:
            return torch.device(found)
    return device


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own parameters elsewhere between its forwards."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


@contextmanager
def onloaded(module: Any) -> Iterator[None]:
    """Inside, the parameters of an offloaded module are where it computes; values that are kept must be copies."""
    if not (is_offloaded(module) and any(parameter.is_meta for parameter in module.parameters(recurse=False))):
        yield  # it is there, perhaps by an outer call of this
        return
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


def refuse_new_parameter(adapter_name: str, key: str, base: nn.Module) -> None:
    """Raises `ValueError` if an offloaded module lacks the parameter, since accelerate has no place for a new one."""
    if getattr(base, key, None) is None and is_offloaded(base):
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r} into an offloaded {type(base).__name__}: it would get a {key} that it "
            "does not have. Load the base model without offloading, put the adapter on that, and merge there."
        )


def empty_like_of(model: nn.Module, last: bool = False) -> torch.Tensor:
    """An empty tensor of the precision of the first (or last) parameter that is not of integers, where that is used.

    torchao's tensors know no `new_empty`.
    """
    # the first is found without a walk through the whole model, since every layer that is injected asks for it
    found = ((module, p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module, parameter in reversed([*found]) if last else found:
        if parameter.is_floating_point():
            return torch.empty(0, device=working_device(module, parameter.device), dtype=parameter.dtype)
    return torch.empty(0)
