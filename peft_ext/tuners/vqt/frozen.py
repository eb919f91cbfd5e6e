"""Running a block on query rows: see the equation in `model.py`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ...reading import Family, Frozen, replaced_forward, rows_of_a_reader, without_checkpointing


EMBEDDINGS = "embeddings"  # the submodule of a backbone, under one name in all families


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
    with replaced_forward(attention, stand_in), without_checkpointing(block), rows_of_a_reader(block):
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
