"""Forwards of a model that a reader changes for a while, and what a frozen pass through it must look out for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


_READS = "_peft_ext_reads"  # on a block that is run on rows that are no tokens


@contextmanager
def rows_of_a_reader(block: nn.Module) -> Iterator[None]:
    """Inside, `block` is run on rows that are no tokens of the model; see `are_tokens`."""
    setattr(block, _READS, True)
    try:
        yield
    finally:
        delattr(block, _READS)


def are_tokens(block: nn.Module) -> bool:
    """Whether what `block` is run on now are the model's tokens, which some adapters know by their place."""
    return not getattr(block, _READS, False)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `module` runs `forward` in the place of its own."""
    own = module.__dict__.get("forward")  # accelerate and others put one here too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_without_compiler(model: nn.Module) -> None:
    """Lets `torch.compile` end its graph at the forward of `model`, inside of which hooks and forwards come and go."""
    own = model.__dict__.get("forward")  # accelerate puts one here
    # a bound method, so that a copy of the model runs itself and not `model`
    eager = (
        MethodType(torch.compiler.disable(type(model).forward), model) if own is None else torch.compiler.disable(own)
    )
    model.forward = eager  # type: ignore[method-assign]


def run_as_before(model: nn.Module) -> None:
    """Undoes `run_without_compiler`."""
    eager: Any = model.__dict__.get("forward")
    if isinstance(eager, MethodType):
        del model.forward
    elif hasattr(eager, "_torchdynamo_orig_callable"):
        model.forward = eager._torchdynamo_orig_callable


@contextmanager
def without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Inside, transformers does not checkpoint `block`, whose second run would not find what hooks did in the first."""
    enabled = getattr(block, "gradient_checkpointing", False)
    if not enabled:
        yield
        return
    block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        block.gradient_checkpointing = enabled  # type: ignore[assignment]


def is_checkpointed(blocks: Iterable[nn.Module]) -> bool:
    """Whether gradient checkpointing is on in any of these blocks."""
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks)


def refuse_reentrant_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Raises `ValueError` if a block that is trained is checkpointed in a way that hides its tensors from autograd."""
    for block in blocks:
        options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
        if block.training and getattr(block, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing hides what is read from autograd, so the adapter in the backbone "
                "would not be trained through it. Use "
                "`gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})`."
            )


def records_outputs(backbone: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether transformers records what the blocks put out in this call of the backbone."""
    names = ("output_hidden_states", "output_attentions")
    config = getattr(backbone, "config", None)
    return any(kwargs.get(name, None) or getattr(config, name, False) for name in names)


def may_be_cut_short(backbone: nn.Module) -> bool:
    """Whether nothing has to be tidied up after each module: FSDP frees the shards then, accelerate offloads."""
    return not any(
        hasattr(module, "_hf_hook")
        or any(cls.__name__.startswith(("FSDP", "FullySharded")) for cls in type(module).__mro__)
        for module in backbone.modules()
    )


class AllFound(Exception):
    """All that is read is known, so the rest of the frozen pass would be for nothing."""
