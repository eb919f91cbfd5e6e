"""The optional link to transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...delta import SparseDelta
from .model import warn_if_unmoved


class SparseFTCallback(TrainerCallback):
    """Takes `total_steps` of the schedule from the Trainer, logs the reselections, and says so if there were none.

    Everything else works without it. A `total_steps` in the config goes before.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passes on the number of optimizer steps that the Trainer has worked out."""
        for leaf in _deltas(kwargs.get("model")):
            if leaf.tracker is not None:
                leaf.tracker.config.trainer_steps = state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `reselections`, how many there were, and `replaced`, the share of the support that the last one moved."""
        found_leaves = _deltas(kwargs.get("model"))
        leaves = [leaf for leaf in found_leaves if leaf.tracker is not None and leaf.weight.requires_grad]
        if not leaves:
            return
        steps = {step for leaf in leaves for step, _ in leaf.tracker.reselections}
        last = max(steps, default=0)
        moved = sum(count for leaf in leaves for step, count in leaf.tracker.reselections if step == last)
        found = {"reselections": len(steps), "replaced": round(moved / sum(leaf.weight.numel() for leaf in leaves), 4)}
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the number back, which is that of this training alone, and warns of a schedule that never moved."""
        model: Any = kwargs.get("model")
        for leaf in _deltas(model):
            if leaf.tracker is not None:
                leaf.tracker.config.trainer_steps = None
        for name in getattr(model, "peft_config", {}):
            warn_if_unmoved(model, name)


def _deltas(model: nn.Module | None) -> list[SparseDelta]:
    return [] if model is None else [module for module in model.modules() if isinstance(module, SparseDelta)]
