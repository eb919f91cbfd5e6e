"""The mean gradient of a loss by some parameters, over batches: for methods that need its sign."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .batches import batches, world
from .calibrate import _as_it_was, _loss, _take_together


def mean_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int | None = None,
) -> dict[str, torch.Tensor]:
    """The mean, with its sign, of the gradients of the batches' losses, in eval mode; by the parameters' names.

    With several processes it is the mean over all of them.

    Raises:
        ValueError: There are no batches, or the loss is not finite or depends on none of the parameters.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0

    def take(name: str, grad: torch.Tensor, parameter: torch.Tensor) -> None:
        sums[name] += grad.detach()

    with _as_it_was(model, parameters):
        model.eval()
        for batch in batches(dataloader, sys.maxsize if num_batches is None else num_batches, model):
            loss = _loss(model, batch, loss_fn)
            if not bool(torch.isfinite(loss)) or not loss.requires_grad:
                raise ValueError(f"The loss of batch {count} is {loss.item()}, or depends on none of the parameters.")
            loss.backward()
            if world() > 1:
                _take_together(parameters, take)
            else:
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        take(name, parameter.grad, parameter)
                        parameter.grad = None
            count += 1
    if count == 0:
        raise ValueError("The data loader gave no batch: it is empty, or an iterator that was used up before.")
    return {name: total / count for name, total in sums.items()}
