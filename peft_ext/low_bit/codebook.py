"""The levels of a quantised matrix, and its codes in bytes."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..core import needs_plain_operations
from ..sparse import pack_bits, unpack_bits


BITS = (1, 2, 3, 4, 5, 6, 7, 8)
FULL = 32  # bits of a matrix that is not quantised
EPS = 1e-5  # beside the standard deviation, as published
ROUNDS = 500
MARGIN = 1e-4  # how far from a threshold latents are put that are made up

_tables: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


class Coded(NamedTuple):
    """A quantised matrix as a file holds it: `codes` `(coded_size(n, bits),)` in uint8, `stats` `(2,)`: mu and sd."""

    codes: torch.Tensor
    stats: torch.Tensor


def coded_size(n: int, bits: int) -> int:
    """Bytes of the codes of n entries."""
    return -(-n * bits // 8)


@torch.compiler.assume_constant_result  # a compiler would write all rounds into its graph
def codebook(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The `2**bits` levels of a standard normal variable, and the `2**bits - 1` thresholds between them.

    Each level is the median of its cell, each threshold in the middle between two levels; up to 4 bits this is where
    the published 500 rounds arrive (at 8 bits they do not converge).
    """
    return _codebook(bits)


@cache
def _codebook(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = 2**bits
    levels = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    for _ in range(ROUNDS):
        inner = torch.special.ndtr((levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
        levels = torch.special.ndtri((edges[1:] + edges[:-1]) / 2)
        levels = (levels - levels.flip(0)) / 2  # symmetric to the last bit
    return tuple(levels.tolist()), tuple(((levels[1:] + levels[:-1]) / 2).tolist())


def tables(bits: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codebook as tensors of the dtype and device of `like`."""
    if torch.compiler.is_compiling():  # which would compile again when something else is kept
        return _tensors(bits, like)
    key = (bits, like.dtype, like.device)
    if key not in _tables:
        with torch.inference_mode(False):  # what is kept must serve training, too
            _tables[key] = _tensors(bits, like)
    return _tables[key]


def _tensors(bits: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    levels, thresholds = (torch.tensor(t, dtype=like.dtype, device=like.device) for t in codebook(bits))
    return levels, thresholds


def used_values(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The quantised form of a latent matrix, differentiable as in the formula of this package; same shape."""
    levels, thresholds = tables(bits, weight)
    if not needs_plain_operations():
        return Quantised.apply(weight, levels, thresholds)
    z, sd, mu = _standardised(weight)
    codes = torch.bucketize(z.detach(), thresholds)
    return sd * (levels[codes] + (z - z.detach())) + mu  # what is added is zero, so the value is that of `decode`


class Quantised(torch.autograd.Function):
    r"""The same with the gradient in closed form, which takes fewer operations.

    With z = (w - mu) / (sd + eps), the level q of each entry, rho = sd / (sd + eps) and g the gradient of the output:

        dL/dw_i = rho g_i + (1 - rho) mean(g) + (dsd/dw_i) sum_j g_j (q_j - rho z_j),   dsd/dw_i = (w_i - mu) / ((n - 1) sd)
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, levels: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """weight of any shape, levels `(2**bits,)`, thresholds `(2**bits - 1,)`; returns what `decode` would."""
        z, sd, mu = _standardised(weight)
        used = levels[torch.bucketize(z, thresholds)]
        ctx.save_for_backward(z, used, sd)
        return sd * used + mu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        z, used, sd = ctx.saved_tensors
        rho = sd / (sd + EPS)
        inner = torch.dot(grad.reshape(-1), torch.addcmul(used, z, rho, value=-1).reshape(-1))
        # z (sd + eps) / sd = z / rho; equal entries spread by nothing, and so does their spread
        slope = torch.where(sd > 0, inner / (max(z.numel() - 1, 1) * rho), 0.0)
        return torch.addcmul(grad * rho + (1 - rho) * grad.mean(), z, slope), None, None


def _standardised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, standard deviation and mean; a single entry, or equal ones, spread by nothing."""
    sd, mu = torch.std_mean(weight, correction=min(1, weight.numel() - 1))
    return (weight - mu) / (sd + EPS), sd, mu


@torch.no_grad()
def encode(weight: torch.Tensor, bits: int) -> Coded:
    """Codes and statistics of a latent matrix."""
    z, sd, mu = _standardised(weight)
    codes = torch.bucketize(z.flatten(), tables(bits, weight)[1])
    return Coded(pack_bits(codes, bits), torch.stack([mu, sd]))


@torch.no_grad()
def decode(coded: Coded, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What `used_values` gave for the matrix that was encoded, bit for bit.

    Raises:
        ValueError: The number of bytes is not that of such a matrix.
    """
    n = torch.Size(shape).numel()
    if len(coded.codes) != coded_size(n, bits):
        raise ValueError(
            f"A matrix {tuple(shape)} in {bits} bits has {coded_size(n, bits)} bytes of codes, got {len(coded.codes)}."
        )
    mu, sd = coded.stats
    levels = tables(bits, coded.stats)[0]
    return (sd * levels[unpack_bits(coded.codes, bits, n)] + mu).view(shape)


@torch.no_grad()
def latents(coded: Coded, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A latent matrix that a coded one could come from: with its codes and, but for rounding, its mean and spread.

    The true one is lost with the training that wrote the file. Entries are spread evenly over the probability of their
    cells, then scaled and shifted together to mean 0 and spread 1. At 8 bits the cells
    are so narrow that of matrices with heavy tails the spread is met to 20 % only.
    """
    n = torch.Size(shape).numel()
    mu, sd = coded.stats.double().cpu()
    if not sd > 0:
        return torch.full(shape, float(mu), dtype=coded.stats.dtype, device=coded.stats.device)
    codes = unpack_bits(coded.codes, bits, n).cpu()
    cuts = torch.tensor(codebook(bits)[1], dtype=torch.float64)
    shrink = sd / (sd + EPS)  # z of what has mean mu and spread sd is smaller by this
    edges = torch.cat([cuts.new_tensor([-torch.inf]), cuts / shrink, cuts.new_tensor([torch.inf])])
    low, high = edges[codes], edges[codes + 1]
    golden = (torch.arange(1, n + 1, dtype=torch.float64) * 0.6180339887498949) % 1.0
    below, above = torch.special.ndtr(low), torch.special.ndtr(high)
    spread = torch.special.ndtri(below + (0.01 + 0.98 * golden) * (above - below))
    factor, offset = 1.0, 0.0
    for _ in range(50):  # Newton's steps to mean 0 and spread 1; entries at the edge of their cell stay there
        t = torch.minimum(torch.maximum(factor * spread + offset, low + MARGIN), high - MARGIN)
        free = (t > low + MARGIN) & (t < high - MARGIN)
        slope = (t * spread)[free].sum().item()
        if not free.any() or slope <= 0:
            break
        offset -= (t.sum() / free.sum()).item()
        factor += ((n - 1) * (1 - t.var()) / (2 * slope)).clamp(-0.5, 0.5).item()
    return (mu + sd * t).to(coded.stats).view(shape)
