"""Parameters of which each process holds a part, and what wraps modules then.

FSDP2 (`fully_shard`) puts a DTensor in the place of a parameter, and the gathered one while the module runs. A decision
that needs all of it is made alike in all processes: `whole` gathers, `put` writes each process' own part back. Both are
called by all processes in the same order.

FSDP1 and DeepSpeed hand the optimizer flattened copies of many parameters. What is held by them has no gradient or
optimizer state of its own that could be gathered here: `held_by` says who holds it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.optim import Optimizer

from .offloading import is_offloaded, onloaded


WRAPPERS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")  # in a module's name

if distributed.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor, which `whole` completes."""
    return distributed.is_available() and isinstance(tensor, DTensor)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The values of all processes' parts, detached; of a tensor that is not sharded, its own."""
    if not is_sharded(tensor):
        return tensor.detach()
    full: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


@torch.no_grad()
def put(target: torch.Tensor, values: torch.Tensor) -> None:
    """Writes `values`, of the whole shape and the same in all processes, into what this process holds of `target`."""
    target.detach().copy_(part_like(values, target))


@torch.no_grad()
def part_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values`, of the whole shape and the same in all processes, sharded as `like` is; no communication."""
    values = values.to(like.device, like.dtype)
    if not is_sharded(like):
        return values
    like_any: Any = like
    return distribute_tensor(values, like_any.device_mesh, like_any.placements, src_data_rank=None)


def owned_weight(leaf: nn.Module) -> Any:
    """The parameter `weight` that an optimizer owns: inside of a forward or backward, FSDP2 has put another one there."""
    return vars(leaf).get("_sharded_weight", leaf.weight)


def note_weight(leaf: nn.Module, weight: torch.Tensor) -> None:
    """To be called when a sharded tensor is assigned to `leaf.weight`: it is in place while the module does not run."""
    vars(leaf)["_sharded_weight"] = weight


def held_by(leaf: nn.Module, optimizer: Optimizer) -> str | None:
    """Who holds the leaf's `weight` in flattened copies that `optimizer` may own; `None` if nobody does."""
    weight = leaf.weight
    if _is_in_deepspeed_copy(weight, optimizer):
        return "DeepSpeed"
    if not isinstance(weight, nn.Parameter) and leaf in flattened_modules(optimizer):
        return "FSDP1 (`use_orig_params=False`)"
    if getattr(weight, "_fsdp_flattened", False) and world_size() > 1 and _owns(optimizer, weight):
        return "FSDP1 (`use_orig_params=True`)"
    return None


def _owns(optimizer: Optimizer, parameter: Any) -> bool:
    return any(own is parameter for group in optimizer.param_groups for own in group["params"])


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the module's parameters, and gathers them where it calls for them."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def refusal(what: str, holder: str, instead: str) -> ValueError:
    """The error for what cannot be trained in flattened copies."""
    return ValueError(
        f"{what} cannot be trained under {holder}, which holds parameters in flattened parts, where single values have "
        f"no gradient and no optimizer state that could be looked at or moved. Use FSDP2 (`fsdp_version: 2`), "
        f"DistributedDataParallel, or {instead}."
    )


def _is_in_deepspeed_copy(parameter: Any, optimizer: Optimizer) -> bool:
    """Whether this optimizer, and no other in the process, has a flattened copy of the parameter."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        engine = getattr(parameter, "_z3_optimizer", None)
        return engine is None or engine.optimizer is optimizer
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return False
    flat = mapping.hp_fragment.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == flat for group in optimizer.param_groups for p in group["params"])


def _is_decayed_by_deepspeed(parameter: Any, optimizer: Optimizer, decayed: Sequence[bool]) -> bool:
    """Whether that copy is in a group that is decayed."""
    if not _is_in_deepspeed_copy(parameter, optimizer):
        return False
    return hasattr(parameter, "ds_id") or decayed[parameter._hp_mapping.param_group_index]


def refuse_flattened_decay(optimizer: Optimizer, undecayed: Iterable[nn.Module]) -> None:
    """Raises `ValueError` if the optimizer would decay flattened copies of the parameters of these modules.

    A flattened parameter of FSDP1 that holds nothing else can be left out of the decay, and is no reason.
    """
    decayed = [bool(group.get("weight_decay")) for group in optimizer.param_groups]
    if not any(decayed):
        return
    modules = set(undecayed)
    holder = None
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and _is_decayed_by_deepspeed(parameter, optimizer, decayed):
                holder = "DeepSpeed"
    for group, is_decayed in zip(optimizer.param_groups, decayed, strict=True):
        for parameter in group["params"] if is_decayed else ():
            owners = {info.module in modules for info in getattr(parameter, "_param_infos", ())}
            if owners == {True, False}:
                holder = "FSDP1 (`use_orig_params=False`)"
    if holder is not None:
        raise ValueError(
            f"`weight_decay` is set, and {holder} holds flattened copies of parameters of which some must not decay "
            "(scales, mask logits, sparse values of LT-SFT). Set `weight_decay=0`, or use FSDP2 (`fsdp_version: 2`) or "
            "DistributedDataParallel, where they are left out by themselves."
        )


def flattened_modules(optimizer: Optimizer) -> set[nn.Module]:
    """The modules whose parameters FSDP1 has flattened into those of the optimizer."""
    return {
        info.module
        for group in optimizer.param_groups
        for parameter in group["params"]
        for info in getattr(parameter, "_param_infos", ())
    }


def call_with(module: nn.Module, parameters: Mapping[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
    """The module called with these tensors for its parameters.

    FSDP1 puts gathered parameters beside the module's own as plain attributes. Under ZeRO-3, and of an offloaded module,
    no hook of the module runs.
    """
    if torch.compiler.is_compiling():
        return functional_call(module, dict(parameters), args, kwargs)
    if is_partitioned(module):  # the hooks of ZeRO-3 know no other tensors than the module's own
        twin = copy.copy(module)
        own = module._parameters  # which gathers what it is asked for
        vars(twin)["_parameters"] = {key: parameters[key] if key in parameters else own[key] for key in own}
        return twin.forward(*args, **kwargs)
    if is_offloaded(module):  # its hook would put its own tensors in their place
        twin = copy.copy(module)
        with onloaded(module):
            vars(twin)["_parameters"] = {**module._parameters, **parameters}
        return type(module).forward(twin, *args, **kwargs)
    twin = copy.copy(module)  # other threads, which call or read the module meanwhile, must find it as it is
    attributes: dict[str, Any] = vars(twin)
    attributes["_parameters"] = {**module._parameters, **parameters}
    for key, value in attributes.items():
        if key in parameters:
            attributes[key] = parameters[key]
        elif isinstance(value, MethodType) and value.__self__ is module:  # somebody has replaced `forward`
            attributes[key] = MethodType(value.__func__, twin)
        elif isinstance(value, partial) and value.args and value.args[0] is module:  # accelerate has
            attributes[key] = partial(value.func, twin, *value.args[1:], **value.keywords)
    return twin(*args, **kwargs)


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


# Wrappers


def plain_name(name: str) -> str:
    """The name of a module or tensor without the wrappers around modules in it, as in a state dict."""
    return WRAPPERS.sub("", name).removesuffix(".")


def unwrapped(module: Any) -> Any:
    """The module inside of FSDP1's wrappers."""
    while "_fsdp_wrapped_module" in module._modules:
        module = module._modules["_fsdp_wrapped_module"]
    return module


def plain_named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` with the names that they have without wrappers; the wrappers themselves are left out."""
    for name, module in model.named_modules():
        if "_fsdp_wrapped_module" not in module._modules:
            yield plain_name(name), module
