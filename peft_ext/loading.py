"""Loading an adapter in one line. Importing this package is what makes PEFT know its methods."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from .version import __version__


FOR_THE_ADAPTER = ("adapter_name", "is_trainable", "revision", "subfolder", "autocast_adapter_dtype", "torch_device")
FOR_BOTH = ("token", "cache_dir", "local_files_only")


def load(adapter: str | os.PathLike[str], base_model: nn.Module | None = None, **kwargs: Any) -> PeftModel:
    """Loads an adapter of this package from a directory or the Hub.

    `PeftModel.from_pretrained` does the same, but ends in `KeyError: 'SSF'` where `peft_ext` was not imported before.

    Args:
        adapter: Directory or Hub repository with the adapter.
        base_model: The model to put it on; if `None`, the one that the adapter names is loaded, as the class that it
            was trained on.
        kwargs: What is meant for the adapter (`revision`, `is_trainable`, ...) goes to `PeftModel.from_pretrained`;
            the rest (`num_labels`, `dtype`, `device_map`, ...) to the base model's.

    Raises:
        ValueError: The method is unknown, or `base_model` is left out, but the adapter does not name a model of
            transformers.
    """
    path = os.fspath(adapter)
    both = {key: kwargs.pop(key) for key in FOR_BOTH if key in kwargs}
    ours = {key: kwargs.pop(key) for key in FOR_THE_ADAPTER if key in kwargs}
    where = {key: ours[key] for key in ("revision", "subfolder") if key in ours}
    try:
        config = PeftConfig.from_pretrained(path, **where, **both)
    except KeyError as error:
        raise ValueError(
            f"The adapter {path!r} is of the method {error.args[0]!r}, which neither the installed peft nor peft_ext "
            f"{__version__} has; run `pip install -U peft peft-ext`."
        ) from None
    if base_model is None:
        mapping = config.auto_mapping or {}
        library = mapping.get("parent_library", "")
        if not (library.startswith("transformers.") and config.base_model_name_or_path):
            raise ValueError(
                f"The adapter {path!r} does not say which class of transformers it was trained on; load that model "
                "yourself and pass it as `base_model`."
            )
        model_cls = getattr(import_module(library), mapping["base_model_class"])
        revision = {} if config.revision is None else {"revision": config.revision}
        base_model = model_cls.from_pretrained(config.base_model_name_or_path, **revision, **kwargs, **both)
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} are options of the base model, but `base_model` is loaded already.")
    return PeftModel.from_pretrained(base_model, path, **ours, **both)
