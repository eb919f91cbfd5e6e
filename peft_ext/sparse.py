r"""The sparse delta: k values on k places of a weight, and nothing of the weight's size kept for it.

A delta on a weight W of n entries is a vector of values `(k,)` and the sorted flat places `(k,)` that they sit at:

    W' = W + S,    S.view(-1)[indices] = values,    d values = (dL/dW').view(-1)[indices]

- `encode` / `decode`: the places in `encoded_size(k, n)` bytes, a number that follows from k and n alone;
- `sparse_apply`: the module with its weight so changed; for the backward it keeps the input, the values and the places;
- `top_indices`: the places of the largest scores, exact and the same on every machine.

**Which product is used.** Measured on one thread of an AVX-512 CPU (Linear(1024, 1024), 1 % density, the dense product
of 64, 512 and 2,048 rows being 1): writing the delta into the weight and putting the kept originals back adds 0.03,
0.01 and 0.01; a product with S alone, in CSR, costs 0.06, 0.06 and 0.08; the gradient of the values by a sampled
product costs 0.08, 0.07 and 0.13, by the dense product 1. Hence: the weight is written to where nothing is lost by
adding to it (a plain dense weight in the precision that is computed in), and otherwise (half precision, autocast,
quantised, offloaded) the base runs as it is and the product with S is added in fp32. On CUDA, where sparse products
are slow, the dense product of one layer, which lives only until its entries are read, gives the gradient.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .core import HALF


LARGEST_KEY = 0x7F7FFFFF  # the bits of the largest finite float
CHUNK = 1 << 20  # entries that are looked at together where a whole weight is gone through


# The index code


def _low_bits(k: int, n: int) -> int:
    return max(0, (n // k).bit_length() - 1) if k else 0


def encoded_size(k: int, n: int) -> int:
    """Bytes that `encode` needs for k of n places: about `log2(n / k) + 2` bits each."""
    if k == 0:
        return 0
    low = _low_bits(k, n)
    return -(-k * low // 8) + -(-(k + ((n - 1) >> low) + 1) // 8)


def index_dtype(n: int) -> torch.dtype:
    """The smallest integer type that holds a flat place in a weight of n entries."""
    return torch.int32 if n <= torch.iinfo(torch.int32).max else torch.int64


def encode(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Sorted distinct places `(k,)` below n as `(encoded_size(k, n),)` bytes, in the code of Elias and Fano.

    The lower bits of each place are written out; the upper ones stand in unary, as a one at `upper + rank`.
    """
    k = len(indices)
    if k == 0:
        return torch.zeros(0, dtype=torch.uint8, device=indices.device)
    low = _low_bits(k, n)
    indices = indices.long()
    lower = _pack(indices & ((1 << low) - 1), low)
    positions = (indices >> low) + torch.arange(k, device=indices.device)
    upper = torch.zeros(encoded_size(k, n) - len(lower), dtype=torch.int32, device=indices.device)
    upper.index_add_(0, positions >> 3, (1 << (positions & 7)).int())  # each bit is set once, so a sum is an "or"
    return torch.cat([lower, upper.to(torch.uint8)])


def decode(code: torch.Tensor, k: int, n: int) -> torch.Tensor:
    """The places `(k,)` that `encode` wrote, sorted, in `index_dtype(n)`.

    Raises:
        ValueError: These are not the places of k among n entries.
    """
    if len(code) != encoded_size(k, n):
        raise ValueError(f"An index of {k} among {n} places has {encoded_size(k, n)} bytes, got {len(code)}.")
    if k == 0:
        return torch.zeros(0, dtype=index_dtype(n), device=code.device)
    low = _low_bits(k, n)
    n_lower = -(-k * low // 8)
    eight = torch.arange(8, device=code.device)
    ones = ((code[n_lower:, None] >> eight) & 1).flatten().nonzero().squeeze(1)
    if len(ones) == k:
        upper = ones - torch.arange(k, device=code.device)
        indices = (upper << low) + _unpack(code[:n_lower], low, k)
        if indices[-1] < n and (indices[1:] > indices[:-1]).all():
            return indices.to(index_dtype(n))
    raise ValueError(f"The stored index is damaged: it does not name {k} distinct places among {n}.")


def decode_alone(code: torch.Tensor, k: int) -> list[tuple[torch.Tensor, int, int]]:
    """The places `(k,)` in a code without n: each way to read it, with the smallest and the largest n that fit.

    As a rule there is one, and its bounds on n are within `8 / k` of each other; a few places can be read in
    several ways, a damaged code in none.
    """
    if k == 0:
        return []
    found = []
    for low in range(63):
        n_upper = len(code) - (-(-k * low // 8))
        if n_upper <= 0:
            break
        # `encoded_size` solved for n, and the n that `_low_bits` gives so many bits
        smallest = max(((8 * (n_upper - 1) - k) << low) + 1, k << low)
        largest = min((8 * n_upper - k) << low, (k << (low + 1)) - 1)
        if smallest > largest:
            continue
        with suppress(ValueError):
            places = decode(code, k, largest)
            found.append((places, max(smallest, int(places[-1]) + 1), largest))
    return found


def _pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """`numbers` `(k,)` of so many bits each, one after the other, as bytes."""
    pieces = [torch.zeros(0, dtype=torch.uint8, device=numbers.device)]
    weights = 1 << torch.arange(8, device=numbers.device)
    places = torch.arange(bits, device=numbers.device)
    for part in numbers.split(CHUNK) if bits else ():  # eight numbers fill whole bytes, and so does a chunk
        stream = ((part[:, None] >> places) & 1).flatten()
        stream = F.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        pieces.append((stream * weights).sum(1).to(torch.uint8))
    return torch.cat(pieces)


def _unpack(code: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    if bits == 0:
        return torch.zeros(k, dtype=torch.long, device=code.device)
    pieces = []
    eight = torch.arange(8, device=code.device)
    places = torch.arange(bits, device=code.device)
    for start in range(0, k, CHUNK):
        count = min(CHUNK, k - start)
        part = code[start * bits // 8 : -(-(start + count) * bits // 8)]
        stream = ((part[:, None] >> eight) & 1).flatten()[: count * bits].view(count, bits).long()
        pieces.append((stream << places).sum(1))
    return torch.cat(pieces)


# Choosing places


def random_indices(k: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """k distinct places below n, sorted, drawn evenly on the CPU, so that a seed gives the same on every device."""
    if 4 * k > n:
        return torch.randperm(n, generator=generator)[:k].sort().values
    drawn = torch.zeros(0, dtype=torch.long)
    while len(drawn) < k:
        more = torch.randint(n, (k + k // 4 + 16,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]].sort().values


def top_indices(scores: Callable[[int, int], torch.Tensor], n: int, k: int, smallest: bool = False) -> torch.Tensor:
    """The flat places `(k,)` of the k largest of n scores, sorted; among equal scores the first places win.

    Args:
        scores: Gives the scores of the places `start` to `stop`; a negative score takes its place out. They are
            asked for in pieces, each once and in order, so that nothing of n entries is made here.
        smallest: Take the k smallest instead.

    Returns fewer than k places if fewer are in. Scores are compared in fp32.
    """
    size = min(CHUNK, max(1 << 15, n // 32))  # several tensors of this size are alive at a time
    keys: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    held, floor = 0, -1  # only keys above the floor can be among the k largest
    for start in range(0, n, size):
        piece = _keys(scores(start, min(n, start + size)), smallest)
        entering = (piece > floor).nonzero().squeeze(1)
        keys.append(piece[entering])
        places.append(entering + start)
        held += len(entering)
        if held > 2 * k or start + size >= n:
            together = torch.cat(keys)
            best = _largest(together, k)
            keys, places, held = [together[best]], [torch.cat(places)[best]], len(best)
            if held == k:
                floor = int(keys[0].min()) if k else LARGEST_KEY
    return places[0] if places else torch.zeros(0, dtype=torch.long)


def _keys(scores: torch.Tensor, smallest: bool) -> torch.Tensor:
    """Integers that sort like the scores; NaN, which must not win, is out like a negative one."""
    plain = torch.nan_to_num(scores.float(), nan=-1.0, posinf=torch.finfo(torch.float32).max).add_(0.0)  # no -0
    keys = plain.contiguous().view(torch.int32)  # the bits of non-negative floats sort like the floats
    return torch.where(keys < 0, keys, LARGEST_KEY - keys) if smallest else keys


def _largest(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The places of the k largest of non-negative keys, sorted, by radix selection; of equal ones the first win."""
    if k >= len(keys):
        return torch.arange(len(keys), device=keys.device)
    if k == 0:
        return torch.zeros(0, dtype=torch.long, device=keys.device)
    upper = keys >> 16  # first the upper half of the bits of the k-th largest, then the lower one
    high, rest = _bin_of_kth(torch.bincount(upper, minlength=1 << 16), k)
    bits, ties = _bin_of_kth(torch.bincount(keys[upper == high] & 0xFFFF, minlength=1 << 16), rest)
    threshold = (high << 16) | bits
    chosen = keys > threshold
    chosen[(keys == threshold).nonzero().squeeze(1)[:ties]] = True
    return chosen.nonzero().squeeze(1)


def _bin_of_kth(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin that the k-th largest falls in, and how many of that bin are among the k largest."""
    from_above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, k))
    before = int(from_above[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - before


def is_in(indices: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Which of `indices` are in the sorted `pool`, as a mask."""
    if len(pool) == 0:
        return torch.zeros_like(indices, dtype=torch.bool)
    place = torch.searchsorted(pool, indices).clamp_(max=len(pool) - 1)
    return pool[place] == indices


# Products


class Observer(Protocol):
    """Somebody who looks at the gradient of a whole weight while it is at hand, in the backward."""

    def observe(self, gradient: Gradient, values: torch.Tensor) -> None:
        """`values` `(k,)` is the part of the gradient that goes to the observer's own values."""


@dataclass
class Gradient:
    """The gradient of a weight, which is computed only as far as it is asked for."""

    op: Operation
    x: torch.Tensor
    grad: torch.Tensor

    def at(self, indices: torch.Tensor) -> torch.Tensor:
        """Its entries `(k,)` at flat places."""
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            return self.op.grad_values(self.x, self.grad, indices)

    def top_indices(self, k: int) -> torch.Tensor:
        """The flat places `(k,)` of its entries of largest magnitude, sorted; of a linear layer it is never whole."""
        width = self.op.n // self.op.shape[0]
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            rows = self.op.gradient_rows(_at_least_fp32(self.x), _at_least_fp32(self.grad))

            def magnitudes(start: int, stop: int) -> torch.Tensor:
                first = start // width
                block = rows(first, -(-stop // width)).reshape(-1)
                return block[start - first * width : stop - first * width].abs_()

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
        """The gradient of the weight at flat places; here read off the dense one."""
        return self.grad_weight(x, grad).reshape(-1).index_select(0, indices)

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The module's output with S for a weight and no bias."""
        return self.product(x, self.dense(values, indices, x.dtype), None)

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
        pattern = csr(indices, torch.zeros(len(indices), dtype=left.dtype), self.shape)
        return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or self.transposed or not _is_increasing(indices):
            return super().sparse_product(x, values, indices)
        rows = _at_least_fp32(x.reshape(-1, x.shape[-1]))
        return (csr(indices, values.to(rows.dtype), self.shape) @ rows.T).T.reshape(*x.shape[:-1], -1)


def _is_increasing(indices: torch.Tensor) -> bool:
    """Whether this is one sorted run; the places of several adapters, one after the other, are not."""
    return len(indices) < 2 or bool((indices[1:] > indices[:-1]).all())


def csr(indices: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """S as a sparse matrix in CSR layout; entries need not be in order within a row."""
    rows = indices // shape[1]
    columns = indices - rows * shape[1]
    starts = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=indices.device, dtype=rows.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
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
    """A table looked up by token ids x; `scale` is what some architectures multiply the rows by."""

    def __init__(self, embedding: nn.Embedding, scale: torch.Tensor | float | None = None) -> None:
        super().__init__(embedding.weight.shape)
        self.padding_idx = embedding.padding_idx
        self.scale = scale

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return rows
        return rows * (self.scale.to(rows) if isinstance(self.scale, torch.Tensor) else self.scale)

    def takes(self, x: torch.Tensor) -> bool:
        return False

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._scaled(F.embedding(x, weight))

    def sparse_product(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        tokens, place = x.unique(return_inverse=True)
        own, at = self._of_tokens(tokens, indices)
        rows = torch.zeros(len(tokens), self.shape[1], dtype=values.dtype, device=values.device)
        columns = indices[own].long() % self.shape[1]
        rows.index_put_((at, columns), values[own], accumulate=True)
        return self._scaled(rows[place])

    def _of_tokens(self, tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the places are in rows of these sorted tokens, and in the how-manieth token's row."""
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
