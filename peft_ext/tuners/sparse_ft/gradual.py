r"""Supports that follow from the base's weights and move little: SaRA's, which shrinks once, and ID3's, which grows.

**SaRA** (Hu et al. 2024, arXiv:2409.06633), `selection="below"`. The weights with |w| < threshold are tuned. Once, in
the middle of the training, those that have left that range, |w + s| >= threshold, are frozen at what they have come
to; the optimizer keeps its state for the others.

**ID3** (Agarwal et al. 2024, arXiv:2408.14470), `selection="growing"`. The support of k weights is empty at first. Step
t of T adds the floor(k t / T) - floor(k (t - 1) / T) indices of largest |g| / (|w| + eps)^p outside it, which take part
in that very step; none is ever dropped.

**Where this differs from the published code, and why.** Weight decay pulls the deltas, not the weights, to zero, as in
all other selections. SaRA's nuclear-norm term is left out (in the code as shipped it has no effect), and the optimizer
keeps its state at the reselection, where the published one forgets it. ID3's indices are chosen in each module by
itself, not in all together, so that the shapes of an adapter follow from its config. With gradient accumulation the
first micro-batch names four times as many candidates as are needed, and the sums over all of them decide; with several
processes the first one's gradients decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ...core.sharding import put, whole
from ...sparse import Gradient, is_in
from .optimizer_state import STATE, movable_state
from .spiel import AgTracker
from .tracker import Tracker, warn_once


if TYPE_CHECKING:
    from ...delta import SparseDelta

CANDIDATES = 4  # for each place that is to grow


class BelowTracker(Tracker):
    """Freezes, once, the values that have taken their weights out of the range."""

    frozen: torch.Tensor | None = None  # (k,) of booleans
    _kept: torch.Tensor | None = None

    @property
    def reselect_at(self) -> int | None:
        """The number of steps after which that is."""
        steps = self.config.steps
        return self.config.reselect_at or (None if steps is None else max(1, steps // 2))

    def miss_total_steps(self) -> None:
        """Says that there will be no reselection."""
        if self.config.reselect_at is None:
            warn_once(
                self.said,
                "total_steps",
                "Neither SparseFTConfig.total_steps nor reselect_at is set, so the support stays what it is at the "
                "start. Set one of them, or pass `callbacks=[peft_ext.SparseFTCallback()]` to the Trainer.",
            )

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """Frozen values have no gradient, which would count in a norm by which gradients are clipped."""
        super().observe(leaf, gradient, values)
        if self.frozen is not None:
            values.masked_fill_(self.frozen, 0.0)

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Takes frozen values out of the step."""
        super().before_step(leaf, optimizer, group, closure)
        if self.frozen is not None:
            self._kept = whole(leaf.weight)[self.frozen].clone()
            if leaf.weight.grad is not None and not closure:
                put(leaf.weight.grad, whole(leaf.weight.grad).masked_fill(self.frozen, 0.0))

    @torch.no_grad()
    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Puts frozen values back, which momentum or decay may have moved, counts, and reselects if it is time."""
        if self.frozen is not None and self._kept is not None:
            values = whole(leaf.weight).clone()
            values[self.frozen] = self._kept
            put(leaf.weight, values)
        self._kept = None
        if taken and leaf.weight.grad is not None:
            self.step += 1
            if self.step == self.reselect_at:
                assert self.config.threshold is not None
                values = whole(leaf.weight)
                weights = self.base_weight().reshape(-1)[leaf.indices().long()]
                left = (weights.to(values) + values).abs() >= self.config.threshold
                self.frozen = left if self.frozen is None else self.frozen | left
                self.reselections.append((self.step, int(left.sum())))
        if leaf.weight.grad is not None:
            self._store(leaf, optimizer)

    def _tensors(self, leaf: SparseDelta) -> dict[str, torch.Tensor | int]:
        none = torch.zeros(leaf.k, dtype=leaf.weight.dtype, device=leaf.weight.device)
        return {"frozen": none if self.frozen is None else self.frozen.to(none)}

    def _load(self, leaf: SparseDelta, state: dict[str, Any]) -> None:
        self.frozen = state[f"{STATE}frozen"] > 0

    def _clear(self) -> None:
        self.frozen = None


class GrowingTracker(AgTracker):
    """Lets ever more of the values take part; those that do not are zero, and their indices are still open."""

    active: torch.Tensor | None = None  # (k,) of booleans

    def _active_of(self, leaf: SparseDelta) -> torch.Tensor:
        if self.active is None or len(self.active) != leaf.k:
            self.active = whole(leaf.weight) != 0  # an adapter that is trained further keeps what it has
        return self.active

    def see(self, values: torch.Tensor) -> None:
        """Takes note of what takes part at the start, which the first backward asks for."""
        if not self._searched:
            self.active = values != 0

    def _begin(self, values: torch.Tensor) -> None:
        super()._begin(values)
        self.active = values != 0

    def _number(self, k: int) -> int:
        """How many indices the step under way adds."""
        steps = self.config.steps
        if steps is None or self.active is None:
            return 0
        return max(0, k * min(self.step + 1, steps) // steps - int(self.active.sum()))

    def is_gathering(self, k: int) -> bool:
        """Whether the step under way adds indices."""
        return self._number(k) > 0

    def _score(self, magnitude: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return magnitude / (weights.to(magnitude).abs() + self.config.growth_eps) ** self.config.growth_power

    def _name_candidates(self, leaf: SparseDelta, gradient: Gradient) -> torch.Tensor:
        """The indices outside the support of the largest scores."""
        taken = leaf.indices().long()[self._active_of(leaf)]
        weights = self.base_weight().reshape(-1)

        def score(magnitude: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            inside = taken[torch.searchsorted(taken, start) : torch.searchsorted(taken, stop)] - start
            return self._score(magnitude, weights[start:stop]).index_fill_(0, inside, -1.0)

        return gradient.top_indices(CANDIDATES * self._number(leaf.k), score)

    def miss_total_steps(self) -> None:
        """There is no pace to grow at."""
        raise ValueError(
            "SparseFTConfig.total_steps is not set, so it is not known how fast the support is to grow. Set it to the "
            "number of optimizer steps of the training, or pass `callbacks=[peft_ext.SparseFTCallback()]` to the "
            "Trainer."
        )

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Adds indices, with their gradients, and takes the values that have none yet out of the step."""
        if closure:
            raise ValueError(
                "selection='growing' chooses by the gradients of a step and does not work with "
                "`optimizer.step(closure)`: call `loss.backward()` and then `optimizer.step()`."
            )
        Tracker.before_step(self, leaf, optimizer, group, closure)
        movable_state(optimizer, optimizer.state.get(leaf.weight, {}), leaf.weight)
        self._active_of(leaf)
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is None or not bool(overflow):
            self._measure(leaf, optimizer)
            if self._measured is not None:
                self._grow(leaf, optimizer, self._measured)
        if leaf.weight.grad is not None:
            waiting = ~self._active_of(leaf)
            put(leaf.weight.grad, whole(leaf.weight.grad).masked_fill(waiting, 0.0))

    @torch.no_grad()
    def _grow(self, leaf: SparseDelta, optimizer: Optimizer, gradients: torch.Tensor) -> None:
        assert self.candidates is not None
        active, candidates = self._active_of(leaf), self.candidates
        number = self._number(len(active))
        scores = self._score(gradients.abs(), self.base_weight().reshape(-1)[candidates])
        chosen = scores.sort(descending=True, stable=True).indices[:number].sort().values
        places, gradients = candidates[chosen], gradients[chosen]
        indices = leaf.indices().long()
        waiting = is_in(places, indices)  # open indices that happen to be there already
        active = active.clone()
        active[torch.searchsorted(indices, places[waiting])] = True
        places, gradients = places[~waiting], gradients[~waiting]
        scale = getattr(optimizer, "grad_scale", None)
        slots = (~active).nonzero().squeeze(1)[: len(places)]
        moved = self._move(
            leaf, optimizer, slots, places, {"gradient": gradients if scale is None else gradients * scale}
        )
        self.reselections[-1] = (self.step + 1, len(chosen))
        active[slots] = True
        self.active = torch.empty_like(active)
        self.active[moved] = active

    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts the step."""
        self._discard_step()
        if leaf.weight.grad is None:
            return
        self.step += int(taken)
        self._store(leaf, optimizer)

    def _clear(self) -> None:
        super()._clear()
        self.active = None

    def _tensors(self, leaf: SparseDelta) -> dict[str, torch.Tensor | int]:
        return {"active": self._active_of(leaf).to(leaf.weight.dtype)}

    def _load(self, leaf: SparseDelta, state: dict[str, Any]) -> None:
        super()._clear()
        self.active = state[f"{STATE}active"] > 0
