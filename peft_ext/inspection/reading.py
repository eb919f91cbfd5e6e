"""Reading the files of an adapter, from a directory or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, BadInput, Site, about_of, method_of
from ..packed_files import PACKED, is_packed, read_packed


CONFIG = "config.json"
ADAPTER_FILES = [
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PACKED,
    CONFIG,
    "README.md",
]  # what is fetched from the Hub to be read
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def directory_of(source: str, patterns: Sequence[str] = ADAPTER_FILES) -> Path:
    """The directory that `source` is, or the copy of that repository on the Hub.

    Raises:
        BadInput: It is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise BadInput(f"{source} is no safetensors file, and nothing else is read. {_resave()}")
    if path.exists():
        raise BadInput(f"{source} is a file: give the directory that it is in.")
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise BadInput(f"{source} does not exist: give a directory, or a repository of the Hub (user/name).") from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # whatever can go wrong on the way to the Hub
        raise BadInput(
            f"{source} is no directory here, and no repository of that name came from the Hub "
            f"({type(error).__name__}): check the name, the connection, and `hf auth login` if it is private."
        ) from error


def read_adapter(source: str, besides: Sequence[str] = ()) -> Adapter:
    """Reads an adapter from a directory or the Hub.

    Args:
        source: The directory, or the repository.
        besides: Patterns of further files to fetch from the Hub.

    Raises:
        BadInput: There is none, its method is unknown, or its files do not fit together.
    """
    directory = directory_of(source, [*ADAPTER_FILES, *besides])
    if not (directory / ADAPTER_CONFIG).is_file():
        raise BadInput(_no_adapter(source, directory))
    config = read_json(directory / ADAPTER_CONFIG)
    method = config.get("peft_type")
    if method not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:  # compared, for it may be of any type
        raise BadInput(
            f"{source} is of the method {method!r}, which neither the installed peft nor peft_ext has: "
            "`pip install -U peft peft-ext`, or import the package that it comes from in Python."
        )
    file = directory / ADAPTER_WEIGHTS
    if is_packed(directory):
        sites, others = by_site(read_packed(directory / PACKED).unpacked(), method)
        return Adapter(source, directory, config, sites, others)
    if not file.is_file():
        found = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        has = f"has {', '.join(found)}, which is not read" if found else f"has no {ADAPTER_WEIGHTS}"
        raise BadInput(f"{source} {has}. {_resave()}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise BadInput(
            f"{ADAPTER_WEIGHTS} of {source} is no safetensors file ({error}): a damaged copy, or a pointer of git LFS "
            "(`git lfs pull`)."
        ) from None
    sites, others = by_site(tensors, method)
    if not sites and (method_of(method) is not None or about_of(method).columns):
        raise BadInput(
            f"{ADAPTER_CONFIG} of {source} says {method}, but {ADAPTER_WEIGHTS} has no tensor of that method "
            f"({_some(tensors) or 'it is empty'}): restore the two that were saved together."
        )
    return Adapter(source, directory, config, sites, others)


def is_pruned(directory: Path) -> bool:
    """Whether `save_pruned` wrote a model there."""
    if (directory / ADAPTER_CONFIG).is_file() or not (directory / CONFIG).is_file():
        return False
    config = read_json(directory / CONFIG)
    return "pruned" in config or "unpruned" in config


def _no_adapter(source: str, directory: Path) -> str:
    found = [path.parent.name for path in sorted(directory.glob(f"*/{ADAPTER_CONFIG}"))]
    if found:
        return (
            f"{source} has no {ADAPTER_CONFIG}, but there are adapters in it: {', '.join(found)}. Give one of these."
        )
    if (directory / CONFIG).is_file():
        return f"{source} is a whole model and was not pruned: give an adapter, or what `save_pruned` wrote."
    names = _some(path.name for path in directory.iterdir())
    return f"{source} has no {ADAPTER_CONFIG} ({names or 'it is empty'}): give what `model.save_pretrained` wrote."


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is no JSON ({error}): restore the file that was saved.") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object but a {type(content).__name__}: restore the file that was saved.")
    return content


def _resave() -> str:
    return "Only safetensors are read, for other files can run code: load it in Python and `save_pretrained` it again."


def _some(names: Iterable[str]) -> str:
    chosen = sorted(names)
    return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")


def by_site(tensors: Mapping[str, torch.Tensor], method: str) -> tuple[dict[str, Site], dict[str, torch.Tensor]]:
    """The tensors of a method, as they are saved, by the module that they are on; and the others."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[method]  # type: ignore[index]  # its keys hash like their values
    about = about_of(method)
    sites: dict[str, Site] = {}
    others = {}
    for key, tensor in tensors.items():
        names = key.removeprefix("base_model.model.").split(".")
        at = next((i for i, name in enumerate(names) if name.startswith(prefix)), None)
        if at is None:
            others[".".join(names)] = tensor
            continue
        module = ".".join(names[:at]).removesuffix(".base_layer")
        leaf = ".".join(names[at:]).removeprefix(prefix)
        module, leaf = about.place(module, leaf)
        sites.setdefault(module, Site(module, state=about.state)).leaves[leaf] = tensor
    return sites, others
