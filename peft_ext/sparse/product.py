"""The module with a sparse delta on its weight, and the gradients of the values."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..core import HALF
from .operations import Conv2dOperation, Gradient, LinearOperation, Operation


class Observer(Protocol):
    """Somebody who looks at the gradient of a whole weight while it is at hand, in the backward."""

    def observe(self, gradient: Gradient, values: torch.Tensor) -> None:
        """`values` `(k,)` is the part of the gradient that goes to the observer's own values."""


# The weight is changed for the time of one product, so two threads must not do it at once.
_locks: dict[int, threading.Lock] = {}


class written:
    """Inside, `weight` is W + S; afterwards it is W again, bit for bit, for the originals are put back.

    Subtracting the values instead would leave 0.7 % of the touched entries changed in their last bit.
    """

    def __init__(self, weight: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> None:
        # `data` has a version counter of its own: who keeps W for a backward finds there the W that was kept
        self.weight, self.values, self.indices = weight.data, values, indices
        self.lock = _locks.setdefault(weight.data_ptr(), threading.Lock())

    def __enter__(self) -> torch.Tensor:
        self.lock.acquire()
        flat = self.weight.view(-1)
        self.kept = flat.index_select(0, self.indices)
        flat.index_add_(0, self.indices, self.values.to(flat.dtype))
        return self.weight

    def __exit__(self, *error: object) -> None:
        self.weight.view(-1).index_copy_(0, self.indices.long(), self.kept)
        self.lock.release()


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
                return op.sparse_product(x, values, indices)
            with written(weight, values, indices) as changed:
                return op.product(x, changed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        op, weight = ctx.op, ctx.weight
        grad_x = grad_values = None
        with torch.autocast(values.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if weight is None:
                    grad_x = op.grad_input(x, grad.to(x.dtype), op.dense(values, indices, x.dtype))
                else:
                    with written(weight, values, indices) as changed:
                        grad_x = op.grad_input(x, grad, changed)
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
    weight = module.weight
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
        and not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
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
        indices: `(k,)`, the flat places of the values.
        observers: Who looks at the gradient, with the slice of `values` that is theirs.
    """
    device = values.device.type
    if op.takes(x):
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    else:
        assert isinstance(module.weight, torch.Tensor)
        dtype = module.weight.dtype
    if torch.compiler.is_compiling():  # the compiler chooses what to keep
        output = module(x)
        inputs = x.to(dtype) if op.takes(x) else x
        inputs = op.pad(inputs) if isinstance(op, Conv2dOperation) else inputs
        dense = torch.zeros(op.n, dtype=dtype, device=values.device).index_add(0, indices, values.to(dtype))
        return output + op.product(inputs, dense.view(op.shape), None).to(output.dtype)
    weight = module.weight if can_be_written(module, dtype) else None
    output = module(x) if weight is None else None
    inputs = x.to(dtype) if op.takes(x) else x
    if isinstance(op, Conv2dOperation):
        inputs = op.pad(inputs)
    bias = getattr(module, "bias", None) if weight is not None else None
    product = SparseProduct.apply(inputs, values, indices, weight, bias, op, observers)
    return product if output is None else (output + product.to(output.dtype))
