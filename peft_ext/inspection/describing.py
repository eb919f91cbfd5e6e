"""What is in an adapter, and what is left in a pruned model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from ..core import STUMBLES, Adapter, BadInput, Row, about_of
from ..packed_files import weights_file
from .pruned import describe_pruned
from .reading import directory_of, is_pruned, read_adapter
from .tables import grouped, totals, with_ratios


# what is said of every adapter besides
_ELSEWHERE = {"peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "revision"}
_ELSEWHERE |= {"peft_version", "peft_ext_version", "target_modules"}


def rows_of(adapter: Adapter) -> list[Row]:
    """A row for each module: its layer and type, parameters, shapes, and what the method tells.

    Raises:
        BadInput: The tensors are not what the method saves.
    """
    about = about_of(adapter.method)
    try:
        rows = about.rows(adapter)
    except BadInput:
        raise
    except STUMBLES as error:
        raise adapter.misfit(f"{type(error).__name__} {error}") from error
    return [with_ratios(row, about.columns) for row in rows]


def describe(source: str) -> dict[str, Any]:
    """What is in an adapter, or what is left in a pruned model.

    Args:
        source: A directory, or a repository on the Hub.

    Raises:
        BadInput: It is neither.
    """
    directory = directory_of(source)
    if is_pruned(directory):
        return describe_pruned(source, directory)
    adapter = read_adapter(source)
    about = about_of(adapter.method)
    rows, trained = rows_of(adapter), adapter.trained()
    parameters = sum(tensor.numel() for tensor in trained)
    others = sum(tensor.numel() for tensor in adapter.others.values()) if adapter.sites else 0
    file_bytes = weights_file(adapter.directory).stat().st_size
    return {
        "kind": "adapter",
        "source": source,
        "method": adapter.method,
        "name": about.name,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "base_class": adapter.base_class,
        "task": adapter.config.get("task_type"),
        "written_by": _versions(adapter.config),
        "settings": settings(adapter.config),
        "parameters": {"all": parameters, "method": parameters - others, "saved_whole": others},
        "saved_whole": {name: list(tensor.shape) for name, tensor in adapter.others.items()},
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in trained}),
        "file_bytes": file_bytes,
        "bytes_per_parameter": file_bytes / parameters if parameters else None,
        "totals": totals(rows, about.columns),
        "figures": about.figures(adapter, rows),
        "by_type": grouped(rows, "type", about.columns),
        "by_layer": grouped((row for row in rows if row["layer"] >= 0), "layer", about.columns),
        "modules": rows,
    }


def _versions(config: Mapping[str, Any]) -> str:
    names = {"peft_ext": config.get("peft_ext_version"), "peft": config.get("peft_version")}
    return ", ".join(f"{name} {version}" for name, version in names.items() if version)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say most about the method, and the short ones that are not as they are by default."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config_class)
    }
    chosen = {key: config[key] for key in about_of(config["peft_type"]).headline if config.get(key) is not None}
    for key, value in config.items():
        is_short = not isinstance(value, dict) and len(json.dumps(value)) < 80
        if key in defaults and key not in _ELSEWHERE and value != defaults[key] and is_short:
            chosen.setdefault(key, value)
    return chosen
