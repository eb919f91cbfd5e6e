"""What happens as training steps go by.

Neither `Trainer` nor a bare loop tells a tuner that a step was taken, so tuners listen to torch's optimizer hooks,
which see every `torch.optim.Optimizer`, fused or not, wrapped by accelerate or not. One pair of hooks serves the whole
process: it is installed when the first module asks for something and removed with the last one.

Optimizers that keep flattened copies of many parameters (DeepSpeed) no longer hold the parameters themselves; what is
promised here does not reach them.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableSet
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


_undecayed: MutableSet[nn.Module] = weakref.WeakSet()
_handles: list[RemovableHandle] = []


def exempt_from_weight_decay(module: nn.Module) -> None:
    """From now on no optimizer decays the parameters that `module` itself owns, whatever its `weight_decay` says.

    Each step is made by a stand-in for the optimizer that shares its state, but has the parameters in a copy of their
    group whose `weight_decay` is zero. The optimizer's own groups stay as the user made them, so learning-rate
    schedulers and checkpoints never see the split, even if the step raises. The update is the one the optimizer makes
    with `weight_decay=0`, bit for bit.
    """
    _undecayed.add(module)
    weakref.finalize(module, _remove_hooks_if_unused)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_split_groups))
        _handles.append(register_optimizer_step_post_hook(_carry_back))


def _split_groups(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
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
    return (stand_in, *args[1:]), kwargs  # `step` is called with this as its `self`


def _carry_back(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stand_in = args[0]
    if stand_in is optimizer:
        return
    # some optimizers count in attributes or in their groups
    attributes = {key: value for key, value in stand_in.__dict__.items() if key != "param_groups"}
    optimizer.__dict__.update(attributes)
    for group, stepped in zip(optimizer.param_groups, stand_in.param_groups, strict=False):
        group.update({key: value for key, value in stepped.items() if key not in ("params", "weight_decay")})


def _remove_hooks_if_unused() -> None:
    if not any(True for _ in _undecayed):
        while _handles:
            _handles.pop().remove()
