"""What happens as training steps go by.

Neither `Trainer` nor a bare loop tells a tuner that a step was taken, so tuners listen to torch's optimizer hooks,
which see every `torch.optim.Optimizer`, fused or not, wrapped by accelerate or not. One pair of hooks serves the whole
process: it is installed when the first module asks for something and removed with the last one.

Optimizers that keep flattened copies of many parameters (DeepSpeed) no longer hold the parameters themselves. What is
promised here does not reach them; `sharding.py` tells who they are, and refuses what would be broken.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, MutableMapping, MutableSet, Sequence
from functools import cache
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .sharding import refuse_flattened_decay


class StepListener(Protocol):
    """A module with a parameter `weight` that wants to know of the optimizer steps that concern it.

    A step concerns it if its weight is in the optimizer's groups. Listeners are called in the order of those groups,
    which is the same in every process, so that they may talk to their twins in other processes. Of the steps of an
    optimizer that wraps another one (SAM, Lookahead) and of that other one, only the inner step counts, since that is
    where gradients are complete; if the inner one has a part of the parameters only (`ZeroRedundancyOptimizer`), only
    the outer step counts.
    """

    @property
    def weight(self) -> Any:
        """The parameter."""

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """The gradients are complete; `closure`: they are not, the step itself will compute them."""

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """The step was made, or, if not `taken`, was none of the training.

        That is, a scaled gradient had overflowed, or the step has the rate zero and gradients of zero and only makes
        the optimizer's state, as `torch.distributed.checkpoint` does; `before_step` is not called then.
        """

    def foreign_step(self, optimizer: Optimizer) -> None:
        """An optimizer that does not own the weight makes a step."""


_undecayed: MutableSet[nn.Module] = weakref.WeakSet()
_listeners: MutableSet[Any] = weakref.WeakSet()
_found: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # by `optimizer_of`
_last_search = -1  # the backward in which it last looked
_making_state: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose step under way moves nothing
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whether it can leave parameters undecayed
_hooked_step = Optimizer.profile_hook_step(lambda self: None).__code__  # the frame around every step
_handles: list[RemovableHandle] = []


def exempt_from_weight_decay(module: nn.Module) -> None:
    """From now on no optimizer decays the parameters that `module` itself owns, whatever its `weight_decay` says.

    Each step is made by a stand-in for the optimizer that shares all of its attributes, but sees the parameters in a
    group whose `weight_decay` is zero. What the stand-in reads and writes otherwise is the optimizer's own, in the
    moment it does so, so that what a hook or a closure sets during a step counts, and learning-rate schedulers and
    checkpoints never see the split, even if the step raises. The update is the one the optimizer makes with
    `weight_decay=0`, bit for bit.
    """
    _undecayed.add(module)
    _install_hooks(module)


def listen_to_steps(listener: StepListener) -> None:
    """From now on `listener` is told of every optimizer step, for as long as it lives; it is held weakly."""
    _listeners.add(listener)
    _install_hooks(listener)


def stop_listening(listener: StepListener) -> None:
    """From now on `listener` is told of nothing more."""
    _listeners.discard(listener)
    _remove_hooks_if_unused()


def owners_of(parameters: Sequence[torch.Tensor]) -> list[Optimizer | None]:
    """The optimizer that owns each, `None` where there is none yet. Looks through all live objects, as `optimizer_of`."""
    _found.update(candidate for candidate in gc.get_objects() if issubclass(type(candidate), Optimizer))
    owners = {
        id(parameter): optimizer
        for optimizer in _found
        if not _leaves_steps_to_others(optimizer)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return [owners.get(id(parameter)) for parameter in parameters]


def optimizer_of(parameter: torch.Tensor) -> Optimizer | None:
    """The optimizer that owns `parameter`, if there is one yet.

    Torch tells nobody when an optimizer is made or its state is loaded, so all live objects are looked through, which
    takes about 0.1 s, once in a backward at most: for the first backward of a run, which may be a resumed one.
    """
    global _last_search
    backward = torch._C._current_graph_task_id()  # -1 outside of one
    if (owner := _owner_among(_found, parameter)) is not None or (backward == _last_search != -1):
        return owner
    # the type is asked, since `isinstance` runs code of proxies and lazy modules
    _found.update(candidate for candidate in gc.get_objects() if issubclass(type(candidate), Optimizer))
    _last_search = backward
    return _owner_among(_found, parameter)


def _owner_among(optimizers: Iterable[Optimizer], parameter: torch.Tensor) -> Optimizer | None:
    owners = [
        optimizer
        for optimizer in optimizers
        if any(parameter is owned for group in optimizer.param_groups for owned in group["params"])
    ]
    return next((owner for owner in owners if not _leaves_steps_to_others(owner)), None)


def wrapped_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Those that this one holds, and that make steps for it."""
    return [value for value in vars(optimizer).values() if issubclass(type(value), Optimizer)]


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether it leaves its steps to one that has only some of its parameters, the others being other processes'."""
    wrapped = wrapped_optimizers(optimizer)
    return bool(wrapped) and not _parameters_of([optimizer]) <= _parameters_of(wrapped)


def _leaves_steps_to_others(optimizer: Optimizer) -> bool:
    wrapped = wrapped_optimizers(optimizer)
    return bool(wrapped) and _parameters_of([optimizer]) <= _parameters_of(wrapped)


def _parameters_of(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _install_hooks(user: object) -> None:
    weakref.finalize(user, _remove_hooks_if_unused)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _steps_under_way() -> Iterator[Any]:
    """Who makes the steps that the calling hook runs in, the innermost first: optimizers, or their stand-ins."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _hooked_step:
            yield frame.f_locals["args"][0]
        frame = frame.f_back  # type: ignore[assignment]


def steps_around(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers whose steps are under way and which have left them to `optimizer`."""
    return [outer for outer in _steps_under_way() if optimizer in wrapped_optimizers(outer)]


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this is the step of a parent class, called by a class whose own step is under way."""
    return sum(maker is optimizer for maker in _steps_under_way()) > 1


def _counts(optimizer: Optimizer) -> bool:
    """Whether the listeners are to know of this step, and not of one inside or around it."""
    if _leaves_steps_to_others(optimizer):
        return False
    return not any(
        optimizer in wrapped_optimizers(outer) and is_sharded(outer)
        for outer in _steps_under_way()
        if outer is not optimizer
    )


def _makes_state_only(optimizer: Optimizer) -> bool:
    if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    if _is_nested(optimizer):
        return None
    _making_state.discard(optimizer)
    if len(_listeners) and _counts(optimizer):
        closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
        if not closure and _makes_state_only(optimizer):
            _making_state.add(optimizer)
        else:
            _announce(optimizer, closure)
    if optimizer not in _checked:
        _checked.add(optimizer)
        refuse_flattened_decay(optimizer, _undecayed)
    stand_in = None if wrapped_optimizers(optimizer) else _stand_in(optimizer)
    return None if stand_in is None else ((stand_in, *args[1:]), kwargs)  # `step` is called with this as its `self`


def _announce(optimizer: Optimizer, closure: bool) -> None:
    owned = _owned_listeners(optimizer)
    for listener, group in owned:
        listener.before_step(optimizer, group, closure)
    mine = {id(listener) for listener, _ in owned}
    for listener in list(_listeners):
        if id(listener) not in mine:
            listener.foreign_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _is_nested(optimizer):
        return
    if len(_listeners) and _counts(optimizer) and (owned := _owned_listeners(optimizer)):
        # a fused optimizer under a GradScaler is called, and calls its hooks, on skipped steps too
        overflow = getattr(optimizer, "found_inf", None)
        taken = (overflow is None or not bool(overflow)) and optimizer not in _making_state
        for listener, group in owned:
            listener.after_step(optimizer, group, taken)
    _making_state.discard(optimizer)


def _owned_listeners(optimizer: Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    by_weight: dict[int, list[Any]] = {}
    for listener in _listeners:
        by_weight.setdefault(id(listener.weight), []).append(listener)
    return [
        (listener, group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for listener in by_weight.get(id(parameter), ())
    ]


class _GroupView(MutableMapping[str, Any], dict[str, Any]):  # type: ignore[metaclass,misc]
    """A group of the user's with other parameters or another decay; all else is read from it and written to it.

    Of a group that is seen as two, the second one keeps what it writes, and does not see what the first one writes:
    an optimizer that counts steps in its groups counts in each.
    """

    def __init__(self, group: dict[str, Any], first: _GroupView | None = None, **instead: Any) -> None:
        super().__init__()
        self.group, self.first, self.instead = group, first, instead
        self.before: dict[str, Any] = {}  # what was there when this view wrote

    def __getitem__(self, key: str) -> Any:
        if key in self.instead:
            return self.instead[key]
        if self.first is not None and key in self.first.before:
            if self.first.before[key] is _ABSENT:
                raise KeyError(key)
            return self.first.before[key]
        return self.group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if self.first is not None or key in self.instead:
            self.instead[key] = value
        else:
            self.before.setdefault(key, self.group.get(key, _ABSENT))
            self.group[key] = value

    def __delitem__(self, key: str) -> None:
        if self.first is None:
            del self.group[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.group, **self.instead})

    def __len__(self) -> int:
        return len({**self.group, **self.instead})


_ABSENT = object()


def _stand_in(optimizer: Optimizer) -> Optimizer | None:
    """One that makes the step in place of `optimizer`, with the exempt parameters in groups without decay.

    `None` if none of the parameters is exempt.
    """
    split = _split(optimizer.param_groups, {})
    if all(mine is theirs for mine, theirs in zip(split, optimizer.param_groups, strict=False)):
        return None
    stand_in: Any = object.__new__(_stand_in_class(type(optimizer)))  # type: ignore[arg-type]
    stand_in.__dict__ = optimizer.__dict__
    stand_in.views = {}
    return stand_in


@cache
def _stand_in_class(cls: Any) -> type[Optimizer]:
    def groups(self: Any) -> list[dict[str, Any]]:
        return _split(self.__dict__["param_groups"], self.views)

    def set_groups(self: Any, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    members = {
        "param_groups": property(groups, set_groups),
        "__slots__": ("views",),  # beside the attributes, which are the optimizer's
        "__module__": cls.__module__,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


def _split(groups: list[dict[str, Any]], views: dict[int, list[Any]]) -> list[dict[str, Any]]:
    """The groups in their order, and after them those parts of them that are not to be decayed; `views` made before."""
    exempt = {id(parameter) for module in _undecayed for parameter in module.parameters(recurse=False)}

    def is_exempt(parameter: Any) -> bool:
        # FSDP's flat parameters name the modules whose parameters they hold
        flattened = getattr(parameter, "_param_infos", ())
        return id(parameter) in exempt or (bool(flattened) and all(info.module in _undecayed for info in flattened))

    def views_of(group: dict[str, Any]) -> list[Any]:
        ours = [p for p in group["params"] if is_exempt(p)] if group.get("weight_decay") else []
        if not ours:
            return []
        if len(ours) == len(group["params"]):
            return [_GroupView(group, weight_decay=0.0)]
        first = _GroupView(group, params=[p for p in group["params"] if not is_exempt(p)])
        return [first, _GroupView(group, first, params=ours, weight_decay=0.0)]

    for group in groups:
        if id(group) not in views:
            views[id(group)] = views_of(group)
    own: list[dict[str, Any]] = [next(iter(views[id(group)]), group) for group in groups]
    return own + [view for group in groups for view in views[id(group)][1:]]


def _remove_hooks_if_unused() -> None:
    if not any(True for _ in chain(_undecayed, _listeners)):  # a look at the first: there may be thousands
        while _handles:
            _handles.pop().remove()
