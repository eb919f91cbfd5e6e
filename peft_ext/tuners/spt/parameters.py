r"""Parameters that are no Linear's weight, such as the experts of a mixture, which `target_parameters` names.

A parameter `(E, outputs, inputs)` (or `(E, inputs, outputs)`, where its module says `is_transposed`) is E matrices, one
`(outputs, inputs)` is one. Each gets its own part of the budget, as a Linear's weight does, under the name of the
parameter with the number of the matrix behind it: `...mlp.experts.down_proj[3]`. The module runs with

    W_e' = W_e + scale * B_e A_e        or        W_e' = W_e + S_e        or        W_e' = W_e

in the place of the parameter, so that nothing is known of what it computes. There is no input to drop anything of, hence
no dropout and no drop-path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core import is_admitted, layer_and_type, linear_features, unadapted_modules
from ...core.schedule import listen_to_steps
from ...delta import SparseDelta
from ...scores import Scores
from ...sparse import Operation
from .config import SPTConfig
from .layer import SPTLayer
from .structures import LEAVES, STRUCTURES, read


# Names


def parameter_of(name: str) -> str:
    """The parameter that a matrix is of: `experts.down_proj` of `experts.down_proj[3]`."""
    return re.sub(r"\[\d+\]$", "", name)


def number_of(name: str) -> int:
    """The number of a matrix in its parameter."""
    match = re.search(r"\[(\d+)\]$", name)
    return int(match[1]) if match else 0


def matrices_of(name: str, parameter: torch.Tensor) -> list[str]:
    """The names of the matrices of a parameter with two or three dimensions."""
    return [name] if parameter.ndim == 2 else [f"{name}[{index}]" for index in range(len(parameter))]


def is_transposed(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether the matrices of a parameter are `(inputs, outputs)`; PEFT's LoRA goes by the same attribute."""
    return parameter.ndim == 3 and bool(getattr(module, "is_transposed", False))


# Targets


def named_parameters(config: SPTConfig, model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """The parameters that `target_parameters` names, with their modules.

    Raises:
        ValueError: A name matches nothing, or what cannot be taken.
    """
    targets = config.target_parameters or ()
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    matched: set[str] = set()
    for module_name, module in unadapted_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}"
            by = {target for target in targets if f".{name}".endswith(f".{target}")}
            matched |= by
            if by and is_admitted(config, module_name):
                _check(name, module, parameter)
                found[name] = (module, parameter)
    if unknown := sorted(set(targets) - matched):
        there = {
            layer_and_type(f"{name}.{key}")[1] for name, module in unadapted_modules(model) for key in takes(module)
        }
        raise ValueError(
            f"`target_parameters` {unknown} not found in the base model, a {type(model).__name__}; it has "
            f"{', '.join(sorted(there)[:20]) or 'none but those of modules that `target_modules` takes'}."
        )
    return found


def takes(module: nn.Module) -> list[str]:
    """Those of a module's own parameters that `target_parameters` can name."""
    return [key for key, parameter in module.named_parameters(recurse=False) if _problem(module, parameter) is None]


def _problem(module: nn.Module, parameter: nn.Parameter) -> str | None:
    if linear_features(module) is not None or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return f"belongs to a {type(module).__name__}, which `target_modules` can name"
    if not parameter.is_floating_point():
        return f"is quantised ({parameter.dtype}) and has no gradient"
    if parameter.ndim not in (2, 3):
        return f"has the shape {tuple(parameter.shape)}; there must be two dimensions, or three with the experts first"
    return None


def _check(name: str, module: nn.Module, parameter: nn.Parameter) -> None:
    if (problem := _problem(module, parameter)) is not None:
        raise ValueError(f"`target_parameters` cannot take {name!r}: it {problem}.")


def shapes_of_matrices(found: Mapping[str, tuple[nn.Module, nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    """`(outputs, inputs)` of each matrix of some parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (module, parameter) in found.items():
        shape = tuple(parameter.shape[-2:])
        shape = shape[::-1] if is_transposed(module, parameter) else shape
        shapes |= dict.fromkeys(matrices_of(name, parameter), shape)
    return shapes


class ScoresByMatrix(Scores):
    """Scores in which parameters with three dimensions are taken apart into their matrices."""

    def __init__(self, scores: Scores, found: Mapping[str, tuple[nn.Module, nn.Parameter]]) -> None:
        """`found` are the parameters that are taken apart, some of those of `scores`."""
        self.scores = scores
        self.places: dict[str, tuple[str, int]] = {}  # parameter and number of each matrix
        sizes: dict[str, int] = {}
        for name, size in scores.sizes.items():
            matrices = matrices_of(name, found[name][1]) if name in found else [name]
            self.places |= {matrix: (name, index) for index, matrix in enumerate(matrices)}
            sizes |= dict.fromkeys(matrices, size // len(matrices))
        super().__init__(sizes)
        self.batches = scores.batches
        self._current: tuple[str, torch.Tensor] | None = None  # the one parameter that is written out

    def of(self, name: str) -> torch.Tensor:
        parameter, index = self.places[name]
        if self._current is None or self._current[0] != parameter:
            self._current = (parameter, self.scores.of(parameter))
        return self._current[1][index * self.sizes[name] : (index + 1) * self.sizes[name]]


# The layer


class SPTParameters(SPTLayer):
    """A module some of whose parameters are changed, for the forward, by what their matrices got.

    Of the parameter `key`, `spt_delta_<key>` holds the tuned weights of all sparse matrices together, `spt_down_<key>`
    and `spt_up_<key>`, `(K, r, inputs)` and `(K, outputs, r)`, the leaves of its K structured ones.
    """

    other_param_names = ("structures", "structured")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        """Raises `ValueError` if there is an adapter of another method on the module."""
        if hasattr(base_layer, "base_layer"):
            raise ValueError(
                "`target_parameters` cannot take parameters of a module on which there is an adapter of another method: "
                "merge that first."
            )
        self.keys = takes(base_layer)
        self.adapter_layer_names = tuple(f"spt_{leaf}_{key}" for key in self.keys for leaf in ("delta", *LEAVES))
        super().__init__(base_layer, **quantization_kwargs)
        self.structured: dict[str, dict[str, torch.Tensor]] = {}  # the numbers `(K,)`, by adapter and parameter

    def operation(self) -> Operation | None:
        """`None`: nothing is known of what the module computes."""
        return None

    def leaf(self, adapter_name: str, leaf: str, key: str) -> Any:
        """The leaf of an adapter for a parameter, `None` if it has none."""
        return getattr(self, f"spt_{leaf}_{key}")._modules.get(adapter_name)

    def update_layer(self, adapter_name: str, config: SPTConfig, *, name: str) -> None:
        """Puts on what the config's allocation has for the matrices of the module `name`."""
        kinds = config.kinds or {}
        self.structured[adapter_name] = {}
        self.like = next(self.get_base_layer().parameters(recurse=False)).new_empty(0)  # the leaves go where it is
        for key in self.keys:
            parameter: torch.Tensor = getattr(self.get_base_layer(), key)
            matrices = matrices_of(f"{name}.{key}", parameter)
            leaves: dict[str, nn.Module] = {}
            if any(kinds.get(matrix) == "sparse" for matrix in matrices):
                leaves["delta"] = _delta(matrices, parameter.numel(), config)
            structured = [index for index, matrix in enumerate(matrices) if kinds.get(matrix) in STRUCTURES]
            if structured:
                self.structured[adapter_name][key] = places = torch.tensor(structured)
                structure = self.structures.setdefault(
                    adapter_name, STRUCTURES[kinds[matrices[structured[0]]]](config)
                )
                weights = parameter.detach().reshape(-1, *parameter.shape[-2:])[places.to(parameter.device)]
                leaves |= structure.make_stack(self._turned(weights, key), config.r)
            for leaf, module in leaves.items():
                getattr(self, f"spt_{leaf}_{key}")[adapter_name] = module
        self.finish_update(adapter_name, config)

    def _turned(self, matrices: torch.Tensor, key: str) -> torch.Tensor:
        """Some matrices of a parameter, `(K, rows, columns)`, as `(K, outputs, inputs)`; and back."""
        base = self.get_base_layer()
        return matrices.mT if is_transposed(base, getattr(base, key)) else matrices

    def low_rank(self, adapter_name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """`(E, r, inputs)` and `(E, outputs, r)` by parameter; zero for the matrices without a structure."""
        found = {}
        for key, places in self.structured[adapter_name].items():
            parameter: torch.Tensor = getattr(self.get_base_layer(), key)
            count = len(parameter) if parameter.ndim == 3 else 1
            down, up = (read(self.leaf(adapter_name, leaf, key)).detach() for leaf in ("down", "up"))
            places = places.to(down.device)
            found[key] = (
                down.new_zeros(count, *down.shape[1:]).index_copy(0, places, down),
                up.new_zeros(count, *up.shape[1:]).index_copy(0, places, up),
            )
        return found

    def _changed(self, adapter_name: str, key: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter with the update of one adapter, differentiable in its leaves, in the dtype that it has."""
        if (places := self.structured.get(adapter_name, {}).get(key)) is not None:
            places, stack = places.to(parameter.device), parameter.reshape(-1, *parameter.shape[-2:])
            leaves = {leaf: self.leaf(adapter_name, leaf, key) for leaf in LEAVES}
            changed = self.structures[adapter_name].merged(leaves, self._turned(stack[places], key))
            stack = stack.index_copy(0, places, self._turned(changed, key).to(stack.dtype))
            parameter = stack.view(parameter.shape)
        if (delta := self.leaf(adapter_name, "delta", key)) is not None:
            flat, values, indices = parameter.reshape(-1), delta(), delta.indices().long()
            touched = flat[indices].to(torch.promote_types(flat.dtype, values.dtype)) + values
            parameter = flat.index_copy(0, indices, touched.to(flat.dtype)).view(parameter.shape)
        return parameter

    def _keys(self, adapters: list[str]) -> list[str]:
        """The parameters that some of the adapters change."""
        return [
            key
            for key in self.keys
            if any(self.leaf(name, leaf, key) is not None for name in adapters for leaf in ("delta", *LEAVES))
        ]

    def _effective(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The changed parameters, for the time of one forward."""
        effective = {}
        for key in self._keys(adapters):
            parameter: torch.Tensor = getattr(self.get_base_layer(), key)
            with torch.autocast(parameter.device.type, enabled=False):
                for name in adapters:
                    parameter = self._changed(name, key, parameter)
            effective[key] = parameter
        return effective

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises `ValueError`, unless the batch has one adapter: nothing is known of which input is of which sample."""
        if len(names := set(adapter_names)) > 1:
            raise ValueError(
                f"A {type(self.get_base_layer()).__name__} with adapted parameters (`target_parameters`) cannot run a "
                f"batch of several adapters ({', '.join(sorted(names))}): its inputs are tokens, not samples. Run the "
                "samples of each adapter as a batch of their own, with `set_adapter` in between."
            )
        adapters = self.present(names)
        return self.adapted_forward(adapters, *args, **kwargs) if adapters else self.base_layer(*args, **kwargs)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The parameters with the adapter's updates, as the forward has them."""
        base = self.get_base_layer()
        return {key: self._changed(adapter_name, key, getattr(base, key).data) for key in self._keys([adapter_name])}


def _delta(matrices: list[str], size: int, config: SPTConfig) -> SparseDelta:
    """The tuned weights of the sparse ones among the matrices of one parameter with `size` entries."""
    kinds, counts, supports = config.kinds or {}, config.counts or {}, config.support or {}
    sparse = [(index, matrix) for index, matrix in enumerate(matrices) if kinds.get(matrix) == "sparse"]
    placeholder = any(matrix not in supports for _, matrix in sparse)
    places = [
        supports.get(matrix, torch.arange(counts[matrix])).long() + index * (size // len(matrices))
        for index, matrix in sparse
    ]
    leaf = SparseDelta(torch.cat(places), size, placeholder)
    if placeholder and not config.inference_mode:
        listen_to_steps(leaf)  # so that it is not trained by mistake
    return leaf
