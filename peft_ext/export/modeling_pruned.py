"""Models of transformers whose layers have fewer channels than the config says, each layer a number of its own.

`config.pruned` lists what differs from the stock class: `shapes`, of parameters, and `attributes`, of modules, both by
name. A class of this module has the name of the stock class that it extends, so that nothing else needs to know.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

Written by peft_ext, which is not needed to load it; `peft_ext.load_pruned(path)` does the same without remote code.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


class LayerConfig:
    """The model's config with other values for one layer; what is set on the model's later shows here too."""

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, own=own, config=config)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or key == "config":  # asked for while a copy is being made
            raise AttributeError(key)
        return getattr(self.config, key)


def set_parameter(module: nn.Module, key: str, values: torch.Tensor) -> None:
    """Puts a parameter of another shape in the place of one; Linear modules remember the shape."""
    values = values.detach().clone(memory_format=torch.contiguous_format)
    setattr(module, key, nn.Parameter(values, requires_grad=getattr(module, key).requires_grad))
    if key == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
    elif key == "weight" and isinstance(module, Conv1D):
        module.nx, module.nf = values.shape


def shrink(model: nn.Module, shapes: dict[str, list[int]], attributes: dict[str, dict[str, Any]]) -> None:
    """Cuts parameters to these shapes; what is left of their values is arbitrary, the saved ones are loaded later.

    Raises:
        ValueError: The model does not have such a parameter, or it is smaller.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        if name not in parameters or not _fits(shape, parameters[name].shape):
            found = list(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(
                f"`pruned.shapes` of config.json says {shape} for {name!r}, where {type(model).__name__} with the rest "
                f"of this config has {found}. Was the config edited? Restore the one that was saved with the weights."
            )
        owner, _, key = name.rpartition(".")
        corner = tuple(slice(size) for size in shape)
        set_parameter(model.get_submodule(owner), key, parameters[name][corner])
    for name, values in attributes.items():
        module: Any = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, LayerConfig(module.config, **value) if key == "config" else value)


def _fits(shape: list[int], largest: torch.Size) -> bool:
    return len(shape) == len(largest) and all(0 < size <= most for size, most in zip(shape, largest, strict=True))


class Pruned:
    """What a stock class needs besides."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        per_layer = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # today's stock classes refuse it
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shrink(self, config.pruned["shapes"], config.pruned["attributes"])  # type: ignore[arg-type]
        config.per_layer_config = per_layer

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            raise explained(error, path) from error


def explained(error: RuntimeError, path: Any) -> Exception:
    """A `ValueError` in place of transformers' hint at what it has logged, if weights did not fit."""
    if "ignore_mismatched_sizes" not in str(error):
        return error
    return ValueError(
        f"The weights in {path!s} do not have the shapes that its config.json says; the log above lists them. Was the "
        "config edited? Restore the one that was saved with the weights."
    )


def pruned_class(stock: type) -> type:
    """The stock class, for configs with `pruned`."""
    name = stock.__name__
    if name not in globals():
        globals()[name] = type(name, (Pruned, stock), {"__module__": __name__, "__doc__": stock.__doc__})
    return globals()[name]


def __getattr__(name: str) -> type:
    """The class that `auto_map` of the config asks for."""
    if name.startswith("_") or not hasattr(transformers, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(getattr(transformers, name))
