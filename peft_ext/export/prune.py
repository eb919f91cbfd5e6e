"""From a model with masks to one without what they cut."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..core import ExtConfig, ExtModel, tuner_of
from ..groups import Group
from .cut import columns_of, cut, refuse_quantised, slices
from .saving import settle


def prune_and_unload(
    model: PeftModel, *, keep_lora: bool = False, round_to: int = 1, uniform: bool = False
) -> PreTrainedModel | PeftModel:
    """Cuts out what the masks of the active adapter cut, and takes the adapter off; consumes the model.

    Of several active adapters each cuts something, and the LoRA of one may read a unit that only another has cut: such
    a unit stays, so that the result equals the model.

    Args:
        model: A model with a mask-pruning adapter whose masks are decided.
        keep_lora: Leave LoRA unmerged, as PEFT's own, so that training can go on. This adapter fits the cut base only:
            save both, `save_pruned(copy.deepcopy(model).unload(), path)` and `model.save_pretrained(adapter_path)`.
        round_to: Feed-forward blocks keep a multiple of so many channels (a few more than the masks say), which suits
            the hardware.
        uniform: All layers keep as many as the one with the most, so that a stock class can load the model.

    Returns:
        The smaller model, LoRA merged into its weights; with `keep_lora` a `PeftModel` with a LoRA adapter of the same
        name on it. Parameters are frozen as `merge_and_unload` leaves them; `model.requires_grad_()` makes them train.
        `save_pruned` writes it if its class is one of transformers, and not one that is derived from it.

    Raises:
        TypeError: It is no PeftModel.
        ValueError: There is no such adapter, its masks are not decided yet, it holds values that are not finite, the
            base is quantised, or, with `keep_lora`, adapters are merged or more than one is active.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`prune_and_unload` takes a PeftModel with a mask-pruning adapter, got {type(model).__name__}."
        )
    groups, kept = _decided(model)
    layers = tuple({tuner.tuner_layer_cls for tuner in _tuners(model).values()})
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, layers):
            refuse_quantised(name, module.get_base_layer())
    carried = _finite_tensors(model)
    if not keep_lora:
        several = len(model.active_adapters) > 1
        base: Any = model.merge_and_unload()
        if several:
            kept = {name: _with_those_read(base, groups[name], units) for name, units in kept.items()}
        cut(base, groups, kept, round_to=round_to, uniform=uniform)
        settle(base)
        return base
    config, lora = _lora(model)
    adapter = model.active_adapters[0]
    settings: Any = model.peft_config[adapter]
    config.trainable_token_indices = settings.trainable_token_indices
    base = model.unload()
    stay = cut(base, groups, kept, round_to=round_to, uniform=uniform)
    settle(base)
    pruned = get_peft_model(base, config, adapter_name=adapter)
    _fill(pruned, adapter, lora, groups, kept, stay)
    set_peft_model_state_dict(pruned, carried, adapter_name=adapter)
    return pruned


def _tuners(model: PeftModel) -> dict[str, type[ExtModel]]:
    """The tuner classes of the active adapters."""
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    return {name: tuner_of(config) for name, config in configs.items() if isinstance(config, ExtConfig)}


def _finite_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the active adapters have besides the method's own tensors: heads, and embeddings of tokens.

    Raises:
        ValueError: A tensor of theirs, of whatever kind, is not finite.
    """
    besides: dict[str, torch.Tensor] = {}
    for adapter, tuner in _tuners(model).items():
        tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise ValueError(
                f"Adapter {adapter!r} holds values that are not finite, after a loss that was not: "
                f"{', '.join(broken[:5])} ({len(broken)} in all). Go on from an earlier checkpoint."
            )
        besides |= {key: value.detach().clone() for key, value in tensors.items() if f".{tuner.prefix}" not in key}
    return besides


def _with_those_read(base: nn.Module, group: Group, kept: torch.Tensor) -> torch.Tensor:
    """Also the units that are read nevertheless: by the LoRA of an adapter, where only one before it has cut them."""
    weight = columns_of(base.get_submodule(group.name))  # (outputs, inputs)
    reads = weight.unflatten(1, (group.units, group.width)).ne(0).any(2).any(0).cpu()
    reads[kept] = True
    return reads.nonzero().flatten()


def _decided(model: PeftModel) -> tuple[dict[str, Group], dict[str, torch.Tensor]]:
    """Groups of the active adapters, and the units that none of them cuts."""
    groups: dict[str, Group] = {}
    kept: dict[str, torch.Tensor] = {}
    for adapter, tuner in _tuners(model).items():
        for name, (group, units) in tuner.kept_units(model, adapter).items():
            kept[name] = units[torch.isin(units, kept[name])] if name in kept else units
            groups[name] = group
    if not groups:
        raise ValueError(
            f"No active adapter of the model has masks that say what to cut (active: {model.active_adapters}); a model "
            "with a mask-pruning adapter has."
        )
    return groups, kept


def _lora(model: PeftModel) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The LoRA of the one active adapter: config, and A `(r, inputs)` and B `(outputs, r)` by module."""
    tuners = _tuners(model)
    layers = tuple({tuner.tuner_layer_cls for tuner in tuners.values()})
    merged = any(module.merged for module in model.modules() if isinstance(module, layers))
    if len(model.active_adapters) != 1 or merged:
        raise ValueError("`keep_lora` takes one active adapter that is not merged: `set_adapter`, `unmerge_adapter`.")
    ((adapter, tuner),) = tuners.items()
    return tuner.as_lora(model, adapter)


@torch.no_grad()
def _fill(
    pruned: PeftModel,
    adapter: str,
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]],
    groups: dict[str, Group],
    kept: dict[str, torch.Tensor],
    stay: dict[str, torch.Tensor],
) -> None:
    """Copies what is left of A and B; A reads padding as little as the base does."""
    rows, columns = slices(groups, stay)
    base: nn.Module = pruned.get_base_model()
    for name, (down, up) in lora.items():
        layer: Any = base.get_submodule(name)
        if name in columns:
            group = groups[name]
            read = torch.isin(torch.arange(group.units), kept[name]).repeat_interleave(group.width).to(down.device)
            down = (down * read)[:, columns[name].to(down.device)]
        if name in rows:
            up = up[rows[name].to(up.device)]
        layer.lora_A[adapter].weight.copy_(down)
        layer.lora_B[adapter].weight.copy_(up)
