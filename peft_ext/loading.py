"""Loading an adapter in one line. Importing this package is what makes PEFT know its methods."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .core import ADAPTER_CONFIG, methods, require_model
from .core.mixed import ORDER
from .export.loading import load_pruned, read_config
from .packed_files import PACKED, is_packed, unpacked
from .version import __version__


FOR_THE_ADAPTER = (
    *("adapter_name", "is_trainable", "revision", "subfolder", "autocast_adapter_dtype", "torch_device"),
    "low_cpu_mem_usage",
)
HEAD_NAMES = {"classifier", "score"}
FOR_BOTH = ("token", "cache_dir", "local_files_only")


def load(adapter: str | os.PathLike[str], base_model: nn.Module | None = None, **kwargs: Any) -> PeftModel:
    """Loads an adapter of this package, or a packed one of any method, from a directory or the Hub.

    `PeftModel.from_pretrained` does the same, but ends in `KeyError: 'SSF'` where `peft_ext` was not imported before.

    Args:
        adapter: Directory or Hub repository with the adapter.
        base_model: The model to put it on; if `None`, the one that the adapter names is loaded, as the class that it
            was trained on, with as many labels as the head that the adapter brings. If it is a `PeftModel`, the adapter
            comes beside those that it has, as by its `load_adapter`, and `adapter_name` must be given.
        kwargs: What is meant for the adapter (`revision`, `is_trainable`, ...) goes to `PeftModel.from_pretrained`;
            the rest (`num_labels`, `dtype`, `device_map`, ...) to the base model's.

    Raises:
        ValueError: The method is unknown, `base_model` has an adapter of that name, or is left out, but the adapter does not name a model of
            transformers, or the adapter's weights are incomplete or damaged.
    """
    path = os.fspath(adapter)
    if os.path.isfile(os.path.join(path, ORDER)):
        raise ValueError(
            f"{path!r} holds the adapters of a mixed model: load them together with "
            "`peft_ext.PeftMixedModel.from_pretrained(base_model, path)`, or one of them from its own folder."
        )
    both = {key: kwargs.pop(key) for key in FOR_BOTH if key in kwargs}
    ours = {key: kwargs.pop(key) for key in FOR_THE_ADAPTER if key in kwargs}
    where: dict[str, Any] = {key: ours[key] for key in ("revision", "subfolder") if key in ours}
    try:
        config = PeftConfig.from_pretrained(path, **where, **both)
    except KeyError as error:
        raise ValueError(
            f"The adapter {path!r} is of the method {error.args[0]!r}, which neither the installed peft nor peft_ext "
            f"{__version__} has; run `pip install -U peft peft-ext`."
        ) from None
    if base_model is not None:
        require_model(base_model, "base_model")
    if isinstance(base_model, PeftModel):
        return _beside(base_model, path, {**ours, **both, **kwargs})
    packed = packed_directory(path, where, both)
    if packed is not None:
        own = {key: value for key, value in ours.items() if key not in where}
        with unpacked(packed) as folder:
            return load(folder, base_model, **own, **both, **kwargs)
    if base_model is None:
        base = str(config.base_model_name_or_path)
        hub: dict[str, Any] = both if config.revision is None else {**both, "revision": config.revision}
        is_cut = is_pruned(config, hub)
        model_cls: Any = None if is_cut else base_class(config, path)
        if not {"num_labels", "id2label", "config"} & kwargs.keys():
            weights = adapter_file(path, where, both)
            labels = None if weights is None else labels_of(weights)
            stock = read_config(base, **hub) if is_cut else model_cls.config_class.from_pretrained(base, **hub)
            if labels is not None and labels != getattr(stock, "num_labels", labels):
                # the base's own head is of another size, and the adapter's is put in its place
                kwargs |= {"num_labels": labels, "ignore_mismatched_sizes": True}
        base_model = load_pruned(base, **kwargs, **hub) if is_cut else model_cls.from_pretrained(base, **kwargs, **hub)
    elif kwargs:
        raise ValueError(
            f"{', '.join(sorted(kwargs))}: no options of an adapter, and `base_model` is loaded already. An adapter has "
            f"{', '.join(sorted((*FOR_THE_ADAPTER, *FOR_BOTH)))}."
        )
    try:
        return PeftModel.from_pretrained(base_model, path, **ours, **both)
    except KeyError as error:  # PEFT looks for the tensors of heads and tokens without asking
        raise ValueError(
            f"The adapter {path!r} has no tensor {error.args[0]!r}, which its adapter_config.json asks for: restore the "
            "files that were saved."
        ) from error
    except SafetensorError as error:
        raise ValueError(f"The weights of the adapter {path!r} cannot be read: {error}") from error


def _beside(model: PeftModel, path: str, options: dict[str, Any]) -> PeftModel:
    """One more adapter on a model that has some; from a packed file, too, which PEFT's `load_adapter` cannot read."""
    allowed = (*FOR_THE_ADAPTER, *FOR_BOTH)
    if unknown := sorted(options.keys() - set(allowed)):
        raise ValueError(f"{', '.join(unknown)}: no options of an adapter. It has {', '.join(sorted(allowed))}.")
    name = options.pop("adapter_name", None)
    if name is None or name in model.peft_config:
        raise ValueError(
            f"`adapter_name` is {name!r}, and the model has the adapters {sorted(model.peft_config)}: give the new one "
            "another name."
        )
    hub: dict[str, Any] = {key: options.pop(key) for key in ("revision", "subfolder") if key in options}
    both: dict[str, Any] = {key: options.pop(key) for key in FOR_BOTH if key in options}
    packed = packed_directory(path, hub, both)
    if packed is None:
        model.load_adapter(path, name, **options, **hub, **both)
        return model
    with unpacked(packed) as folder:
        model.load_adapter(folder, name, **options)
    return model


def is_pruned(config: PeftConfig, hub: dict[str, Any]) -> bool:
    """Whether an adapter was trained on a model that `save_pruned` wrote: then the class is said by that one's config."""
    if config.base_model_name_or_path:
        with suppress(OSError):  # the loading of the base says it
            return "pruned" in PreTrainedConfig.get_config_dict(config.base_model_name_or_path, **hub)[0]
    return False


def base_class(config: PeftConfig, path: str) -> Any:
    """The class of transformers that an adapter says it was trained on; nothing else is taken.

    Raises:
        ValueError: It names none.
    """
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    library, name = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    found = None
    if isinstance(library, str) and library.startswith("transformers.models.") and config.base_model_name_or_path:
        with suppress(ImportError):
            found = getattr(import_module(library), str(name), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise ValueError(
        f"The adapter {path!r} does not say which class of transformers it was trained on; load that model yourself "
        "and pass it as `base_model`."
    )


def adapter_file(path: str, where: dict[str, Any], both: dict[str, Any]) -> str | None:
    """The file with an adapter's weights, `None` if there is none in safetensors."""
    local = os.path.join(path, where.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(local):
        return local
    if os.path.isdir(path):
        return None
    with suppress(EntryNotFoundError):
        return hf_hub_download(path, SAFETENSORS_WEIGHTS_NAME, **where, **both)
    return None


def packed_directory(path: str, where: dict[str, Any], both: dict[str, Any]) -> Path | None:
    """Where an adapter lies that `compress` or `binarize` has packed, `None` if it is an ordinary one."""
    local = Path(path, where.get("subfolder") or "")
    if Path(path).is_dir():
        return local if is_packed(local) else None
    if adapter_file(path, where, both) is not None:
        return None
    with suppress(EntryNotFoundError):
        hf_hub_download(path, ADAPTER_CONFIG, **where, **both)
        return Path(hf_hub_download(path, PACKED, **where, **both)).parent
    return None


def labels_of(file: str) -> int | None:
    """The number of labels of the head in an adapter's file, `None` if it has none, or one of several layers."""
    prefixes = tuple(method.prefix for method in methods().values())  # a head may carry an adapter
    with safe_open(file, "pt") as tensors:
        heads = [key for key in tensors.keys() if HEAD_NAMES & set(key.split(".")) and key.endswith(".weight")]  # noqa: SIM118
        last = [key for key in heads if key.endswith(".out_proj.weight")] or heads
        shapes = [tensors.get_slice(key).get_shape() for key in last if not has_part(key, prefixes)]
    return shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 2 else None


def has_part(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a part of a tensor's name begins with one of the prefixes."""
    return any(part.startswith(prefixes) for part in key.split("."))
