"""Warnings about what an adapter leaves out: experts, heads that stay at their random start, layers that never act."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .config import ExtConfig
from .layer import ExtLayer
from .targets import backbone_linears


def warn_of_experts(config: ExtConfig, model: nn.Module) -> None:
    """Says so if the model has experts that `config` leaves out without a word."""
    advice = ""
    if hasattr(config, "target_parameters"):
        advice = " Name them in `target_parameters`, or set that to an empty list if they are to stay as they are."
    for name, module in model.named_modules():
        is_conv = isinstance(module, nn.modules.conv._ConvNd)
        if is_conv or not re.search("expert|moe", f"{name}.{type(module).__name__}".lower()):
            continue  # others have parameters of three dimensions too: XLNet's projections, Swin V2's logit scales
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:
                warnings.warn(
                    f"{config.METHOD} leaves out the mixture-of-experts weights such as {name}.{key}: they are "
                    "parameters of three dimensions, not Linear modules, and `target_modules='all-linear'` does not "
                    f"reach them.{advice}",
                    UserWarning,
                    stacklevel=2,
                )
                return


def all_linears(name: str, config: ExtConfig, model: nn.Module) -> set[str]:
    """All Linear modules of the backbone, as default targets of the method `name`; says so if experts are left out.

    Raises:
        ValueError: There are none.
    """
    found = backbone_linears(model)
    if not found:
        raise ValueError(
            f"{name} has no default targets on this {type(model).__name__}, which has no Linear module outside its head."
        )
    warn_of_experts(config, model)
    return found


def watch_first_gradients(model: nn.Module) -> None:
    """From now on each layer of the model notes which of its adapters has had a gradient."""
    for module in model.modules():
        if isinstance(module, ExtLayer):
            module.watch_first_gradients()


def warn_of_idle_layers(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Says once, of each adapter that was trained here, which of its layers took no part in the training."""
    for adapter in adapter_names:
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, ExtLayer) and adapter in module.watched
        }
        idle = {name: layer for name, layer in layers.items() if adapter not in layer.learnt}
        if len(idle) == len(layers) or all(adapter in layer.reported for layer in idle.values()):
            continue  # not trained, or trained where nobody could watch; or nothing new
        for layer in idle.values():
            layer.reported.add(adapter)
        never_run = [name for name, layer in idle.items() if not layer.has_run]
        unused = [name for name in idle if name not in never_run]
        parts = [f"{len(never_run)} were never run ({_some(never_run)})"] if never_run else []
        parts += [f"{len(unused)} were run, but the loss did not depend on them ({_some(unused)})"] if unused else []
        warnings.warn(
            f"Adapter {adapter!r} was trained, but not all of it: of its {len(layers)} modules, {', and '.join(parts)}. "
            "They are still as they were initialised. Leave them out of `target_modules`, or train with a loss and "
            "inputs that use them.",
            UserWarning,
            stacklevel=2,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def warn_of_fresh_head(model: nn.Module) -> None:
    for head_name in SEQ_CLS_HEAD_NAMES:
        head = getattr(model, head_name, None)
        if not isinstance(head, nn.Module) or isinstance(head, AuxiliaryTrainingWrapper):
            continue
        linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
        if linears and not any(p.requires_grad for p in head.parameters()) and _looks_fresh(linears[-1], model):
            warnings.warn(
                f"The head {head_name!r} looks freshly initialised and stays frozen, so the adapter would be trained "
                f"against random class vectors. Set `modules_to_save=[{head_name!r}]` in the config, or a `task_type` "
                "for which PEFT trains the head.",
                UserWarning,
                stacklevel=2,
            )


def trains_fresh_head(model: nn.Module) -> bool:
    """Whether a module that is trained in full beside the adapter looks freshly initialised in the frozen model."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            linears = [module for module in wrapper.original_module.modules() if isinstance(module, nn.Linear)]
            if linears and _looks_fresh(linears[-1], model):
                return True
    return False


def _looks_fresh(linear: nn.Linear, model: nn.Module) -> bool:
    """An initial bias is exactly zero, a trained one never; without a bias, the spread of the initial weights tells."""
    if linear.weight.is_meta:
        return False
    if linear.bias is not None:
        return not linear.bias.any()
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    return spread is not None and abs(linear.weight.float().std().item() / spread - 1) < 0.05
