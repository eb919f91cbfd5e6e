r"""Sparse fine-tuning: a weight W becomes W + S, where S has k entries that are not zero, trained in place of W.

    y = (W + S) x + b

SpIEL (Ansell et al. 2024, arXiv:2401.16405) moves the support of S while it trains; LT-SFT (Ansell et al. 2022,
arXiv:2110.07560) finds it by a dense training first; others fix it by the magnitude of W or at random.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...core import (
    ExtConfig,
    ExtLayer,
    ExtModel,
    backbone_linears,
    backbone_modules,
    matched_targets,
    warn_of_experts,
)
from ...delta import layer_operation
from ...sparse import LinearOperation
from .budget import budget_of, settle_budget
from .config import SAVE_DTYPES, SparseFTConfig
from .deltas import deltas
from .layer import SparseFTLayer, SparseFTLinear
from .spiel import SpielTracker
from .sums import add_weighted_adapter
from .tracker import warn_once


class SparseFTModel(ExtModel):
    """Puts sparse deltas on the targets of a model; used through `get_peft_model(model, SparseFTConfig(...))`.

    Without `target_modules`, all Linear modules (and GPT-2's Conv1D) but the heads are adapted, as published.
    """

    prefix = "sparse_ft_"
    tuner_layer_cls = SparseFTLayer
    misfit_advice = (
        "It was made for another base model, or with another `density` (or `num_tunable_weights`). To go on training, "
        "use the saved adapter's own config: `PeftModel.from_pretrained(base, path, is_trainable=True)`."
    )

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """All Linear modules of the backbone, whatever the architecture; its 2-D convolutions if it has none.

        Raises:
            ValueError: It has neither.
        """
        names = backbone_linears(model)
        names = names or {name for name, module in backbone_modules(model) if isinstance(module, nn.Conv2d)}
        if not names:
            raise ValueError(
                f"Sparse fine-tuning has no default targets on this {type(model).__name__}: outside its head it has no "
                "Linear module and no 2-D convolution. Name modules in `target_modules`."
            )
        return names

    @classmethod
    def default_targets(cls, config: ExtConfig, model_config: dict[str, Any], model: nn.Module) -> ExtConfig:
        """The default modules; `"all-linear"` are the same ones. Says so if there are experts, which are left out."""
        targets = config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            warn_of_experts(config, model)
            config.target_modules = None
        return super().default_targets(config, model_config, model)

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what the method cannot adapt."""
        return SparseFTLinear if isinstance(layer_operation(base_layer), LinearOperation) else SparseFTLayer

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The name, by which the budgets go, and what this tuner has already warned of."""
        return {"name": name, "said": tuner.__dict__.setdefault("_said", set())}

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Also settles how many weights of which module are tuned, while the model is still as it was.

        Raises:
            ValueError: The budget or the support does not fit the model, or the support is still missing.
        """
        assert isinstance(config, SparseFTConfig)
        cls.check_modules(config, model)
        targets = dict(matched_targets(config, model))
        if targets:  # PEFT itself says so if nothing matches
            settle_budget(config, model, targets)

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the target modules, for `calibrate`.

        Raises:
            ValueError: The config's `selection` is not `"sensitivity"`.
        """
        if config.selection != "sensitivity":
            raise ValueError(f"`calibrate` needs `selection='sensitivity'`, the config says {config.selection!r}.")
        return cls.target_weights(config, model)

    @classmethod
    def with_budget(cls, config: Any, budget: float) -> Any:
        """A copy with `density` below 1, else with `num_tunable_weights`."""
        other = copy.copy(config)
        other.density, other.num_tunable_weights = (budget, None) if budget < 1 else (None, int(budget))
        return other

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """The budget goes to the largest scores of all targets together; with `spread`, to those drawn."""
        chosen = scores.spread_out(config.spread, config.seed)
        config.use_support(chosen.top(budget_of(config, model, scores.total)))

    @classmethod
    def inject_layer(
        cls, tuner: Any, config: ExtConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """As for every method, but modules without a single tuned weight are left alone."""
        assert isinstance(config, SparseFTConfig)
        per_module = config.num_weights_per_module or {}
        if not (per_module.get(name) or per_module.get(f"{name}.bias")):
            return None
        return super().inject_layer(tuner, config, adapter_name, target, name)

    @classmethod
    def stored_tensors(
        cls, model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The values in `save_dtype`; warns if a schedule should have moved the support and has not."""
        warn_if_unmoved(model, adapter_name)
        dtype = SAVE_DTYPES[config.save_dtype]
        if dtype == torch.float32:
            return tensors
        return {
            key: tensor.to(dtype) if tensor.is_floating_point() and f".{cls.prefix}" in key else tensor
            for key, tensor in tensors.items()
        }

    # Composition, see sums.py

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Adds `adapter_name`, the weighted sum of sparse adapters of this model, on the union of their supports.

        What one of them has trained besides, a head or the embeddings of single tokens, is carried over as it is.

        Args:
            adapters: The adapters to add up.
            weights: One factor for each; a negative one subtracts.
            adapter_name: The new adapter; it is not active until `set_adapter`.
            combination_type: `"linear"`, the sum, or `"ties"`: where adapters disagree in sign, the sign of the
                larger total wins and only the values of that sign are averaged by their weights.

        Raises:
            ValueError: An adapter is missing or of another method, the numbers do not match, the new name is taken,
                `combination_type` is unknown, or two adapters have trained one head to different values.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)


def warn_if_unmoved(model: nn.Module, adapter_name: str) -> None:
    """Warns once if an adapter was trained and its schedule never moved the support."""
    trackers = [leaf.tracker for _, leaf in deltas(model, adapter_name) if isinstance(leaf.tracker, SpielTracker)]
    if not any(tracker.backwards for tracker in trackers) or any(tracker.reselections for tracker in trackers):
        return
    tracker = trackers[0]
    steps = max(tracker.step for tracker in trackers)
    if steps == 0:
        reason = (
            "no step of an optimizer that owns its values was seen (DeepSpeed, FSDP with flattened parameters, or an "
            "optimizer that is no torch.optim.Optimizer)"
        )
    elif steps < tracker.config.accumulation_steps:
        reason = f"{steps} steps were taken and the first reselection comes after {tracker.config.accumulation_steps}"
    else:
        reason = "no reselection fell due, or none would have replaced a single value"
    warn_once(
        tracker.said,
        f"unmoved {adapter_name}",
        f"The support of the sparse adapter {adapter_name!r} has not moved since it was drawn at random: {reason}. "
        "It is trained as a fixed random support.",
    )
