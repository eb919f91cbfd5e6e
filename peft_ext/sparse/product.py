"""The module with a sparse delta on its weight, and the gradients of the values."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..core import HALF, is_hooked, needs_plain_operations
from .operations import Conv2dOperation, Gradient, LinearOperation, Operation


class Observer(Protocol):
    """Somebody who looks at the gradient of a whole weight while it is at hand, in the backward."""

    def observe(self, gradient: Gradient, values: torch.Tensor) -> None:
        """`values` `(k,)` is the part of the gradient that goes to the observer's own values."""


# The weight is changed for the time of one product, so two threads must not do it at once.
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_locks_guard = threading.Lock()


def _lock_of(weight: torch.Tensor) -> threading.Lock:
    with _locks_guard:
        return _locks.setdefault(weight.data_ptr(), threading.Lock())


def with_delta(
    weight: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    function: Callable[[torch.Tensor], torch.Tensor | None],
) -> Any:
    """`function(weight)` while `weight` is W + S; afterwards it is W again, bit for bit, for the originals are put back.

    Subtracting the values instead would leave 0.7 % of the touched entries changed in their last bit. Whatever may
    fail for want of memory is made before the first write. This is one function and no context manager, because Ctrl-C
    can come between the end of a `with` block and the first line of `__exit__`, but not between the end of a `try`
    block and a builtin in its `finally`.
    """
    # `data` has a version counter of its own: who keeps W for a backward finds there the W that was kept
    data = weight.data
    flat, values, indices = data.view(-1), values.to(data.dtype), indices.long()
    with _lock_of(data):
        kept = flat.index_select(0, indices)
        try:
            flat.index_add_(0, indices, values)
            return function(data)
        finally:
            try:
                flat.index_copy_(0, indices, kept)
            except BaseException:  # out of memory, or Ctrl-C, in here: the weight must not stay changed
                flat.index_copy_(0, indices, kept)
                raise


def _own(output: torch.Tensor) -> torch.Tensor:
    """The same memory, but no view: autograd refuses in-place changes of a view that a custom function returns."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


class SparseProduct(torch.autograd.Function):
    """The product with W + S, or with S alone if no weight is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        op: Operation,
        observers: tuple[tuple[Observer, int, int], ...],
    ) -> torch.Tensor:
        """x as the module takes it, values and indices `(k,)`; returns the module's output."""
        ctx.op, ctx.weight, ctx.observers = op, weight, observers
        if not ctx.needs_input_grad[1] and isinstance(op, LinearOperation):
            ctx.save_for_backward(x.new_empty(0), values, indices)  # the gradient of x does not need x
        else:
            ctx.save_for_backward(x, values, indices)
        with torch.autocast(values.device.type, enabled=False):
            if weight is None:
                return _own(op.sparse_product(x, values, indices))
            return _own(with_delta(weight, values, indices, lambda changed: op.product(x, changed, bias)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        op, weight = ctx.op, ctx.weight
        grad_x = grad_values = None
        with torch.autocast(values.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if weight is None:
                    grad_x = op.sparse_grad_input(x, grad, values, indices)
                else:
                    grad_x = with_delta(weight, values, indices, lambda changed: op.grad_input(x, grad, changed))
            if ctx.needs_input_grad[1]:
                # the product's own type, unless x was in half precision and the product made in fp32
                grad = grad.to(x.dtype) if x.is_floating_point() else grad
                grad_values = op.grad_values(x, grad, indices).to(values.dtype)
                gradient = Gradient(op, x, grad)
                for observer, start, stop in ctx.observers:
                    observer.observe(gradient, grad_values[start:stop])
        return grad_x, grad_values, None, None, None, None, None


def can_be_written(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the module's weight can be changed for the time of a product without loss, hooks and gradients included."""
    weight = getattr(module, "weight", None)
    return (
        type(module) in (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
        and type(weight) is nn.Parameter
        and weight.dtype == dtype
        and dtype not in HALF
        and weight.is_contiguous()
        and weight.device.type != "meta"
        and not (weight.is_shared() and weight.device.type == "cpu")  # other processes may be reading it
        and not weight.is_inference()
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        and not is_hooked(module)
    )


def sparse_apply(
    module: nn.Module,
    op: Operation,
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    observers: tuple[tuple[Observer, int, int], ...] = (),
) -> torch.Tensor:
    """`module(x)` with S added to its weight.

    Args:
        module: The frozen module, dense, quantised or itself adapted.
        values: `(k,)`, fp32 as a rule, of one adapter or of several one after the other.
        indices: `(k,)`, the flat indices of the values.
        observers: Who looks at the gradient, with the slice of `values` that is theirs.
    """
    dtype = _compute_dtype(x) if op.takes(x) else module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    if needs_plain_operations() or not can_be_written(module, dtype):
        return add_product(op, x, module(x), values, indices, observers)
    product = SparseProduct.apply(
        _inputs(op, x), values, indices, module.weight, getattr(module, "bias", None), op, observers
    )
    assert isinstance(product, torch.Tensor)
    return product


def add_product(
    op: Operation,
    x: torch.Tensor,
    output: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    observers: tuple[tuple[Observer, int, int], ...] = (),
) -> torch.Tensor:
    """`output` and the product of x with S alone; the arguments are those of `sparse_apply`."""
    inputs = _inputs(op, x)
    if needs_plain_operations():
        # plain operations, with S as a whole weight: a compiler chooses by itself what to keep
        dtype = inputs.dtype if op.takes(x) else values.dtype
        dense = torch.zeros(op.n, dtype=dtype, device=values.device).index_add(0, indices, values.to(dtype))
        product = op.product(inputs, dense.view(op.shape), None)
    else:
        product = SparseProduct.apply(inputs, values, indices, None, None, op, observers)
    return output + product.to(output.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _inputs(op: Operation, x: torch.Tensor) -> torch.Tensor:
    """x in the type that is computed in, and padded."""
    inputs = x.to(_compute_dtype(x)) if op.takes(x) else x
    return op.pad(inputs) if isinstance(op, Conv2dOperation) else inputs
