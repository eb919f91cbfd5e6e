"""The frozen pass, and running a block on query rows: see the equation in `model.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...reading import Family, replaced_forward


EMBEDDINGS = "embeddings"  # the submodule of a backbone, under one name in all families


@dataclass
class Frozen:
    """What the frozen pass leaves behind in one layer, and all that the queries need of it.

    Args:
        keys, values: `(B, N, D)`, as the projections put them out.
        mask: What is added to the scores, or whether a key is seen (bool): `(B or 1, heads or 1, 1, N)`; `None`: all.
        args, kwargs: The block's other arguments, tensors left out.
        dtype: Of the hidden states.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


@contextmanager
def without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Inside, transformers does not checkpoint `block`, whose second run would not find the keys and values."""
    enabled = getattr(block, "gradient_checkpointing", False)
    if not enabled:
        yield
        return
    block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        block.gradient_checkpointing = enabled  # type: ignore[assignment]


def query_mask(mask: Any, keys: int, device: torch.device) -> torch.Tensor | None:
    """The row `(B or 1, heads or 1, 1, N)` of an attention mask that holds for a query.

    A query has no position. It sees what the first token sees: the keys that are no padding, with the class token's
    own bias where the architecture has a relative position bias.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):  # flex attention's BlockMask
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, mask.shape[0], None, 1, keys, device=device)
    if mask.ndim == 2:  # flash attention's padding mask
        return mask.bool()[:, None, None, :]
    return mask[..., :1, :]


def _heads(states: torch.Tensor, head_size: int) -> torch.Tensor:
    """`(B, N, D)` as `(B, heads, N, head_size)`."""
    return states.unflatten(-1, (-1, head_size)).transpose(1, 2)


def attend(
    family: Family, attention: nn.Module, frozen: Frozen, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What `attention` puts out for query rows `(B, T, D)` if they attend to the frozen keys and values.

    Stands in for the attention's own `forward`, whatever implementation that uses: they compute the same function.
    """
    names = family.names
    head_size = getattr(attention, names.head_size)
    queries = getattr(attention, names.q)(hidden_states)
    mask = frozen.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(queries.dtype)
    output = F.scaled_dot_product_attention(
        _heads(queries, head_size),
        _heads(frozen.keys, head_size),
        _heads(frozen.values, head_size),
        attn_mask=mask,
        scale=getattr(attention, names.scale),
    )
    output = output.transpose(1, 2).flatten(2)
    return output if names.out is None else getattr(attention, names.out)(output), None


def attention_weights(family: Family, attention: nn.Module, frozen: Frozen, rows: torch.Tensor) -> torch.Tensor:
    """The weights `(B, heads, T, N)` with which `rows`, as the attention gets them, read the tokens."""
    names = family.names
    head_size = getattr(attention, names.head_size)
    queries = _heads(getattr(attention, names.q)(rows), head_size)
    scores = queries @ _heads(frozen.keys, head_size).transpose(2, 3) * getattr(attention, names.scale)
    if frozen.mask is not None:
        shown = frozen.mask
        scores = scores.masked_fill(~shown, -math.inf) if shown.dtype == torch.bool else scores + shown
    return scores.softmax(-1)


def run_block(
    family: Family, block: nn.Module, frozen: Frozen, rows: torch.Tensor, attention_forward: Any = attend
) -> torch.Tensor:
    """Z `(B, T, D)`: the block's own output for the query rows `(B, T, D)`."""
    attention = block.get_submodule(family.attention)
    stand_in = partial(attention_forward, family, attention, frozen)
    with replaced_forward(attention, stand_in), without_checkpointing(block):
        output = block(rows.to(frozen.dtype), *frozen.args, **frozen.kwargs)
    return output[0] if isinstance(output, tuple) else output


class EmbeddingDropout:
    """While open, elements of the backbone's embeddings `(B, N, D)` are dropped with a probability.

    Attributes:
        dropped: Which ones. They are drawn in the first pass; given, they are dropped again.
    """

    def __init__(self, backbone: nn.Module, probability: float, dropped: torch.Tensor | None = None) -> None:
        self.backbone = backbone
        self.probability = probability
        self.dropped = dropped

    def __enter__(self) -> Self:
        self.handle = self.backbone.get_submodule(EMBEDDINGS).register_forward_hook(self._drop)
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.probability == 0:
            return output
        states, *rest = output if isinstance(output, tuple) else (output,)
        if self.dropped is None:
            self.dropped = torch.rand(states.shape, device=states.device) < self.probability
        states = states.masked_fill(self.dropped, 0.0) / (1 - self.probability)
        return (states, *rest) if isinstance(output, tuple) else states


class AllFound(Exception):
    """The keys and values of the last block are known, so the rest of the frozen pass would be for nothing."""


class Capture:
    """While open, each block that the backbone runs is handed over, with its keys and values, to `on_block`.

    With `cut_short`, the pass ends in `AllFound` inside the last block, which `finish` then hands over.
    """

    def __init__(
        self,
        family: Family,
        blocks: Mapping[int, nn.Module],
        on_block: Callable[[int, Frozen], None],
        cut_short: bool = False,
    ) -> None:
        self.family = family
        self.blocks = blocks
        self.on_block = on_block
        self.found: dict[str, Any] = {}
        self.index = -1
        self.last = max(blocks) if cut_short else None
        self.is_reading = False  # the block is being run on query rows, which is not to be captured

    def __enter__(self) -> Self:
        names = self.family.names
        self.handles: list[RemovableHandle] = []
        for index, block in self.blocks.items():
            attention: Any = block.get_submodule(self.family.attention)
            self.handles += [
                block.register_forward_pre_hook(partial(self._enter_block, index), with_kwargs=True),
                attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True),
                # looked up anew each time: an adapter may have been put around them
                getattr(attention, names.k).register_forward_hook(partial(self._keep, "keys")),
                getattr(attention, names.v).register_forward_hook(partial(self._keep, "values")),
                block.register_forward_hook(partial(self._leave_block, index)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_reading:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self.index = index
        self.found = {
            "args": tuple(None if isinstance(value, torch.Tensor) else value for value in args[1:]),
            "kwargs": {
                key: None if isinstance(value, torch.Tensor) else value
                for key, value in kwargs.items()
                if key != "hidden_states"
            },
            "dtype": hidden.dtype,
        }

    def _enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_reading:
            self.found["mask"] = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _keep(self, name: str, projection: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.is_reading:
            return
        self.found[name] = output
        if self.index == self.last and {"keys", "values"} <= self.found.keys():
            raise AllFound

    def _leave_block(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        if not self.is_reading:
            self.finish()

    def finish(self) -> None:
        """Hands over the block whose keys and values were found last."""
        found, self.found = self.found, {}
        found["mask"] = query_mask(found["mask"], found["keys"].shape[1], found["keys"].device)
        self.is_reading = True
        try:
            self.on_block(self.index, Frozen(**found))
        finally:
            self.is_reading = False
