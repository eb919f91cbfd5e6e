"""Hidden states of a frozen pass, and what a reader makes of them in the place of the last block's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .forwards import replaced_forward, without_checkpointing


# makes an output `(B, N, D)` of the last block from the states `(B, N, D)` that were read, the block's own output last
OnStates = Callable[[list[torch.Tensor]], torch.Tensor]


class StatesCapture:
    """While open, the states that enter some blocks are picked up, and `on_states` has the last block's output.

    What follows the last block (the final norm, a pooler) runs with autograd if `grad` is set, also where the blocks
    run without.

    Args:
        blocks: The blocks whose input is read, in order.
        last: The last block of the backbone.
        on_states: Called once in each pass, with the inputs of `blocks` and the output of `last`.
        grad: Whether autograd is on from there on.
    """

    def __init__(self, blocks: Sequence[nn.Module], last: nn.Module, on_states: OnStates, grad: bool) -> None:
        self.blocks = blocks
        self.last = last
        self.on_states = on_states
        self.grad = grad
        self.found: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(partial(self._enter, place), with_kwargs=True)
            for place, block in enumerate(self.blocks)
        ]
        handles.append(self.last.register_forward_hook(self._leave))
        for handle in handles:
            self.stack.callback(handle.remove)
        # a checkpointed block runs again in the backward, when the hook on it is gone
        self.stack.enter_context(without_checkpointing(self.last))
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def _enter(self, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found[place] = args[0] if args else kwargs["hidden_states"]

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        own, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        states = [self.found[place] for place in range(len(self.blocks))]
        self.found = {}
        torch.set_grad_enabled(self.grad)  # until the context around the pass ends
        made = self.on_states([*states, own])
        return made if rest is None else (made, *rest)


@contextmanager
def skipped_blocks(blocks: Sequence[nn.Module], output: torch.Tensor) -> Iterator[None]:
    """Inside, the blocks put out what they are given, the last one `output` `(B, N, D)`, and nothing is computed."""

    def skip(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(without_checkpointing(block))
            stack.enter_context(replaced_forward(block, (lambda *_, **__: output) if block is blocks[-1] else skip))
        yield


def padding_mask(backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Which tokens are no padding, `(B, N)` bool, from what the backbone is called with; `None`: all.

    Raises:
        ValueError: The mask is of each query and key, which does not say it.
    """
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]
    mask = dict(zip(names, args, strict=False)).get("attention_mask", kwargs.get("attention_mask"))
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"The `attention_mask` has the shape {tuple(mask.shape)}, which does not tell which tokens are padding: "
            "give one of shape (samples, tokens)."
        )
    return mask.bool()
