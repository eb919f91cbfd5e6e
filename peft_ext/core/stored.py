"""What a file must have before it goes into an adapter: every tensor, of the right kind, in range and finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from .layer import ExtLayer
from .sharding import plain_named_modules, unwrapped


SHOWN = 8  # faults in one message
PEFT_PREFIX = "base_model.model."  # of the keys in a file, also where the model has none
INNER = ".base_layer"
Layer = TypeVar("Layer", bound=ExtLayer)


def packed(
    model: nn.Module, adapter_name: str, prefix: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their keys in the model, with those of leaves that a file holds in another form so."""
    result = dict(tensors)
    for in_file, in_model, leaf in leaves_of(model, adapter_name, prefix):
        stored_parts: Any = getattr(leaf, "stored_parts", None)
        if stored_parts is None:
            continue
        parts = [
            "weight",
            *(part for part, _ in leaf.named_buffers()),
        ]  # `state_dict` would gather where it is sharded
        start = next((start for start in spellings(in_model) if all(start + part in result for part in parts)), None)
        if start is None:
            raise KeyError(f"The state dict lacks tensors of {in_file.removesuffix('.')!r}: {', '.join(parts)}.")
        own = {part: result.pop(start + part) for part in parts}
        result.update({start + part: tensor for part, tensor in stored_parts(own).items()})
    return result


def leaves_of(model: nn.Module, adapter_name: str, prefix: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Of each leaf of an adapter: the beginning of its keys in a file, that in the model, and the leaf."""
    for name, layer in plain_named_modules(model):
        if not isinstance(layer, ExtLayer):
            continue
        for container in layer.adapter_layer_names:
            leaves: nn.ModuleDict = getattr(layer, container)
            if container.startswith(prefix) and adapter_name in leaves:
                yield f"{name}.{container}.", f"{name}.{container}.{adapter_name}.", unwrapped(leaves[adapter_name])


def spellings(key: str) -> Iterator[str]:
    """How a file may call a tensor: alone, an adapter does not know of those that are around it."""
    for spelling in dict.fromkeys((key, without_inner(key))):
        yield spelling
        if not spelling.startswith(PEFT_PREFIX):
            yield PEFT_PREFIX + spelling


def without_inner(key: str) -> str:
    """The key of an adapter's tensor as it is where no other adapter is around it."""
    return re.sub(r"\.base_layer(?=\.[^.]+\.)", "", key)


def layers_by_name(model: nn.Module, layer_class: type[Layer], adapter_name: str) -> dict[str, Layer]:
    """The layers of a class that have an adapter, by the names of their modules in the base.

    Layers of other adapters may be around them, whose part of a name a file of this adapter alone must not have.
    """
    return {
        re.sub(rf"\{INNER}(?=\.|$)", "", name.removeprefix(PEFT_PREFIX)): module
        for name, module in model.named_modules()
        if isinstance(module, layer_class) and adapter_name in module._get_available_adapters()
    }


class Stored:
    """The tensors of a file, matched with the leaves of an adapter.

    Attributes:
        tensors: By their keys in the model; what belongs to no leaf keeps its key.
        faults: What is wrong with them, a sentence each; wrong shapes are found later, by whoever loads them.
        groups: The keys, in the model, of each leaf with more than one tensor.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, prefix: str, state_dict: Mapping[str, torch.Tensor]
    ) -> None:
        rest = dict(state_dict)
        self.tensors: dict[str, torch.Tensor] = {}
        self.faults: list[str] = []
        self.groups: list[set[str]] = []
        for in_file, in_model, leaf in leaves_of(model, adapter_name, prefix):
            parts = {}
            own = leaf.state_dict()
            optional = getattr(leaf, "training_only", ())
            for part in list(own):
                key = next((key for key in spellings(in_file + part) if key in rest), None)
                if key is None and part in optional:
                    del own[part]
                elif key is None:
                    self.faults.append(f"{in_file}{part} is missing")
                else:
                    parts[part] = rest.pop(key)
            self.tensors |= {in_model + part: tensor for part, tensor in parts.items()}
            if len(own) > 1:
                self.groups.append({in_model + part for part in own})
            self._check(in_file, leaf, own, parts)
        known = model.state_dict()
        for key, tensor in rest.items():
            self._check_rest(key, tensor, known)
        self.tensors |= rest

    def _check(
        self, name: str, leaf: nn.Module, own: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]
    ) -> None:
        before = len(self.faults)
        for part, tensor in parts.items():
            if tensor.dtype == getattr(leaf, "former_dtypes", {}).get(part):
                continue
            if tensor.is_floating_point() != own[part].is_floating_point():
                self.faults.append(f"{name}{part} is of type {tensor.dtype}, which cannot be")
            elif tensor.is_floating_point():
                self._check_finite(name + part, tensor)
            elif tensor.dtype != own[part].dtype:
                self.faults.append(f"{name}{part} is of type {tensor.dtype}, not {own[part].dtype}")
        fits = parts.keys() == own.keys() and all(tensor.shape == own[part].shape for part, tensor in parts.items())
        check: Any = getattr(leaf, "check_stored", None)
        if check is not None and fits and len(self.faults) == before:
            try:
                check(parts)
            except ValueError as error:
                self.faults.append(f"{name.removesuffix('.')}: {error}")

    def _check_rest(self, key: str, tensor: torch.Tensor, known: Mapping[str, torch.Tensor]) -> None:
        owner, _, part = key.rpartition(".")
        names = (key, f"{owner}{INNER}.{part}")
        found = (known.get(name, known.get(name.removeprefix(PEFT_PREFIX))) for name in names)
        own = next((tensor for tensor in found if tensor is not None), None)
        if own is None:
            self.faults.append(f"{key} belongs to nothing in the model")
        elif tensor.is_floating_point():
            self._check_finite(key, tensor)
        elif own.is_floating_point():
            self.faults.append(f"{key} is of type {tensor.dtype}, not {own.dtype}")

    def _check_finite(self, key: str, tensor: torch.Tensor) -> None:
        if not bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all()):
            self.faults.append(f"{key} has values that are not finite")

    def refusal(self, advice: str) -> ValueError:
        """The error that lists the faults."""
        more = f"\n    and {len(self.faults) - SHOWN} more" if len(self.faults) > SHOWN else ""
        listed = "".join(f"\n    {fault}" for fault in self.faults[:SHOWN])
        return ValueError(f"The adapter's weights cannot be loaded into this model:{listed}{more}\n{advice}")


def refuse_other_shapes(tuner: Any, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded: of another model, they are refused, and adapters that wait for them taken off.

    Of a leaf some of whose tensors were left out because of their shape (`ignore_mismatched_sizes`) none is loaded:
    values without their indices would be another function.
    """
    own = tuner.state_dict(prefix=prefix)
    waiting = {name: config for name, config in tuner.peft_config.items() if getattr(config, "awaits_weights", False)}
    misfits = [
        key
        for key, value in state_dict.items()
        if key in own and f".{tuner.prefix}" in key and value.shape != own[key].shape
    ]
    if misfits:
        for name in waiting:
            tuner.discard(name)
        raise RuntimeError(
            "The adapter does not fit this model:\n"
            + "".join(
                f"    size mismatch for {key.removeprefix(f'{prefix}model.')}: {tuple(state_dict[key].shape)} in the "
                f"adapter, {tuple(own[key].shape)} in the model\n"
                for key in misfits[:5]
            )
            + f"({len(misfits)} in all.) {tuner.misfit_advice}"
        )
    together, tuner.loads_together = tuner.loads_together, []
    for group in together:
        present = group & state_dict.keys()
        if present and present != group:
            for key in present:
                del state_dict[key]
            warnings.warn(
                f"{min(group - present)} does not fit this model, so {min(present)} was not loaded either.",
                UserWarning,
                stacklevel=2,
            )
    for config in waiting.values():
        config.awaits_weights = False
