"""Merging whole models: everything that could stand in the way is found before the first weight changes."""

from __future__ import annotations

from itertools import product

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from .layer import ExtLayer


def check_merges(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Raises what the merge of any of our layers would raise, while the model is still as it was."""
    refuse_tied_weights(model, adapter_names)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            try:
                if adapter_names is not None:
                    refuse_partial_merge(module, adapter_names)
                if not isinstance(module, ExtLayer):
                    continue
                names = module.present(module.active_adapters if adapter_names is None else adapter_names)
                refuse_other_order(module, names)
                with onload_layer(module):
                    for adapter in names:
                        if adapter not in module.merged_adapters:
                            module.checked_merge(adapter, safe_merge)
            except ValueError as error:
                error.add_note(f"This is about the module {name!r}.")
                raise


def refuse_partial_merge(layer: BaseTunerLayer, adapter_names: list[str]) -> None:
    """Refuses to merge an adapter without those that act inside of it, unless none depends on the others.

    What is merged acts before all that is not. Inner adapters may be merged alone, as they act first anyhow, if nothing
    outside goes by the weight.

    Raises:
        ValueError: The output would change.
    """
    names = [name for name in adapter_names if name in layer._get_available_adapters()]
    inner: object = getattr(layer, "base_layer", None)
    while isinstance(inner, BaseTunerLayer):
        owned = inner._get_available_adapters() - set(inner.merged_adapters)
        acting = [name for name in inner.active_adapters if name in owned]
        merging = [name for name in acting if name in adapter_names]
        if merging and isinstance(layer, ExtLayer):
            layer.check_inner_merge(merging)
        for name, other in product(names, acting):
            if other not in merging and not (adds_alone(layer, name) and adds_alone(inner, other)):
                raise _is_merged_first(name, other)
        inner = inner.base_layer  # type: ignore[attr-defined]


def refuse_other_order(layer: ExtLayer, adapter_names: list[str]) -> None:
    """Refuses to merge active adapters in another order than they act in, unless none depends on the others.

    Args:
        layer: The layer.
        adapter_names: Those of its adapters that are to be merged.

    Raises:
        ValueError: The output would change.
    """
    order = layer.present(layer.active_adapters)
    merged = list(dict.fromkeys([*layer.merged_adapters, *adapter_names]))
    for place, name in enumerate(merged):
        for other in order[: order.index(name)] if name in order else ():
            if other not in merged[:place] and not (layer.adds_alone(name) and layer.adds_alone(other)):
                raise _is_merged_first(name, other)


def _is_merged_first(name: str, other: str) -> ValueError:
    return ValueError(
        f"Cannot merge adapter {name!r} without {other!r}, which acts before it on the same module: merge both, "
        f"`merge_adapter([{other!r}, {name!r}])`, or deactivate one of them."
    )


def adds_alone(layer: BaseTunerLayer, adapter_name: str) -> bool:
    """Whether an adapter, ours or PEFT's, adds to the output what depends on the input alone."""
    if isinstance(layer, ExtLayer):
        return layer.adds_alone(adapter_name)
    return isinstance(layer, LoraLayer) and adapter_name not in layer.lora_variant  # DoRA is a variant


def refuse_tied_weights(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises `ValueError` if merging an adapted module would change another module too, since they share a weight."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    for name, layer in model.named_modules():
        if not (isinstance(layer, ExtLayer) and layer.present(adapter_names or layer.active_adapters)):
            continue
        base = layer.get_base_layer()
        for parameter in base._parameters.values():
            others = [other for other, module in owners.get(id(parameter), ()) if module is not base]
            if others:
                raise ValueError(
                    f"Cannot merge the adapter of {name!r}: its weight is tied to {others[0]!r}, which would change "
                    "too. Keep the adapter unmerged, list the module in `exclude_modules` before training, or untie "
                    "the weights before adapting the model (for tied embeddings: load with "
                    "`tie_word_embeddings=False` and copy the input embedding into the output layer)."
                )


def announce_unloading(model: nn.Module) -> None:
    for layer in [module for module in model.modules() if isinstance(module, ExtLayer)]:
        layer.leave(model)
