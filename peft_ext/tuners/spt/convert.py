"""The structured half as a plain LoRA adapter, for servers that know only LoRA."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from .config import SPTConfig
from .layer import SPTLayer
from .parameters import SPTParameters
from .structures import LowRank


def save_as_lora(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes the low-rank part of an SPT adapter as a PEFT LoRA adapter, which loads without this package.

    Where only some of the experts of `target_parameters` are low-rank, the others get an update of zero.

    Args:
        path: A directory; it takes `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        TypeError: It is no SPT adapter.
        ValueError: It has no low-rank part, or has tuned single weights that would be lost: merge
            those into the base, or calibrate with `unstructured=False`.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SPTConfig):
        raise TypeError(f"There is no SPT adapter named {adapter_name!r} on this model.")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    parameters: list[str] = []
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, SPTLayer):
            continue
        if any(
            adapter_name in getattr(module, container)
            for container in module.adapter_layer_names
            if container.startswith(("spt_delta", "spt_bias"))
        ):
            raise ValueError(
                f"{name!r} has tuned single weights or vectors, which LoRA cannot hold: calibrate with "
                "`unstructured=False, vector_threshold=None`, or merge the adapter (`merge_and_unload`)."
            )
        structure = module.structures.get(adapter_name)
        if structure is not None:
            if type(structure) is not LowRank:
                raise ValueError(f"{name!r} has a structure of the kind {config.structured!r}, LoRA needs 'lora'.")
            key = f"base_model.model.{name}"
            if isinstance(module, SPTParameters):
                stacks = module.low_rank(adapter_name)
                parameters += [f"{name}.{parameter}" for parameter in stacks]
                # PEFT wraps the module once for each parameter, the last one outermost
                for depth, (down, up) in enumerate(reversed(stacks.values())):
                    inner = key + ".base_layer" * depth
                    # (E, r, inputs) as (E r, inputs), (E, outputs, r) as (outputs, r E)
                    tensors[f"{inner}.lora_A.weight"] = down.flatten(0, 1).cpu().contiguous()
                    tensors[f"{inner}.lora_B.weight"] = up.permute(1, 2, 0).flatten(1).cpu().contiguous()
                continue
            leaves: Any = module.leaves(adapter_name)
            tensors[f"{key}.lora_A.weight"] = leaves["down"].weight.detach().cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = leaves["up"].weight.detach().cpu().contiguous()
            ranks[name] = len(leaves["down"].weight)
    if not ranks and not parameters:
        raise ValueError(f"The SPT adapter {adapter_name!r} has no low-rank part.")
    first = next(iter(ranks.values()), config.r)
    lora = LoraConfig(
        r=first,
        lora_alpha=config.scale * first,  # type: ignore[arg-type]
        target_modules=list(ranks),
        target_parameters=parameters or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != first},
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        lora_dropout=0.0 if parameters else config.dropout,  # which PEFT refuses on parameters
        fan_in_fan_out=any(module.__class__.__name__ == "Conv1D" for module in model.get_base_model().modules()),
    )
    os.makedirs(path, exist_ok=True)
    lora.save_pretrained(os.fspath(path))
    save_file(tensors | _saved_modules(model, adapter_name), os.path.join(path, "adapter_model.safetensors"))
    return lora


def _saved_modules(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """What the adapter saves besides: heads that are trained in full, and token embeddings."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value.cpu().contiguous() for key, value in own.items() if ".spt_" not in key}
