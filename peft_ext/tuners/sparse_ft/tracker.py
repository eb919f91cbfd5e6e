"""What moves the indices of a delta: where it stands in the training, what a checkpoint holds of it, and the move itself."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ...core.schedule import is_sharded, optimizer_of
from ...core.sharding import owned_weight, put, whole
from ...sparse import Gradient, Operation
from .averages import averages_of, forget, move_along, note_copy, refuse_mixture
from .config import SparseFTConfig
from .optimizer_state import STATE, from_8_bit, movable_state, to_8_bit, values_around


if TYPE_CHECKING:
    from ...delta import DeltaLayer, SparseDelta

FOREIGN_STEPS = 8  # of an optimizer that does not own the values, before that is called an error
HISTORY = 256  # moves of the support that a checkpoint remembers, a fixed number


def warn_once(said: set[str], key: str, message: str) -> None:
    """A warning that is raised once per tuner, which keeps `said`, however many layers have the same to say."""
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)


class Tracker:
    """Where one delta stands in its schedule. The base of all variants, which fill in when and where indices move."""

    def __init__(self, config: SparseFTConfig, op: Operation | None, said: set[str], name: str = "") -> None:
        self.config = config
        self._op = op
        self.name = name  # of the module
        self.said = said
        self._layer: weakref.ref[DeltaLayer] | None = None  # weak, so that a model goes with its last reference
        self.step = 0  # optimizer steps that moved the values
        self.reselections: list[tuple[int, int]] = []  # (step, indices that changed)
        self.backwards = 0
        self.fresh = True  # the values were all zero when the run began
        self._foreign = 0
        self._searched = False
        self._is_new = True  # what the values were when the run began is not known yet
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._known_state = 0  # which `optimizer.state` it was; loading one makes another

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_optimizer": None,
            "_searched": False,
            "_is_new": True,
            "_known_state": 0,
            "_layer": None,
        }

    def enter(self, layer: DeltaLayer) -> None:
        """A forward through the layer that the delta is on begins."""
        if self._layer is None or self._layer() is not layer:
            self._layer = weakref.ref(layer)

    def base_weight(self) -> torch.Tensor:
        """The weight that the delta is on."""
        layer = self._layer() if self._layer is not None else None
        assert layer is not None
        return whole(layer.get_base_weight())

    @property
    def selection(self) -> str:
        """The config's."""
        return self.config.selection

    @property
    def op(self) -> Operation:
        """The product with the weight."""
        assert self._op is not None
        return self._op

    # Events

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """One backward through the layer: the gradient of its weight, and of the values."""
        self.backwards += 1
        optimizer = self._optimizer() if self._optimizer is not None else None
        if not self._searched:
            self._searched = True
            optimizer = optimizer_of(owned_weight(leaf))
        elif self._optimizer is not None and optimizer is None:  # gone: another run begins, perhaps with this backward
            self._optimizer = None  # searched for once, since that walks over all objects
            optimizer = optimizer_of(owned_weight(leaf))
        if optimizer is not None and id(optimizer.state) != self._known_state:
            self._resume(leaf, optimizer)

    def see(self, values: torch.Tensor) -> None:
        """A forward reads the values."""

    def _begin(self, values: torch.Tensor) -> None:
        """The first step of a run is about to move these values."""
        self.fresh = not bool(values.any())

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """An optimizer that owns the values is about to step."""
        self._foreign = 0
        forget(leaf)
        if (
            self._is_new
        ):  # here and not in a forward: all processes make the step, also those that do not use the module
            self._begin(whole(leaf.weight))
            self._is_new = False
        if is_sharded(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} keeps the state of the values in one process only, where it cannot be "
                "moved when the support moves. Use the optimizer itself, or a fixed support such as "
                "`selection='random'`."
            )
        known = self._optimizer() if self._optimizer is not None else None
        if (
            known is None or id(optimizer.state) != self._known_state
        ):  # accelerate's wrapper shares the state of the real one
            self._resume(leaf, optimizer)
        if self.config.steps is None:
            self.miss_total_steps()

    def miss_total_steps(self) -> None:
        """`total_steps` is not known, neither from the config nor from a callback."""

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
                "have gradients: it was made before the adapter was put on the model, or before `fully_shard`, or "
                "holds copies of the parameters. Make the optimizer from `model.parameters()` after `get_peft_model`."
            )

    # Copies of the model

    def note_copy(self, leaf: SparseDelta, copied: SparseDelta) -> None:
        """`copied` is a deep copy of the leaf, which may be going to average it."""
        note_copy(leaf, copied)

    def was_written(self, leaf: SparseDelta) -> bool:
        """Whether the leaf, a copy, was written to in place by an average; a `ValueError` if that makes no sense."""
        return refuse_mixture(leaf)

    def note_load(self, leaf: SparseDelta) -> None:
        """Other tensors were loaded into the leaf."""
        forget(leaf)

    # What a checkpoint of a training holds: under the same keys, and in the same shapes, at every step

    def _resume(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        self._optimizer, self._known_state = weakref.ref(optimizer), id(optimizer.state)
        state = optimizer.state.get(owned_weight(leaf), {})
        if f"{STATE}step" not in state:
            if self.step:  # another optimizer without a past: another run
                self.step, self.fresh = 0, False
                self._clear()
        else:
            self.step = int(state[f"{STATE}step"])
            self.fresh, self._is_new = bool(state[f"{STATE}fresh"]), False
            history = state[f"{STATE}reselections"]
            self.reselections = [(int(step), int(moved)) for step, moved in history if step > 0]
            self._load(leaf, state)

    def _load(self, leaf: SparseDelta, state: dict[str, Any]) -> None:
        """Takes up what `_tensors` has kept."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Forgets what was gathered."""
        raise NotImplementedError

    def _tensors(self, leaf: SparseDelta) -> dict[str, torch.Tensor | int]:
        """What was gathered, to be kept; in shapes that are always the same."""
        raise NotImplementedError

    def _store(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        state = optimizer.state[leaf.weight]
        history = torch.zeros(HISTORY, 2)
        recent = self.reselections[-HISTORY:]
        if recent:
            history[: len(recent)] = torch.tensor(recent, dtype=torch.float32)
        state[f"{STATE}step"] = self.step
        state[f"{STATE}fresh"] = int(self.fresh)
        state[f"{STATE}reselections"] = history
        state.update({f"{STATE}{key}": value for key, value in self._tensors(leaf).items()})

    # Moving the support

    def _move(
        self,
        leaf: SparseDelta,
        optimizer: Optimizer,
        dropped: torch.Tensor,
        grown: torch.Tensor,
        seeds: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Puts the indices `grown` where `dropped` (positions in the vector) were, and keeps the vector sorted.

        `seeds` are the optimizer's state for the grown ones, by its key, and their gradient under `"gradient"`; what
        has none starts at zero. Returns where in the new vector each position of the old one has come to.
        """
        indices = leaf.indices().long().clone()
        averages = averages_of(leaf)
        indices[dropped] = grown
        order = indices.argsort()
        weight = leaf.weight
        vectors = {"value": weight.data}
        if weight.grad is not None:
            vectors["gradient"] = weight.grad
        state = optimizer.state.get(weight, {})
        vectors |= {key: state[key] for key in movable_state(optimizer, state, weight)}
        vectors |= values_around(optimizer, weight)
        for key, vector in vectors.items():
            moved = whole(vector).clone() if vector.is_floating_point() else from_8_bit(state, key)
            moved[dropped] = seeds[key].to(moved.dtype) if key in seeds else 0
            if vector.is_floating_point():
                put(vector, moved[order])
            else:
                to_8_bit(state, key, moved[order])
        leaf.set_indices(indices[order])
        for average in averages:
            move_along(average, dropped, order, indices[order])
        self.reselections.append((self.step, len(grown)))
        return order.argsort()
