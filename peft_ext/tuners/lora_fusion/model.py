"""LoRAFusion on a whole model: the LoRAs, the modules that they adapt, and which of these share coefficients."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import (
    ExtLayer,
    SharingModel,
    StandIn,
    group_key,
    is_admitted,
    layers_by_name,
    linear_features,
    matched_targets,
)
from ...lora_files import lora_of
from .config import LoraFusionConfig
from .given import read_all, refuse_other_sizes, refuse_unequal_shapes
from .layer import SHARED, LoraFusionLayer, LoraFusionLinear


class LoraFusionModel(SharingModel):
    """Puts the LoRAs on a model, with their coefficients; used through `get_peft_model(model, LoraFusionConfig(adapters=[...]))`."""

    prefix = "fused_low_rank_"
    tuner_layer_cls = LoraFusionLayer
    shared = SHARED

    @classmethod
    def default_targets(cls, config: LoraFusionConfig, model_config: dict[str, Any], model: nn.Module) -> Any:
        """Reads the LoRAs, and takes the modules that they adapt where the user names none."""
        if config.ranks is None:
            if config.awaits_weights:  # of a saved adapter, whose LoRAs are in its own file
                raise ValueError(
                    "`ranks` is missing from adapter_config.json, though a saved adapter has it: restore the files that "
                    "were saved."
                )
            config.given = read_all(config.adapters, model)
        return super().default_targets(config, model_config, model)

    @classmethod
    def default_modules(cls, config: LoraFusionConfig, model: nn.Module) -> set[str]:
        """The modules that at least one of the LoRAs adapts, and that are not trained in full or excluded."""
        found = config.given.modules if config.given is not None else set()
        return {name for name in found if is_admitted(config, name)}

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what is no linear module."""
        if isinstance(base_layer, StandIn):
            return LoraFusionLayer
        if linear_features(base_layer) is None:
            raise TypeError(
                f"LoRAFusion is for Linear modules (and GPT-2's Conv1D), not a {type(base_layer).__name__}."
            )
        return LoraFusionLinear

    @classmethod
    def check_targets(cls, config: LoraFusionConfig, model: nn.Module) -> None:
        """Raises `ValueError`, too, for targets that no LoRA adapts, and factors that cannot be added up."""
        super().check_targets(config, model)
        given = config.given
        if given is None:
            return
        modules = dict(matched_targets(config, model))
        if alone := [name for name in modules if name not in given.modules]:
            raise ValueError(
                f"`target_modules` takes in {alone[0]!r}, which none of the LoRAs adapts (of {len(alone)} in all), so "
                "there is nothing to be fused. Leave `target_modules` out to take what they adapt."
            )
        refuse_other_sizes(given, modules)
        if config.mode == "factors":
            refuse_unequal_shapes(given, list(modules))
        found = {name: given.ranks(name) for name in modules}
        common = Counter(map(tuple, found.values())).most_common(1)[0][0]
        config.ranks = list(common)
        config.other_ranks = {name: ranks for name, ranks in found.items() if ranks != config.ranks} or None

    @classmethod
    def group_of(cls, name: str, base_layer: nn.Module, config: LoraFusionConfig) -> str | None:
        """By `share`; a module in no block has coefficients of its own."""
        if config.share == "all":
            return "all"
        block = block_of(name) if config.share == "block" else None
        return None if block is None else group_key(block.split("."))

    @classmethod
    def layer_kwargs(
        cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: LoraFusionConfig
    ) -> dict[str, Any]:
        """Where the coefficients start, the factors, and the shared coefficients of this module, if it has no own."""
        start = cls.start(config, tuner.model)
        if isinstance(base_layer, StandIn):
            return {"start": start}
        owner = cls.shared_layer(tuner.model, name, base_layer, config)
        stack = None if config.given is None else config.given.stacked(name)
        return {"start": start, "ranks": config.ranks_at(name), "stack": stack, "owner": owner}

    @classmethod
    def start(cls, config: LoraFusionConfig, model: nn.Module) -> torch.Tensor:
        """The coefficients `(n,)` of a group before training; noise of `init_weights=False` is added later."""
        n = len(config.adapters)
        if config.init_weights == "xavier":
            # of the matrix of all coefficients, (n, groups)
            groups = {cls.group_of(name, base, config) or name for name, base in matched_targets(config, model)}
            bound = math.sqrt(6 / (n + len(groups)))
            return torch.empty(n).uniform_(-bound, bound)
        return torch.full((n,), 0.0 if config.init_weights == "zero" else 1 / n)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model, on which the LoRAs that it fuses act no longer."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        fused: Any = self.peft_config[adapter_name]
        for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
            others = [name for name in layer.active_adapters if name not in fused.adapters]
            if len(others) < len(layer.active_adapters):
                layer.set_adapter(others)

    @classmethod
    def finish_injection(cls, model: nn.Module, config: LoraFusionConfig, adapter_name: str) -> None:
        """Lets go of what was read: the layers have it."""
        config.given = None

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The update of each module, of rank r for factors, and of all ranks together for deltas; no magnitudes.

        Raises:
            ValueError: There are magnitudes.
        """
        if model.peft_config[adapter_name].magnitude:  # type: ignore[union-attr, index, operator]
            raise ValueError(
                f"The adapter {adapter_name!r} has magnitudes, which are no update of low rank; `save_as_lora` writes it "
                "as a LoRA with `use_dora=True`."
            )
        layers = layers_by_name(model, LoraFusionLinear, adapter_name)
        updates = {name: layer.low_rank(adapter_name) for name, layer in layers.items()}
        return lora_config(layers, updates), {n: (down.detach(), up.detach()) for n, (down, up) in updates.items()}


def lora_config(
    layers: dict[str, LoraFusionLinear], updates: dict[str, tuple[torch.Tensor, torch.Tensor]], **fields: Any
) -> LoraConfig:
    """The config of a LoRA of these updates, whose scale is 1 everywhere."""
    is_transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    return lora_of({name: len(down) for name, (down, _) in updates.items()}, is_transposed, **fields)


def block_of(name: str) -> str | None:
    """The path of the block that a module is in: up to its number, and in a stage of blocks up to that of the block."""
    match = re.match(r"(.*?\.)?\d+(\.(blocks|layers)\.\d+)?(?=\.)", name)
    return None if match is None else match[0]
