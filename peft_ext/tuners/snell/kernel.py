"""The update of a weight from the distances of points, made in chunks of rows and never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


SCALE = 0.1  # of the distances, as published
CHUNK = 1 << 22  # entries of an update that are alive at once
DIRECT = 1 << 24  # entries up to which all are held while their quantile is looked for
Chunks = Callable[[], Iterator[torch.Tensor]]


def differences(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """D `(out, in)` of points `(2, out, r/2)` and `(2, in, r/2)`."""
    near, far = _distances(outputs, inputs)
    return (near - far) * SCALE


def _distances(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Both distances `(2, out, in)`; computed as they are, since a matrix product would lose the small ones."""
    return torch.cdist(outputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")


def gate_of(matrix: torch.Tensor, threshold: torch.Tensor, kind: str) -> torch.Tensor:
    """g(D), in the shape of D."""
    if kind == "none":
        return torch.ones_like(matrix)
    size = matrix.abs()
    return (size - threshold).clamp_min_(0.0) if kind == "shrink" else size * (size > threshold)


def row_chunks(outputs: int, inputs: int) -> Iterator[slice]:
    """The rows of a matrix, by chunks of at most `CHUNK` entries (one row at least)."""
    rows = max(1, CHUNK // max(1, inputs))
    return (slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows))


@torch.no_grad()
def threshold_of(outputs: torch.Tensor, inputs: torch.Tensor, sparsity: float, kind: str) -> torch.Tensor:
    """t: the quantile of |D| at `sparsity`, a number; zero without a gate."""
    if kind == "none":
        return outputs.new_zeros(())

    def sizes() -> Iterator[torch.Tensor]:
        for rows in row_chunks(outputs.shape[1], inputs.shape[1]):
            yield differences(outputs[:, rows], inputs).abs_().flatten()

    return quantile(sizes, outputs.shape[1] * inputs.shape[1], sparsity)


@torch.no_grad()
def update_of(outputs: torch.Tensor, inputs: torch.Tensor, sparsity: float, kind: str) -> torch.Tensor:
    """D * g(D) `(out, in)`, whole."""
    threshold = threshold_of(outputs, inputs, sparsity, kind)
    update = outputs.new_empty(outputs.shape[1], inputs.shape[1])
    for rows in row_chunks(*update.shape):
        matrix = differences(outputs[:, rows], inputs)
        update[rows] = matrix * gate_of(matrix, threshold, kind)
    return update


# Quantiles


def quantile(chunks: Chunks, total: int, q: float) -> torch.Tensor:
    """What `torch.quantile` gives of values that are not negative, which it refuses above 2^24 of them.

    Args:
        chunks: Gives the values, chunk by chunk and the same each time; a chunk is alive at a time.
        total: How many there are.
        q: Between 0 and 1; between two values it is interpolated.
    """
    rank = q * (total - 1)
    low = min(int(rank), total - 1)
    if total <= DIRECT or torch.compiler.is_compiling():
        held = list(chunks())
        # where it is fast, and waits for nothing; and a compiler cannot follow a search that goes by the values
        if held[0].is_cuda or torch.compiler.is_compiling():
            values = torch.cat(held)
            first, second = (values.kthvalue(min(low + k, total)).values for k in (1, 2))
            return torch.lerp(first, second, rank - low)
        chunks = lambda: iter(held)
    first = _select(chunks, low)
    return first if rank == low else torch.lerp(first, _next(chunks, first, low), rank - low)


def _select(chunks: Chunks, rank: int) -> torch.Tensor:
    """The value of this rank, from 0: their bits are in the order of the values, and are found 16 by 16."""
    like = next(chunks())[:1]
    size, whole = 8 * like.element_size(), torch.int64 if like.element_size() == 8 else torch.int32
    prefix = 0
    for shift in range(size - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in chunks():
            keys = part.view(whole)
            own = keys if shift == size - 16 else keys[(keys >> (shift + 16)) == prefix]
            counts += torch.bincount(((own >> shift) & 0xFFFF).long(), minlength=1 << 16).cpu()
        ends = counts.cumsum(0)
        digit = int(torch.searchsorted(ends, rank, right=True))
        rank -= int(ends[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
    bits = torch.tensor([prefix], dtype=whole, device=like.device)
    return bits.view(like.dtype)[0]


def _next(chunks: Chunks, first: torch.Tensor, rank: int) -> torch.Tensor:
    """The value after the one of this rank, which is `first`."""
    up_to, above = 0, []
    for part in chunks():
        up_to += int((part <= first).sum())
        larger = part[part > first]
        above += [larger.min()] if len(larger) else []
    return first if up_to > rank + 1 or not above else torch.stack(above).min()


# The product


class KernelProduct(torch.autograd.Function):
    """x `(N, in)` times the transposed update, `(N, out)`; no matrix of the weight's size is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, sparsity: float, kind: str
    ) -> torch.Tensor:
        """In the type of the points, in which the products are made."""
        ctx.kind = kind
        with torch.autocast(x.device.type, enabled=False):
            threshold = threshold_of(outputs, inputs, sparsity, kind)
            ctx.save_for_backward(x, outputs, inputs, threshold)
            read = x.to(outputs.dtype)
            y = read.new_empty(len(x), outputs.shape[1])
            for rows in row_chunks(outputs.shape[1], inputs.shape[1]):
                matrix = differences(outputs[:, rows], inputs)
                y[:, rows] = read @ matrix.mul_(gate_of(matrix, threshold, kind)).T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Makes the update again, chunk by chunk."""
        x, outputs, inputs, threshold = ctx.saved_tensors
        wants_x, wants_points = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        with torch.autocast(x.device.type, enabled=False):
            read = x.to(outputs.dtype)
            grad_x = torch.zeros_like(read) if wants_x else None
            grad_outputs, grad_inputs = torch.zeros_like(outputs), torch.zeros_like(inputs)
            for rows in row_chunks(outputs.shape[1], inputs.shape[1]):
                apart = _distances(outputs[:, rows], inputs)
                matrix = (apart[0] - apart[1]).mul_(SCALE)
                gate = gate_of(matrix, threshold, ctx.kind)
                if grad_x is not None:
                    grad_x.addmm_(grad[:, rows], matrix * gate)
                if wants_points:
                    grad_matrix = (grad[:, rows].T @ read).mul_(gate).mul_(SCALE)
                    for head, sign in ((0, 1.0), (1, -1.0)):
                        # the distance of two equal points has the gradient zero, as in torch
                        pull = torch.where(apart[head] > 0, grad_matrix / apart[head], 0.0).mul_(sign)
                        grad_outputs[head, rows] = (
                            pull.sum(1, keepdim=True) * outputs[head, rows] - pull @ inputs[head]
                        )
                        grad_inputs[head] += pull.sum(0)[:, None] * inputs[head] - pull.T @ outputs[head, rows]
        found = (grad_outputs, grad_inputs) if wants_points else (None, None)
        return (None if grad_x is None else grad_x.to(x.dtype), *found, None, None)


def kernel_product(
    x: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, sparsity: float, kind: str, plain: bool
) -> torch.Tensor:
    """x `(..., in)` times the transposed update, `(..., out)`; `plain` by operations that torch can transform."""
    if plain:
        matrix = differences(outputs, inputs)
        gate = gate_of(matrix.detach(), threshold_of(outputs.detach(), inputs.detach(), sparsity, kind), kind)
        return F.linear(x.to(outputs.dtype), matrix * gate)
    product: torch.Tensor = KernelProduct.apply(x.reshape(-1, x.shape[-1]), outputs, inputs, sparsity, kind)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], outputs.shape[1])
