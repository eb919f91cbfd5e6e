"""LoRA-SB on a whole model: its targets, and what it takes from a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import ExtLayer, ExtModel, all_linears, layers_by_name, linear_features, matched_targets, weight_of
from ...lora_files import lora_of
from ...scores import Scores
from .config import CORE, DOWN, UP, LoraSBConfig
from .layer import LoraSBLinear, factors


class LoraSBModel(ExtModel):
    """Puts the matrices on the targets; used through `get_peft_model(model, calibrate(model, LoraSBConfig(...), data))`."""

    prefix = "low_rank_core_"
    tuner_layer_cls = LoraSBLinear
    scores_kind: ClassVar[str] = "gradient"

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """All Linear modules of the backbone, as published.

        Raises:
            ValueError: It has none.
        """
        return all_linears("LoRA-SB", config, model)

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is no linear module."""
        if linear_features(base_layer) is None:
            raise TypeError(f"LoRA-SB is for Linear modules (and GPT-2's Conv1D), not a {type(base_layer).__name__}.")
        return LoraSBLinear

    @classmethod
    def check_targets(cls, config: LoraSBConfig, model: nn.Module) -> None:
        """Raises `ValueError`, too, without a calibration of these very modules, or with a rank above what they have."""
        super().check_targets(config, model)
        targets = dict(matched_targets(config, model))
        refuse_large_rank(config, targets)
        if config.init_weights is not True or config.awaits_weights:
            return
        if not config.calibrated:
            raise ValueError(
                "LoRA-SB starts where the first step of full fine-tuning would lead, and has to look at some data:\n"
                "    config = peft_ext.calibrate(model, config, dataloader)\n"
                "before `get_peft_model(model, config)`. `init_weights='weights'` (LoRA-XS) needs no data."
            )
        support = config.support
        for name, module in targets.items() if support is not None else ():
            assert support is not None
            inputs, outputs = linear_features(module) or (0, 0)
            parts = [support.get(f"{name}.{part}", torch.empty(0)) for part in (DOWN, UP)]
            if [tuple(part.shape) for part in parts] != [(config.r, inputs), (outputs, config.r)]:
                raise ValueError(
                    f"The config was calibrated for another model, other targets or another `r`: it has no factors that "
                    f"fit {name!r}. Calibrate it on this {type(model).__name__}."
                )

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """By its name a layer finds its factors."""
        return {"name": name}

    # Calibration

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the target modules.

        Raises:
            TypeError: The start needs no data.
            ValueError: The rank is above what a target has.
        """
        if config.init_weights is not True:
            raise TypeError(f"`init_weights={config.init_weights!r}` looks at no data: there is nothing to calibrate.")
        refuse_large_rank(config, cls.resolved_targets(config, model))
        return cls.target_weights(config, model)

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Scores) -> None:
        """Writes the factors of -`step_size` sign(g), and R at the start, into the config."""
        support: dict[str, torch.Tensor] = {}
        for name, module in cls.resolved_targets(config, model).items():
            weight = weight_of(module)
            gradient = scores.of(name).to(weight.device).view(weight.shape)
            step = -config.step_size * (gradient.T if isinstance(module, Conv1D) else gradient).sign()
            down, values, up = factors(step, min(config.r, *step.shape))
            parts = {DOWN: down, CORE: values.diag(), UP: up}
            support |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
        config.support, config.calibrated = support, True

    # Conversion

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """A, and B R as LoRA's B."""
        layers = layers_by_name(model, LoraSBLinear, adapter_name)
        r = model.peft_config[adapter_name].r  # type: ignore[union-attr, index, operator]
        transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        return lora_of(dict.fromkeys(layers, r), transposed), {
            name: layer.low_rank(adapter_name) for name, layer in layers.items()
        }


def refuse_large_rank(config: LoraSBConfig, targets: Mapping[str, nn.Module]) -> None:
    """`ValueError` if a target has fewer inputs or outputs than `r`."""
    for name, module in targets.items():
        if min(linear_features(module) or (0, 0)) < config.r:
            raise ValueError(
                f"`r` is {config.r}, and {name!r} has {linear_features(module)} inputs and outputs: lower `r`, or "
                "list the module in `exclude_modules`."
            )
