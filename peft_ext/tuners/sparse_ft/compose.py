"""Sparse adapters as things to add, compare and convert: sums, overlap, grafts from dense checkpoints, LT-SFT's files.

Deltas add up, so a task's and a language's adapter are composed by having both active, or, once and for all, by
`model.add_weighted_adapter(["task", "language"], [1.0, 1.0], "both")`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ...core import matched_targets
from ...delta import layer_operation
from ...sparse import is_in
from .config import SparseFTConfig
from .model import SparseFTModel, best_of_all, deltas


Sparse = tuple[torch.Tensor, torch.Tensor]  # sorted flat places (k,) and their values (k,)


def add_weighted_adapter(
    tuner: SparseFTModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See [`SparseFTModel.add_weighted_adapter`]."""
    if combination_type not in ("linear", "ties"):
        raise ValueError(f"`combination_type` must be 'linear' or 'ties', got {combination_type!r}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: give one weight per adapter.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"An adapter named {adapter_name!r} exists: choose another name, or delete it first.")
    sparse = {name for name, config in tuner.peft_config.items() if isinstance(config, SparseFTConfig)}
    if missing := [name for name in adapters if name not in sparse]:
        raise ValueError(f"There is no sparse adapter named {missing[0]!r} on this model.")
    parts = [_tensors(tuner.model, name) for name in adapters]
    combined = {}
    for module in dict.fromkeys(key for part in parts for key in part):
        own = [(part[module], weight) for part, weight in zip(parts, weights, strict=True) if module in part]
        combined[module] = combine([delta for delta, _ in own], [weight for _, weight in own], combination_type)
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    config = copy.deepcopy(configs[0])
    for other in configs[1:]:
        config.target_modules = _either(config.target_modules, other.target_modules)
    config = _as_given(config).use_support({module: indices for module, (indices, _) in combined.items()})
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    _set_values(tuner.model, adapter_name, combined)
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def _either(first: Any, second: Any) -> Any:
    if isinstance(first, str) or isinstance(second, str):
        if first != second:
            raise ValueError(
                "The adapters' `target_modules` are different regular expressions, which have no union: load them "
                "with lists of names."
            )
        return first
    return set(first) | set(second)


def _as_given(config: SparseFTConfig) -> SparseFTConfig:
    config.selection, config.density, config.num_tunable_weights = "given", None, None
    config.support, config.num_weights_per_module = None, None
    return config


def combine(parts: Sequence[Sparse], weights: Sequence[float], combination_type: str = "linear") -> Sparse:
    """The weighted sum of sparse deltas on one weight, on the union of their places.

    With `"ties"`, each place keeps only the values whose sign is that of the weighted sum there, and becomes their
    weighted mean: values that contradict each other no longer cancel.
    """
    union = torch.cat([indices.long() for indices, _ in parts]).unique()
    rows = torch.zeros(len(parts), len(union), dtype=torch.float64, device=union.device)
    for row, (indices, values), weight in zip(rows, parts, weights, strict=True):
        row[torch.searchsorted(union, indices.long())] = weight * values.double()
    total = rows.sum(0)
    if combination_type == "ties":
        agrees = (rows.sign() == total.sign()) & (rows != 0)
        strengths = torch.tensor(weights, dtype=torch.float64, device=union.device).abs().unsqueeze(1)
        strength = (agrees * strengths).sum(0)
        total = torch.where(strength > 0, (rows * agrees).sum(0) / strength.clamp(min=1e-300), 0.0)
    return union, total.float()


def _tensors(model: nn.Module, adapter_name: str) -> dict[str, Sparse]:
    return {name: (leaf.indices().long(), leaf().detach()) for name, leaf in deltas(model, adapter_name)}


@torch.no_grad()
def _set_values(model: nn.Module, adapter_name: str, tensors: Mapping[str, Sparse]) -> None:
    for name, leaf in deltas(model, adapter_name):
        leaf.weight.copy_(tensors[name][1])


@dataclass(frozen=True)
class Overlap:
    """How two sparse adapters relate, on one module or all together.

    Args:
        first, second: Tuned weights of each.
        shared: Weights that both tune.
        same_sign: Shared weights that both move in the same direction.
    """

    first: int
    second: int
    shared: int
    same_sign: int

    @property
    def jaccard(self) -> float:
        """Shared weights as a fraction of all that either tunes."""
        return self.shared / max(1, self.first + self.second - self.shared)


def overlap(model: nn.Module, first: str, second: str) -> dict[str, Overlap]:
    """How the sparse adapters `first` and `second` of a model overlap: by module, and in all (`""`).

    Raises:
        ValueError: There is no such sparse adapter.
    """
    ours, theirs = _tensors(model, first), _tensors(model, second)
    for name, part in ((first, ours), (second, theirs)):
        if not part:
            raise ValueError(f"There is no sparse adapter named {name!r} on this model.")
    return overlap_of(ours, theirs)


def overlap_of(ours: Mapping[str, Sparse], theirs: Mapping[str, Sparse]) -> dict[str, Overlap]:
    """The same of the places and values of two adapters, by module."""
    found = {}
    nothing = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
    for module in dict.fromkeys([*ours, *theirs]):
        (places, values), (others, other_values) = ours.get(module, nothing), theirs.get(module, nothing)
        places, others = places.cpu(), others.cpu()
        mine = is_in(places, others)
        their_values = other_values.cpu()[torch.searchsorted(others, places[mine])]
        same_sign = int((values.cpu()[mine].sign() == their_values.sign()).sum())
        found[module] = Overlap(len(places), len(others), int(mine.sum()), same_sign)
    parts = list(found.values())
    found[""] = Overlap(*(sum(getattr(part, key) for part in parts) for key in Overlap.__dataclass_fields__))
    return found


# Conversion


def graft(base_model: nn.Module, tuned: nn.Module | Mapping[str, torch.Tensor], config: SparseFTConfig) -> PeftModel:
    """The difference of two dense checkpoints, or the largest part of it, as a sparse adapter on the base model.

    Args:
        base_model: What the tuned model was trained from.
        tuned: The tuned model, or its state dict.
        config: With `selection="given"`. Its budget, if it has one, keeps the largest differences of all targets
            together; without, all that are not zero are kept, so that nothing is lost on the targets.

    Raises:
        ValueError: The tuned weights do not fit the base model, or nothing differs.
    """
    if config.selection != "given":
        raise ValueError(f"`graft` needs a config with `selection='given'`, got {config.selection!r}.")
    state = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
    differences: dict[str, torch.Tensor] = {}
    for name, parameter in _parameters(base_model, config).items():
        key = name if name.endswith(".bias") else f"{name}.weight"
        if key not in state or state[key].shape != parameter.shape:
            raise ValueError(f"The tuned checkpoint has no {key!r} of shape {tuple(parameter.shape)}.")
        difference = state[key].detach().to(parameter.device).double() - parameter.detach().double()
        differences[name] = difference.float().flatten()
    if config.density is not None or config.num_tunable_weights is not None:
        from .model import _budget

        budget = _budget(config, base_model, sum(d.numel() for d in differences.values()))
        support = best_of_all({name: d.abs() for name, d in differences.items()}, budget)
    else:
        support = {name: d.nonzero().squeeze(1) for name, d in differences.items() if d.any()}
    if not support:
        raise ValueError("The two checkpoints do not differ on the target modules.")
    return _with_adapter(base_model, config, {name: (i, differences[name][i]) for name, i in support.items()})


def _parameters(model: nn.Module, config: SparseFTConfig) -> dict[str, torch.Tensor]:
    """The weights and biases of the targets by the names that supports have."""
    model_config: Any = getattr(model, "config", None)
    SparseFTModel.default_targets(config, model_config.to_dict() if model_config is not None else {}, model)
    found: dict[str, torch.Tensor] = {}
    for name, module in matched_targets(config, model):
        layer_operation(module)
        for key, full in (("weight", name), ("bias", f"{name}.bias")):
            parameter = getattr(module, key, None)
            if isinstance(parameter, torch.Tensor):
                if not parameter.is_floating_point():
                    raise ValueError(f"{name!r} is quantised: take the difference of checkpoints that are not.")
                found[full] = parameter
    return found


def _with_adapter(model: nn.Module, config: SparseFTConfig, tensors: dict[str, Sparse]) -> PeftModel:
    config.num_weights_per_module = None
    config.use_support({name: indices for name, (indices, _) in tensors.items()})
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(adapted, PeftModel)
    _set_values(adapted, "default", tensors)
    return adapted


ALLOWED: list[
    Any
] = [  # what a `pytorch_diff.bin` pickles besides tensors: numpy scalars and arrays, of number types only
    numpy.dtype,
    numpy.ndarray,
    *(type(numpy.dtype(kind)) for kind in ("int16", "int32", "int64", "uint8", "uint16", "float16", "float32")),
    *(type(numpy.dtype(kind)) for kind in ("uint32", "uint64", "int8", "float64")),
]


def import_lt_sft(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    config: SparseFTConfig | None = None,
    *,
    with_abs: bool = True,
) -> PeftModel:
    """A published LT-SFT file, `pytorch_diff.bin`, as a sparse adapter on its base model.

    The file is read without running anything that is pickled in it.

    Args:
        base_model: The model that it was trained from.
        path: The file, or the directory with it.
        config: With `selection="given"`; its targets are taken from the file. Made here if `None`.
        with_abs: Also take the parameters that the file holds whole, such as a head, into the model. `False` for a
            language's adapter that is to be composed with a task's.

    Raises:
        ValueError: The file names parameters that the model does not have, or that cannot be adapted.
    """
    file = os.fspath(path)
    file = os.path.join(file, "pytorch_diff.bin") if os.path.isdir(file) else file
    with torch.serialization.safe_globals([*ALLOWED, (_scalar(), "numpy.core.multiarray.scalar"), _scalar()]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    parameters = dict(base_model.named_parameters())
    modules = dict(base_model.named_modules())
    tensors: dict[str, Sparse] = {}
    for key, part in content["diffs"].items():
        if key not in parameters:
            raise ValueError(f"{file} changes {key!r}, which {type(base_model).__name__} does not have.")
        indices, values = decode_lt_sft(part, parameters[key].shape)
        name, _, kind = key.rpartition(".")
        if kind not in ("weight", "bias"):
            raise ValueError(f"{file} changes {key!r}, which is no module's weight or bias and cannot be adapted.")
        layer_operation(modules[name])
        if len(indices):
            tensors[name if kind == "weight" else key] = (indices, values)
    config = config or SparseFTConfig(selection="given")
    if config.target_modules is None:
        config.target_modules = {name.removesuffix(".bias") for name in tensors}
    adapted = _with_adapter(base_model, config, tensors)
    if with_abs and content.get("abs"):
        with torch.no_grad():
            for key, value in content["abs"].items():
                if key not in parameters or parameters[key].shape != value.shape:
                    raise ValueError(f"{file} holds {key!r} of {tuple(value.shape)}, which does not fit the model.")
                parameters[key].copy_(value)
    return adapted


def _scalar() -> Any:
    """The function that numpy pickles its scalars with."""
    return numpy.float32(0).__reduce__()[0]


def decode_lt_sft(part: Mapping[str, Any], shape: Sequence[int]) -> Sparse:
    """The sorted row-major places and values of one tensor of a `pytorch_diff.bin`.

    The file counts places in column-major order, the first dimension running fastest, as steps from one to the next.
    """
    if tuple(int(size) for size in part["size"]) != tuple(shape):
        raise ValueError(f"A delta of {tuple(part['size'])} does not fit a parameter of {tuple(shape)}.")
    steps, values = (torch.as_tensor(numpy.asarray(part[key])) for key in ("index_steps", "values"))
    places = steps.long().cumsum(0)
    indices = torch.zeros_like(places)
    stride = 1
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, -1, -1):
        strides[dim], stride = stride, stride * shape[dim]
    for size, row_stride in zip(shape, strides, strict=True):
        indices += places % size * row_stride
        places = places // size
    order = indices.argsort()
    return indices[order], values.float()[order]


__all__ = ["Overlap", "add_weighted_adapter", "combine", "graft", "import_lt_sft", "overlap", "overlap_of"]
