"""The dense reference: the same model in float64, its weights computed anew from the adapters' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .method import Method
from .models import tiny


Tensors = dict[str, torch.Tensor]


def adapter_tensors(model: nn.Module, prefix: str, adapter: str) -> dict[str, Tensors]:
    """What an adapter consists of: by module, its parameters and buffers by leaf, such as `ssf_scale.weight`."""
    found: dict[str, Tensors] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer, nn.Module):
            tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            own = {
                f"{name.split('.')[0]}.{name.split('.', 2)[2]}": tensor.detach()
                for name, tensor in tensors.items()
                if name.startswith(prefix) and name.split(".")[1] == adapter
            }
            if own:
                found[path.removeprefix("base_model.model.")] = own
    return found


class DenseModel:
    """A tiny model in float64 without adapters, on which they are put as changed weights.

    Args:
        method: With its `reference`, which gives the parameters of one module as one adapter changes them:
            `reference(base, adapter, config, training)`, `base` being the module's parameters by name (no `"bias"` if
            it has none) and `adapter` the adapter's tensors on it by leaf, both in float64 where they are floating.
            What it returns must be differentiable in the adapter's tensors.
        name: The tiny model.
    """

    def __init__(self, method: Method, name: str) -> None:
        self.method = method
        self.model = tiny(name).double().requires_grad_(False)
        self.parameters = {
            path: {key: p.detach() for key, p in module.named_parameters(recurse=False)}
            for path, module in self.model.named_modules()
        }

    def put_on(
        self, adapters: Iterable[Mapping[str, Tensors]], configs: Mapping[int, Any] | list[Any], training: bool
    ) -> nn.Module:
        """The model with these adapters on it, one after the other."""
        assert self.method.reference is not None
        effective = {path: dict(parameters) for path, parameters in self.parameters.items()}
        for adapter, config in zip(adapters, configs, strict=True):
            for path, own in adapter.items():
                effective[path] |= self.method.reference(effective[path], own, config, training)
        for path, module in self.model.named_modules():
            for key, value in effective[path].items():
                if key in module._parameters:
                    del module._parameters[key]
                setattr(module, key, value)
            if "bias" not in effective[path] and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.bias = None
        return self.model


def as_reference(adapter: Mapping[str, Tensors], with_gradients: Mapping[str, set[str]] | None = None) -> Any:
    """Copies of an adapter's tensors in float64; those named by module and leaf are to get gradients."""
    copies: dict[str, Tensors] = {}
    for path, own in adapter.items():
        copies[path] = {}
        for leaf, tensor in own.items():
            value = tensor.double() if tensor.is_floating_point() else tensor
            value = value.clone().detach()
            copies[path][leaf] = value.requires_grad_(leaf in (with_gradients or {}).get(path, ()))
    return copies
