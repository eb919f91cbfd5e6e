r"""SpIEL: drop and regrow (Ansell et al. 2024, arXiv:2401.16405), driven by the steps of whatever optimizer is used.

Reselection happens after updates A, R + A, 2R + A, ... (R `reselection_steps`, A `accumulation_steps`). It drops the
n = int(k p) values of least magnitude and grows as many indices, where p = 1 at the first one and
p = rate * (1 - t / T) at step t of T afterwards (`"linear"`), or p = rate * (1 + cos(pi t / T)) / 2 (`"cosine"`).

**AG**, accumulated gradients. Gathering begins with update 1, R, 2R, ...: the first micro-batch sees the gradient of
the whole weight and names the k candidates of largest magnitude; from then on only their gradients are summed. Those
of largest |sum g| that are not in the support grow. A place that is both dropped and grown keeps value and moments.
A grown one starts at value 0 with the moments that it would have if its gradients had been seen,

    m = mean(g) (1 - b1^t),    v = mean(g^2) (1 - b2^t)    so that, bias-corrected, m = mean(g) and v = mean(g^2).

**MA**, momentum approximation. The values are updated by SM3 with one accumulator a row r and one a column c,

    nu_ij = min(r_i, c_j) + g_ij^2,           value_ij = (value_ij - lr g_ij / sqrt(nu_ij + 1e-8)) (1 - lr decay),
    r_i = max(r_i, max_j nu_ij),              c_j = max(c_j, max_i nu_ij),

the maxima over the support, so that accumulators never fall, and the indices outside it of largest r_i c_j grow. The
learning rate and the weight decay are those of the optimizer that owns the values; its own update is left out.

**With `spread`**, AG's candidates, and the indices that MA grows, are drawn with chances in proportion to |g|^(1/spread)
and (r_i c_j)^(1/spread), instead of being the largest. What is dropped, and which of the candidates grow, stays as it is.

**Where this differs from the published code, and why.** Per-element ages are one step count per tensor, that of the
optimizer, so that any optimizer will do; with the seeds above no age is off by one. Sums are of the gradients of whole
optimizer steps, unscaled and clipped like the optimizer's own, and not of micro-batch gradients, whose size depends on
the number of accumulation steps and whose squares are those of a smaller batch. With several processes, all take the
candidates of the first micro-batch of the first one that has used the module, and the mean of their gradients from the
second step on, so that all hold the same support; the published code lets them drift apart. A step that a gradient scaler skips counts for
nothing. Nothing is gathered for a reselection that will not come. The first reselection replaces everything only if
the values were zero when the run began: an adapter that is trained further keeps what it has learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.optim import Optimizer

from ...core import stable_generator
from ...core.sharding import is_sharded, owned_weight, put, whole, world_size
from ...sparse import Gradient, drawn_keys, is_in, top_indices
from .optimizer_state import PER_VALUE, SPLIT, STATE, movable_state, seeds_of
from .tracker import Tracker, warn_once


if TYPE_CHECKING:
    from ...delta import SparseDelta


class SpielTracker(Tracker):
    """The schedule of reselections."""

    def next_reselection(self) -> int:
        """The number of steps after which the next reselection comes."""
        first, interval = self.config.accumulation_steps, self.config.reselection_steps
        return first if self.step < first else first + interval * ((self.step - first) // interval + 1)

    def rate_at(self, step: int) -> float:
        """The fraction that a reselection after so many steps replaces; 0 if there is none."""
        config = self.config
        total = config.steps
        if total is not None and step > total:
            return 0.0
        if step == config.accumulation_steps and config.reselection_policy == "linear" and self.fresh:
            return 1.0
        if total is None:
            return config.reselection_rate
        if config.reselection_policy == "linear":
            return config.reselection_rate * (1 - step / total)
        return config.reselection_rate * (1 + math.cos(math.pi * step / total)) / 2

    def number_at(self, k: int, step: int) -> int:
        """How many of k values a reselection after so many steps drops."""
        return int(k * self.rate_at(step))

    def is_gathering(self, k: int) -> bool:
        """Whether gradients are wanted now: from one step before the interval begins, and from the start at first."""
        due = self.next_reselection()
        begin = due - self.config.accumulation_steps
        return self.step >= max(0, begin - 1) and self.number_at(k, due) > 0

    def _drawing(self, leaf: SparseDelta) -> Callable[[torch.Tensor, int, int], torch.Tensor] | None:
        """Turns scores into those whose largest are a draw; `None` without `spread`.

        The numbers follow from the seed, the module and the step, so that they are the same in all processes, and after
        a training was resumed.
        """
        if not self.config.spread:
            return None
        generator = stable_generator(self.config.seed, f"{self.name} {self.step}")
        if leaf.weight.device.type == "cuda":  # as many numbers as the weight has entries
            generator = torch.Generator(leaf.weight.device).manual_seed(generator.initial_seed())
        return lambda scores, start, stop: drawn_keys(scores, 1 / self.config.spread, generator)

    def miss_total_steps(self) -> None:
        """Says that the replaced fraction will not fall."""
        warn_once(
            self.said,
            "total_steps",
            "SparseFTConfig.total_steps is not set, so every reselection replaces the same fraction of the "
            f"support ({self.config.reselection_rate}) up to the end. Set it to the number of optimizer steps, or "
            "pass `callbacks=[peft_ext.SparseFTCallback()]` to the Trainer.",
        )


class AgTracker(SpielTracker):
    """The accumulated gradients of the candidates."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._backwards_before = 0  # backwards seen up to the last reselection
        self._clear()

    def _clear(self) -> None:
        self.candidates: torch.Tensor | None = None  # flat indices, sorted
        self.sums: torch.Tensor | None = None  # of g over the steps of this phase
        self.square_sums: torch.Tensor | None = None
        self.count = 0  # steps in the sums
        self._discard_step()

    def _discard_step(self) -> None:
        """Forgets the step that is under way; if it was the first of a phase, the next one names the candidates."""
        self._pending: torch.Tensor | None = None  # g of the candidates, summed over this step's micro-batches
        self._raw: torch.Tensor | None = None  # the same for the values in the support
        self._measured: torch.Tensor | None = None
        self._closure = False
        self._backward = -1  # the last one seen; a shared module is seen more than once in the same
        if self.count == 0:
            self.candidates = None

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """Names the candidates if there are none yet, and adds to their gradients."""
        super().observe(leaf, gradient, values)
        k = leaf.k
        if not self.is_gathering(k):
            return
        backward = torch._C._current_graph_task_id()
        # a step that a gradient scaler (or the user) skipped never got here, but its gradient was thrown away
        if self._pending is not None and backward != self._backward and _was_thrown_away(leaf, self._raw):
            self._discard_step()
        self._backward = backward
        if self.candidates is None:
            self.candidates = self._name_candidates(leaf, gradient)
        found = gradient.at(self.candidates)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        self._pending = found if self._pending is None else self._pending + found
        self._raw = values.clone() if self._raw is None else self._raw + values

    def _resume(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        # an optimizer is new to us at its first step: what that step's backward has named and gathered is still right
        under_way = (self.candidates, self._pending, self._raw, self._backward) if self.count == 0 else None
        super()._resume(leaf, optimizer)
        if under_way is not None and self.count == 0 and self.is_gathering(leaf.k):
            self.candidates, self._pending, self._raw, self._backward = under_way

    def _name_candidates(self, leaf: SparseDelta, gradient: Gradient) -> torch.Tensor:
        """The indices, sorted, whose gradients are gathered from now on."""
        return gradient.top_indices(leaf.k, self._drawing(leaf))

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Takes the step's gradients while nothing has changed them any more."""
        super().before_step(leaf, optimizer, group, closure)
        self._closure = closure
        if not closure:
            self._measure(leaf, optimizer)

    @torch.no_grad()
    def _measure(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        """The candidates' gradients as the optimizer sees gradients: averaged, unscaled, clipped."""
        if self.is_gathering(leaf.k):
            self._share(leaf)
        grad = None if leaf.weight.grad is None else whole(leaf.weight.grad)
        if self._pending is None or self._raw is None or grad is None:
            return
        if is_sharded(leaf.weight) and not bool(self._raw.isfinite().all()):
            self._discard_step()  # what a skipped step has left, which could not be told in the backward
            return
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            grad = grad / scale
        # what scaling and clipping have done to the values' own gradient they would have done to the candidates'
        raw = self._raw.to(grad.dtype)
        # in tensors, for a device would be waited for at every number that is looked at
        norm = raw.square().sum()
        factor = torch.where(norm > 0, (raw * grad).sum() / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)
        # no number, where a gradient overflowed, changes nothing: such a step is skipped
        self._measured = self._pending * torch.where((factor - 1).abs() > 1e-5, factor, 1.0)

    def _share(self, leaf: SparseDelta) -> None:
        """Makes all processes that train together hold the same candidates and gradients.

        All take part, also those whose batches did not reach the module, or the others would wait for ever.
        """
        world = world_size()
        if world == 1:
            return
        k, device, rank = leaf.k, leaf.weight.device, distributed.get_rank()
        counts = torch.tensor([0 if self._pending is None else len(self._pending)], device=device)
        every = [torch.zeros_like(counts) for _ in range(world)]
        distributed.all_gather(every, counts)
        using = [process for process, count in enumerate(every) if int(count)]
        if not using:
            return
        length = int(every[using[0]])
        if self._pending is None or self._raw is None:
            self._raw = torch.zeros(k, device=device)
            self._pending = torch.zeros(length, device=device)
        if self.count == 0:
            if rank != using[0]:
                self.candidates = torch.zeros(length, dtype=torch.long, device=device)
                self._pending = torch.zeros(length, dtype=self._pending.dtype, device=device)
            assert self.candidates is not None
            self.candidates, self._pending = self.candidates.long().contiguous(), self._pending.contiguous()
            distributed.broadcast(self.candidates, src=using[0])
            distributed.broadcast(self._pending, src=using[0])
        else:
            distributed.all_reduce(self._pending)
            self._pending /= world
        self._raw = self._raw.contiguous()
        distributed.all_reduce(self._raw)
        self._raw /= world

    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts the step, and moves the support and the optimizer's state if it is time."""
        if taken and self._closure:  # the step computed its gradients itself
            self._measure(leaf, optimizer)
        self._closure = False
        if leaf.weight.grad is None or not taken:
            self._discard_step()
            # not before the optimizer has made its own state, which some do only where there is none yet
            if leaf.weight.grad is not None and f"{STATE}step" not in optimizer.state.get(leaf.weight, {}):
                self._store(leaf, optimizer)
            return
        if self.step == 0:
            movable_state(
                optimizer, optimizer.state.get(leaf.weight, {}), leaf.weight
            )  # or an error, while it is time
        due = self.next_reselection()
        self.step += 1
        if self._measured is not None:
            self.sums = self._measured if self.sums is None else self.sums + self._measured
            squares = self._measured.square()
            self.square_sums = squares if self.square_sums is None else self.square_sums + squares
            self.count += 1
        self._discard_step()
        number = self.number_at(leaf.k, due)
        if self.step == due:
            if number and self.candidates is not None:
                self._reselect(leaf, optimizer, group, number)
            elif number and self.backwards == self._backwards_before:
                warn_once(
                    self.said,
                    "compiled",
                    "SpIEL has seen no gradient of the adapted weights, so the support stays where it is: inside "
                    "`torch.compile` the backward is not observed. Train without compiling.",
                )
            self._clear()
            self._backwards_before = self.backwards
        self._store(leaf, optimizer)

    def _tensors(self, leaf: SparseDelta) -> dict[str, torch.Tensor | int]:
        sums = torch.zeros(4, leaf.k, dtype=leaf.weight.dtype, device=leaf.weight.device)
        if self.count and self.candidates is not None and self.sums is not None and self.square_sums is not None:
            parts = (self.candidates // SPLIT, self.candidates % SPLIT, self.sums, self.square_sums)
            for row, part in zip(sums, parts, strict=True):
                row[: len(part)] = part
        found = len(self.candidates) if self.count and self.candidates is not None else 0
        return {"sums": sums, "found": found, "count": self.count}

    def _load(self, leaf: SparseDelta, state: dict[str, Any]) -> None:
        self._clear()
        self.count, found = int(state[f"{STATE}count"]), int(state[f"{STATE}found"])
        if self.count:
            upper, lower, self.sums, self.square_sums = state[f"{STATE}sums"][:, :found].clone()
            self.candidates = upper.long() * SPLIT + lower.long()

    @torch.no_grad()
    def _reselect(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], number: int) -> None:
        assert self.candidates is not None and self.sums is not None and self.square_sums is not None
        indices = leaf.indices().long()
        # smallest first; stable, so that all processes drop the same
        leaving = whole(leaf.weight).abs().sort(stable=True).indices[:number]
        stays = torch.ones_like(indices, dtype=torch.bool)
        stays[leaving] = False
        pool = (~is_in(self.candidates, indices[stays])).nonzero().squeeze(1)
        best = self.sums[pool].abs().sort(descending=True, stable=True).indices[:number]
        chosen = pool[best].sort().values
        places = self.candidates[chosen]
        new = ~is_in(places, indices)  # the others are dropped and grown at once, and so left as they are
        leaving = leaving[~is_in(indices[leaving], places)][: int(new.sum())]
        chosen, places = chosen[new], places[new]
        mean, mean_square = self.sums[chosen] / self.count, self.square_sums[chosen] / self.count
        state = optimizer.state.get(leaf.weight, {})
        self._move(leaf, optimizer, leaving, places, seeds_of(group, state, mean, mean_square, self.count))


def _was_thrown_away(leaf: SparseDelta, raw: torch.Tensor | None) -> bool:
    """Whether the gradient of the micro-batches before this one is gone, though no step was made.

    Of a sharded leaf that cannot be told here, in the middle of a backward: its gradient may be elsewhere until it is
    reduced.
    """
    if is_sharded(owned_weight(leaf)):
        return False
    grad = leaf.weight.grad if leaf.weight.is_leaf else None  # under FSDP1 it may be a view
    return grad is None or (raw is not None and not grad.any() and bool(raw.any()))


class MaTracker(SpielTracker):
    """SM3's row and column accumulators, which make the updates and say where to grow."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._clear()
        self._grad: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Takes the gradient away, so that the optimizer leaves the values to SM3."""
        super().before_step(leaf, optimizer, group, closure)
        if closure:
            raise ValueError(
                "selection='spiel-ma' makes its own update and does not work with `optimizer.step(closure)`: call "
                "`loss.backward()` and then `optimizer.step()`, or use selection='spiel-ag'."
            )
        self._grad, leaf.weight.grad = leaf.weight.grad, None
        scale = getattr(optimizer, "grad_scale", None)
        self._scale = scale.clone() if scale is not None else None

    @torch.no_grad()
    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Makes the update, counts the step, and moves the support if it is time."""
        grad, self._grad = self._grad, None
        leaf.weight.grad = grad
        if not taken:
            state = optimizer.state[leaf.weight]
            for key in PER_VALUE & state.keys():  # made by a step that only makes state, and never to be moved
                del state[key]
            if f"{STATE}step" not in state:
                self._store(leaf, optimizer)
            return
        if grad is None:
            return
        if self._scale is not None:
            grad = grad / self._scale
        if group.get("maximize"):
            grad = -grad
        self._update(leaf, whole(grad), group)
        due = self.next_reselection()
        self.step += 1
        number = self.number_at(leaf.k, due)
        if self.step == due and number:
            self._reselect(leaf, optimizer, number)
        self._store(leaf, optimizer)
        # Adam and its kin look for it when their state is loaded; they themselves never step these values
        optimizer.state[leaf.weight].setdefault("step", torch.zeros(()))

    def _clear(self) -> None:
        self.rows: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None

    def _tensors(self, leaf: SparseDelta) -> dict[str, torch.Tensor | int]:
        rows, columns = self._accumulators(leaf)
        return {"rows": rows, "columns": columns}

    def _load(self, leaf: SparseDelta, state: dict[str, Any]) -> None:
        self.rows, self.columns = state[f"{STATE}rows"], state[f"{STATE}columns"]

    def _accumulators(self, leaf: SparseDelta) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows is None or self.columns is None:
            height = self.op.shape[0]
            self.rows = torch.zeros(height, dtype=leaf.weight.dtype, device=leaf.weight.device)
            self.columns = self.rows.new_zeros(self.op.n // height)
        return self.rows, self.columns

    def _update(self, leaf: SparseDelta, grad: torch.Tensor, group: dict[str, Any]) -> None:
        rows, columns = self._accumulators(leaf)
        indices = leaf.indices().long()
        row, column = indices // len(columns), indices % len(columns)
        nu = torch.minimum(rows[row], columns[column]) + grad.square()
        rows.scatter_reduce_(0, row, nu, "amax")  # running maxima: what has left the support still counts
        columns.scatter_reduce_(0, column, nu, "amax")
        values = whole(leaf.weight) - group["lr"] * grad / (nu + 1e-8).sqrt()
        put(leaf.weight, values * (1 - group["lr"] * group.get("weight_decay", 0.0)))

    def _reselect(self, leaf: SparseDelta, optimizer: Optimizer, number: int) -> None:
        rows, columns = self._accumulators(leaf)
        indices = leaf.indices().long()
        drawing = self._drawing(leaf)

        def scores(start: int, stop: int) -> torch.Tensor:
            first, last = start // len(columns), -(-stop // len(columns))
            block = torch.outer(rows[first:last], columns).view(-1)
            offset = first * len(columns)
            block = block[start - offset : stop - offset]
            inside = indices[torch.searchsorted(indices, start) : torch.searchsorted(indices, stop)] - start
            block = block.index_fill_(0, inside, -1.0)
            return block if drawing is None else drawing(block, start, stop)

        grown = top_indices(scores, self.op.n, number)
        leaving = whole(leaf.weight).abs().sort(stable=True).indices[: len(grown)]
        self._move(leaf, optimizer, leaving, grown, {})
