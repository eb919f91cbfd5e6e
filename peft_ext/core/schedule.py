"""What happens as training steps go by.

Neither `Trainer` nor a bare loop tells a tuner that a step was taken, so tuners listen to torch's optimizer hooks,
which see every `torch.optim.Optimizer`, fused or not, wrapped by accelerate or not. One pair of hooks serves the whole
process: it is installed when the first module asks for something and removed with the last one.

Optimizers that keep flattened copies of many parameters (DeepSpeed) no longer hold the parameters themselves; what is
promised here does not reach them.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import MutableSet
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class StepListener(Protocol):
    """A module with a parameter `weight` that wants to know of the optimizer steps that concern it.

    A step concerns it if its weight is in the optimizer's groups. Listeners are called in the order of those groups,
    which is the same in every process, so that they may talk to their twins in other processes.
    """

    @property
    def weight(self) -> Any:
        """The parameter."""

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """The gradients are complete; `closure`: they are not, the step itself will compute them."""

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """The step was made, or, if not `taken`, skipped because a scaled gradient had overflowed."""

    def foreign_step(self, optimizer: Optimizer) -> None:
        """An optimizer that does not own the weight makes a step."""


_undecayed: MutableSet[nn.Module] = weakref.WeakSet()
_listeners: MutableSet[Any] = weakref.WeakSet()
_found: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # by `optimizer_of`
_last_search = -1  # the backward in which it last looked
_hooked_step = Optimizer.profile_hook_step(lambda self: None).__code__  # the frame around every step
_handles: list[RemovableHandle] = []


def exempt_from_weight_decay(module: nn.Module) -> None:
    """From now on no optimizer decays the parameters that `module` itself owns, whatever its `weight_decay` says.

    Each step is made by a stand-in for the optimizer that shares its state, but has the parameters in a copy of their
    group whose `weight_decay` is zero. The optimizer's own groups stay as the user made them, so learning-rate
    schedulers and checkpoints never see the split, even if the step raises. The update is the one the optimizer makes
    with `weight_decay=0`, bit for bit.
    """
    _undecayed.add(module)
    _install_hooks(module)


def listen_to_steps(listener: StepListener) -> None:
    """From now on `listener` is told of every optimizer step, for as long as it lives; it is held weakly."""
    _listeners.add(listener)
    _install_hooks(listener)


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


def _owner_among(optimizers: MutableSet[Optimizer], parameter: torch.Tensor) -> Optimizer | None:
    for optimizer in optimizers:
        if any(parameter is owned for group in optimizer.param_groups for owned in group["params"]):
            return optimizer
    return None


def _install_hooks(user: object) -> None:
    weakref.finalize(user, _remove_hooks_if_unused)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether this is the step of a parent class, called by a class whose own step is under way."""
    calls = 0
    frame = sys._getframe(2)
    while frame is not None and calls < 2:
        # the first of `args` is who makes the step: the optimizer, or its stand-in
        calls += frame.f_code is _hooked_step and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    if _is_nested(optimizer):
        return None
    if len(_listeners):
        closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
        owned = _owned_listeners(optimizer)
        for listener, group in owned:
            listener.before_step(optimizer, group, closure)
        mine = {id(listener) for listener, _ in owned}
        for listener in list(_listeners):
            if id(listener) not in mine:
                listener.foreign_step(optimizer)
    stand_in = _stand_in(optimizer)
    return None if stand_in is None else ((stand_in, *args[1:]), kwargs)  # `step` is called with this as its `self`


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _is_nested(optimizer):
        return
    if args[0] is not optimizer:
        _carry_back(args[0], optimizer)
    if len(_listeners) and (owned := _owned_listeners(optimizer)):
        # a fused optimizer under a GradScaler is called, and calls its hooks, on skipped steps too
        overflow = getattr(optimizer, "found_inf", None)
        taken = overflow is None or not bool(overflow)
        for listener, group in owned:
            listener.after_step(optimizer, group, taken)


def _owned_listeners(optimizer: Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    by_weight = {id(listener.weight): listener for listener in _listeners}
    return [
        (by_weight[id(parameter)], group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in by_weight
    ]


def _stand_in(optimizer: Optimizer) -> Optimizer | None:
    """One that makes the step in place of `optimizer`, with the exempt parameters in groups without decay.

    `None` if none of the parameters is exempt.
    """
    exempt = {id(parameter) for module in _undecayed for parameter in module.parameters(recurse=False)}

    def is_exempt(parameter: Any) -> bool:
        # FSDP's flat parameters name the modules whose parameters they hold
        flattened = getattr(parameter, "_param_infos", ())
        return id(parameter) in exempt or (bool(flattened) and all(info.module in _undecayed for info in flattened))

    stepped: list[dict[str, Any]] = []  # one per group of the user's, in the same order
    added: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        ours = [p for p in group["params"] if is_exempt(p)] if group.get("weight_decay") else []
        if len(ours) == len(group["params"]):
            stepped.append({**group, "weight_decay": 0.0} if ours else group)
        elif ours:
            stepped.append({**group, "params": [p for p in group["params"] if not is_exempt(p)]})
            added.append({**group, "params": ours, "weight_decay": 0.0})
        else:
            stepped.append(group)
    if all(mine is theirs for mine, theirs in zip(stepped, optimizer.param_groups, strict=True)):
        return None
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__, param_groups=stepped + added)
    return stand_in


def _carry_back(stand_in: Optimizer, optimizer: Optimizer) -> None:
    # some optimizers count in attributes or in their groups
    attributes = {key: value for key, value in stand_in.__dict__.items() if key != "param_groups"}
    optimizer.__dict__.update(attributes)
    for group, stepped in zip(optimizer.param_groups, stand_in.param_groups, strict=False):
        group.update({key: value for key, value in stepped.items() if key not in ("params", "weight_decay")})


def _remove_hooks_if_unused() -> None:
    if not any(True for _ in (*_undecayed, *_listeners)):
        while _handles:
            _handles.pop().remove()
