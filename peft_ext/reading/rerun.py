"""Gradient checkpointing of a frozen pass: nothing of it is kept, and the backward runs it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


# `(leaves, gradients of the outputs, inputs)` to the gradients of the leaves
Replay = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[Any]]


class _Rerun(torch.autograd.Function):
    """Gives outputs that were computed without autograd a backward that computes them again."""

    @staticmethod
    def forward(
        ctx: Any, replay: Replay, leaves: int, outputs: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.replay, ctx.leaves = replay, leaves
        ctx.save_for_backward(*tensors[:leaves], *tensors[leaves + outputs :])
        return tuple(output.view_as(output) for output in tensors[leaves : leaves + outputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        own = ctx.replay(saved[: ctx.leaves], grads, saved[ctx.leaves :])
        return (None, None, None, *own, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.leaves))


def with_backward(
    replay: Replay, leaves: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """`outputs`, which were computed without autograd, with a backward by `replay`.

    Args:
        replay: Computes the gradients of the leaves again, from the leaves, the gradients of the outputs and `inputs`.
        leaves: What gradients are for.
        outputs: What was computed.
        inputs: Further tensors that `replay` needs; autograd keeps them, and the leaves, and nothing else.
    """
    found: Any = _Rerun.apply(replay, len(leaves), len(outputs), *leaves, *outputs, *inputs)
    return found


class _Recomputed(torch.autograd.Function):
    """Computes something without keeping what autograd would keep, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.autocast = function, same_autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), ctx.autocast():
            output = ctx.function(*leaves)
        needed = [leaf for leaf, needs in zip(leaves, ctx.needs_input_grad[1:], strict=True) if needs]
        found = iter(torch.autograd.grad(output, needed, grad))
        return (None, *[next(found) if needs else None for needs in ctx.needs_input_grad[1:]])


def recomputed(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, of which autograd keeps the `tensors` alone and computes the rest again.

    For what is cheap to compute and large to keep. `function` must be differentiable by each of them, and depend on
    nothing else that is trained.
    """
    found: torch.Tensor = _Recomputed.apply(function, *tensors)
    return found


def split_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], tuple[list[Any], dict[str, Any]]]]:
    """The tensors among the arguments of a call, and a function that makes the arguments from such tensors again."""
    values = [*args, *kwargs.values()]
    at = [index for index, value in enumerate(values) if isinstance(value, torch.Tensor)]
    tensors = [values[index] for index in at]
    rest = [None if isinstance(value, torch.Tensor) else value for value in values]  # autograd keeps the tensors
    count, names = len(args), list(kwargs)

    def again(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        values = list(rest)
        for index, tensor in zip(at, tensors, strict=True):
            values[index] = tensor
        return values[:count], dict(zip(names, values[count:], strict=True))

    return tensors, again


def same_autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts with the autocast that is on now."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, enabled=enabled, dtype=dtype)
