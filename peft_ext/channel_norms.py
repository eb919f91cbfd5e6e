r"""Which channels of a frozen model's activations are large: one pass, without gradients.

The norm of channel c at a site, over all tokens x of the samples of a class, averaged over the classes:

    norm_c = mean over classes of sqrt(sum of x_c^2)

Without classes it is the norm over everything. Tokens that the attention mask leaves out do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from .core import evaluating


_TOLD = ("attention_mask", "labels")  # of a batch


@dataclass(frozen=True)
class ChannelSite:
    """Activations `(B, ..., C)` of a module.

    Args:
        module: Its full name, without adapters.
        side: `"inputs"` or `"outputs"`; of several the first.
        skip: Tokens at the beginning of a sample that do not count.
        by_class: By the whole numbers in a batch's `labels` `(B,)`, if it has such.
    """

    module: str
    side: str
    skip: int = 0
    by_class: bool = False


class ChannelNorms:
    """Sums of squares by site, class and channel, in fp64 on the host.

    Attributes:
        batches: How many batches they come from.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, torch.Tensor]] = {}
        self.batches = 0

    def add(self, name: str, squares: torch.Tensor, classes: torch.Tensor) -> None:
        """Adds squares `(B, C)` of samples of these classes `(B,)`."""
        own = self.sums.setdefault(name, {})
        for label in classes.unique().tolist():
            total = squares[classes == label].sum(0, dtype=torch.float64).cpu()
            own[label] = own[label] + total if label in own else total

    def of(self, name: str) -> torch.Tensor:
        """The norms `(C,)` of a site, in the mean over the classes."""
        return torch.stack([sums.sqrt() for _, sums in sorted(self.sums[name].items())]).mean(0)

    def gather(self) -> None:
        """Adds up the sums of all processes."""
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, self.sums)
        self.sums = {}
        for part in parts:
            for name, by_class in part.items():
                own = self.sums.setdefault(name, {})
                for label, sums in by_class.items():
                    own[label] = own[label] + sums if label in own else sums


@torch.no_grad()
def measure_channels(
    model: nn.Module,
    sites: Mapping[str, ChannelSite],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> ChannelNorms:
    """Runs the batches through the model, in eval mode, and measures the channels of the sites.

    Args:
        batches: Mappings of keyword arguments, or whatever `run(model, batch)` takes.

    Raises:
        ValueError: There was no batch, one is no mapping, or a site was not reached.
    """
    norms = ChannelNorms()
    current: dict[str, Any] = {}

    def take(name: str, site: ChannelSite, activations: Any) -> None:
        norms.add(name, *_squares(activations, site, current["batch"]))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, site in sites.items():
            hook = _hook(model.get_submodule(site.module), site.side, partial(take, name, site))
            stack.callback(hook.remove)
        for batch in batches:
            current["batch"] = batch
            if run is None and not isinstance(batch, Mapping):
                raise ValueError(
                    f"A batch must be a mapping of keyword arguments of the model, got {type(batch).__name__}; for "
                    "anything else give a `loss_fn(model, batch)`, whose result does not matter here."
                )
            model(**batch) if run is None else run(model, batch)
            norms.batches += 1
    if norms.batches == 0:
        raise ValueError("The data loader gave no batch: it is empty, or an iterator that was used up before.")
    if distributed.is_available() and distributed.is_initialized():
        norms.gather()
    if missing := [site.module for name, site in sites.items() if name not in norms.sums]:
        raise ValueError(f"The batches never ran through {missing[0]!r} and {len(missing) - 1} more of the targets.")
    return norms


def _hook(module: nn.Module, side: str, take: Callable[[Any], None]) -> Any:
    if side == "outputs":
        return module.register_forward_hook(lambda _, args, output: take(output))
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: take(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )


def _squares(activations: Any, site: ChannelSite, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The squares by sample `(B, C)` and the samples' classes `(B,)`."""
    x = activations[0] if isinstance(activations, tuple) else activations
    fields: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    mask, labels = (value if isinstance(value, torch.Tensor) else None for value in map(fields.get, _TOLD))
    if mask is not None and mask.ndim == 2 and x.ndim == 2 and len(x) == mask.numel():
        x = x.view(*mask.shape, -1)  # some models fold the tokens into the batch
    squares = x.float().square()
    if mask is not None and squares.shape[:2] == mask.shape:
        squares = squares * mask[..., None].to(squares.dtype)
    if squares.ndim > 2:
        squares = squares[:, site.skip :].flatten(1, -2).sum(1)
    is_told = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    if site.by_class and is_told and labels is not None and len(squares) % len(labels) == 0:
        # the windows of an image follow one another
        return squares, labels.repeat_interleave(len(squares) // len(labels))
    return squares, torch.zeros(len(squares), dtype=torch.long, device=squares.device)
