"""The optional link to transformers' Trainer."""

from __future__ import annotations

from statistics import mean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import MaskLoraConfig
from .layer import MaskLoraLayer
from .model import gates_of


class MaskLoraCallback(TrainerCallback):
    """Takes `total_steps` from the Trainer, and adds the keep ratios to its log and progress bar.

    Everything else works without it. A `total_steps` in the config goes before.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passes on the number of optimizer steps that the Trainer has worked out."""
        for config in _configs(kwargs.get("model")).values():
            config.trainer_steps = state.max_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the number back, which is that of this training alone."""
        for config in _configs(kwargs.get("model")).values():
            config.trainer_steps = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `keep_ffn` and `keep_heads`, the share of units kept, means over the layers."""
        model: Any = kwargs.get("model")
        for name in _configs(model):
            kinds: dict[str, list[float]] = {}
            for gate in gates_of(model, name).values():
                kept = gate.kept.float() if gate.is_fixed else gate.logits().detach().sigmoid()
                kinds.setdefault(gate.group.kind, []).append(float(kept.mean()))
            ratios = {f"keep_{kind}": round(mean(values), 4) for kind, values in kinds.items()}
            if logs is not None:
                logs.update(ratios)
            if state.log_history:
                state.log_history[-1].update(ratios)


def _configs(model: Any) -> dict[str, MaskLoraConfig]:
    if model is None or not any(isinstance(module, MaskLoraLayer) for module in model.modules()):
        return {}
    while not hasattr(model, "peft_config"):
        model = model.module  # what wraps it for several processes
    return {name: config for name, config in model.peft_config.items() if isinstance(config, MaskLoraConfig)}
