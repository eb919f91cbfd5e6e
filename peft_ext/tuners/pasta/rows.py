"""Which rows of the hidden states belong to special tokens, and which vector each of them gets."""

from __future__ import annotations

import inspect
import threading
import warnings
from typing import Any

import torch
from torch import nn

from .config import PASTAConfig


class LeadingRows:
    """Rows that stand first in every sample: class token, distillation token, registers."""

    def shares(
        self, adapter: str, config: PASTAConfig, hidden_states: torch.Tensor, samples: list[int] | None = None
    ) -> torch.Tensor:
        """`(N, m)`: one where row i gets vector p, else zero. The hidden states are `(B, N, D)`."""
        assert config.num_vectors is not None
        return torch.eye(
            hidden_states.shape[1], config.num_vectors, device=hidden_states.device, dtype=hidden_states.dtype
        )

    def close(self) -> None:
        """Nothing to take away."""


class _Forward(threading.local):
    """What is known of the model's forward that runs now, in each thread of its own: a server's pool may run several."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.found: dict[str, torch.Tensor] = {}  # by adapter
        self.trains = False

    def __reduce__(self) -> tuple[type[_Forward], tuple[()]]:
        return _Forward, ()  # a copy of the model runs forwards of its own


class SpecialTokens:
    """Tokens that `input_ids` shows to be special: hooks on the model that is called with them.

    They are looked up once for each adapter and forward, and forgotten at its end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._now = _Forward()
        self._checked: set[str] = set()  # adapters of which a training forward was looked at
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self._now
        now.found, now.trains = {}, model.training and torch.is_grad_enabled()
        now.inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._now.found, self._now.inputs = {}, None

    def shares(
        self, adapter: str, config: PASTAConfig, hidden_states: torch.Tensor, samples: list[int] | None = None
    ) -> torch.Tensor:
        """`(B, N, m)`: one where token i of a sample gets vector p, else zero.

        Args:
            adapter: The adapter, which has the same samples in all layers of a forward.
            config: Its config.
            hidden_states: `(B, N, D)`.
            samples: Which of the model's samples these are; `None`: all.

        Raises:
            ValueError: There are no `input_ids`, they do not fit the hidden states, or a sample has more special tokens
                than there are vectors.
        """
        now = self._now
        if adapter not in now.found:
            now.found[adapter] = self._look_up(config, hidden_states.shape[:2], samples).to(hidden_states.dtype)
            if not torch.compiler.is_compiling() and now.trains and adapter not in self._checked:
                self._checked.add(adapter)
                self._warn_of_none(now.found[adapter], config)
        return now.found[adapter].to(hidden_states.device)

    @staticmethod
    def _warn_of_none(shares: torch.Tensor, config: PASTAConfig) -> None:
        """Looks once, at the first batch that is trained on, since a GPU would have to be waited for."""
        if not bool(shares.any()):
            warnings.warn(
                f"PASTA found none of the special tokens {config.special_tokens} in the first training batch, so its vectors "
                "are not trained by it. Let the tokenizer add special tokens, or name those of your texts in "
                "`special_tokens`.",
                UserWarning,
                stacklevel=2,
            )

    def _look_up(self, config: PASTAConfig, shape: torch.Size, samples: list[int] | None) -> torch.Tensor:
        inputs = self._now.inputs
        if inputs is None:
            raise ValueError(
                "A block was run outside its model's forward, so PASTA does not know which tokens it got. Call the "
                "model; for checkpointing use `gradient_checkpointing_enable()` of transformers 5.23 or later."
            )
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise ValueError(
                "PASTA finds special tokens by their ids, and the model was called with `inputs_embeds` and no "
                "`input_ids`. Pass `input_ids`, or switch the adapter off (`disable_adapter()`)."
            )
        if samples is not None:
            ids = ids[samples]
            mask = mask[samples] if isinstance(mask, torch.Tensor) else mask
        if ids.shape != shape:
            raise ValueError(
                f"`input_ids` are {tuple(ids.shape)} and the hidden states {tuple(shape)}: PASTA does not know which "
                "token is where. Call the model without prompts of another method, and with inputs that are not packed."
            )
        kinds = ids.unsqueeze(-1) == torch.tensor(config.special_tokens, device=ids.device)  # (B, N, ids)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:  # padding may have the id of the end of a text
            kinds &= mask[:, -shape[1] :, None].to(ids.device).bool()
        if config.by_token:
            return kinds
        is_special = kinds.any(-1)
        rank = is_special.cumsum(1) - 1
        assert config.num_vectors is not None
        _refuse_surplus(rank, config.num_vectors)
        return is_special.unsqueeze(-1) & (rank.unsqueeze(-1) == torch.arange(config.num_vectors, device=ids.device))


def _refuse_surplus(rank: torch.Tensor, vectors: int) -> None:
    advice = "(pairs of sentences have one more than single ones), or `by_token=True`"
    if torch.compiler.is_compiling():  # a look at the values would break the graph
        message = f"A sample has more special tokens than `num_vectors`, {vectors}. Set that higher {advice}."
        torch._assert_async((rank < vectors).all(), message)
    elif (most := int(rank.max()) + 1) > vectors:
        raise ValueError(
            f"A sample has {most} special tokens, and `num_vectors` is {vectors}. Set `num_vectors={most}` {advice}."
        )
