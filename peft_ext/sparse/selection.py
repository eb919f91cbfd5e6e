"""Which indices are taken: at random, those of the largest scores, or some drawn by their scores."""

from __future__ import annotations

from collections.abc import Callable

import torch


LARGEST_KEY = 0x7F7FFFFF  # the bits of the largest finite float
SMALLEST_SPREAD = 1e-9
CHUNK = 1 << 20  # entries that are looked at together where a whole weight is gone through


def random_indices(k: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """k distinct indices below n, sorted, drawn evenly on the CPU, so that a seed gives the same on every device."""
    if 4 * k > n:
        return torch.randperm(n, generator=generator)[:k].sort().values
    drawn = torch.zeros(0, dtype=torch.long)
    while len(drawn) < k:
        more = torch.randint(n, (k + k // 4 + 16,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]].sort().values


def top_indices(scores: Callable[[int, int], torch.Tensor], n: int, k: int, smallest: bool = False) -> torch.Tensor:
    """The flat indices `(k,)` of the k largest of n scores, sorted; among equal scores the first indices win.

    Args:
        scores: Gives the scores of the indices `start` to `stop`; a negative score takes its place out. They are
            asked for in pieces, each once and in order, so that nothing of n entries is made here.
        smallest: Take the k smallest instead.

    Returns fewer than k indices if fewer are in. Scores are compared in fp32.
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


def drawn_keys(scores: torch.Tensor, power: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers, in fp32 and from zero on, whose k largest are k scores drawn without replacement, for any k.

    The chances are in proportion to score^power: the keys sort like power * log(score) + G with G = -log E,
    E ~ Exp(1). A score of zero has the key zero; one below zero has NaN, which `top_indices` leaves out as well.

    Args:
        scores: Of any shape.
        power: Positive.
        generator: The noise is drawn on its device, in the order of the scores.
    """
    parts = [_drawn(part, power, generator) for part in scores.reshape(-1).split(CHUNK)]
    return torch.cat(parts).view(scores.shape)


def _drawn(scores: torch.Tensor, power: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.empty(scores.shape, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    keys = power * scores.to(noise).log() - noise.log()
    # rises with the key, and is positive, without under- or overflow: fp32 keeps the relative precision
    keys = torch.where(keys > 0, 1 + keys, 1 / (1 - keys))
    return keys.to(scores.device, torch.float32)


def check_spread(spread: object) -> None:
    """`ValueError` unless it is 0, or positive and not so small that its inverse is no use as a power."""
    if not (isinstance(spread, (int, float)) and (spread == 0 or spread >= SMALLEST_SPREAD)):
        raise ValueError(
            f"`spread` must be 0, which takes the largest scores, or a number from {SMALLEST_SPREAD:g} on, such as 1, "
            f"got {spread!r}."
        )


def _keys(scores: torch.Tensor, smallest: bool) -> torch.Tensor:
    """Integers that sort like the scores; NaN, which must not win, is out like a negative one."""
    plain = torch.nan_to_num(scores.float(), nan=-1.0, posinf=torch.finfo(torch.float32).max).add_(0.0)  # no -0
    keys = plain.contiguous().view(torch.int32)  # the bits of non-negative floats sort like the floats
    return torch.where(keys < 0, keys, LARGEST_KEY - keys) if smallest else keys


def _largest(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The indices of the k largest of non-negative keys, sorted, by radix selection; of equal ones the first win."""
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
