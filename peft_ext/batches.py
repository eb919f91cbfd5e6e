"""The batches of a pass that looks at data before training, in one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn

from .core import empty_like_of


def loader(dataloader: Iterable[Any] | None, trainer: Any, num_batches: int) -> Iterable[Any]:
    if (dataloader is None) == (trainer is None):
        raise ValueError("Give either `dataloader` or `trainer`.")
    if type(num_batches) is not int:
        raise TypeError(f"`num_batches` must be a whole number, got {num_batches!r}.")
    if num_batches < 1:
        raise ValueError(f"`num_batches` must be at least 1, got {num_batches}.")
    if dataloader is not None and not isinstance(dataloader, Iterable):
        raise TypeError(f"`dataloader` must be an iterable of batches, got {type(dataloader).__name__}.")
    if trainer is not None and not hasattr(trainer, "get_train_dataloader"):
        raise TypeError(f"`trainer` must be a Trainer, got {type(trainer).__name__}.")
    found: Iterable[Any] = trainer.get_train_dataloader() if dataloader is None else dataloader
    return found


def batches(dataloader: Iterable[Any], limit: int, model: nn.Module) -> Iterator[Any]:
    """At most `limit` batches, moved to the model; with several processes as many as all of them have."""
    device = empty_like_of(model).device
    iterator = iter(dataloader)
    for _ in range(limit):
        batch = next(iterator, None)
        if world() > 1:
            has_one = torch.tensor(int(batch is not None), device=device)
            distributed.all_reduce(has_one, distributed.ReduceOp.MIN)
            batch = batch if bool(has_one) else None
        if batch is None:
            return
        yield _moved(batch, device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_process() -> bool:
    return world() == 1 or distributed.get_rank() == 0
