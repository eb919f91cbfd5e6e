"""The index code of Elias and Fano: sorted indices in a number of bytes that follows from k and n alone."""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F


CHUNK = 1 << 20  # indices that are packed together


def _low_bits(k: int, n: int) -> int:
    return max(0, (n // k).bit_length() - 1) if k else 0


def encoded_size(k: int, n: int) -> int:
    """Bytes that `encode` needs for k of n indices: about `log2(n / k) + 2` bits each."""
    if k == 0:
        return 0
    low = _low_bits(k, n)
    return -(-k * low // 8) + -(-(k + ((n - 1) >> low) + 1) // 8)


def index_dtype(n: int) -> torch.dtype:
    """The smallest integer type that holds a flat place in a weight of n entries."""
    return torch.int32 if n <= torch.iinfo(torch.int32).max else torch.int64


def encode(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Sorted distinct indices `(k,)` below n as `(encoded_size(k, n),)` bytes, in the code of Elias and Fano.

    The lower bits of each place are written out; the upper ones stand in unary, as a one at `upper + rank`.
    """
    k = len(indices)
    if k == 0:
        return torch.zeros(0, dtype=torch.uint8, device=indices.device)
    low = _low_bits(k, n)
    indices = indices.long()
    lower = pack_bits(indices & ((1 << low) - 1), low)
    positions = (indices >> low) + torch.arange(k, device=indices.device)
    upper = torch.zeros(encoded_size(k, n) - len(lower), dtype=torch.int32, device=indices.device)
    upper.index_add_(0, positions >> 3, (1 << (positions & 7)).int())  # each bit is set once, so a sum is an "or"
    return torch.cat([lower, upper.to(torch.uint8)])


def decode(code: torch.Tensor, k: int, n: int) -> torch.Tensor:
    """The indices `(k,)` that `encode` wrote, sorted, in `index_dtype(n)`.

    Raises:
        ValueError: These are not the indices of k among n entries.
    """
    if len(code) != encoded_size(k, n):
        raise ValueError(f"An index of {k} among {n} entries has {encoded_size(k, n)} bytes, got {len(code)}.")
    if k == 0:
        return torch.zeros(0, dtype=index_dtype(n), device=code.device)
    ones = _upper_bits(code, k, n).nonzero().squeeze(1)
    if len(ones) == k:
        indices = _joined(ones, code, k, n)
        if indices[-1] < n and (indices[1:] > indices[:-1]).all():
            return indices.to(index_dtype(n))
    raise ValueError(f"The stored index is damaged: it does not name {k} distinct entries of {n}.")


def decode_unchecked(code: torch.Tensor, k: int, n: int) -> torch.Tensor:
    """The same without a look at what is in the code, so that a compiler can trace it: all shapes follow from k and n."""
    if k == 0:
        return torch.zeros(0, dtype=index_dtype(n), device=code.device)
    ones = _upper_bits(code, k, n).argsort(descending=True, stable=True)[:k]  # the ones, in their order
    return _joined(ones, code, k, n).to(index_dtype(n))


def _upper_bits(code: torch.Tensor, k: int, n: int) -> torch.Tensor:
    n_lower = -(-k * _low_bits(k, n) // 8)
    return ((code[n_lower:, None] >> torch.arange(8, device=code.device)) & 1).flatten()


def _joined(ones: torch.Tensor, code: torch.Tensor, k: int, n: int) -> torch.Tensor:
    """The indices, from the positions `(k,)` of the ones among the upper bits, and from the lower bits."""
    low = _low_bits(k, n)
    upper = ones - torch.arange(k, device=code.device)
    return (upper << low) + unpack_bits(code[: -(-k * low // 8)], low, k)


def decode_alone(code: torch.Tensor, k: int) -> list[tuple[torch.Tensor, int, int]]:
    """The indices `(k,)` in a code without n: each way to read it, with the smallest and the largest n that fit.

    As a rule there is one, and its bounds on n are within `8 / k` of each other; a few indices can be read in
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


def pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """`numbers` `(k,)` of so many bits each, one after the other, as bytes; the first is in the lowest bits."""
    pieces = [torch.zeros(0, dtype=torch.uint8, device=numbers.device)]
    weights = 1 << torch.arange(8, device=numbers.device)
    places = torch.arange(bits, device=numbers.device)
    for part in numbers.split(CHUNK) if bits else ():  # eight numbers fill whole bytes, and so does a chunk
        stream = ((part[:, None] >> places) & 1).flatten()
        stream = F.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        pieces.append((stream * weights).sum(1).to(torch.uint8))
    return torch.cat(pieces)


def unpack_bits(code: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The numbers `(k,)` that `pack_bits` wrote, as int64."""
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
