"""Sparse adapters as things to add, compare and convert: sums, overlap, grafts from dense checkpoints, LT-SFT's files.

Deltas add up, so a task's and a language's adapter are composed by having both active, or, once and for all, by
`model.add_weighted_adapter(["task", "language"], [1.0, 1.0], "both")`.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ...core import Overlap, Support, matched_targets, overlap_of, require_model
from ...delta import layer_operation
from .budget import budget_of
from .config import SparseFTConfig, require_selection
from .deltas import best_of_all
from .model import SparseFTModel
from .sums import set_values, tensors_of


def overlap(model: nn.Module, first: str, second: str) -> dict[str, Overlap]:
    """How the sparse adapters `first` and `second` of a model overlap: by module, and in all (`""`).

    Raises:
        ValueError: There is no such sparse adapter.
    """
    ours, theirs = tensors_of(model, first), tensors_of(model, second)
    for name, part in ((first, ours), (second, theirs)):
        if not part:
            raise ValueError(f"There is no sparse adapter named {name!r} on this model.")
    return overlap_of(ours, theirs)


# Conversion


def graft(base_model: nn.Module, tuned: nn.Module | Mapping[str, torch.Tensor], config: SparseFTConfig) -> PeftModel:
    """The difference of two dense checkpoints, or the largest part of it, as a sparse adapter on the base model.

    Args:
        base_model: What the tuned model was trained from.
        tuned: The tuned model, or its state dict.
        config: With `selection="given"`. Its budget, if it has one, keeps the largest differences of all targets
            together; without, all that are not zero are kept, so that nothing is lost on the targets. What the adapter
            has besides (`modules_to_save`, `trainable_token_indices`) is taken from the tuned model as it is. A warning
            says what differs elsewhere, and is left out.

    Raises:
        ValueError: The tuned weights do not fit the base model, or nothing differs.
    """
    require_model(base_model, "base_model")
    require_selection(config, "graft", "given")
    config = copy.deepcopy(config)
    state = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
    differences: dict[str, torch.Tensor] = {}
    for name, parameter in _parameters(base_model, config).items():
        key = name if name.endswith(".bias") else f"{name}.weight"
        if key not in state or state[key].shape != parameter.shape:
            raise ValueError(f"The tuned checkpoint has no {key!r} of shape {tuple(parameter.shape)}.")
        difference = state[key].detach().to(parameter.device).double() - parameter.detach().double()
        differences[name] = difference.float().flatten()
    if config.density is not None or config.num_tunable_weights is not None:
        budget = budget_of(config, base_model, sum(d.numel() for d in differences.values()))
        support = best_of_all({name: d.abs() for name, d in differences.items()}, budget)
    else:
        support = {name: d.nonzero().squeeze(1) for name, d in differences.items() if d.any()}
    if not support:
        raise ValueError("The two checkpoints do not differ on the target modules.")
    tensors = dict(base_model.named_parameters()) | dict(base_model.named_buffers())
    adapted = _with_adapter(base_model, config, {name: (i, differences[name][i]) for name, i in support.items()})
    taken = {name if name.endswith(".bias") else f"{name}.weight": None for name in differences}
    _warn_of_the_rest(tensors, state, taken | _take_besides(adapted, config, state))
    return adapted


def _warn_of_the_rest(
    tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], taken: Mapping[str, list[int] | None]
) -> None:
    """Warns if checkpoints differ where nothing was taken; of an embedding it may be some rows that were."""
    left = []
    for name, tensor in tensors.items():
        rows = taken.get(name, [])
        if name not in state or rows is None:
            continue
        other = state[name].detach().to(tensor.device)
        if other.shape == tensor.shape:
            changed = other != tensor.detach()
            if rows:
                changed[rows] = False
        if other.shape != tensor.shape or changed.any():
            left.append(name)
    if left:
        warnings.warn(
            f"{len(left)} tensors outside of the targets differ between the two checkpoints and are not in the "
            f"adapter: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}. What is grafted is the tuned model "
            "without them. Name their modules in `target_modules`, or in `modules_to_save`.",
            UserWarning,
            stacklevel=3,
        )


def _take_besides(
    adapted: PeftModel, config: SparseFTConfig, state: Mapping[str, torch.Tensor]
) -> dict[str, list[int] | None]:
    """Copies what is trained in full, heads and embeddings of tokens, from the tuned model's tensors.

    Returns their names, for embeddings with the rows that were taken.
    """
    taken: dict[str, torch.Tensor] = {}
    rows: dict[str, list[int] | None] = {}
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for key in own:
        if f".{SparseFTModel.prefix}" in key:
            continue
        name = key.removeprefix("base_model.model.")
        embedding = name.removesuffix(".token_adapter.trainable_tokens_delta")
        source = name if embedding == name else f"{embedding}.weight"
        if source not in state:
            raise ValueError(f"The tuned checkpoint has no {source!r}, which the adapter trains in full.")
        rows[source] = None if embedding == name else _tokens_of(config, embedding)
        taken[key] = state[source] if embedding == name else state[source][rows[source]]
    if taken:
        set_peft_model_state_dict(adapted, own | taken)
    return rows


def _tokens_of(config: SparseFTConfig, embedding: str) -> list[int]:
    """The trained tokens of an embedding."""
    indices = config.trainable_token_indices
    if isinstance(indices, Mapping):
        return next(found for name, found in indices.items() if f".{embedding}".endswith(f".{name}"))
    return list(indices or ())


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


def _with_adapter(model: nn.Module, config: SparseFTConfig, tensors: dict[str, Support]) -> PeftModel:
    config.num_weights_per_module = None
    config.use_support({name: indices for name, (indices, _) in tensors.items()})
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(adapted, PeftModel)
    set_values(adapted, "default", tensors)
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
    require_model(base_model, "base_model")
    file = os.fspath(path)
    file = os.path.join(file, "pytorch_diff.bin") if os.path.isdir(file) else file
    with torch.serialization.safe_globals([*ALLOWED, (_scalar(), "numpy.core.multiarray.scalar"), _scalar()]):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text advises to run the file all the same
            raise ValueError(
                f"{file} cannot be read as a file of LT-SFT: it is damaged, or holds other objects than tensors and "
                "numbers, and what is pickled in a file is not run."
            ) from error
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read as a file of LT-SFT ({type(error).__name__}: {error})."
            ) from error
    parameters = dict(base_model.named_parameters())
    modules = dict(base_model.named_modules())
    tensors: dict[str, Support] = {}
    diffs, whole = _parts_of(content, file)
    for key, value in whole.items() if with_abs else ():
        if key not in parameters or parameters[key].shape != value.shape or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{file} holds {key!r} of {tuple(value.shape)}, which does not fit the model.")
    for key, part in diffs.items():
        if key not in parameters:
            raise ValueError(f"{file} changes {key!r}, which {type(base_model).__name__} does not have.")
        indices, values = decode_lt_sft(part, parameters[key].shape)
        name, _, kind = key.rpartition(".")
        if kind not in ("weight", "bias"):
            raise ValueError(f"{file} changes {key!r}, which is no module's weight or bias and cannot be adapted.")
        layer_operation(modules[name])
        if len(indices):
            tensors[name if kind == "weight" else key] = (indices, values)
    config = copy.deepcopy(config) or SparseFTConfig(selection="given")
    if config.target_modules is None:
        config.target_modules = {name.removesuffix(".bias") for name in tensors}
    adapted = _with_adapter(base_model, config, tensors)
    if with_abs:
        with torch.no_grad():
            for key, value in whole.items():
                parameters[key].copy_(value)
    return adapted


def _parts_of(content: Any, file: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The deltas and the whole parameters of a `pytorch_diff.bin`; `ValueError` if it is none."""
    diffs = content.get("diffs") if isinstance(content, dict) else None
    whole = (content.get("abs") or {}) if isinstance(content, dict) else {}
    needed = ("size", "index_steps", "values")
    if not isinstance(diffs, dict) or not all(isinstance(part, Mapping) for part in diffs.values()):
        raise ValueError(f"{file} has no `diffs` by the names of parameters, so it is no file of LT-SFT.")
    for key, part in diffs.items():
        if lacking := [name for name in needed if name not in part]:
            raise ValueError(f"{file} has no `{lacking[0]}` for {key!r}.")
    if not (isinstance(whole, dict) and all(isinstance(value, torch.Tensor) for value in whole.values())):
        raise ValueError(f"`abs` of {file} must hold parameters by their names.")
    return diffs, whole


def _scalar() -> Any:
    """The function that numpy pickles its scalars with."""
    return numpy.float32(0).__reduce__()[0]


def decode_lt_sft(part: Mapping[str, Any], shape: Sequence[int]) -> Support:
    """The sorted row-major indices and values of one tensor of a `pytorch_diff.bin`.

    The file counts indices in column-major order, the first dimension running fastest, as steps from one to the next.
    """
    if tuple(int(size) for size in part["size"]) != tuple(shape):
        raise ValueError(f"A delta of {tuple(part['size'])} does not fit a parameter of {tuple(shape)}.")
    steps, values = (torch.as_tensor(numpy.asarray(part[key])) for key in ("index_steps", "values"))
    if steps.ndim != 1 or steps.shape != values.shape or not bool(torch.isfinite(values).all()):
        raise ValueError(f"A delta has {tuple(steps.shape)} indices and {tuple(values.shape)} finite values.")
    places = steps.long().cumsum(0)
    if len(places) and (int(places[0]) < 0 or bool((places.diff() <= 0).any()) or int(places[-1]) >= math.prod(shape)):
        raise ValueError(f"A delta has indices that are not distinct, or outside of {tuple(shape)}.")
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
