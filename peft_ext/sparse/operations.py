"""A module's product with its weight, taken apart into what a sparse delta needs of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core import HALF
from .selection import is_in, top_indices


# On a CPU the gradient of x from S is computed with S in CSR layout up to this density, and with S as a whole weight
# above it: a sparse product makes as many operations less, each of them slower.
SPARSE_ENOUGH = 1 / 100


@dataclass
class Gradient:
    """The gradient of a weight, which is computed only as far as it is asked for."""

    op: Operation
    x: torch.Tensor
    grad: torch.Tensor

    def at(self, indices: torch.Tensor) -> torch.Tensor:
        """Its entries `(k,)` at flat indices."""
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            return self.op.grad_values(self.x, self.grad, indices)

    def top_indices(
        self, k: int, score: Callable[[torch.Tensor, int, int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The flat indices `(k,)` of its entries of largest magnitude, sorted; of a linear layer it is never whole.

        `score` gives the scores to go by instead, from the magnitudes of the entries `start` to `stop`; a negative
        one takes its entry out.
        """
        width = self.op.n // self.op.shape[0]
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            rows = self.op.gradient_rows(_at_least_fp32(self.x), _at_least_fp32(self.grad))

            def magnitudes(start: int, stop: int) -> torch.Tensor:
                first = start // width
                block = rows(first, -(-stop // width)).reshape(-1)
                block = block[start - first * width : stop - first * width].abs_()
                return block if score is None else score(block, start, stop)

            return top_indices(magnitudes, self.op.n, k)


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


class Operation:
    """A module's product with its weight, taken apart. `shape` is that of the weight, `n` the number of its entries."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.n = 1
        for size in shape:
            self.n *= size

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The module's output with this weight."""
        raise NotImplementedError

    def grad_input(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """The gradient of x, in its shape."""
        raise NotImplementedError

    def grad_weight(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the whole weight."""
        raise NotImplementedError

    def gradient_rows(self, x: torch.Tensor, grad: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        """A function that gives the rows `first` to `last` of the gradient of the weight, as a tensor of its own."""
        whole = self.grad_weight(x, grad)
        return lambda first, last: whole[first:last].clone()

    def grad_values(self, x: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The gradient of the weight at flat indices; here read off the dense one."""
        return self.grad_weight(x, grad).reshape(-1).index_select(0, indices)

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The module's output with S for a weight and no bias."""
        return self.product(x, self.dense(values, indices, x.dtype), None)

    def sparse_grad_input(
        self, x: torch.Tensor, grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor | None:
        """The gradient of x from the product with S alone."""
        return self.grad_input(x, grad.to(x.dtype), self.dense(values, indices, x.dtype))

    def dense(self, values: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """S as a whole weight, for as long as the caller needs it."""
        flat = torch.zeros(self.n, dtype=dtype, device=values.device)
        return flat.index_add_(0, indices, values.to(dtype)).view(self.shape)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the product is one that a compute type applies to."""
        return x.is_floating_point()


class LinearOperation(Operation):
    """x `(..., in)` times a weight `(out, in)`; GPT-2's Conv1D keeps it as `(in, out)`, that is, transposed."""

    def __init__(self, shape: Sequence[int], transposed: bool = False) -> None:
        super().__init__(shape)
        self.transposed = transposed

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def grad_input(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return grad @ (weight.T if self.transposed else weight)

    def _rows(self, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors of the weight's gradient, `(rows, N)` and `(N, columns)`."""
        x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (x.T, grad) if self.transposed else (grad.T, x)

    def grad_weight(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        left, right = self._rows(x, grad)
        return left @ right

    def gradient_rows(self, x: torch.Tensor, grad: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        left, right = self._rows(x, grad)
        return lambda first, last: left[first:last] @ right

    def grad_values(self, x: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        left, right = self._rows(x, grad)
        if left.device.type != "cpu":
            return (left @ right).reshape(-1).index_select(0, indices)
        left, right = _at_least_fp32(left), _at_least_fp32(right)
        distinct, inverse = _distinct(indices)
        pattern = csr(distinct, torch.zeros(len(distinct), dtype=left.dtype), self.shape)
        values = torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()
        return values if inverse is None else values[inverse]

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or self.transposed:
            return super().sparse_product(x, values, indices)
        rows = _at_least_fp32(x.reshape(-1, x.shape[-1]))
        product = (_summed_csr(indices, values.to(rows.dtype), self.shape) @ rows.T).T
        return product.reshape(*x.shape[:-1], self.shape[0])

    def sparse_grad_input(
        self, x: torch.Tensor, grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor | None:
        if x.device.type != "cpu" or self.transposed or len(indices) > SPARSE_ENOUGH * self.n:
            return super().sparse_grad_input(x, grad, values, indices)
        rows = _at_least_fp32(grad.reshape(-1, grad.shape[-1]))
        height, width = self.shape
        flipped = indices % width * height + indices // width
        flipped, order = flipped.sort()
        delta = _summed_csr(flipped, values.to(rows.dtype)[order], (width, height))
        return (delta @ rows.T).T.reshape(*grad.shape[:-1], width).to(x.dtype)


def _distinct(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The indices sorted and each once, as CSR needs them, and where in that each of them is (`None`: they were so).

    Those of several adapters come one after the other, and may overlap.
    """
    if len(indices) < 2 or bool((indices[1:] > indices[:-1]).all()):
        return indices, None
    distinct, inverse = torch.unique(indices, return_inverse=True)
    return distinct, inverse


def _summed_csr(indices: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """S as a sparse matrix in CSR layout; values of the same index, those of several adapters, are summed."""
    distinct, inverse = _distinct(indices)
    if inverse is not None:
        values = values.new_zeros(len(distinct)).index_add_(0, inverse, values)
    return csr(distinct, values, shape)


def csr(indices: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """S as a sparse matrix in CSR layout; the indices are sorted and distinct."""
    rows = indices // shape[1]
    columns = indices - rows * shape[1]
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=indices.device, dtype=rows.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")  # torch 2.11
        return torch.sparse_csr_tensor(starts.to(columns.dtype), columns, values, tuple(shape), check_invariants=False)


class Conv2dOperation(Operation):
    """A two-dimensional convolution; x is padded beforehand, where a padding mode or an uneven padding asks for it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.shape)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: tuple[int, ...] = (0, 0)
        self.pads: tuple[list[int], str] | None = None
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            self.padding = tuple(conv.padding)
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            self.pads = (list(conv._reversed_padding_repeated_twice), mode)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pads is None else F.pad(x, self.pads[0], mode=self.pads[1])

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, mask: list[bool]) -> Any:
        batched = (x, grad) if x.ndim == 4 else (x.unsqueeze(0), grad.unsqueeze(0))
        return torch.ops.aten.convolution_backward(
            *(batched[1], batched[0], weight, None, self.stride, self.padding, self.dilation, False, (0, 0)),
            *(self.groups, mask),
        )

    def grad_input(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._backward(x, grad, weight, [True, False, False])[0].view(x.shape)

    def grad_weight(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return self._backward(x, grad, grad.new_empty(self.shape), [False, True, False])[1]


class EmbeddingOperation(Operation):
    """A table looked up by token ids x; `scale` is what some architectures multiply the rows by.

    Of the options of `nn.Embedding`, `padding_idx` and `scale_grad_by_freq` hold for the values of a delta as they would
    for the table. `sparse` is about the form of a gradient that a frozen table has not.
    """

    def __init__(self, embedding: nn.Embedding, scale: torch.Tensor | float | None = None) -> None:
        super().__init__(embedding.weight.shape)
        self.padding_idx = embedding.padding_idx
        self.scale_grad_by_freq = embedding.scale_grad_by_freq
        self.scale = scale

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return rows
        return rows * (self.scale.to(rows) if isinstance(self.scale, torch.Tensor) else self.scale)

    def takes(self, x: torch.Tensor) -> bool:
        return False

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._scaled(F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq))

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        tokens, place = x.unique(return_inverse=True)
        own, at = self._of_tokens(tokens, indices)
        rows = torch.zeros(len(tokens), self.shape[1], dtype=values.dtype, device=values.device)
        columns = indices[own].long() % self.shape[1]
        rows.index_put_((at, columns), values[own], accumulate=True)
        return self._scaled(rows[place])

    def _of_tokens(self, tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the indices are in rows of these sorted tokens, and the position of that token among them."""
        rows = indices.long() // self.shape[1]
        own = is_in(rows, tokens).nonzero().squeeze(1)
        return own, torch.searchsorted(tokens, rows[own])

    def grad_input(self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
        return None

    def _token_rows(self, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct tokens, and the gradient of each one's row, `(tokens, width)`."""
        tokens, place = x.unique(return_inverse=True)
        grad = self._scaled(_at_least_fp32(grad).reshape(-1, self.shape[1]))
        rows = torch.zeros(len(tokens), self.shape[1], dtype=grad.dtype, device=grad.device)
        rows.index_add_(0, place.flatten(), grad)
        if self.scale_grad_by_freq:
            rows /= place.flatten().bincount(minlength=len(tokens)).unsqueeze(1)
        if self.padding_idx is not None:
            rows[tokens == self.padding_idx] = 0.0
        return tokens, rows

    def grad_weight(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return self.gradient_rows(x, grad)(0, self.shape[0])

    def gradient_rows(self, x: torch.Tensor, grad: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        tokens, rows = self._token_rows(x, grad)

        def between(first: int, last: int) -> torch.Tensor:
            start, stop = (int(torch.searchsorted(tokens, place)) for place in (first, last))
            block = torch.zeros(last - first, self.shape[1], dtype=rows.dtype, device=rows.device)
            return block.index_copy_(0, tokens[start:stop].long() - first, rows[start:stop])

        return between

    def grad_values(self, x: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        tokens, rows = self._token_rows(x, grad)
        own, at = self._of_tokens(tokens, indices)
        values = torch.zeros(len(indices), dtype=rows.dtype, device=rows.device)
        values[own] = rows[at, indices[own].long() % self.shape[1]]
        return values


def operation_of(module: nn.Module) -> Operation | None:
    """The product that a plain module makes with its weight, or `None` if it is of no type known here."""
    if isinstance(module, nn.Linear):
        return LinearOperation(module.weight.shape)
    if isinstance(module, Conv1D):
        return LinearOperation(module.weight.shape, transposed=True)
    if isinstance(module, nn.Conv2d):
        return Conv2dOperation(module)
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return EmbeddingOperation(module)
    return None
