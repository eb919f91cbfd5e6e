"""Gradient checkpointing: no keys and values are kept, and the backward runs the frozen pass again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...reading import Family
from .frozen import AllFound, Capture, EmbeddingDropout, Frozen, run_block
from .queries import QueryRows


class Rerun(torch.autograd.Function):
    """Gives the query outputs, which were computed without autograd, a backward that runs the frozen pass again."""

    @staticmethod
    def forward(ctx: Any, replay: Callable[..., Any], layers: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """tensors: the query rows of each layer, their outputs, and whatever else `replay` needs."""
        ctx.replay, ctx.layers = replay, layers
        rows, outputs, inputs = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        ctx.save_for_backward(*rows, *inputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        row_grads = ctx.replay(saved[: ctx.layers], grads, saved[ctx.layers :])
        return (None, None, *row_grads, *[None] * (len(ctx.needs_input_grad) - 2 - ctx.layers))


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
    call = [*args, *kwargs.values()]
    at = [index for index, value in enumerate(call) if isinstance(value, torch.Tensor)]
    inputs = [call[index] for index in at]
    rest = [None if isinstance(value, torch.Tensor) else value for value in call]  # the tensors autograd keeps
    device = rows[0].rows.device.type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    places = {index: place for place, index in enumerate(blocks)}
    masks = [one.dropped for one in rows if one.dropped is not None]
    probability = rows[0].probability
    if dropout.dropped is not None:
        masks.append(dropout.dropped)
    embedding_dropout = dropout.probability

    def replay(
        leaves: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        again = list(rest)
        dropped = list(tensors[len(at) :])
        embeddings = EmbeddingDropout(backbone, embedding_dropout, dropped.pop() if embedding_dropout else None)
        for index, tensor in zip(at, tensors, strict=False):
            again[index] = tensor
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
        named = dict(zip(kwargs, again[len(args) :], strict=True))
        with (
            torch.no_grad(),
            torch.autocast(device, enabled=autocast[0], dtype=autocast[1]),
            embeddings,
            Capture(family, blocks, read, cut_short=_may_be_cut_short(backbone)) as capture,
        ):
            try:
                backbone(*again[: len(args)], **named)
            except AllFound:
                capture.finish()
        return [row_grads[place] for place in range(len(leaves))]

    tensors = [*(one.rows for one in rows), *outputs.values(), *inputs, *masks]
    return dict(zip(blocks, Rerun.apply(replay, len(rows), *tensors), strict=True))


def _may_be_cut_short(backbone: nn.Module) -> bool:
    """Whether nothing has to be tidied up after each module: FSDP frees the shards then, accelerate offloads."""
    return not any(
        hasattr(module, "_hf_hook")
        or any(cls.__name__.startswith(("FSDP", "FullySharded")) for cls in type(module).__mro__)
        for module in backbone.modules()
    )
