"""Plain LoRAs with random factors on the tiny models, on disk, to be fused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import tiny
from peft import LoraConfig, get_peft_model


TARGETS: dict[str, list[str]] = {"mlp": ["fc1", "fc2"]}
_directory = tempfile.TemporaryDirectory(prefix="peft_ext_loras_")


def write_lora(path: Path, name: str, *, seed: int, dtype: torch.dtype = torch.float32, **fields: Any) -> str:
    """A LoRA on all Linear modules of a tiny model's backbone, with factors of ordinary size; returns its directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exclude = {} if name in TARGETS else {"exclude_modules": r"(.*\.)?(classifier|score|pooler|lm_head)(\..*)?"}
        fields = {"r": 2, "target_modules": TARGETS.get(name, "all-linear"), **exclude, **fields}
        fields.setdefault("fan_in_fan_out", name == "gpt2")
        model = get_peft_model(tiny(name).to(dtype), LoraConfig(**fields), autocast_adapter_dtype=False)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.5)
    model.save_pretrained(str(path))
    return str(path)


@cache
def two_loras(name: str) -> list[str]:
    """The directories of two LoRAs of unequal ranks."""
    folder = Path(_directory.name, name)
    first = write_lora(folder / "first", name, seed=1, lora_alpha=3)
    return [first, write_lora(folder / "second", name, seed=2, r=3, lora_alpha=6)]


class LorasFor(Mapping[str, Mapping[str, Any]]):
    """Config fields by model, made when they are asked for."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        if name not in self.names:
            raise KeyError(name)
        return {"adapters": two_loras(name), "target_modules": TARGETS.get(name)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
