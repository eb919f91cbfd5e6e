"""Features of a frozen model on disk: one file for each state of the model, in it what each batch gave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..core import acting_adapters, sorted_text
from .heads import Head


class FeatureCache:
    """What is known of a batch is found by a hash of its content; of another state of the model, in another file.

    Args:
        directory: Made if it is not there.
        model: Its weights, adapters with their configs included and the head left out, name the file.
        head: The head, whose name and place count and whose values do not.

    Raises:
        ValueError: The file is damaged.
    """

    def __init__(self, directory: str | PathLike[str], model: nn.Module, head: Head) -> None:
        self.path = Path(directory) / f"features-{_fingerprint(model, head)}.safetensors"
        self.found: dict[str, torch.Tensor] = {}
        self.is_new = False
        if self.path.is_file():
            try:
                with safe_open(self.path, "pt") as file:
                    checksum = (file.metadata() or {}).get("checksum")
                    self.found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"The cached features {str(self.path)!r} are damaged ({error}): delete it."
                ) from error
            if checksum != _checksum(self.found):
                raise ValueError(f"The cached features {str(self.path)!r} are damaged: delete it.")

    def get(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """The features of a batch, `None` if they are not known."""
        return self.found.get(_digest(inputs))

    def put(self, inputs: Mapping[str, Any], features: torch.Tensor) -> None:
        """Keeps the features of a batch, until `save` in memory."""
        self.found[_digest(inputs)] = features.contiguous()
        self.is_new = True

    def save(self) -> None:
        """Writes what is new; a process that is killed meanwhile leaves the old file."""
        if not self.is_new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        save_file(self.found, part, metadata={"checksum": _checksum(self.found)})
        part.replace(self.path)
        self.is_new = False


def _fingerprint(model: nn.Module, head: Head) -> str:
    """A hash of all that the features depend on besides the batch."""
    whole = blake2b(digest_size=16)
    whole.update(repr((type(model).__name__, head.name, acting_adapters(model), _configs(model))).encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        whole.update(config.to_json_string().encode())
    own = {id(parameter) for parameter in head.module.parameters()}
    for name, tensor in _tensors(model):
        if id(tensor) not in own:
            _add(whole, name, tensor)
    return whole.hexdigest()


def _configs(model: nn.Module) -> str:
    """Those of all adapters; without what says how one was saved or is trained."""
    configs: Any = getattr(model, "peft_config", None)
    unread = {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"}
    found = {name: config.to_dict() for name, config in configs.items()} if isinstance(configs, Mapping) else {}
    return sorted_text({name: {k: v for k, v in fields.items() if k not in unread} for name, fields in found.items()})


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _digest(inputs: Mapping[str, Any]) -> str:
    whole = blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        if isinstance(value, torch.Tensor):
            _add(whole, name, value)
        else:
            whole.update(f"{name}={json.dumps(value, default=repr)};".encode())
    return whole.hexdigest()


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        _add(whole, name, tensor)
    return whole.hexdigest()


def _add(whole: Any, name: str, tensor: torch.Tensor) -> None:
    whole.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
