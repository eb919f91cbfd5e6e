"""Other tensors in an adapter that stays where it is: what serves requests, compiled too, runs on with them."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter as hotswap_built_in

from .core import ExtConfig, ExtLayer, SharingModel, is_named


# what an adapter is for and where it acts: the names and shapes of its tensors say the latter, or `_refuse_other_modules`
_FREE = {
    *("base_model_name_or_path", "revision", "peft_version", "peft_ext_version", "auto_mapping", "task_type"),
    *("inference_mode", "init_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
_DOWNLOAD = ("subfolder", "revision", "cache_dir", "token")


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Writes a saved adapter into the tensors of one that is on the model: `peft.utils.hotswap`, for all methods.

    Parameters and buffers are overwritten in place and together, so that values never meet the indices of another
    adapter, nothing is allocated, and a compiled model is not compiled again. For serving: an optimizer keeps what it
    has gathered for the former values.

    Args:
        model: A `PeftModel`, compiled or not.
        model_name_or_path: Directory or Hub repository of the adapter that comes in.
        adapter_name: The adapter whose place it takes; it keeps this name.
        torch_device: Where its file is read to; the CPU if `None`.
        kwargs: `subfolder`, `revision`, `cache_dir`, `token`.

    Raises:
        ValueError: The adapter is missing or merged, the other one is of another method, differs in a field that its
            function depends on, or in its tensors. Nothing has changed then.
        TypeError: It is a mixed model; or an option is none.
        RuntimeError: Tensors have other shapes. Nothing has changed then.
    """
    path, peft_model = os.fspath(model_name_or_path), getattr(model, "_orig_mod", model)
    if isinstance(peft_model, PeftMixedModel):
        raise TypeError(
            "Adapters are exchanged in place in a `PeftModel`, got a `PeftMixedModel`: add the other adapter with "
            "`load_adapter` and activate it with `set_adapter`."
        )
    if not isinstance(peft_model, PeftModel) or adapter_name not in peft_model.peft_config:
        raise ValueError(
            f"The model has no adapter {adapter_name!r} to be exchanged: load the first one with "
            "`PeftModel.from_pretrained`."
        )
    current = peft_model.peft_config[adapter_name]
    if not isinstance(current, ExtConfig):
        hotswap_built_in(model, path, adapter_name, torch_device, **kwargs)
        return
    if unknown := sorted(kwargs.keys() - set(_DOWNLOAD)):
        raise TypeError(f"{', '.join(unknown)}: no options of `hotswap_adapter`, which has {', '.join(_DOWNLOAD)}.")
    incoming = PeftConfig.from_pretrained(path, **kwargs)
    _refuse_another_function(peft_model, current, incoming, path)
    _refuse_other_modules(peft_model, adapter_name, incoming, path)
    layers = [module for module in peft_model.modules() if isinstance(module, (ExtLayer, BaseTunerLayer))]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights: call `unmerge_adapter()` first.")
    tensors = load_peft_weights(path, device=torch_device or "cpu", **kwargs)
    try:
        set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
    except KeyError as error:  # PEFT looks for the tensors of heads and tokens without asking
        raise ValueError(
            f"The adapter {path!r} has no tensor {error.args[0]!r}, which {adapter_name!r} has."
        ) from error
    _take_over_attributes(current, incoming)


def _refuse_another_function(model: PeftModel, current: ExtConfig, incoming: Any, path: str) -> None:
    """Raises `ValueError` if the same tensors would be another function under the other config."""
    if type(current) is not type(incoming):
        raise ValueError(
            f"The adapter {path!r} is of the method {incoming.peft_type.value}, and that on the model of "
            f"{current.METHOD}: an adapter is exchanged for one of the same method."
        )
    # as JSON has them, since one of the two may never have been in a file
    ours, theirs = (json.loads(json.dumps(config.to_dict())) for config in (current, incoming))
    for fields_of in (ours, theirs):
        fields_of["modules_to_save"] = _saved_whole(model, fields_of["modules_to_save"])
    names = sorted(ours.keys() - _FREE - set(current.TRAINING_ONLY))
    different = [name for name in names if ours[name] != theirs[name]]
    if different:
        listed = ", ".join(f"`{name}` {_short(theirs[name])} for {_short(ours[name])}" for name in different)
        raise ValueError(
            f"The adapter {path!r} cannot take the place of that on the model, whose tensors it would read otherwise: "
            f"it has {listed}. Load it beside the other, with `load_adapter`."
        )


def _refuse_other_modules(model: PeftModel, adapter_name: str, incoming: ExtConfig, path: str) -> None:
    """Raises `ValueError` if tensors that modules share would act on others than they were trained for."""
    tuner = model.base_model
    if not isinstance(tuner, SharingModel):
        return
    there = {
        name
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, ExtLayer) and layer.present([adapter_name]) and not name.startswith(f"{tuner.shared}.")
    }
    wanted = set(tuner.resolved_targets(incoming, tuner.model))
    if different := sorted(there ^ wanted):
        raise ValueError(
            f"The adapter {path!r} cannot take the place of that on the model, since they are on different modules "
            f"({len(different)}, such as {different[0]!r}), which share tensors. Load it beside the other, with "
            "`load_adapter`."
        )


def _saved_whole(model: PeftModel, names: list[str] | None) -> list[str]:
    """Those of `modules_to_save` that the model has, each once: PEFT adds a task's heads whenever it loads a config."""
    keys = [key for key, _ in model.get_base_model().named_modules()]
    return sorted({name for name in names or () if is_named(name, keys)})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _take_over_attributes(current: ExtConfig, incoming: Any) -> None:
    """What a config holds beside its fields, such as a support, is that of the tensors now."""
    own = {field.name for field in fields(current)} | {"awaits_weights", "filled_in"}
    for name in (vars(current).keys() | vars(incoming).keys()) - own:
        setattr(current, name, vars(incoming).get(name))


__all__ = ["hotswap_adapter"]
