"""Loading a model that was cut, with no code from where it lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .modeling_pruned import explained, pruned_class, refuse_incomplete


_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# by which classes of transformers say that a config is none, or not theirs
_NO_CONFIG = (ArithmeticError, AttributeError, LookupError, TypeError, StrictDataclassError)
MOST_LAYERS = 10_000


def load_pruned(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Loads what `save_pruned` wrote, with no code from there.

    Args:
        path: A directory, or a repository on the Hub.
        kwargs: For `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

    Raises:
        ValueError: The config does not say of which class of transformers it is or what was cut, it does not fit the
            weights, or these are not complete or not finite; the message lists what is wrong.
    """
    path = os.fspath(path)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "`load_pruned` runs no code from where the model lies. Leave `trust_remote_code` out, or load the model "
            "with the Auto class that its card names."
        )
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        config = read_config(path, **{key: kwargs[key] for key in _WHERE if key in kwargs})
        model, info = class_of(config, path).from_pretrained(path, output_loading_info=True, **kwargs)
    except (RuntimeError, *_NO_CONFIG) as error:
        if isinstance(error, RuntimeError) and (said := explained(error, path)) is not error:
            raise said from error
        raise ValueError(
            f"The config.json in {path} is none of a model of transformers ({type(error).__name__}: {error}). Restore "
            "the one that was saved with the weights."
        ) from error
    refuse_incomplete(info, path)
    refuse_other_kinds(model, path)
    broken = [name for name, p in model.named_parameters() if p.is_floating_point() and not _is_finite(p)]
    if broken:
        raise ValueError(f"The weights in {path} are not finite: {', '.join(broken[:10])} ({len(broken)} in all).")
    loaded: Any = (model, info) if wants_info else model
    return loaded


def refuse_other_kinds(model: PreTrainedModel, path: str) -> None:
    """Raises `ValueError` if a file on this machine has whole numbers for floating-point parameters."""
    floats = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for file in sorted(Path(path).glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in floats & set(tensors.keys()):
                kind = tensors.get_slice(key).get_dtype()
                if not kind.startswith(("F", "BF")):
                    raise ValueError(f"{file} has {kind} for {key!r}, which is a floating-point parameter.")


def read_config(path: str, **where: Any) -> PreTrainedConfig:
    """The config in a directory or repository, by a class of transformers: no code from there is run, or offered."""
    fields, _ = PreTrainedConfig.get_config_dict(path, **where)
    for name, value in fields.items():
        if "layer" in name and isinstance(value, int) and value > MOST_LAYERS:  # transformers walks over all of them
            raise ValueError(
                f"`{name}` of the config.json in {path} is {value}, more than any model has. Restore the one that was "
                "saved with the weights."
            )
        if name.startswith("num_") and isinstance(value, int) and value < 0:
            raise ValueError(
                f"`{name}` of the config.json in {path} is {value}. Restore the one that was saved with the weights."
            )
    return AutoConfig.from_pretrained(path, trust_remote_code=False, **where)


def class_of(config: PreTrainedConfig, path: Any) -> Any:
    """The class that loads a model with this config.

    Raises:
        ValueError: `architectures` names no model class of transformers, or one of another kind of config.
    """
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    stock = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    is_model = isinstance(stock, type) and issubclass(stock, PreTrainedModel)
    if stock is None or not is_model:
        raise ValueError(
            f"`architectures` of the config in {path} is {names!r}, whose first entry should be a model class of "
            "transformers."
        )
    if stock.config_class is None or not isinstance(config, stock.config_class):
        raise ValueError(
            f"`architectures` of the config in {path} is {names!r}, which is no class for the {type(config).__name__} "
            "that its `model_type` asks for."
        )
    return class_for(config, stock) if hasattr(config, "pruned") else stock


def class_for(config: PreTrainedConfig, stock: type[PreTrainedModel]) -> Any:
    """The class for a config with `pruned`; `save_pretrained` copies its code."""
    model_class: Any = pruned_class(stock)
    names = auto_classes(stock, config)
    model_class._auto_class = names[0] if names else None
    return model_class


def auto_classes(stock: type[PreTrainedModel], config: PreTrainedConfig) -> list[str]:
    """The names of the Auto classes that load a stock class."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            if stock in (classes if isinstance(classes, tuple) else (classes,)):
                found.append(name)
    return found


def _is_finite(parameter: torch.Tensor) -> bool:
    return parameter.is_meta or parameter.element_size() < 2 or bool(parameter.isfinite().all())
