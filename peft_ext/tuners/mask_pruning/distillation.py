"""Learning from a teacher without masks: its divergence is added to the loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core import without_adapters
from ...core.advice import trains_fresh_head
from ...core.modes import evaluating
from .config import MaskLoraConfig
from .gate import MaskGate


class Distillation:
    """A hook on the model: with `distillation`, its loss also has the divergence from a teacher without masks."""

    def __init__(self) -> None:
        self._has_fresh_head: bool | None = None  # not looked up yet

    @classmethod
    def watch(cls, model: nn.Module) -> None:
        """Puts the hook on a model that does not have it; PEFT does not call the tuner of every model."""
        if not any(isinstance(hook, cls) for hook in model._forward_hooks.values()):
            model.register_forward_hook(cls(), with_kwargs=True)

    @classmethod
    def leave(cls, model: nn.Module) -> None:
        """Takes it away."""
        for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, cls)]:
            del model._forward_hooks[key], model._forward_hooks_with_kwargs[key]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):  # the teacher's forward is not watched, either
            return
        config = _config_of(model)
        if config is None or not config.distillation:
            return
        if getattr(output, "loss", None) is None or getattr(output, "logits", None) is None:
            raise ValueError(
                "`distillation` is added to the `loss` that the model returns beside its `logits`: pass `labels` to it. "
                "TRL's SFTTrainer computes its loss itself; use `Trainer` there, or `distillation=0`."
            )
        learns_from_itself = config.distillation_teacher == "self"
        if config.distillation_teacher is None:
            if self._has_fresh_head is None:
                self._has_fresh_head = trains_fresh_head(model)
            learns_from_itself = self._has_fresh_head
        with torch.no_grad(), (without_masks if learns_from_itself else without_adapters)(model):
            dense = model(*args, **kwargs)
        output.loss = output.loss + config.distillation * divergence(
            model, output.logits, dense.logits, config.distillation_temperature, kwargs
        )


def _config_of(model: nn.Module) -> MaskLoraConfig | None:
    """That of the first active adapter with masks; the one that its schedule goes by."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "mask_pruning_gate")]
    for layer in layers:
        gates = layer.mask_pruning_gate
        for name in [] if layer.disable_adapters else layer.active_adapters:
            if name in gates and gates[name].schedule is not None:
                config: MaskLoraConfig = gates[name].schedule.config
                return config
    return None


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
    a label; a causal model's output is compared where it predicts a token that has one. If the model's own loss is the
    sum over this batch divided by `num_items_in_batch`, so is this one. Of several labels at once:
    the same of each label's sigmoid, mean over all. Of a regression: the squared difference, mean over all.

    Args:
        model: The model; its config names the problem.
        logits: Its output.
        dense: The teacher's.
        temperature: T.
        inputs: The arguments of `forward`, of which `labels` are read, or `shift_labels`, and `num_items_in_batch`.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    new, old = logits.float(), dense.float()
    if problem == "regression":
        return F.mse_loss(new, old)
    new, old = new / temperature, old / temperature
    count: Any = None
    if problem == "multi_label_classification":
        # two classes, of the logits x and 0, are a label's sigmoid
        new, old = (torch.stack((x, torch.zeros_like(x)), -1) for x in (new, old))
    elif (labels := inputs.get("shift_labels", inputs.get("labels"))) is not None:
        if "shift_labels" not in inputs and _predicts_the_next(model) and labels.shape == new.shape[:-1]:
            new, old, labels = new[..., :-1, :], old[..., :-1, :], labels[..., 1:]
        if labels.shape == new.shape[:-1]:
            new, old = new[labels != -100], old[labels != -100]
        if _divides_by_given_count(type(model).forward):
            count = inputs.get("num_items_in_batch")
    new, old = (F.log_softmax(x.reshape(-1, x.shape[-1]), -1) for x in (new, old))
    if count is None:
        count = max(len(new), 1)  # there may be no labels
    elif isinstance(count, torch.Tensor):
        count = count.to(new.device)
    return temperature**2 * F.kl_div(new, old, reduction="sum", log_target=True) / count


@cache
def _divides_by_given_count(forward: Callable[..., Any]) -> bool:
    """Whether a model's loss is divided by the `num_items_in_batch` that Trainer passes to most models.

    It is where `forward` hands its keyword arguments on to transformers' loss function; others take no notice.
    """
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # there is no source
        return False
    return re.search(r"self\.loss_function\(.*?\*\*", source, re.DOTALL) is not None


def _predicts_the_next(model: nn.Module) -> bool:
    """Whether the logits at a position are compared with the label of the next one."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not getattr(config, "is_encoder_decoder", False)
