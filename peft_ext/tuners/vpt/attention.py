"""How an attention gets further keys and values, whatever implementation it uses.

Every attention of transformers asks its config for the implementation and calls that with queries, keys and values. A
`PromptedConfig` in the place of that config names `attend` while prompts are to act, which adds the rows and hands all
over to the model's own implementation. So nothing is said here of projections, rotary positions or dropout. The rows
are made inside that call: gradient checkpointing, which runs a block again, makes them again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


NAME = "peft_ext_prompts"  # of `attend`, among the attention implementations of transformers


class Prompter(Protocol):
    """What a `PromptedConfig` asks."""

    def acts(self) -> bool:
        """Whether there are rows to add."""

    def key_values(self, attention: nn.Module, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The further keys and values `(B, heads, T, head size)`."""

    def travelling(self) -> int:
        """How many of the queries' last rows are prompts themselves."""

    recorded: list[torch.Tensor] | None
    """If a list, gets the share `(B, heads)` of the attention that goes to prompts."""


class PromptedConfig:
    """A model's config as an attention sees it, with `attend` for its attention implementation while prompts act."""

    def __init__(self, stock: Any, prompter: Prompter) -> None:
        self.__dict__.update(stock=stock, prompter=prompter)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "stock" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.stock, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def _attn_implementation(self) -> Any:
        return NAME if self.prompter.acts() else self.stock._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.stock._attn_implementation = value


def attend(
    attention: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention of query `(B, heads, N, head size)` to key and value with the prompts' rows first."""
    config: Any = attention.config
    prompter: Prompter = config.prompter
    keys, values = prompter.key_values(attention, query)
    count = keys.shape[2]
    implementation = config.stock._attn_implementation
    if count and implementation.startswith("flash") and kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{implementation} counts its sliding window from the first key, which is a prompt here: load the model "
            "with `attn_implementation='sdpa'`."
        )
    implementation = "eager" if prompter.recorded is not None else implementation
    output, weights = _stock(attention, implementation)(
        attention,
        query,
        torch.cat([keys, key], 2) if count else key,
        torch.cat([values, value], 2) if count else value,
        extended(attention_mask, count, query, key) if count else attention_mask,
        **kwargs,
    )
    if weights is not None:
        tokens = query.shape[2] - prompter.travelling()
        weights = weights[:, :, :tokens]
        shown = weights[..., count : count + tokens]
        if prompter.recorded is not None:
            prompter.recorded.append(1 - shown.detach().sum(-1).mean(-1))
        weights = shown
    return output, weights


AttentionInterface.register(NAME, attend)


def _stock(attention: nn.Module, implementation: str) -> Callable[..., Any]:
    eager = next(
        function
        for cls in type(attention).__mro__  # the class may be one that a quantiser or FSDP has derived
        if (function := getattr(sys.modules[cls.__module__], "eager_attention_forward", None)) is not None
    )
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def extended(mask: Any, count: int, query: torch.Tensor, key: torch.Tensor) -> Any:
    """An attention mask in which every query sees `count` further keys before the others.

    Args:
        mask: What transformers makes for the implementation: `None`, `(B, N)` (flash), `(B or 1, heads or 1, N or 1, N)`
            of bools or of what is added to the scores, or a `BlockMask` (flex).
        count: How many keys.
        query, key: `(B, heads, N, head size)`.
    """
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor):
        return F.pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1)
    inner = mask.mask_mod
    return _block_mask(
        lambda b, h, q, k: (k < count) | inner(b, h, q, (k - count).clamp(min=0)), mask, query, key, count
    )


def lengthened(mask: Any, count: int, hidden: torch.Tensor) -> Any:
    """A mask for `count` further tokens behind the others, which all see and which see what the first token sees.

    Args:
        mask: As in `extended`.
        count: How many tokens.
        hidden: The tokens without them, `(B, N, D)`.
    """
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor):
        value = 0.0 if mask.is_floating_point() else 1
        mask = F.pad(mask, (0, count), value=value)
        if mask.ndim == 4 and mask.shape[2] > 1:
            mask = torch.cat([mask, mask[:, :, :1].expand(-1, -1, count, -1)], 2)
        return mask
    inner, tokens = mask.mask_mod, hidden.shape[1]

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k >= tokens) | inner(b, h, torch.where(q < tokens, q, 0), k.clamp(max=tokens - 1))

    return _block_mask(sees, mask, hidden[:, None], hidden[:, None], count, count)


def _block_mask(
    sees: Callable[..., Any], mask: Any, query: torch.Tensor, key: torch.Tensor, keys: int, queries: int = 0
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = mask.shape[0], None if mask.shape[1] == 1 else mask.shape[1]
    return create_block_mask(
        sees, batch, heads, query.shape[2] + queries, key.shape[2] + keys, device=str(query.device)
    )
