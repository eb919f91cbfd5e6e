"""What an adapter needs of modules that it does not adapt: statistics that stay, and no way around the adapter.

Batch norms. Their running statistics are no parameters and are not saved with an adapter, so they stay what the base
model has: a frozen batch norm normalises with them, in training too.

`nn.TransformerEncoder` and its layers. In eval mode without gradients they compute from their children's weights and
call none of them. A layer with hooks in it is run the plain way; its encoder then must not make nested tensors.

bitsandbytes' 4-bit modules stay in an order through which there is a gradient, see `quantised.py`.
"""

from __future__ import annotations

from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .layer import ExtLayer
from .quantised import allow_order, keep_order


_NESTED = "_peft_ext_use_nested_tensor"  # on an encoder: what it was before there was an adapter in it


def prepare(model: nn.Module) -> None:
    """To be called when layers are in `model`; what was prepared before stays."""
    keep_order(model)
    trained = {
        id(module)
        for wrapper in model.modules()
        if isinstance(wrapper, AuxiliaryTrainingWrapper)
        for module in wrapper.modules()
    }
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and id(module) not in trained:
            _hook_once(module.register_forward_pre_hook, module._forward_pre_hooks, keep_statistics)
        elif isinstance(module, nn.TransformerEncoderLayer) and _has_layer(module):
            _hook_once(module.register_forward_pre_hook, module._forward_pre_hooks, take_plain_path)
        elif isinstance(module, nn.TransformerEncoder) and _has_layer(module) and not hasattr(module, _NESTED):
            setattr(module, _NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False


def restore(model: nn.Module) -> None:
    """Undoes `prepare`, when the last layers are about to leave `model`."""
    allow_order(model)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (keep_statistics, take_plain_path):
                del module._forward_pre_hooks[key]
        if hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)


def keep_statistics(module: nn.Module, args: Any) -> None:
    """Before each forward of a batch norm: unless it is trained itself, it uses the statistics of the base model."""
    if module.training and not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        module.training = False


def take_plain_path(module: nn.Module, args: Any) -> None:
    """Does nothing: `nn.TransformerEncoderLayer` takes no fast path while there is a hook in it."""


def _has_layer(module: nn.Module) -> bool:
    return any(isinstance(child, ExtLayer) for child in module.modules())


def _hook_once(register: Any, hooks: Any, hook: Any) -> None:
    if hook not in hooks.values():
        register(hook)
