"""Layer sampling: in each interval of steps, a few blocks are trained and all others are frozen (LISA, HFT).

    step s:  trained = always + draw(seed, s // every)

LISA draws whole blocks, HFT half of the matrices of each kind in each block. There is no adapter: what is trained are
the model's own parameters. They all require gradients whenever an optimizer may be built. A training forward freezes
those that the draw leaves out, and the optimizer step that follows thaws them again.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

from peft import PeftModel
from torch import is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer

from ..core import listen_to_steps, owners_of, stop_listening
from .units import OUTSIDE, Candidates, Slot, Unit, find_candidates, tied_across


STEP = "layer_sampling_step"  # in the optimizer's group, so that a checkpoint of a training has it
_sampled: weakref.WeakKeyDictionary[nn.Module, LayerSampling] = weakref.WeakKeyDictionary()


def layer_sampling(
    model: nn.Module,
    blocks: int | None = None,
    every: int = 20,
    always: Sequence[str] = OUTSIDE,
    reset_state: bool = True,
    unit: str = "block",
    share: float | None = None,
    seed: int = 0,
) -> LayerSampling:
    """Trains a few blocks of `model` at a time; over a training, all of them get their turn.

    Only parameters that require a gradient at the call take part: all of a plain model (LISA, HFT), or an adapter's.
    Works with `Trainer`, TRL's trainers and a bare loop, and needs nothing more than this call. It may come before or
    after the optimizer is built, as long as the optimizer holds all parameters that take part.

    The draws follow from `seed` and the step alone, so they are the same in all processes. The step is kept in the
    optimizer's parameter group: a training that is resumed from a checkpoint, with the same arguments here, goes on
    within its interval.

    Args:
        model: A model of a known architecture, with adapters on it or not.
        blocks: How many blocks are trained at a time; `None`: 2. For `unit="block"` only.
        every: Optimizer steps until the next draw.
        always: What is trained all the time outside of the blocks: some of "embeddings" (with all else that comes
            before the blocks), "norm" and "head" (with all else that comes after them). The rest is frozen for good.
        reset_state: Frees the optimizer state of parameters that are frozen. Otherwise they find their state again at
            their next turn, and the memory becomes that of full fine-tuning.
        unit: "block", or "matrix": modules within each block, a share of each category (attention, feed-forward,
            norms) of it.
        share: Which part of the modules is trained at a time; `None`: 0.5. For `unit="matrix"` only.
        seed: Of the draws.

    Returns:
        What tells which parameters are trained when, and ends the sampling by `close()`.

    Raises:
        ValueError: A field is out of range, the model's blocks are not known, or the model is sampled already. At the
            first step: no optimizer holds the parameters. At a forward: others require gradients than at the call, as
            after `set_adapter`.
        TypeError: `model` is no module, or a number is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}: give the model whose layers are to be sampled.")
    for field, value in (("blocks", 2 if blocks is None else blocks), ("every", every), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"`{field}` must be a whole number, not {value!r}.")
    if share is not None and (isinstance(share, bool) or not isinstance(share, Real)):
        raise TypeError(f"`share` must be a number above 0 and at most 1, not {share!r}.")
    if unit not in ("block", "matrix"):
        raise ValueError(f"`unit` must be 'block' or 'matrix', not {unit!r}.")
    if unit == "block" and share is not None:
        raise ValueError(f"`share` ({share}) is for `unit='matrix'`; say how many `blocks` for whole blocks.")
    if unit == "matrix" and blocks is not None:
        raise ValueError(f"`blocks` ({blocks}) is for `unit='block'`; give a `share` for matrices.")
    if every < 1:
        raise ValueError(f"`every` must be at least 1 step, not {every}.")
    if not isinstance(always, (str, bytes)) and isinstance(always, Iterable):
        always = tuple(always)  # read more than once
    if not isinstance(always, tuple) or not all(place in OUTSIDE for place in always):
        raise ValueError(f"`always` must be a sequence with some of {', '.join(OUTSIDE)}, not {always!r}.")
    if model in _sampled:
        raise ValueError(f"The layers of this {type(model).__name__} are sampled already: `close()` that one first.")
    candidates = find_candidates(model, by_matrix=unit == "matrix")
    if tied := tied_across(candidates, model, always):
        raise ValueError(
            f"{', '.join(tied)} is embeddings and head at once (tied): name both in `always`, or neither."
        )
    if unit == "block":
        draw = _blocks(candidates, 2 if blocks is None else blocks, seed)
    else:
        draw = _matrices(candidates, 0.5 if share is None else share, seed)
    _sampled[model] = LayerSampling(model, candidates, draw, every, always, reset_state)
    return _sampled[model]


class LayerSampling:
    """A model whose layers are sampled; made by [`layer_sampling`]."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        draw: Callable[[int], list[Unit]],
        every: int,
        always: Sequence[str],
        reset_state: bool,
    ) -> None:
        self._draw, self._every, self._reset_state = draw, every, reset_state
        self._model = weakref.ref(model)
        self._unused = [slot for place in OUTSIDE if place not in always for slot in candidates.outside[place]]
        unused = set(self._unused)
        self._slots = [slot for slot in candidates.slots if slot not in unused]
        self._always = [slot for place in OUTSIDE if place in always for slot in candidates.outside[place]]
        self._anchor = self._slots[-1]  # the parameter by which the optimizer is known
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._owners: list[weakref.ref[Optimizer]] = []
        self._step, self._interval = 0, -1
        self._frozen: set[Slot] = set()
        self._was_run = False  # a training forward waits for a step
        _freeze(self._unused)
        self._handles = [model.register_forward_pre_hook(_Hook(self._before_forward))]
        for module, slots in candidates.holders:
            self._handles.append(module.register_forward_pre_hook(_Hook(partial(self._before_module, slots))))
        listen_to_steps(self)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter by which the optimizer is known."""
        return self._anchor.parameter

    @property
    def step(self) -> int:
        """How many steps the optimizer has taken, or had when it was last there."""
        if (group := self._group()) is not None:
            self._step = group.get(STEP, 0)
        return self._step

    def units_at(self, step: int) -> list[str]:
        """The names of the blocks, or of the modules, that are trained in this optimizer step, the first being 0."""
        return [unit.name for unit in self._draw(step // self._every)]

    def parameters_at(self, step: int) -> list[str]:
        """The names of all parameters that are trained in this step, without those of PEFT's wrappers."""
        return [slot.name for slot in self._trained(step // self._every)]

    def close(self) -> None:
        """Ends the sampling: from now on all parameters that took part are trained."""
        for handle in self._handles:
            handle.remove()
        stop_listening(self)
        self._thaw()
        for slot in self._unused if self._is_trained_on() else []:
            slot.parameter.requires_grad_(True)
        if (model := self._model()) is not None:
            _sampled.pop(model, None)

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Of a training that began unseen, or whose forward went past the model, only the draw's gradients count.

        If the forward was made by the draw of another optimizer, which a training before has left, that draw's do: there
        are no others.
        """
        interval = self._interval if self._frozen else group.get(STEP, 0) // self._every
        if optimizer is not self._optimizer():
            self._take(optimizer)
        if not closure:
            for slot in self._left_out(interval):
                slot.parameter.grad = None
        self._was_run = False

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts, and thaws, so that whoever looks between two steps finds all parameters trainable."""
        if taken:
            group[STEP] = self._step = group.get(STEP, 0) + 1
        self._thaw()

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Raises if this is the step for which a forward was made."""
        if self._was_run and self._group() is None:
            self._find()
            if self._group() is None:
                raise ValueError(
                    f"{type(optimizer).__name__} makes a step, but no optimizer holds the parameters that layer sampling "
                    f"is to train ({self._anchor.name}, ...). Were they frozen afterwards, as `get_peft_model` does? "
                    "Then call `layer_sampling` after that. Optimizers that hold flattened copies of the parameters "
                    "(DeepSpeed ZeRO) cannot be used with it."
                )

    def _before_forward(self) -> None:
        _freeze(self._unused)  # PEFT thaws all of an adapter at the end of `disable_adapter`
        if (group := self._group()) is None:
            self._find()
            if (group := self._group()) is None:
                self._was_run = True
                return  # no optimizer is built yet, and when it is, it must find all parameters trainable
        self._check_trainable()
        self._was_run = True
        interval = group.get(STEP, 0) // self._every
        left_out = self._left_out(interval)
        if interval != self._interval:
            self._drop(left_out)
            self._interval = interval
        self._frozen |= {slot for slot in left_out if slot.parameter.requires_grad}
        _freeze(left_out)

    def _before_module(self, slots: list[Slot]) -> None:
        """Freezes again what PEFT has thawed since the forward, for a block that is computed anew in the backward."""
        if self._frozen and not is_compiling():
            _freeze(slot for slot in slots if slot in self._frozen)

    def _trained(self, interval: int) -> list[Slot]:
        return self._always + [slot for unit in self._draw(interval) for slot in unit.slots]

    def _left_out(self, interval: int) -> list[Slot]:
        trained = set(self._trained(interval))
        return [slot for slot in self._slots if slot not in trained]

    def _drop(self, slots: list[Slot]) -> None:
        """Frees what frozen parameters hold: gradients, which an accumulation may have left, and optimizer state."""
        for slot in slots:
            slot.parameter.grad = None
            for owner in self._owners if self._reset_state else []:
                if (optimizer := owner()) is not None:
                    optimizer.state.pop(slot.parameter, None)

    def _thaw(self) -> None:
        for slot in self._frozen if self._is_trained_on() else []:
            slot.parameter.requires_grad_(True)
        self._frozen = set()

    def _is_trained_on(self) -> bool:
        """Whether what is drawn is trainable still, and not of an adapter that is active no more."""
        return any(slot.parameter.requires_grad for slot in self._slots if slot not in self._frozen)

    def _check_trainable(self) -> None:
        """Raises if others require gradients than when the sampling began: they would be trained without a draw."""
        model: Any = self._model()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        known = {id(slot.parameter) for slot in self._slots}
        lost = [slot.name for slot in self._slots if not slot.parameter.requires_grad and slot not in self._frozen]
        more = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in known]
        if lost or more:
            found = f"{lost[0]} is frozen" if lost else f"{more[0]} is trainable, too"
            raise ValueError(
                f"Layer sampling draws from the {len(known)} parameters that required gradients when it was called, and "
                f"now {found}. After `set_adapter`, or after freezing or thawing by hand, call `close()` and "
                "`layer_sampling` again."
            )

    def _group(self) -> dict[str, Any] | None:
        """The optimizer's group that counts the steps, if there is an optimizer yet."""
        if (optimizer := self._optimizer()) is None:
            return None
        weight, groups = self.weight, optimizer.param_groups
        return next((group for group in groups if any(weight is owned for owned in group["params"])), None)

    def _find(self) -> None:
        """Looks for an optimizer."""
        owners = owners_of([slot.parameter for slot in self._slots])
        for slot, owner in zip(self._slots, owners, strict=True):
            if owner is not None:
                self._anchor = slot
                self._take(owner)
                break

    def _take(self, optimizer: Optimizer) -> None:
        """Goes on with an optimizer that was not known before.

        Raises:
            ValueError: It, and others that there are, miss some parameters.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        others = [slot for slot in self._slots if id(slot.parameter) not in held]
        found = owners_of([slot.parameter for slot in others]) if others else []
        missing = [slot.name for slot, owner in zip(others, found, strict=True) if owner is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._slots)} parameters that layer sampling is to train are in no optimizer, "
                f"{missing[0]} for one, so they would never train. Build the optimizer while all of them require "
                "gradients, or freeze those that are not to be trained before `layer_sampling`."
            )
        owners = {id(owner): owner for owner in [optimizer, *found] if owner is not None}
        self._owners = [weakref.ref(owner) for owner in owners.values()]
        self._optimizer = self._owners[0]
        self._interval = -1


class _Hook:
    """What a module calls before a training forward. Those of a copied or pickled model call nothing: it is not sampled."""

    def __init__(self, call: Callable[[], None] | None = None) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.call is not None and module.training and is_grad_enabled():
            self.call()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _freeze(slots: Iterable[Slot]) -> None:
    for slot in slots:
        slot.parameter.requires_grad_(False)


def _blocks(candidates: Candidates, number: int, seed: int) -> Callable[[int], list[Unit]]:
    blocks = [unit for block in candidates.units for units in block.values() for unit in units]
    if not 1 <= number <= len(blocks):
        raise ValueError(f"`blocks` must be between 1 and {len(blocks)}, the model's blocks, not {number}.")
    return lambda interval: [
        blocks[index] for index in sorted(_random(seed, interval).sample(range(len(blocks)), number))
    ]


def _matrices(candidates: Candidates, share: float, seed: int) -> Callable[[int], list[Unit]]:
    """Of three modules a half is one or two, by turns over the blocks: the sum is rounded, not each."""
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, not {share}.")
    plan: list[tuple[list[Unit], int]] = []
    sums: dict[str, float] = {}
    for block in candidates.units:
        for category, units in block.items():
            before = sums.get(category, 0.0)
            sums[category] = before + share * len(units)
            plan.append((units, int(sums[category] + 1e-9) - int(before + 1e-9)))
    if not any(number for _, number in plan):
        raise ValueError(f"A `share` of {share} is less than one module of any category of this model.")

    def draw(interval: int) -> list[Unit]:
        generator = _random(seed, interval)
        chosen = [(units, sorted(generator.sample(range(len(units)), number))) for units, number in plan]
        return [units[index] for units, indices in chosen for index in indices]

    return draw


def _random(seed: int, interval: int) -> random.Random:
    return random.Random(f"layer sampling, seed {seed}, interval {interval}")  # a text's hash is the same everywhere
