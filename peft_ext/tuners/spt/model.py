"""The tuner: what it looks at, and how an allocation gets onto a model."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures import architecture_of
from ...core import (
    ExtConfig,
    ExtLayer,
    ExtModel,
    Row,
    backbone_linears,
    backbone_modules,
    count_parameters,
    is_quantised,
    layer_and_type,
    matched_targets,
    warn_of_experts,
    weight_of,
)
from ...delta import layer_operation
from ...scores import Scores
from ...sparse import LinearOperation
from .allocation import allocate
from .config import SPTConfig
from .layer import SPTLayer, SPTLinear
from .parameters import (
    ScoresByMatrix,
    SPTParameters,
    named_parameters,
    parameter_of,
    shapes_of_matrices,
    takes,
)


class SPTModel(ExtModel):
    """Puts an allocation on a model; used through `get_peft_model(model, calibrate(model, SPTConfig(...), data))`."""

    prefix = "spt_"
    tuner_layer_cls = SPTLayer
    misfit_advice = (
        "It was made for another base model, or with another allocation. To go on training, use the saved adapter's "
        "own config: `PeftModel.from_pretrained(base, path, is_trainable=True)`."
    )

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """All Linear modules of the backbone, and those norms that its heads read.

        Raises:
            ValueError: It has no Linear modules.
        """
        names = backbone_linears(model)
        if not names:
            raise ValueError(
                f"SPT has no default targets on this {type(model).__name__}: it tunes Linear modules, and outside its "
                "head the model has none. Use sparse fine-tuning or SSF, which adapt convolutions."
            )
        if config.target_parameters is None:
            warn_of_experts(config, model)
        architecture = architecture_of(getattr(getattr(model, "config", None), "model_type", None))
        unread = (architecture.unread if architecture is not None else None) or "(?!)"
        norms = {name for name, module in backbone_modules(model) if _is_norm(module)}
        return names | {name for name in norms if not re.fullmatch(unread, name)}

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`TypeError` for what the method cannot adapt."""
        try:
            op = layer_operation(base_layer)
        except TypeError as error:
            if names := takes(base_layer):
                raise TypeError(f"{error} Its parameters {', '.join(names)} go into `target_parameters`.") from None
            raise
        if op is not None and not isinstance(op, LinearOperation):
            raise TypeError(f"SPT does not support modules of type {type(base_layer).__name__}.")
        return SPTLayer if op is None else SPTLinear

    @classmethod
    def layer_class_at(cls, name: str, base_layer: nn.Module, config: Any) -> type[ExtLayer]:
        """Another one for a module with target parameters, whose names are full ones by now."""
        return SPTParameters if _has_target_parameters(config, name) else cls.layer_class(base_layer)

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The name, by which the allocation goes."""
        return {"name": name}

    @classmethod
    def parameter_targets(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """`ValueError` for a name that matches nothing, or what cannot be taken."""
        return {name: parameter for name, (_, parameter) in named_parameters(config, model).items()}

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Also refuses an allocation that is missing or of another model.

        Raises:
            ValueError: The config was not calibrated, or on a model of other shapes.
        """
        assert isinstance(config, SPTConfig)
        cls.check_modules(config, model)
        if config.kinds is None:
            raise ValueError(
                "This SPTConfig does not know yet where its budget goes; before `get_peft_model`:\n"
                "    config = peft_ext.calibrate(model, config, dataloader)"
            )
        config.check_consistent()
        sizes = {name: p.numel() for name, p in _parameters(dict(matched_targets(config, model))).items()}
        matrices = shapes_of_matrices(named_parameters(config, model))
        sizes |= {name: outputs * inputs for name, (outputs, inputs) in matrices.items()}
        for name in config.kinds:
            if name not in sizes:
                raise ValueError(
                    f"The config was calibrated on a {config.architecture} and tunes {name!r}, which is no target of "
                    f"this {type(model).__name__}: calibrate it on this model."
                )
            places = (config.support or {}).get(name)
            too_far = places is not None and len(places) and int(places[-1]) >= sizes[name]
            if too_far or (config.counts or {}).get(name, 0) > sizes[name]:
                raise ValueError(
                    f"The config was calibrated on another {config.architecture}: {name!r} is smaller here. Calibrate "
                    "it on this model."
                )
        # the others get nothing
        config.target_modules = {name.rsplit(".", 1)[0] for name in config.kinds if name not in matrices}
        if config.target_parameters is not None:
            config.target_parameters = sorted({parameter_of(name) for name in config.kinds if name in matrices})

    @classmethod
    def inject_layer(
        cls, tuner: Any, config: ExtConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """As for every method, but modules that get nothing are left alone."""
        assert isinstance(config, SPTConfig)
        kinds = config.kinds or {}
        has_some = f"{name}.weight" in kinds or f"{name}.bias" in kinds or _has_target_parameters(config, name)
        if not has_some:
            return None
        return super().inject_layer(tuner, config, adapter_name, target, name)

    # Calibration

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights and biases of the target modules, and the target parameters."""
        return _parameters(cls.resolved_targets(config, model)) | cls.parameter_targets(config, model)

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Scores) -> None:
        """Writes the allocation of `config.budget` into the config."""
        targets = cls.resolved_targets(config, model)
        parameters = named_parameters(config, model)
        shapes = shapes_of(targets) | shapes_of_matrices(parameters)
        by_matrix = ScoresByMatrix(scores.spread_out(config.spread, config.seed), parameters)
        found = allocate(by_matrix, shapes, config, budget_of(config, model))
        config.kinds, config.counts, config.ranks = found.kinds, found.counts, found.ranks
        config.support = found.support
        config.architecture = type(model).__name__
        config.allocation = found

    @classmethod
    def calibration_report(cls, config: Any, full: bool) -> tuple[str, list[Row]]:
        """The allocation by type, or by layer and type."""
        title = f"{config.allocation.total:,} trainable parameters for a {config.architecture}:"
        return title, allocation_rows(config) if full else allocation_summary(config)

    @classmethod
    def with_budget(cls, config: Any, budget: float) -> Any:
        """A copy of the config with another budget, for `calibrate(..., budgets=[...])`."""
        other = copy.deepcopy(config)
        other.budget = budget
        return other


def _has_target_parameters(config: SPTConfig, name: str) -> bool:
    """Of the module of this name, in a config whose targets are settled."""
    return any(parameter.rpartition(".")[0] == name for parameter in config.target_parameters or ())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, torch.Tensor) and weight.ndim == 1


def _parameters(targets: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights and biases of modules, by name; a quantised weight is stood for by a `QuantisedWeight`."""
    found = {}
    for name, module in targets.items():
        if is_quantised(module) or isinstance(getattr(module, "weight", None), nn.Parameter):
            found[f"{name}.weight"] = weight_of(module)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            found[f"{name}.bias"] = bias
    return found


def shapes_of(targets: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """`(outputs, inputs)` of the matrices and `(size,)` of the vectors of modules, by name."""
    shapes = {}
    for name, parameter in _parameters(targets).items():
        transposed = parameter.ndim == 2 and isinstance(targets[name.rsplit(".", 1)[0]], Conv1D)
        shapes[name] = tuple(parameter.shape[::-1] if transposed else parameter.shape)
    return shapes


def budget_of(config: SPTConfig, model: nn.Module) -> int:
    """The budget as a number of parameters."""
    assert config.budget is not None
    return int(config.budget if config.budget >= 1 else config.budget * count_parameters(model))


def amounts(names: list[str], kinds: Mapping[str, str], counts: Mapping[str, int], ranks: Mapping[str, int]) -> str:
    """What the tensors of these names, which are those of one parameter, got."""
    structures = Counter(f"{kinds[name]} {ranks[name]:,}" for name in names if name in ranks)
    parts = [text if parameter_of(names[0]) == names[0] else f"{count} x {text}" for text, count in structures.items()]
    if any(kinds[name] == "whole" for name in names):
        parts.append("whole")
    if single := sum(counts[name] for name in names if kinds[name] == "sparse"):
        parts.append(f"sparse {single:,}")
    return ", ".join(parts)


def allocation_rows(config: SPTConfig) -> list[Row]:
    """What each tensor got: a row for each layer, a column for each type of tensor, both in the model's order.

    `whole` is a vector that is tuned as it is, `sparse 12` a tensor of which 12 weights are tuned, `lora 8` a matrix
    with an update of rank 8 (of an adapter: of width 8). The matrices of one parameter, such as experts, share a cell:
    `3 x lora 8, sparse 12`. What is in no layer comes last.
    """
    kinds, counts, ranks = config.kinds or {}, config.counts or {}, config.ranks or {}
    cells: dict[int, Row] = defaultdict(dict)
    types: dict[str, None] = {}
    for parameter, names in _by_parameter(config).items():
        layer, kind = layer_and_type(parameter)[0], _type_of(parameter)
        cells[layer][kind] = amounts(names, kinds, counts, ranks)
        types[kind] = None
    order = sorted(cells, key=lambda layer: (layer < 0, layer))
    return [
        {"layer": str(layer) if layer >= 0 else "-", **{kind: cells[layer].get(kind, "") for kind in types}}
        for layer in order
    ]


def allocation_summary(config: SPTConfig) -> list[Row]:
    """A row for each type of tensor, in the order of the model: how many get what, and single weights in all."""
    kinds, counts, ranks = config.kinds or {}, config.counts or {}, config.ranks or {}
    of_type: dict[str, list[str]] = {}
    for parameter, names in _by_parameter(config).items():
        of_type.setdefault(_type_of(parameter), []).extend(names)
    rows: list[Row] = []
    for kind, names in of_type.items():
        gets = Counter(f"{kinds[name]} {ranks[name]}" if name in ranks else kinds[name] for name in names)
        single = sum(counts[name] for name in names if kinds[name] == "sparse")
        rows.append({"type": kind, "tensors": len(names), **gets, **({"weights": single} if single else {})})
    return rows


def _type_of(parameter: str) -> str:
    return layer_and_type(parameter.removesuffix(".weight"))[1]


def _by_parameter(config: SPTConfig) -> dict[str, list[str]]:
    """The tensors with an update by the parameter that they are part of, type by type in the order of the model."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in config.kinds or {}:
        found[parameter_of(name)].append(name)
    allocation = getattr(config, "allocation", None)  # of all targets, where the config was just calibrated
    targets = [*(allocation.sensitive if allocation is not None else ()), *found]
    order = {kind: place for place, kind in reversed(list(enumerate(_type_of(parameter_of(n)) for n in targets)))}
    return dict(sorted(found.items(), key=lambda item: order[_type_of(item[0])]))
