"""A tensor kept as its largest entries and one bit for each: `(B, ...) -> values (K,), bits (ceil(numel / 8),)`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


SAMPLED = 4096  # entries of a sample by which a threshold is estimated


@dataclass(frozen=True, eq=False)
class Sparsified:
    """What is kept of a tensor.

    Attributes:
        values: The kept entries `(K,)`, in the order of the flat tensor.
        bits: Which they are, eight to a byte.
        shape: That of the tensor.
    """

    values: torch.Tensor
    bits: torch.Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Of values and bits."""
        return self.values.nbytes + self.bits.nbytes

    def restore(self) -> torch.Tensor:
        """The tensor, with zeros for what was not kept."""
        mask = _unpacked(self.bits, self.shape.numel())
        dense = self.values.new_zeros(self.shape.numel())
        dense[mask] = self.values
        return dense.view(self.shape)


def sparsify(tensor: torch.Tensor, samples: int, keep: float, exact: bool) -> Sparsified | None:
    """Keeps the entries of largest magnitude of each sample; `None` if that would not take less memory.

    Args:
        tensor: Any shape; of its entries in order, each of the `samples` has an equal part.
        samples: How many.
        keep: The share of each sample that is kept, rounded up to whole entries.
        exact: That many, or those above a threshold that is estimated from a part of the sample.
    """
    entries = tensor.numel() // samples
    count = math.ceil(keep * entries - 1e-9)
    if count * tensor.element_size() + entries / 8 >= entries * tensor.element_size():
        return None
    flat = tensor.detach().reshape(samples, entries)
    if exact:
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask.scatter_(1, flat.abs().topk(count, dim=1, sorted=False).indices, True)
    else:
        magnitudes = flat.abs()
        sampled = magnitudes[:, _positions(entries).to(flat.device)]
        rank = math.ceil(keep * sampled.shape[1] - 1e-9)
        threshold = sampled.topk(rank, dim=1).values[:, -1:]
        mask = (magnitudes >= threshold) & (magnitudes > 0)
    return Sparsified(flat[mask], _packed(mask.view(-1)), tensor.shape)


@lru_cache(maxsize=64)
def _positions(entries: int) -> torch.Tensor:
    """Drawn by a generator of its own; evenly spaced ones would meet few channels."""
    if entries <= SAMPLED:
        return torch.arange(entries)
    return torch.randint(entries, (SAMPLED,), generator=torch.Generator().manual_seed(0))


def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _packed(mask: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    return (padded * _powers(mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    return (bits[:, None] & _powers(bits.device)).bool().view(-1)[:count]
