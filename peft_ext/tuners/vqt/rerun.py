"""Gradient checkpointing: no keys and values are kept, and the backward runs the frozen pass again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...reading import (
    AllFound,
    Family,
    Frozen,
    KeysValuesCapture,
    may_be_cut_short,
    same_autocast,
    split_call,
    with_backward,
)
from .frozen import EmbeddingDropout, run_block
from .queries import QueryRows


def rerunnable(
    family: Family,
    backbone: nn.Module,
    blocks: Mapping[int, nn.Module],
    rows: Sequence[QueryRows],
    outputs: Mapping[int, torch.Tensor],
    dropout: EmbeddingDropout,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[int, torch.Tensor]:
    """The query outputs `(B, T, D)` of each block, with a backward that runs the frozen pass again.

    Args:
        family, backbone, blocks: What is run; the blocks that queries read, by their index.
        rows, outputs: The query rows of each of them, and their outputs, which were computed without autograd.
        dropout: What the first pass drew.
        args, kwargs: What the backbone was called with.
    """
    inputs, call_again = split_call(args, kwargs)
    count = len(inputs)
    autocast = same_autocast(rows[0].rows.device.type)
    places = {index: place for place, index in enumerate(blocks)}
    masks = [one.dropped for one in rows if one.dropped is not None]
    probability = rows[0].probability
    if dropout.dropped is not None:
        masks.append(dropout.dropped)
    embedding_dropout = dropout.probability

    def replay(
        leaves: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        dropped = list(tensors[count:])
        embeddings = EmbeddingDropout(backbone, embedding_dropout, dropped.pop() if embedding_dropout else None)
        again, named = call_again(tensors[:count])
        row_grads: dict[int, torch.Tensor] = {}

        def read(index: int, frozen: Frozen) -> None:
            place = places[index]
            with torch.enable_grad():
                leaf = leaves[place].detach().requires_grad_()
                queries = QueryRows(leaf, dropped[place] if dropped else None, probability)
                output = run_block(family, blocks[index], frozen, queries())
            (row_grads[place],) = torch.autograd.grad(output, leaf, grads[place])

        if backbone.training:
            backbone.eval()
        with (
            torch.no_grad(),
            autocast(),
            embeddings,
            KeysValuesCapture(family, blocks, read, cut_short=may_be_cut_short(backbone)) as capture,
        ):
            try:
                backbone(*again, **named)
            except AllFound:
                capture.finish()
        return [row_grads[place] for place in range(len(leaves))]

    found = with_backward(replay, [one.rows for one in rows], list(outputs.values()), [*inputs, *masks])
    return dict(zip(blocks, found, strict=True))
