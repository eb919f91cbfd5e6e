r"""SpIEL: drop and regrow (Ansell et al. 2024, arXiv:2401.16405), driven by the steps of whatever optimizer is used.

Reselection happens after updates A, R + A, 2R + A, ... (R `reselection_steps`, A `accumulation_steps`). It drops the
n = int(k p) values of least magnitude and grows as many places, where p = 1 at the first one and
p = rate * (1 - t / T) at step t of T afterwards (`"linear"`), or p = rate * (1 + cos(pi t / T)) / 2 (`"cosine"`).

**AG**, accumulated gradients. Gathering begins with update 1, R, 2R, ...: the first micro-batch sees the gradient of
the whole weight and names the k candidates of largest magnitude; from then on only their gradients are summed. Those
of largest |sum g| that are not in the support grow. A place that is both dropped and grown keeps value and moments.
A grown one starts at value 0 with the moments that it would have if its gradients had been seen,

    m = mean(g) (1 - b1^t),    v = mean(g^2) (1 - b2^t)    so that, bias-corrected, m = mean(g) and v = mean(g^2).

**MA**, momentum approximation. The values are updated by SM3 with one accumulator a row r and one a column c,

    nu_ij = min(r_i, c_j) + g_ij^2,  value_ij -= lr g_ij / sqrt(nu_ij + 1e-8),  r_i = max_j nu_ij,  c_j = max_i nu_ij,

the maxima over the support, and the places outside it of largest r_i c_j grow. The learning rate, and the weight
decay, which is decoupled, are those of the optimizer that owns the values; its own update is left out.

**Where this differs from the published code, and why.** Per-element ages are one step count per tensor, that of the
optimizer, so that any optimizer will do; with the seeds above no age is off by one. Sums are of the gradients of whole
optimizer steps, unscaled and clipped like the optimizer's own, and not of micro-batch gradients, whose size depends on
the number of accumulation steps and whose squares are those of a smaller batch. With several processes, all take the
candidates of the first one's first micro-batch, and the mean of their gradients from the second step on, so that all
hold the same support; the published code lets them drift apart. A step that a gradient scaler skips counts for
nothing. Nothing is gathered for a reselection that will not come. The first reselection replaces everything only if
the values were zero when the run began: an adapter that is trained further keeps what it has learnt.
"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.optim import Optimizer

from ...core.schedule import optimizer_of
from ...sparse import Gradient, Operation, is_in, top_indices
from .config import SparseFTConfig


if TYPE_CHECKING:
    from ...delta import SparseDelta

STATE = "sparse_ft_"  # what is kept in the optimizer's state, so that a checkpoint of a training has it
SPLIT = 4096  # places are kept there as two floats, for optimizers cast their state to the parameters' type
FOREIGN_STEPS = 8  # of an optimizer that does not own the values, before that is called an error

_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """A warning that is raised once per process, however many layers have the same to say."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)


class Tracker:
    """Where one delta stands in its schedule. The base of both variants; `AgTracker` and `MaTracker` fill it in."""

    def __init__(self, config: SparseFTConfig, op: Operation) -> None:
        self.config = config
        self.op = op
        self.step = 0  # optimizer steps that moved the values
        self.reselections: list[tuple[int, int]] = []  # (step, places that changed)
        self.backwards = 0
        self.fresh = True  # the values were all zero when the run began
        self._foreign = 0
        self._searched = False
        self._optimizer: weakref.ref[Optimizer] | None = None

    @staticmethod
    def of(config: SparseFTConfig, op: Operation | None) -> Tracker:
        """The tracker for the config's selection."""
        assert op is not None
        return AgTracker(config, op) if config.selection == "spiel-ag" else MaTracker(config, op)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_searched": False}

    # The schedule

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

    # Events

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """One backward through the layer: the gradient of its weight, and of the values."""
        self.backwards += 1
        if self._searched:
            return
        self._searched = True
        self.fresh = not bool(leaf.weight.detach().any())
        optimizer = optimizer_of(leaf.weight)
        if optimizer is not None:
            self._resume(leaf, optimizer)

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """An optimizer that owns the values is about to step."""
        self._foreign = 0
        known = self._optimizer() if self._optimizer is not None else None
        if (
            known is None or known.state is not optimizer.state
        ):  # accelerate's wrapper shares the state of the real one
            self._resume(leaf, optimizer)
        if self.config.steps is None:
            warn_once(
                "total_steps",
                "SparseFTConfig.total_steps is not set, so every reselection replaces the same fraction of the "
                f"support ({self.config.reselection_rate}) up to the end. Set it to the number of optimizer steps, or "
                "pass `callbacks=[peft_ext.SparseFTCallback()]` to the Trainer.",
            )

    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """The optimizer has stepped."""
        raise NotImplementedError

    def foreign_step(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        """An optimizer that does not own the values steps: if none ever does, that is an error."""
        if self._optimizer is not None or leaf.weight.grad is None or not leaf.weight.requires_grad:
            return
        self._foreign += 1
        idle = not any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if (idle or self._foreign >= FOREIGN_STEPS) and optimizer_of(leaf.weight) is None:
            raise ValueError(
                f"{type(optimizer).__name__} makes steps, but does not own the values of the sparse adapter, which "
                "have gradients: it was made before the adapter was put on the model, or holds flattened copies of "
                "the parameters (DeepSpeed, FSDP without `use_orig_params`). Make the optimizer from "
                "`model.parameters()` after `get_peft_model`."
            )

    # What a checkpoint of a training holds

    def _resume(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        state = optimizer.state.get(leaf.weight, {})
        if f"{STATE}step" not in state:
            if self.step:  # another optimizer without a past: another run
                self.step, self.fresh = 0, False
                self._clear()
        else:
            self.step = int(state[f"{STATE}step"])
            self.fresh = bool(state[f"{STATE}fresh"])
            self.reselections = [
                (int(step), int(moved)) for step, moved in state.get(f"{STATE}reselections", torch.zeros(0, 2))
            ]
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _clear(self) -> None:
        """Forgets what was gathered."""
        raise NotImplementedError

    def _store(self, leaf: SparseDelta, optimizer: Optimizer, **tensors: Any) -> None:
        state = optimizer.state[leaf.weight]
        for key in [key for key in state if key.startswith(STATE)]:
            del state[key]
        state[f"{STATE}step"] = self.step
        state[f"{STATE}fresh"] = int(self.fresh)
        state[f"{STATE}reselections"] = torch.tensor(self.reselections, dtype=torch.float32).view(-1, 2)
        state.update({f"{STATE}{key}": value for key, value in tensors.items() if value is not None})

    # Moving the support

    def _move(
        self,
        leaf: SparseDelta,
        optimizer: Optimizer,
        dropped: torch.Tensor,
        grown: torch.Tensor,
        seeds: dict[str, torch.Tensor],
    ) -> None:
        """Puts the places `grown` where `dropped` (positions in the vector) were, and keeps the vector sorted.

        `seeds` are the optimizer's state for the grown ones, by its key; a key without one starts at zero.
        """
        indices = leaf.indices().long().clone()
        indices[dropped] = grown
        order = indices.argsort()
        weight = leaf.weight
        vectors = {"value": weight.data}
        if weight.grad is not None:
            vectors["gradient"] = weight.grad
        state = optimizer.state.get(weight, {})
        vectors |= {key: state[key] for key in movable_state(optimizer, state, weight)}
        for key, vector in vectors.items():
            moved = vector.clone() if vector.is_floating_point() else _from_8_bit(state, key)
            moved[dropped] = seeds[key].to(moved.dtype) if key in seeds else 0
            if vector.is_floating_point():
                vector.copy_(moved[order])
            else:
                _to_8_bit(state, key, moved[order])
        leaf.set_indices(indices[order])
        self.reselections.append((self.step, len(grown)))


class AgTracker(Tracker):
    """The accumulated gradients of the candidates."""

    def __init__(self, config: SparseFTConfig, op: Operation) -> None:
        super().__init__(config, op)
        self._clear()

    def _clear(self) -> None:
        self.candidates: torch.Tensor | None = None  # flat places, sorted
        self.sums: torch.Tensor | None = None  # of g over the steps of this phase
        self.square_sums: torch.Tensor | None = None
        self.count = 0  # steps in the sums
        self._discard_step()

    def _discard_step(self) -> None:
        """Forgets the step that is under way; if it was the first of a phase, the next one names the candidates."""
        self._pending: torch.Tensor | None = None  # g of the candidates, summed over this step's micro-batches
        self._raw: torch.Tensor | None = None  # the same for the values in the support
        self._measured: torch.Tensor | None = None
        self._backward = -1  # the last one seen; a shared module is seen more than once in the same
        if self.count == 0:
            self.candidates = None

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """Names the candidates if there are none yet, and adds to their gradients."""
        super().observe(leaf, gradient, values)
        k = leaf.weight.numel()
        if not self.is_gathering(k):
            return
        backward = torch._C._current_graph_task_id()
        if self._pending is not None and backward != self._backward:
            # a step that a gradient scaler (or the user) skipped never got here, but its gradient was thrown away
            grad = leaf.weight.grad
            if grad is None or (not grad.any() and bool(self._raw.any())):  # type: ignore[union-attr]
                self._discard_step()
        self._backward = backward
        if self.candidates is None:
            self.candidates = gradient.top_indices(k)
        found = gradient.at(self.candidates)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        self._pending = found if self._pending is None else self._pending + found
        self._raw = values.clone() if self._raw is None else self._raw + values

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Takes the step's gradients while nothing has changed them any more."""
        super().before_step(leaf, optimizer, group, closure)
        if not closure:
            self._measure(leaf, optimizer)

    def _measure(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        """The candidates' gradients as the optimizer sees gradients: averaged, unscaled, clipped."""
        grad = leaf.weight.grad
        if self._pending is None or self._raw is None or grad is None:
            return
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            grad = grad / scale
        self._share()
        # what scaling and clipping have done to the values' own gradient they would have done to the candidates'
        raw = self._raw.to(grad.dtype)
        if not torch.equal(raw, grad):
            norm = raw.square().sum()
            factor = (raw * grad).sum() / norm if norm > 0 else norm.new_ones(())
            if abs(float(factor) - 1) > 1e-5:
                self._pending = self._pending * factor
        self._measured = self._pending

    def _share(self) -> None:
        """Makes all processes that train together hold the same candidates and gradients."""
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        assert self._pending is not None and self._raw is not None and self.candidates is not None
        if self.count == 0:
            self._pending = self._pending.contiguous()
            distributed.broadcast(self.candidates, src=0)
            distributed.broadcast(self._pending, src=0)
        else:
            distributed.all_reduce(self._pending)
            self._pending /= distributed.get_world_size()
        distributed.all_reduce(self._raw)
        self._raw /= distributed.get_world_size()

    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts the step, and moves the support and the optimizer's state if it is time."""
        if leaf.weight.grad is None or not taken:
            self._discard_step()
            return
        if self._measured is None:  # the step computed its gradients itself
            self._measure(leaf, optimizer)
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
        number = self.number_at(leaf.weight.numel(), due)
        if self.step == due:
            if number and self.candidates is not None:
                self._reselect(leaf, optimizer, group, number)
            elif number:
                warn_once(
                    "compiled",
                    "SpIEL has seen no gradient of the adapted weights, so the support stays where it is: inside "
                    "`torch.compile` the backward is not observed. Train without compiling.",
                )
            self._clear()
        candidates = self.candidates
        if candidates is not None:
            candidates = torch.stack([candidates // SPLIT, candidates % SPLIT]).float()
        self._store(
            leaf, optimizer, candidates=candidates, sums=self.sums, square_sums=self.square_sums, count=self.count
        )

    def _load(self, state: dict[str, Any]) -> None:
        self._clear()
        candidates = state.get(f"{STATE}candidates")
        if candidates is not None:
            self.candidates = candidates[0].long() * SPLIT + candidates[1].long()
            self.sums, self.square_sums = state[f"{STATE}sums"], state[f"{STATE}square_sums"]
            self.count = int(state[f"{STATE}count"])

    @torch.no_grad()
    def _reselect(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], number: int) -> None:
        assert self.candidates is not None and self.sums is not None and self.square_sums is not None
        indices = leaf.indices().long()
        # smallest first; stable, so that all processes drop the same
        leaving = leaf.weight.data.abs().sort(stable=True).indices[:number]
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


class MaTracker(Tracker):
    """SM3's row and column accumulators, which make the updates and say where to grow."""

    def __init__(self, config: SparseFTConfig, op: Operation) -> None:
        super().__init__(config, op)
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
        if grad is None or not taken:
            return
        if self._scale is not None:
            grad = grad / self._scale
        if group.get("maximize"):
            grad = -grad
        self._update(leaf, grad, group)
        due = self.next_reselection()
        self.step += 1
        number = self.number_at(leaf.weight.numel(), due)
        if self.step == due and number:
            self._reselect(leaf, optimizer, number)
        self._store(leaf, optimizer, rows=self.rows, columns=self.columns)
        # Adam and its kin look for it when their state is loaded; they themselves never step these values
        optimizer.state[leaf.weight].setdefault("step", torch.zeros(()))

    def _clear(self) -> None:
        self.rows: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None

    def _load(self, state: dict[str, Any]) -> None:
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
        rows.scatter_reduce_(0, row, nu, "amax", include_self=False)  # rows without an active place stay as they are
        columns.scatter_reduce_(0, column, nu, "amax", include_self=False)
        leaf.weight.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
        leaf.weight.sub_(group["lr"] * grad / (nu + 1e-8).sqrt())

    def _reselect(self, leaf: SparseDelta, optimizer: Optimizer, number: int) -> None:
        rows, columns = self._accumulators(leaf)
        indices = leaf.indices().long()

        def scores(start: int, stop: int) -> torch.Tensor:
            first, last = start // len(columns), -(-stop // len(columns))
            block = torch.outer(rows[first:last], columns).view(-1)
            offset = first * len(columns)
            block = block[start - offset : stop - offset]
            inside = indices[torch.searchsorted(indices, start) : torch.searchsorted(indices, stop)] - start
            return block.index_fill_(0, inside, -1.0)

        grown = top_indices(scores, self.op.n, number)
        leaving = leaf.weight.data.abs().sort(stable=True).indices[: len(grown)]
        self._move(leaf, optimizer, leaving, grown, {})


# Optimizers: which of their state belongs to single values, and what a grown value finds there

PER_VALUE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),  # Adam, AdamW, RAdam, NAdam; transformers' Adafactor
    *("momentum_buffer", "square_avg", "grad_avg", "sum", "variance"),  # SGD, RMSprop, Adagrad, torch's Adafactor
    *("state1", "state2"),  # bitsandbytes' Adam
}
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit state


def _from_8_bit(state: dict[str, Any], key: str) -> torch.Tensor:
    """The state `state1` or `state2` of an 8-bit optimizer of bitsandbytes, in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
    return dequantize_blockwise(state[key], absmax=absmax, code=code, blocksize=BLOCK)


def _to_8_bit(state: dict[str, Any], key: str, vector: torch.Tensor) -> None:
    """Writes it back; a survivor whose neighbours have changed may be rounded once more."""
    from bitsandbytes.functional import quantize_blockwise

    quantised, scales = quantize_blockwise(vector, code=state[f"qmap{key[-1]}"], blocksize=BLOCK)
    state[key].copy_(quantised)
    state[f"absmax{key[-1]}"].copy_(scales.absmax)


def movable_state(optimizer: Optimizer, state: dict[str, Any], weight: torch.Tensor) -> list[str]:
    """The keys of the optimizer's state that hold one number for every value.

    Raises:
        ValueError: It keeps something else, which cannot be moved along with the support.
    """
    keys = []
    for key, value in state.items():
        if key.startswith(STATE) or not isinstance(value, torch.Tensor) or value.ndim == 0:
            continue
        in_8_bit = "qmap1" in state and key.startswith(("state", "qmap", "absmax"))
        if in_8_bit and not key.startswith("state"):
            continue
        if key not in PER_VALUE or value.shape != weight.shape or not (value.is_floating_point() or in_8_bit):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of {tuple(value.shape)} ({value.dtype}), which cannot be "
                "moved when the support of a sparse adapter moves. Use AdamW, Adam, SGD, RMSprop, Adagrad or "
                "Adafactor (for the Trainer, for example, `optim='adamw_torch'`), or a fixed support such as "
                "`selection='random'`."
            )
        keys.append(key)
    return keys


def seeds_of(
    group: dict[str, Any], state: dict[str, Any], mean: torch.Tensor, mean_square: torch.Tensor, count: int
) -> dict[str, torch.Tensor]:
    """The state that values would have if the gradients of this mean had been theirs for `count` steps."""
    seeds = {
        "square_avg": mean_square,  # RMSprop and Adafactor do not correct a bias
        "grad_avg": mean,
        "variance": mean_square,
        "sum": mean_square * float(state.get("step", 0)),
    }
    if "betas" in group and ("exp_avg_sq" in state or "state2" in state):
        beta1, beta2 = group["betas"][:2]
        step = float(state["step"])
        seeds["exp_avg"] = seeds["state1"] = mean * (1 - beta1**step)
        seeds["exp_avg_sq"] = seeds["max_exp_avg_sq"] = seeds["state2"] = mean_square * (1 - beta2**step)
    else:
        seeds["exp_avg_sq"] = mean_square
    momentum = group.get("momentum") or 0.0
    if momentum:
        seeds["momentum_buffer"] = mean * (1 - group.get("dampening", 0.0)) * sum(momentum**i for i in range(count))
    return seeds
