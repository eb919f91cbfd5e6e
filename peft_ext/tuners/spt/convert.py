"""The structured half as a plain LoRA adapter, for servers that know only LoRA."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ...lora_files import write_lora
from .config import SPTConfig
from .layer import SPTLayer
from .parameters import SPTParameters
from .structures import LowRank


def write_structures(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes the low-rank part of an SPT adapter as a PEFT LoRA adapter, which loads without this package.

    Where only some of the experts of `target_parameters` are low-rank, the others get an update of zero.

    Args:
        path: A directory; it takes `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: It has no low-rank part, or has tuned single weights that would be lost: merge
            those into the base, or calibrate with `unstructured=False`.
    """
    config = model.peft_config[adapter_name]
    assert isinstance(config, SPTConfig)
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
                    tensors[f"{inner}.lora_A.weight"] = down.flatten(0, 1)
                    tensors[f"{inner}.lora_B.weight"] = up.permute(1, 2, 0).flatten(1)
                continue
            leaves: Any = module.leaves(adapter_name)
            tensors[f"{key}.lora_A.weight"] = leaves["down"].weight
            tensors[f"{key}.lora_B.weight"] = leaves["up"].weight
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
        lora_dropout=0.0 if parameters else config.dropout,  # which PEFT refuses on parameters
        fan_in_fan_out=any(module.__class__.__name__ == "Conv1D" for module in model.get_base_model().modules()),
    )
    return write_lora(model, path, adapter_name, lora, tensors)
