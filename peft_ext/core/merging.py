"""Merging whole models: everything that could stand in the way is found before the first weight changes."""

from __future__ import annotations

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from .layer import ExtLayer


def check_merges(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Raises what the merge of any of our layers would raise, while the model is still as it was."""
    refuse_tied_weights(model, adapter_names)
    for name, module in model.named_modules():
        if isinstance(module, ExtLayer):
            try:
                with onload_layer(module):
                    module.check_merge(safe_merge, adapter_names)
            except ValueError as error:
                error.add_note(f"This is about the module {name!r}.")
                raise


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
