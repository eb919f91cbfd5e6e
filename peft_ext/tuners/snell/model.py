"""SNELL on a whole model: its targets, and the allocation over them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...core import ExtLayer, ExtModel, all_linears, layers_by_name, linear_features
from .allocation import Allocation, first_kept
from .layer import SNELLLinear


class SNELLModel(ExtModel):
    """Puts points on the targets; used through `get_peft_model(model, SNELLConfig(...))`."""

    prefix = "snell_"
    tuner_layer_cls = SNELLLinear

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """All Linear modules of the backbone, as published.

        Raises:
            ValueError: It has none.
        """
        return all_linears("SNELL", config, model)

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is no linear module."""
        if linear_features(base_layer) is None:
            raise TypeError(f"SNELL is for Linear modules (and GPT-2's Conv1D), not a {type(base_layer).__name__}.")
        return SNELLLinear

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """How many entries of the update stay at the start, where that is allocated."""
        inputs, outputs = linear_features(base_layer) or (0, 0)
        return {"kept": first_kept(inputs * outputs) if config.allocation == "adaptive" else None}

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Lets an allocation drive the points."""
        if config.allocation == "adaptive" and not config.inference_mode:
            layers = [module for module in model.modules() if isinstance(module, SNELLLinear)]
            Allocation(config, [layer.points(adapter_name) for layer in layers if layer.present([adapter_name])])

    @classmethod
    def stored_tensors(
        cls, model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors; warns if zeros should have been allocated and no step was seen."""
        layers = [m for m in model.modules() if isinstance(m, SNELLLinear) and m.present([adapter_name])]
        steps = [int(layer.points(adapter_name)[0].progress) for layer in layers if config.allocation == "adaptive"]
        if steps and not any(steps) and any(adapter_name in layer.learnt for layer in layers):
            warnings.warn(
                f"No optimizer step of the adapter {adapter_name!r} was seen, so that `allocation='adaptive'` has not "
                "allocated anything: its updates are nearly dense. Optimizers that keep copies of the parameters "
                "(DeepSpeed) are not seen; use 'uniform' with them.",
                UserWarning,
                stacklevel=2,
            )
        return tensors

    @classmethod
    def as_sparse(cls, model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
        """The updates by the names of their modules, in the shapes of the weights.

        Raises:
            ValueError: They have no zeros.
        """
        config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr, index]
        if config.gate == "none":
            raise ValueError("With `gate='none'` an update has no zeros: merge it instead.")
        layers = layers_by_name(model, SNELLLinear, adapter_name)
        return {name: layer.update(adapter_name) for name, layer in layers.items()}
