"""Writing an adapter whose updates are low-rank as a plain LoRA adapter, for servers that know only LoRA."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from .core import ADAPTER_WEIGHTS, ExtConfig, tuner_of


def lora_of(ranks: Mapping[str, int], is_transposed: bool = False, **fields: Any) -> LoraConfig:
    """The config of a LoRA with these ranks by module, whose factor is 1 everywhere.

    Args:
        ranks: By the full names of the modules.
        is_transposed: Whether they are GPT-2's Conv1D.
        fields: More of the config.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=is_transposed,
        **fields,
    )


def write_as_lora(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes an adapter as the LoRA that its tuner's `as_lora` makes of it; a form of `About.exports`.

    Raises:
        ValueError: There is no such adapter, or it has no updates of low rank.
    """
    config: Any = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter named {adapter_name!r}; there are {sorted(model.peft_config)}.")
    lora, updates = tuner_of(config).as_lora(model, adapter_name)
    tensors = {}
    for name, (down, up) in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    return write_lora(model, path, adapter_name, lora, tensors)


def write_lora(
    model: PeftModel,
    path: str | os.PathLike[str],
    adapter_name: str,
    lora: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
) -> LoraConfig:
    """`write_adapter` for a LoRA."""
    write_adapter(model, path, adapter_name, lora, tensors)
    return lora


def write_adapter(
    model: PeftModel,
    path: str | os.PathLike[str],
    adapter_name: str,
    made: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
) -> PeftConfig:
    """Writes the tensors of another method, by their keys in the file, with what the adapter trains besides (heads, tokens).

    What all configs have, such as the base model and the task, `made` takes over from the adapter's config.
    """
    config: Any = model.peft_config[adapter_name]
    assert isinstance(config, ExtConfig)
    for field in ("modules_to_save", "trainable_token_indices", "task_type", "base_model_name_or_path", "revision"):
        setattr(made, field, getattr(config, field))
    made.inference_mode = True
    prefix = f".{config.METHOD.lower()}_"
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    besides = {key: tensor for key, tensor in own.items() if prefix not in key}
    os.makedirs(path, exist_ok=True)
    made.save_pretrained(os.fspath(path))
    # cloned, since modules may share a factor, and safetensors takes no tensors that share memory
    kept = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in {**tensors, **besides}.items()
    }
    save_file(kept, Path(path, ADAPTER_WEIGHTS), metadata={"format": "pt"})
    return made
