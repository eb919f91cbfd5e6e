r"""Mask-pruning LoRA: what is cut is learnt while the model is adapted.

    y = W (m * x) + b + (alpha / r) B A (m * x)

m masks whole groups of channels at the input of the one module that reads them (`peft_ext/groups.py`), for the base and for
LoRA alike, so that a masked channel has no influence and can be cut out afterwards (`export`). The paper's abstract
("Learning to Prune and Low-Rank Adaptation for Compact Language Model Deployment") is all that is known of it; the
masks follow its relatives (CoFi, Sheared LLaMA, FineGates).
"""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import (
    ExtConfig,
    ExtLayer,
    ExtModel,
    backbone_linears,
    layers_by_name,
    linear_features,
    matched_targets,
    require_model,
    stable_generator,
    warn_of_experts,
    weight_of,
)
from ...groups import Group, find_groups
from ...scores import Scores
from ...sparse import drawn_keys
from .config import MaskLoraConfig
from .distillation import Distillation
from .gate import MaskGate, MaskSchedule, check_reachable
from .latency import measured_costs
from .layer import MaskLoraLayer, MaskLoraLinear


class MaskLoraModel(ExtModel):
    """Puts LoRA and masks on a model; used through `get_peft_model(model, MaskLoraConfig(...))`."""

    prefix = "mask_pruning_"
    tuner_layer_cls = MaskLoraLayer
    scores_kind = "magnitude"
    cuts = True
    misfit_advice = (
        "It was made for another base model, or for one that was pruned since. To go on training, use the saved "
        "adapter's own config: `PeftModel.from_pretrained(base, path, is_trainable=True)`."
    )

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """LoRA on all Linear modules of the backbone.

        Raises:
            ValueError: There are none, and no channels that could be pruned either.
        """
        names = backbone_linears(model)
        if not names:
            find_groups(model, config.prune, config.groups)  # says why there are none
        warn_of_experts(config, model)
        return names

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what the method cannot adapt."""
        if linear_features(base_layer) is None:
            raise TypeError(f"Mask-pruning LoRA does not support modules of type {type(base_layer).__name__}.")
        return MaskLoraLinear

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Also finds the groups, and adds the modules that carry their masks to the targets.

        Raises:
            ValueError: The architecture is unknown, the target cannot be reached, or calibration is missing.
        """
        assert isinstance(config, MaskLoraConfig)
        cls.check_modules(config, model)
        groups = groups_of(config, model)
        if config.cost == "latency" and config.unit_costs is None:
            config.unit_costs = measured_costs(model, groups, config)
        check_reachable(groups, config)
        is_new = not (config.inference_mode or config.awaits_weights)
        if config.init_logits == "sensitivity" and config.support is None and is_new:
            raise ValueError(
                "This MaskLoraConfig has `init_logits='sensitivity'`, but has not seen data; before `get_peft_model`:\n"
                "    config = peft_ext.calibrate(model, config, dataloader)"
            )
        for name, logits in (config.support or {}).items():
            if name not in groups or groups[name].units != len(logits):
                raise ValueError(
                    f"The config was calibrated on another model: {name!r} has no group of {len(logits)} units here. "
                    "Calibrate it on this model."
                )
        matched = {name for name, _ in matched_targets(config, model)}
        with_lora = matched if config.lora_modules is None else matched & set(config.lora_modules)
        config.lora_modules = sorted(with_lora) if set(groups) - with_lora else None
        config.target_modules = with_lora | set(groups)

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The module's group, if it carries a mask."""
        known = tuner.__dict__.get("_mask_groups")
        if known is None or known[0] is not config:  # found once for all layers of an adapter
            known = tuner.__dict__["_mask_groups"] = (config, groups_of(config, tuner.model))
        group = known[1].get(name)
        logits = None
        if group is not None:
            start = torch.full((group.units,), config.initial_logit)
            logits = (config.support or {}).get(name, start)
        with_lora = config.lora_modules is None or name in config.lora_modules
        return {"group": group, "with_lora": with_lora, "logits": logits}

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Lets one schedule drive all gates of the adapter."""
        gates = gates_of(model, adapter_name)
        for gate in gates.values():
            gate.train(model.training)  # an adapter that is put on a model in eval mode draws nothing at random
        if gates and not config.inference_mode:
            MaskSchedule(config, list(gates.values()))
            if config.distillation:
                Distillation.watch(model)

    @classmethod
    def stored_tensors(
        cls, model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All; warns if LoRA was trained and the masks never moved."""
        schedule = next((gate.schedule for gate in gates_of(model, adapter_name).values()), None)
        moved = any(".mask_pruning_up." in key and bool(value.any()) for key, value in tensors.items())
        if moved and schedule is not None and schedule.was_used and schedule.step == 0:
            warnings.warn(
                f"Adapter {adapter_name!r} was trained, but its masks took part in no step: the optimizer does not own "
                "them (it was made before the adapter, or holds flattened copies of the parameters). Nothing is "
                "pruned.",
                UserWarning,
                stacklevel=2,
            )
        return tensors

    # Calibration

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that the masks act on.

        Raises:
            ValueError: `init_logits` is not `"sensitivity"`.
        """
        if config.init_logits != "sensitivity":
            raise ValueError(f"`calibrate` needs `init_logits='sensitivity'`, the config says {config.init_logits!r}.")
        targets = cls.resolved_targets(config, model)
        return {name: weight_of(targets.get(name) or model.get_submodule(name)) for name in groups_of(config, model)}

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Scores) -> None:
        """First logits by the rank, among its kind, of what a unit's columns score.

        They are quantiles of a normal distribution around `initial_logit` with a standard deviation of two. Kinds are
        ranked apart: by first-order scores, heads as a whole would be cut before almost any feed-forward channel.
        """
        groups = groups_of(config, model)
        support: dict[str, torch.Tensor] = {}
        for kind in dict.fromkeys(group.kind for group in groups.values()):
            names = [name for name, group in groups.items() if group.kind == kind]
            values = []
            for name in names:
                group, features = groups[name], groups[name].units * groups[name].width
                found = scores.of(name).clamp(min=0)
                is_transposed = isinstance(model.get_submodule(name), Conv1D)
                matrix = found.view(features, -1).T if is_transposed else found.view(-1, features)
                values.append(matrix.sum(0).view(group.units, group.width).sum(1))
            of_units = torch.cat(values)
            if config.spread:
                of_units = drawn_keys(of_units, 1 / config.spread, stable_generator(config.seed, kind))
            ranks = of_units.argsort().argsort()
            quantiles = config.initial_logit + 2 * torch.special.ndtri((ranks + 0.5) / len(ranks))
            parts = quantiles.split([groups[name].units for name in names])
            support |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        config.support = support

    # Export

    @classmethod
    def kept_units(cls, model: nn.Module, adapter_name: str) -> dict[str, tuple[Any, torch.Tensor]]:
        """What the decided masks leave."""
        gates = gates_of(model, adapter_name)
        return {name: (gates[name].group, units) for name, units in kept_units(model, adapter_name).items()}

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The LoRA beside the masks."""
        config: Any = model.peft_config[adapter_name]  # type: ignore[union-attr, index]
        layers = {
            name: layer
            for name, layer in layers_by_name(model, MaskLoraLayer, adapter_name).items()
            if adapter_name in layer.mask_pruning_down
        }
        tensors = {}
        for name, layer in layers.items():
            down: Any = layer.mask_pruning_down[adapter_name]
            up: Any = layer.mask_pruning_up[adapter_name]
            tensors[name] = (down.weight.detach(), up.weight.detach())
        transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        if not tensors:
            raise ValueError("The adapter has masks but no LoRA to keep.")
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            lora_dropout=config.lora_dropout,
            target_modules=list(tensors),
            modules_to_save=config.modules_to_save,
            task_type=config.task_type,
            fan_in_fan_out=transposed,
        )
        return lora, tensors


def groups_of(config: MaskLoraConfig, model: nn.Module) -> dict[str, Group]:
    """The groups that the config prunes; a `ValueError` if none is left."""
    groups = find_groups(model, config.prune, config.groups)
    chosen = copy.copy(config)
    # PEFT takes no notice of `layers_to_transform` where a full name is given
    in_layers = config.layers_to_transform is not None
    chosen.target_modules = {key.split(".")[-1] for key in groups} if in_layers else set(groups)
    matched = {key for key, _ in matched_targets(chosen, model)}
    left = {key: group for key, group in groups.items() if key in matched}
    if not left:
        raise ValueError(
            f"No layer of the {len(groups)} groups that could be pruned is named by `layers_to_transform="
            f"{config.layers_to_transform!r}` and `layers_pattern={config.layers_pattern!r}`: name layers that the "
            "model has, counted from 0, or leave it out."
        )
    return left


def gates_of(model: nn.Module, adapter_name: str) -> dict[str, MaskGate]:
    """The gates of an adapter, by the name of their group, in the order of the model's modules."""
    gates = [
        module.mask_pruning_gate[adapter_name]
        for module in model.modules()
        if isinstance(module, MaskLoraLayer) and adapter_name in module.mask_pruning_gate
    ]
    return {gate.group.name: gate for gate in gates}  # type: ignore[union-attr, misc]


def _gates(model: nn.Module, adapter_name: str | None) -> dict[str, MaskGate]:
    require_model(model)
    if adapter_name is None:
        names = ["default"]
        with suppress(ValueError):  # transformers' own, without an adapter
            active = getattr(model, "active_adapters", None) or names
            names = active() if callable(active) else active
    else:
        names = [adapter_name]
    for name in names:
        if found := gates_of(model, name):
            return found
    raise ValueError(f"The model has no mask-pruning adapter named {' or '.join(map(repr, names))}.")


def kept_units(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The indices of the units that stay, sorted, by group.

    Raises:
        ValueError: The model has no such adapter, or its masks are not decided yet.
    """
    gates = _gates(model, adapter_name)
    for name, gate in gates.items():
        if not gate.is_fixed:
            raise ValueError(
                f"The mask of {name!r} is not decided yet, after {int(gate.progress)} steps of training: finish the "
                "training (see `total_steps` and `fix_ratio`), or call `peft_ext.fix_masks(model)`."
            )
    return {name: gate.kept.bool().nonzero().flatten().cpu() for name, gate in gates.items()}


def fix_masks(model: nn.Module, adapter_name: str | None = None) -> None:
    """Decides the masks now, as the schedule would: by the logits, within `target_sparsity` if there is one.

    Raises:
        ValueError: The model has no such adapter, or it was loaded for inference only.
    """
    gates = _gates(model, adapter_name)
    schedule = next(iter(gates.values())).schedule
    if schedule is None:
        raise ValueError("The adapter was loaded for inference: load it with `is_trainable=True` to decide its masks.")
    schedule.decide()


def keep_ratios(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """The share of units that stays in each group, in expectation before the masks are decided.

    Raises:
        ValueError: The model has no such adapter.
    """
    gates = _gates(model, adapter_name)
    return {
        name: float((gate.kept.float() if gate.is_fixed else gate.logits().sigmoid()).mean())
        for name, gate in gates.items()
    }
