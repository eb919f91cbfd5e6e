"""`save_as_lora`: any adapter whose method knows how, as a plain LoRA adapter."""

from __future__ import annotations

import os
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel

from ..core import about_of, methods


def save_as_lora(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes an adapter whose updates are low-rank as a PEFT LoRA adapter, which loads without this package.

    Heads and token embeddings that were trained with the adapter go with it.

    Args:
        path: A directory; it takes `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        TypeError: There is no such adapter, or its method has no updates of low rank; the message says which have.
        ValueError: This adapter has parts that LoRA cannot hold; the message says which, and what would work.
    """
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise TypeError(
            f"`model` must be a `PeftModel` with the adapter on it, got {type(model).__name__}: call this before "
            "`merge_and_unload` or `unload`."
        )
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise TypeError(f"There is no adapter named {adapter_name!r} on this model, only {sorted(model.peft_config)}.")
    method = getattr(config.peft_type, "value", str(config.peft_type))
    write: Any = about_of(method).exports().get("lora")
    if write is None:
        able = sorted(name for name, other in methods().items() if "lora" in other.about.exports())
        raise TypeError(
            f"The adapter {adapter_name!r} is of the method {method}, which is not written as LoRA; adapters of "
            f"{', '.join(able)} are."
        )
    lora: LoraConfig = write(model, path, adapter_name)
    return lora
