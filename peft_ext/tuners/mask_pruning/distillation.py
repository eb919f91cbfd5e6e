"""Learning from a teacher without masks: its divergence is added to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.modes import evaluating
from .gate import MaskGate


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """Inside, the model has its LoRA and its heads, but nothing is masked, and it is in eval mode."""
    gates = [module for module in model.modules() if isinstance(module, MaskGate)]
    try:
        for gate in gates:
            gate.is_open = True
        with evaluating(model):
            yield
    finally:
        for gate in gates:
            gate.is_open = False


def divergence(
    model: nn.Module, logits: torch.Tensor, dense: torch.Tensor, temperature: float, inputs: Mapping[str, Any]
) -> torch.Tensor:
    """How far the outputs are from the teacher's `dense`, both `(B, C)` or `(B, T, C)`, measured as the loss does.

    Of classes: `T^2 KL(dense || logits)` of the softmax over the last dimension at temperature T, mean over what has
    a label; a causal model's output is compared where it predicts a token that has one. Of several labels at once:
    the same of each label's sigmoid, mean over all. Of a regression: the squared difference, mean over all.

    Args:
        model: The model; its config names the problem.
        logits: Its output.
        dense: The teacher's.
        temperature: T.
        inputs: The arguments of `forward`, of which `labels` are read, or `shift_labels`.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    new, old = logits.float(), dense.float()
    if problem == "regression":
        return F.mse_loss(new, old)
    new, old = new / temperature, old / temperature
    if problem == "multi_label_classification":
        # two classes, of the logits x and 0, are a label's sigmoid
        new, old = (torch.stack((x, torch.zeros_like(x)), -1) for x in (new, old))
    elif (labels := inputs.get("shift_labels", inputs.get("labels"))) is not None:
        if "shift_labels" not in inputs and _predicts_the_next(model) and labels.shape == new.shape[:-1]:
            new, old, labels = new[..., :-1, :], old[..., :-1, :], labels[..., 1:]
        if labels.ndim > 1 and labels.shape == new.shape[:-1]:
            new, old = new[labels != -100], old[labels != -100]
    new, old = (F.log_softmax(x.reshape(-1, x.shape[-1]), -1) for x in (new, old))
    return temperature**2 * F.kl_div(new, old, reduction="batchmean", log_target=True)


def _predicts_the_next(model: nn.Module) -> bool:
    """Whether the logits at a position are compared with the label of the next one."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not getattr(config, "is_encoder_decoder", False)
