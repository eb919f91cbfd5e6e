"""What an adapter trains besides its own tensors: modules in full (heads), and the embeddings of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .config import ExtConfig


def carry_over(model: nn.Module, configs: dict[str, Any], adapters: Sequence[str]) -> Callable[[str, ExtConfig], None]:
    """Checks what a new adapter can take over from several others; nothing is changed yet.

    Returns a function to be called with the new adapter's name and config once it is on the model.

    Raises:
        ValueError: Two of `adapters` have trained the same module, or the same tokens, to different values.
    """
    owners: list[tuple[Any, str]] = []
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            continue
        own = [adapter for adapter in adapters if _tensors(wrapper, adapter)]
        for adapter in own[1:]:
            if not _equal(_tensors(wrapper, own[0]), _tensors(wrapper, adapter)):
                what = "the module" if isinstance(wrapper, ModulesToSaveWrapper) else "tokens of"
                raise ValueError(
                    f"The adapters {own[0]!r} and {adapter!r} have both trained {what} {name!r}, to different values, "
                    "which cannot be added up: only one of the adapters may have it, or all must have the same."
                )
        if own:
            owners.append((wrapper, own[0]))

    def carry(adapter_name: str, config: ExtConfig) -> None:
        for wrapper, owner in owners:
            _copy(wrapper, owner, adapter_name)
        heads = [
            configs[owner].modules_to_save for wrapper, owner in owners if isinstance(wrapper, ModulesToSaveWrapper)
        ]
        tokens = [
            configs[owner].trainable_token_indices
            for wrapper, owner in owners
            if isinstance(wrapper, TrainableTokensWrapper)
        ]
        config.modules_to_save = list(dict.fromkeys(name for names in heads for name in names or ())) or None
        config.trainable_token_indices = tokens[0] if tokens else None

    return carry


def _tensors(wrapper: Any, adapter: str) -> dict[str, torch.Tensor]:
    """What the wrapper holds for an adapter; nothing if it holds nothing."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        return dict(wrapper.modules_to_save[adapter].state_dict()) if adapter in wrapper.modules_to_save else {}
    layer: Any = wrapper.token_adapter
    if adapter not in layer.trainable_tokens_delta:
        return {}
    return {"indices": torch.tensor(layer.token_indices[adapter]), "delta": layer.trainable_tokens_delta[adapter].data}


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@torch.no_grad()
def _copy(wrapper: Any, owner: str, adapter_name: str) -> None:
    if isinstance(wrapper, ModulesToSaveWrapper):
        wrapper.update(adapter_name)
        copied = wrapper.modules_to_save[adapter_name]
        copied.load_state_dict(wrapper.modules_to_save[owner].state_dict())
        copied.requires_grad_(False)
        return
    layer: Any = wrapper.token_adapter
    wrapper.update(adapter_name, token_indices=layer.token_indices[owner], tied_adapter=layer.tied_adapter)
    layer.trainable_tokens_delta[adapter_name].data.copy_(layer.trainable_tokens_delta[owner].data)
    layer.trainable_tokens_delta[adapter_name].requires_grad_(False)
