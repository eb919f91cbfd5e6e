"""A model for a while in another mode: without its adapters, or with another adapter for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import ExtLayer


BASE_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for "no adapter for this sample"


def needs_plain_operations() -> bool:
    """Whether a compiler or a transform of `torch.func` looks on, which cannot use autograd functions of our own."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_hooked(module: nn.Module) -> bool:
    """Whether something is to happen when `module` is called, so that its product cannot be made without the call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")


def acting_adapters(model: nn.Module) -> list[tuple[str, bool, list[str], str]]:
    """Which adapters act where, and what their layers know of them besides tensors, as LoRA's scaling.

    Returns:
        For each adapted module its name, whether its adapters are switched off, which are active, and what is known.
    """
    return [
        (name, bool(module.disable_adapters), list(module.active_adapters), _known_of(module))
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]


def _known_of(layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> str:
    """What plain values `layer` holds of its active adapters, the same text in all processes."""
    active = layer.active_adapters
    known = {
        key: {name: value[name] for name in active if name in value and _is_plain(value[name])}
        for key, value in vars(layer).items()
        if isinstance(value, dict)
    }
    return sorted_text({key: values for key, values in known.items() if values})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def sorted_text(value: Any) -> str:
    """The same for equal values in all processes, as the order of sets is not."""
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{key}:{sorted_text(part)}' for key, part in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{','.join(sorted(map(sorted_text, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(sorted_text, value))}]"
    return repr(value)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the frozen one, in eval mode; which parameters are trained stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        with evaluating(model):
            yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def adapted_in_groups(
    layer: ExtLayer, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The output `(B, ...)` of x `(B, ...)`, the samples of each adapter going through `adapted_forward` together.

    For methods that change what the base layer computes, so that its output cannot be shared: each sample still passes
    through it once.

    Raises:
        ValueError: The layer does not see the samples of the batch.
    """
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(layer.names_of_rows(adapter_names, len(x))):
        groups.setdefault(name if layer.present([name]) else BASE_ADAPTER, []).append(row)
    parts: list[torch.Tensor] = []
    for name, rows in groups.items():
        part = x if len(groups) == 1 else x.index_select(0, torch.tensor(rows, device=x.device))
        is_base = name == BASE_ADAPTER
        parts.append(
            layer.base_layer(part, *args, **kwargs)
            if is_base
            else layer.adapted_forward([name], part, *args, **kwargs)
        )
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for rows in groups.values() for row in rows], device=parts[0].device)
    return torch.cat(parts).index_select(0, order.argsort())


@contextmanager
def mixed_batch(
    model: nn.Module, layer_cls: type[ExtLayer], adapter_names: list[str], num_beams: int | None
) -> Iterator[None]:
    """Inside, sample `i` of a batch passes through the adapter `adapter_names[i]` (`"__base__"`: through none).

    Raises:
        ValueError: The method cannot do it, an adapter does not exist, or the model is in training mode.
    """
    if not layer_cls.supports_mixed_batches:
        reason = f": {layer_cls.why_not_mixed}" if layer_cls.why_not_mixed else ""
        raise ValueError(
            f"{layer_cls.__name__} does not support `adapter_names`{reason}. Run the samples of each adapter as a "
            "batch of their own, with `set_adapter` in between."
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, layer_cls)]
    known = {BASE_ADAPTER}.union(*(layer._get_available_adapters() for layer in layers))
    if unexpected := set(adapter_names) - known:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")

    def pass_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
        return args, {**kwargs, "adapter_names": names}

    # beam search repeats each sample, but only after an encoder, if there is one, has seen it once
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder: Any = model.get_encoder() if is_encoder_decoder else None  # type: ignore[operator]
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    handles = [
        module.register_forward_pre_hook(
            partial(pass_names, names=adapter_names if module in in_encoder else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (layer_cls, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
