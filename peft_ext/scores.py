r"""Scores of the weights of many tensors, and who is chosen by them: the k largest, or k that are drawn.

**Drawn with `spread`.** With s_i >= 0 the score of weight i and p = 1 / spread, k weights are drawn one after the other
without replacement, each time with the probability

    P(i) = s_i^p / sum_j s_j^p         over the weights j that were not drawn yet

which is the same (Gumbel top-k, Vieira 2014) as to take the k largest of

    p log s_i + G_i,        G_i = -log E_i,  E_i ~ Exp(1)

`spread=0` (p to infinity) takes the k largest, `spread=1` draws in proportion to the scores, `spread=2` to their roots
(where scores are squares of gradients: in proportion to the gradients), and the larger it is, the less the scores say.
Weights of score 0 come last. The numbers come from a generator on the CPU for each tensor, so that all processes that
have the same scores and the same seed draw the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .core import stable_generator
from .sparse import drawn_keys, top_indices


SAMPLE = 1 << 17  # weights on which the pool's floor is estimated


class Scores:
    """Non-negative scores of the weights of many tensors, by name.

    Attributes:
        sizes: The number of weights of each tensor.
        batches: How many batches they come from.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.batches = 0

    @property
    def total(self) -> int:
        """The number of all weights."""
        return sum(self.sizes.values())

    def of(self, name: str) -> torch.Tensor:
        """The scores of the weights of one tensor, flat; -1 where they were forgotten."""
        raise NotImplementedError

    def complete(self, name: str, generator: torch.Generator) -> torch.Tensor:
        """The scores of one tensor, flat; those that were forgotten are replaced by what others like them have."""
        return self.of(name)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds `values`, flat, not negative and in fp32, to the sums of one tensor; they may be overwritten."""
        raise NotImplementedError

    def top(self, k: int, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The flat indices of the k largest scores of all tensors (or of those named) together, sorted, by tensor.

        Raises:
            ValueError: Fewer than k were kept.
        """
        names = list(self.sizes) if names is None else names
        ends = torch.tensor([self.sizes[name] for name in names]).cumsum(0).tolist()
        starts = [0, *ends]
        current: dict[str, torch.Tensor] = {}  # the one tensor that is written out

        def piece(start: int, stop: int) -> torch.Tensor:
            parts = []
            for name, first, last in zip(names, starts, ends, strict=False):
                if first < stop and last > start:
                    if name not in current:
                        current.clear()
                        current[name] = self.of(name)
                    parts.append(current[name][max(0, start - first) : stop - first])
            return torch.cat(parts)

        chosen = top_indices(piece, ends[-1] if ends else 0, k)
        if len(chosen) < k:
            raise ValueError(
                f"{k} weights are asked for, {len(chosen)} have a score: lower the budget, or use `memory='exact'`."
            )
        bounds = torch.searchsorted(chosen, torch.tensor(starts)).tolist()
        return {
            name: chosen[first:last] - start
            for name, start, first, last in zip(names, starts, bounds, bounds[1:], strict=False)
            if last > first
        }

    def spread_out(self, spread: float, seed: int) -> Scores:
        """These scores themselves if `spread` is 0; else others whose k largest are a draw from these, for any k."""
        return self if spread == 0 else DrawnScores(self, 1 / spread, seed)

    def draw(
        self, k: int, power: float, generator: torch.Generator, names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """k flat indices of all tensors (or of those named) together, drawn without replacement; sorted, by tensor.

        The first is drawn with the probability s_i^power / sum_j s_j^power, the next likewise among the others, and so
        on. Those whose scores were forgotten take part with scores like those of other forgotten ones.

        Raises:
            ValueError: `power` is not positive, or there are fewer than k.
        """
        seed = int(torch.randint(1 << 32, (), generator=generator, device=generator.device))
        return DrawnScores(self, power, seed).top(k, names)


class DrawnScores(Scores):
    """p log(score) + Gumbel noise, as numbers from zero on: the k largest are a draw, with the same noise for any k."""

    def __init__(self, scores: Scores, power: float, seed: int) -> None:
        """`ValueError` if `power` is not positive."""
        super().__init__(scores.sizes)
        if not power > 0:
            raise ValueError(f"`power` must be positive, got {power!r}.")
        self.batches = scores.batches
        self.scores, self.power, self.seed = scores, power, seed

    def of(self, name: str) -> torch.Tensor:
        generator = stable_generator(self.seed, name)
        return drawn_keys(self.scores.complete(name, generator), self.power, generator)


class ExactScores(Scores):
    """One sum for every weight, in fp32 unless told otherwise, on the host."""

    def __init__(self, sizes: Mapping[str, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sizes)
        self.sums = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}

    def of(self, name: str) -> torch.Tensor:
        return self.sums[name]

    def add(self, name: str, values: torch.Tensor) -> None:
        self.sums[name].add_(values.cpu())


def random_scores(sizes: Mapping[str, int], seed: int) -> ExactScores:
    """Scores that are drawn uniformly, the same in all processes: what is chosen by them is chosen by chance."""
    scores = ExactScores(sizes)
    for name, sums in scores.sums.items():
        sums.uniform_(generator=stable_generator(seed, name))
    return scores


class PooledScores(Scores):
    """Sums of the largest weights only: flat indices, int32, and fp32 sums of an eighth of all weights at most.

    A weight enters with a batch that gives it more than a floor. The floor is zero until the pool has been full; then
    it is the sum that as many weights exceed as fill four fifths of the pool. It rises, and what is below is thrown
    out, when the pool is full again. It is estimated on a regular sample of all weights, whose own sums are never
    forgotten; so is what a weight that enters had before.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        self.room = max(1, self.total // 8)
        self.filling = 0.8  # of the room, after something was thrown out
        self.floor = 0.0
        self.stride = -(-self.total // SAMPLE)
        self.sample: dict[str, torch.Tensor] = {}
        self.sums = {name: torch.zeros(0) for name in sizes}
        self.places = {
            name: torch.zeros(0, dtype=torch.int32 if size < 1 << 31 else torch.int64) for name, size in sizes.items()
        }

    def of(self, name: str) -> torch.Tensor:
        return torch.full((self.sizes[name],), -1.0).index_copy_(0, self.places[name].long(), self.sums[name])

    def complete(self, name: str, generator: torch.Generator) -> torch.Tensor:
        """Forgotten sums are drawn from those of the sample that the pool has forgotten, in the same tensor."""
        found = self.of(name)
        forgotten = (found < 0).nonzero().view(-1)
        if name in self.sample and len(alike := self.sample[name][found[:: self.stride] < 0]):
            found[forgotten] = alike[torch.randint(len(alike), (len(forgotten),), generator=generator)]
        return found

    def add(self, name: str, values: torch.Tensor) -> None:
        values, places = values.cpu(), self.places[name]
        sampled, known = values[:: self.stride], self.sample.get(name)
        self.sample[name] = sampled.clone() if known is None else known + sampled
        before = 0.0  # what a weight that enters now had, on average, in the batches that are forgotten
        if known is None:
            if self._filled() + len(values) > self.room:
                self._raise_floor()
        elif bool((alike := (sampled > self.floor) & (known <= self.floor)).any()):
            before = float(known[alike].mean())
        sums = self.sums[name] + values.index_select(0, places)
        values[places] = 0.0  # so that none enters twice
        entering = (values > self.floor).nonzero().view(-1)
        self.places[name] = torch.cat([places, entering.to(places.dtype)])
        self.sums[name] = torch.cat([sums, values.index_select(0, entering) + before])
        while self._filled() > self.room:
            self._forget()

    def _filled(self) -> int:
        return sum(len(sums) for sums in self.sums.values())

    def _raise_floor(self) -> None:
        seen = sum(self.sizes[name] for name in self.sample)
        sums = torch.cat(list(self.sample.values()))
        below = round(len(sums) * (1 - self.filling * self.room / seen))
        self.floor = float(sums.kthvalue(below).values) if below > 0 else 0.0

    def _forget(self) -> None:
        self._raise_floor()
        for name, sums in self.sums.items():
            stays = sums > self.floor
            self.places[name], self.sums[name] = self.places[name][stays], sums[stays]
        if self._filled() > self.room:  # the sample was not good enough
            self.filling *= 0.9
