r"""SNELLA: how many entries of each update are not zero, as the optimizer makes steps.

With s = |p dL/dp| of a number p of the points, after each step

    I <- 0.85 I + 0.15 s,    U <- 0.85 U + 0.15 |s - I|

a module's score is the mean of I U over the points of its inputs plus that over those of its outputs. Of the entries
that stay in all modules together it gets in proportion to its score, and no more than it has; what is over goes to the
others in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .config import SNELLConfig
from .layer import Points


FIRST_SPARSITY = 0.01
MOMENTUM = 0.85
SENSITIVITY, UNCERTAINTY = "snell_sensitivity", "snell_uncertainty"  # in the optimizer's state, only while it trains


def first_kept(size: int) -> int:
    """How many of the entries of an update stay at the start."""
    return max(1, round((1 - FIRST_SPARSITY) * size))


def sparsity_at(step: int, total: int, target: float) -> float:
    """The share of zeros in all modules together after a step: cubic, as in AdaLoRA."""
    left = 1 - min(step / total, 1.0)
    return target + (FIRST_SPARSITY - target) * left**3


def allocate(scores: torch.Tensor, sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """How many entries each module keeps, int64 `(modules,)`, one at least; of scores and sizes `(modules,)`."""
    scores, sizes = scores.double().nan_to_num(0.0).clamp_min(0.0), sizes.double()
    kept, is_open = sizes.clone(), torch.ones_like(sizes, dtype=torch.bool)
    while bool(is_open.any()):
        weights = torch.where(is_open, scores, 0.0)
        if not bool(weights.sum() > 0):
            weights = torch.where(is_open, sizes, 0.0)
        wanted = (budget - kept[~is_open].sum()) * weights / weights.sum()
        is_full = is_open & (wanted >= sizes)
        if not bool(is_full.any()):
            kept[is_open] = wanted[is_open]
            break
        is_open &= ~is_full
    return kept.floor().clamp_min(1).long()


class Allocation:
    """Drives the points of one adapter."""

    def __init__(self, config: SNELLConfig, modules: Sequence[tuple[Points, Points]]) -> None:
        assert config.total_steps is not None and config.sparsity is not None
        self.total, self.target = config.total_steps, config.sparsity
        self.modules = list(modules)  # outputs and inputs of each
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by leaf, until the step is taken
        self._scores: dict[int, torch.Tensor] = {}
        for pair in self.modules:
            for leaf in pair:
                leaf.drive(self)

    def __getstate__(self) -> dict[str, Any]:
        # what is known of single leaves is known by their ids, which are others in a copy
        return self.__dict__ | {"_pending": {}, "_scores": {}}

    @torch.no_grad()
    def before_step(self, leaf: Points, optimizer: Optimizer, closure: bool) -> None:
        """Measures one leaf; `ValueError` if its gradient is not there yet, or a part of it elsewhere."""
        if closure:
            raise ValueError(
                f"{type(optimizer).__name__}.step was given a closure, which computes the gradients anew, so that "
                "`allocation='adaptive'` cannot see them. Use an optimizer without a closure, or 'uniform'."
            )
        if leaf.weight.shape != leaf.shape or isinstance(leaf.weight, DTensor):
            raise ValueError(
                "The points are sharded over processes (FSDP), so that none of them knows how sensitive the loss is to "
                "all of a module's. Use `allocation='uniform'`, or data-parallel training without shards."
            )
        if leaf.weight.grad is None:
            return
        grad = leaf.weight.grad.float()
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:  # of a fused optimizer under a GradScaler
            grad = grad / scale
        now = (leaf.weight.detach().float() * grad).abs()
        state = optimizer.state.get(leaf.weight, {})
        before = [state.get(key) for key in (SENSITIVITY, UNCERTAINTY)]
        sensitivity, uncertainty = (torch.zeros_like(now) if old is None else old.float() for old in before)
        sensitivity = MOMENTUM * sensitivity + (1 - MOMENTUM) * now
        uncertainty = MOMENTUM * uncertainty + (1 - MOMENTUM) * (now - sensitivity).abs()
        self._pending[id(leaf)] = (sensitivity, uncertainty)

    @torch.no_grad()
    def after_step(self, leaf: Points, optimizer: Optimizer, taken: bool) -> None:
        """Keeps what was measured if the step was taken; the last leaf of the optimizer has the zeros allocated."""
        found = self._pending.pop(id(leaf), None)
        if taken:
            if found is not None:
                optimizer.state[leaf.weight].update({SENSITIVITY: found[0], UNCERTAINTY: found[1]})
                self._scores[id(leaf)] = (found[0] * found[1]).mean().cpu()
            if leaf.size is not None:
                leaf.progress += 1
            if leaf is self._last_of(optimizer):
                self._allocate()

    def _last_of(self, optimizer: Optimizer) -> Points | None:
        leaves = {id(leaf.weight): leaf for pair in self.modules for leaf in pair}
        owned = [p for group in optimizer.param_groups for p in group["params"] if id(p) in leaves]
        return leaves[id(owned[-1])] if owned else None

    def _allocate(self) -> None:
        step = max(int(outputs.progress) for outputs, _ in self.modules)
        if step > self.total:
            return
        none = torch.zeros(())
        scores = torch.stack(
            [sum((self._scores.get(id(leaf), none) for leaf in pair), start=none) for pair in self.modules]
        )
        sizes = torch.tensor([outputs.size for outputs, _ in self.modules])
        budget = (1 - sparsity_at(step, self.total, self.target)) * float(sizes.sum())
        for (outputs, _), kept in zip(self.modules, allocate(scores, sizes, budget).tolist(), strict=True):
            outputs.kept.fill_(kept)
