r"""Which channels of a frozen model's activations are large: one pass, without gradients.

The norm of channel c at a site, over all tokens x of the samples of a class, averaged over the classes:

    norm_c = mean over classes of sqrt(sum of x_c^2)

Without classes it is the norm over everything. Tokens that the attention mask leaves out do not count: in the decoder of
an encoder-decoder those of `decoder_attention_mask`, or else the padding of `decoder_input_ids` or `labels`. Of a site
with a `row`, the mean of that row over the samples of each class is taken instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from .core import evaluating


# keys and values of a decoder's attention to the encoder's tokens, as T5, BART and BERT call them
_OF_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(.+\.)?(k|v|[kv]_proj|key|value)$"
)


@dataclass(frozen=True)
class ChannelSite:
    """Activations `(B, ..., C)` of a module.

    Args:
        module: Its full name, without adapters.
        side: `"inputs"` or `"outputs"`; of several the first.
        skip: Tokens at the beginning of a sample that do not count.
        by_class: By the whole numbers in a batch's `labels` `(B,)`, if it has such.
        row: The one token of a sample whose values are added up, as they are; `None`: the squares of all.
    """

    module: str
    side: str
    skip: int = 0
    by_class: bool = False
    row: int | None = None


class ChannelNorms:
    """Sums of squares, or of the values of one row, by site, class and channel, in fp64 on the host.

    Attributes:
        sums, counts: By site and class: the sums `(C,)`, and of how many samples they are.
        batches: How many batches they come from.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, torch.Tensor]] = {}
        self.counts: dict[str, dict[int, int]] = {}
        self.batches = 0

    def add(self, name: str, values: torch.Tensor, classes: torch.Tensor) -> None:
        """Adds the squares, or the values, `(B, C)` of samples of these classes `(B,)`."""
        for label in classes.unique().tolist():
            chosen = values[classes == label]
            self._add(name, label, chosen.sum(0, dtype=torch.float64).cpu(), len(chosen))

    def _add(self, name: str, label: int, total: torch.Tensor, count: int) -> None:
        sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
        sums[label] = sums[label] + total if label in sums else total
        counts[label] = counts.get(label, 0) + count

    def of(self, name: str) -> torch.Tensor:
        """The norms `(C,)` of a site, in the mean over the classes."""
        return torch.stack([sums.sqrt() for _, sums in sorted(self.sums[name].items())]).mean(0)

    def means(self, name: str) -> dict[int, torch.Tensor]:
        """The mean `(C,)` over the samples of each class, of a site with a `row`; the classes in their order."""
        counts = self.counts[name]
        return {label: sums / counts[label] for label, sums in sorted(self.sums[name].items())}

    def gather(self) -> None:
        """Adds up the sums of all processes."""
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, (self.sums, self.counts))
        self.sums, self.counts = {}, {}
        for sums, counts in parts:
            for name, by_class in sums.items():
                for label, total in by_class.items():
                    self._add(name, label, total, counts[name][label])


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
        norms.add(name, *_values(activations, site, current["fields"], model))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, site in sites.items():
            hook = _hook(model.get_submodule(site.module), site.side, partial(take, name, site))
            stack.callback(hook.remove)
        for batch in batches:
            current["fields"] = batch if isinstance(batch, Mapping) else {}
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


def _values(
    activations: Any, site: ChannelSite, fields: Mapping[str, Any], model: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squares, or the values of the row, by sample `(B, C)` and the samples' classes `(B,)`."""
    x = activations[0] if isinstance(activations, tuple) else activations
    mask, labels = _mask(site.module, fields, getattr(model, "config", None)), _tensor(fields, "labels")
    if mask is not None and mask.ndim == 2 and x.ndim == 2 and len(x) == mask.numel():
        x = x.view(*mask.shape, -1)  # some models fold the tokens into the batch
    values = x[:, site.row].float() if site.row is not None else _squares(x, site, mask)
    is_told = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    if site.by_class and is_told and labels is not None and len(values) % len(labels) == 0:
        # the windows of an image follow one another
        return values, labels.repeat_interleave(len(values) // len(labels))
    return values, torch.zeros(len(values), dtype=torch.long, device=values.device)


def _mask(module: str, fields: Mapping[str, Any], config: Any) -> torch.Tensor | None:
    """Which tokens `(B, T)` of those that the module sees count; `None`: all."""
    parts = module.split(".")
    if any(part.startswith("vision") or part == "visual" for part in parts):
        return None  # its tokens are patches
    if not ("decoder" in parts and getattr(config, "is_encoder_decoder", False)) or _OF_ENCODER.search(module):
        return _tensor(fields, "attention_mask")
    given, ids, labels = (_tensor(fields, f) for f in ("decoder_attention_mask", "decoder_input_ids", "labels"))
    padding = getattr(config, "pad_token_id", None)
    if given is not None:
        return given
    if ids is not None and padding is not None:
        mask = ids != padding
        mask[:, 0] = True  # T5 starts with the padding token
        return mask
    return labels != -100 if ids is None and labels is not None and labels.ndim == 2 else None


def _tensor(fields: Mapping[str, Any], name: str) -> torch.Tensor | None:
    value = fields.get(name)
    return value if isinstance(value, torch.Tensor) else None


def _squares(x: torch.Tensor, site: ChannelSite, mask: torch.Tensor | None) -> torch.Tensor:
    """The squares `(B, C)`, summed over the tokens that count."""
    squares = x.float().square()
    if mask is not None and squares.shape[:2] == mask.shape:
        squares = squares * mask[..., None].to(squares.dtype)
    return squares[:, site.skip :].flatten(1, -2).sum(1) if squares.ndim > 2 else squares
