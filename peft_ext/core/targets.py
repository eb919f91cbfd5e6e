"""Which modules of a model there are, which of them a config names, and how many features they have."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import ExtConfig
from .uncalled import uncalled_modules


HEADS = {"lm_head", "score", "classifier", "qa_outputs", "cls", "classification_head"}


def unadapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of `model` by name, without adapters that are on them, and without what adapters consist of."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
        yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


IN_KEYS = {"weight", "bias", "base_layer", "modules_to_save", "original_module"}  # beside the names of modules


def refuse_ambiguous_names(adapters: Iterable[str], model: nn.Module, layer_class: type[nn.Module] | None) -> None:
    """Raises for a name that no module can have, and for several adapters of which one is called like a part of a key.

    PEFT writes an adapter without all tensors whose keys hold the name of another: beside an adapter `"0"` nothing of
    `layers.0` would be saved. The one layer of another method than that of `layer_class` (`None`: PEFT's), whose adapter
    comes in, hides nothing: what is below its name is that method's alone.

    Raises:
        ValueError: An adapter has such a name.
    """
    adapters = set(adapters)
    for name in adapters:
        if not name or "." in name:
            raise ValueError(f"Adapter name {name!r} must have a character, and no dot: it is that of a module.")
    if len(adapters) < 2:
        return
    keys, apart = set(IN_KEYS), set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            keys.update(module.adapter_layer_names)
            is_another = layer_class is None or not isinstance(module, layer_class)
            if is_another and getattr(module, "holds_whole_adapters", False):
                apart.add(name)
    clashes = dict.fromkeys(adapters & keys, "the keys of tensors")
    for name in (name for name, _ in unadapted_modules(model) if name not in apart):
        clashes |= dict.fromkeys(
            adapters.intersection(name.split(".")), f"the name of a module of the model, {name!r}"
        )
    for name in sorted(clashes):
        raise ValueError(
            f"Adapter name {name!r} is also a part of {clashes[name]}. With several adapters PEFT would leave out tensors "
            f"of this name where it saves the others. Take another name, such as 'adapter_{name}'."
        )


def matched_targets(config: ExtConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `unadapted_modules` that the config's names or expressions match."""
    return ((name, module) for name, module in unadapted_modules(model) if check_target_module_exists(config, name))


def is_admitted(config: ExtConfig, name: str) -> bool:
    """Whether `exclude_modules`, `modules_to_save` and `layers_to_transform` leave a module to be adapted."""
    config = copy.copy(config)
    config.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(config, name))


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `unadapted_modules` that belong to no head and are called, so that an adapter can act on them."""
    left_out = head_modules(model) | set(uncalled_modules(model))
    return ((name, module) for name, module in unadapted_modules(model) if name not in left_out)


def head_modules(model: nn.Module) -> set[str]:
    """The names of the modules that a task has added to the backbone, and of output embeddings."""
    backbone = _backbone_name(model)
    inside = f"{backbone}." if backbone else ""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name
        for name, module in unadapted_modules(model)
        if not (name == backbone or name.startswith(inside)) or module is output or HEADS & set(name.split("."))
    }


def _backbone_name(model: nn.Module) -> str:
    """Where the model without its head is; empty if that is the model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if not isinstance(backbone, nn.Module):
        return ""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return str(prefix)
    # DINOv3 calls a part of the backbone by this name
    is_inside = embedding is None or any(module is embedding for module in backbone.modules())
    return str(prefix) if is_inside else ""


def backbone_linears(model: nn.Module) -> set[str]:
    """The names of all Linear modules (and GPT-2's Conv1D) that are no head."""
    return {name for name, module in backbone_modules(model) if linear_features(module) is not None}


def count_parameters(model: nn.Module) -> int:
    """The parameters of the model without its adapters; quantised weights count what they stand for."""
    added = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            kept = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
            added |= {id(p) for name, child in module.named_children() if name != kept for p in child.parameters()}
    counted: dict[int, int] = {}
    for module in model.modules():
        features = linear_features(module)
        for name, parameter in module.named_parameters(recurse=False):
            size = features[0] * features[1] if name == "weight" and features is not None else parameter.numel()
            if id(parameter) not in added:
                counted[id(parameter)] = size
    return sum(counted.values())


def linear_features(base_layer: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a dense or quantised linear layer (or GPT-2's Conv1D), `None` if it is neither."""
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if isinstance(base_layer, Conv1D):
        return base_layer.nx, base_layer.nf
    backend = resolve_quantization_backend(base_layer)
    if backend is None or backend.layer_type != "linear":
        return None
    inputs, outputs = _get_in_out_features(base_layer)
    return None if inputs is None or outputs is None else (inputs, outputs)


def features_of(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, channels of a convolution or norm, rows and width of an embedding.

    Raises:
        AttributeError: The module is none of these.
    """
    features = linear_features(module)
    if features is not None:
        return features
    for inputs, outputs in (("in_channels", "out_channels"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, inputs) and hasattr(module, outputs):
            return getattr(module, inputs), getattr(module, outputs)
    for channels in ("num_features", "num_channels"):
        if hasattr(module, channels):
            return getattr(module, channels), getattr(module, channels)
    shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", None)
    if not shape:
        raise AttributeError(f"{type(module).__name__} has no features that could be counted.")
    return shape[-1], shape[-1]


def linear_out_features(base_layer: nn.Module) -> int | None:
    """Output features of a dense or quantised linear layer (or GPT-2's Conv1D), `None` if it is neither."""
    features = linear_features(base_layer)
    return None if features is None else features[1]


def is_named(target: str, names: Iterable[str]) -> bool:
    """Whether an entry of `target_modules` matches one of the module names."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def named_all_linear(config: Any, model: nn.Module) -> bool:
    """Puts the names of the modules in place of `target_modules="all-linear"`; returns whether it stood there.

    A module that another adapter has wrapped goes by its own name. Left out are, beside what PEFT leaves out, modules
    that are read and never called, parts of adapters, and the copies of a module that another adapter trains in full or
    in part, as a head. A config without targets, of prompts for example, stays as it is.
    """
    before = getattr(config, "target_modules", None)
    _maybe_include_all_linear_layers(config, model)
    if before is None or config.target_modules is before or not isinstance(config.target_modules, set):
        return False
    names = {re.sub(r"(\.base_layer)+$", "", name) for name in config.target_modules}
    inner = _inside_of_adapters(model)
    config.target_modules = {name for name in names if not name.startswith(inner)} - set(uncalled_modules(model))
    return True


def _inside_of_adapters(model: nn.Module) -> tuple[str, ...]:
    """How the names of modules begin that adapters, and the copies of heads that they train, consist of."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, wrappers))


def refuse_unknown_targets(targets: Iterable[str], model: nn.Module) -> None:
    inner = _inside_of_adapters(model)
    names = [name for name, _ in model.named_modules() if not name.startswith(inner)]
    unknown = sorted(target for target in targets if not is_named(target, names))
    if unknown:
        known = {name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdecimal()}
        similar = sorted({close for target in unknown for close in get_close_matches(target, known)} or known)
        raise ValueError(
            f"Target modules {unknown} not found in the base model, a {type(model).__name__}. Please check the target "
            f"modules and try again; it has modules called {', '.join(similar[:20])}."
        )


def _refuse_tokens_of_a_biased_head(model: PreTrainedModel) -> None:
    with suppress(NotImplementedError):
        ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        first, last = (getattr(end, "original_module", end) for end in ends)
        is_tied = getattr(first, "weight", None) is getattr(last, "weight", last)
        if is_tied and getattr(last, "bias", None) is not None:
            raise ValueError(
                f"`trainable_token_indices` would change this {type(model).__name__} beyond its tokens: PEFT leaves the "
                "bias of a tied output embedding out while tokens are trained. Untie the embeddings (`config."
                "tie_word_embeddings = False` before the model is loaded), or leave the tokens out."
            )


def refuse_no_layers(config: ExtConfig) -> None:
    """Raises `ValueError` if a new adapter is to have no layer; methods would take that for none, or for all."""
    is_new = not (config.inference_mode or config.awaits_weights)
    if is_new and config.layers_to_transform is not None and config.layers_to_transform in ([], (), set()):
        raise ValueError(
            "`layers_to_transform` is empty, so nothing would be adapted: name layers, or leave it out to take all."
        )


def refuse_unknown_tokens(config: ExtConfig, model: nn.Module) -> None:
    """Raises `ValueError` if the model has no embedding of tokens, or none of one in `trainable_token_indices`."""
    indices = config.trainable_token_indices
    if not indices or not isinstance(model, PreTrainedModel):
        return
    if not (config.inference_mode or config.awaits_weights):
        _refuse_tokens_of_a_biased_head(model)
    if not isinstance(indices, list):
        return
    with suppress(NotImplementedError):
        embeddings: Any = model.get_input_embeddings()
        embeddings = getattr(embeddings, "original_module", embeddings)  # of an adapter that is there already
        if not hasattr(embeddings, "weight"):
            raise ValueError(
                f"`trainable_token_indices` is {indices!r}, but what this {type(model).__name__} reads is no embedding "
                f"of tokens ({type(embeddings).__name__}). Leave it out."
            )
        number = getattr(embeddings, "num_embeddings", len(embeddings.weight))
        unknown = [index for index in indices if not 0 <= index < number]
        if unknown:
            raise ValueError(
                f"`trainable_token_indices` names the tokens {unknown}; the model has {number}, "
                "counted from 0. Call `resize_token_embeddings` first if they are new."
            )
