"""Models of transformers whose layers have fewer channels than the config says, each layer a number of its own.

`config.pruned` lists what differs from the stock class: `shapes`, of parameters, and `attributes`, of modules, both by
name; and `per_layer_config`, the same sizes in transformers' own schema for layers that differ, by which caches are
made. A class of this module has the name of the stock class that it extends, so that nothing else needs to know.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

Written by peft_ext, which is not needed to load it; `peft_ext.load_pruned(path)` does the same without remote code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


# what modules compute with besides their parameters; no other attribute is ever set
ATTRIBUTES = (
    *("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_key_value_groups", "all_head_size"),
    *("split_size", "head_dim", "attention_head_size", "scaling", "scale", "intermediate_size"),
)
LAYER_ATTRIBUTES = ("num_attention_heads",)  # what the config of a single layer says of its own
# how config classes call the number of channels of a feed-forward block, and the numbers of heads
WIDTHS = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KEY_HEADS = "num_key_value_heads"


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
        ValueError: The model does not have such a parameter or module, it is smaller, or an attribute is none of those
            that a cut changes; the message lists all of this.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems = [*_wrong_shapes(parameters, shapes), *_wrong_attributes(dict(model.named_modules()), attributes)]
    if problems:
        raise ValueError(
            f"`pruned` of config.json does not go with {type(model).__name__} and the rest of this config: "
            f"{'; '.join(problems[:10])} ({len(problems)} in all). Was the config edited? Restore the one that was "
            "saved with the weights."
        )
    for name, shape in shapes.items():
        owner, _, key = name.rpartition(".")
        corner = tuple(slice(size) for size in shape)
        set_parameter(model.get_submodule(owner), key, parameters[name][corner])
    for name, values in attributes.items():
        module: Any = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, LayerConfig(module.config, **value) if key == "config" else value)


def _wrong_shapes(parameters: dict[str, nn.Parameter], shapes: Any) -> Iterator[str]:
    if not isinstance(shapes, dict):
        yield f"`shapes` is {shapes!r}, not a dictionary"
        return
    for name, shape in shapes.items():
        found = list(parameters[name].shape) if name in parameters else "no such parameter"
        if name not in parameters or not _fits(shape, parameters[name].shape):
            yield f"`shapes` says {shape!r} for {name!r}, where the model has {found}"


def _wrong_attributes(modules: dict[str, nn.Module], attributes: Any) -> Iterator[str]:
    if not isinstance(attributes, dict) or not all(isinstance(values, dict) for values in attributes.values()):
        yield f"`attributes` is {attributes!r}, not a dictionary of dictionaries"
        return
    for name, values in attributes.items():
        if name not in modules:
            yield f"`attributes` names {name!r}, which is no module of the model"
            continue
        own = values.get("config", {})
        if not (isinstance(own, dict) and own.keys() <= set(LAYER_ATTRIBUTES)):
            yield f"`attributes` sets `config` of {name!r} to {own!r}"
            continue
        for key, value in (values | own).items():
            if key == "config" and hasattr(modules[name], "config"):
                continue
            known = key in own or (key in ATTRIBUTES and hasattr(modules[name], key))
            if not known or type(value) not in (int, float) or not value > 0:
                yield f"`attributes` sets `{key}` of {name!r} to {value!r}"


def _fits(shape: Any, largest: torch.Size) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) == len(largest)
        and all(type(size) is int and 0 < size <= most for size, most in zip(shape, largest, strict=True))
    )


def tell_sizes(config: Any) -> None:
    """Lets the config of a model say the sizes of each layer, as transformers asks for them when it makes a cache.

    What is read from the config as a whole stays what it was, as rotary embeddings need it.
    """
    sizes = config.pruned.get("per_layer_config")
    if sizes is None:
        return
    text = config.get_text_config()
    allowed = {*WIDTHS, *HEADS, KEY_HEADS, "head_dim"}
    if not isinstance(sizes, dict) or not all(
        str(index).isdecimal()
        and int(index) < text.num_hidden_layers
        and isinstance(own, dict)
        and own.keys() <= allowed
        and all(type(value) is int and value > 0 for value in own.values())
        for index, own in sizes.items()
    ):
        raise ValueError(
            f"`pruned.per_layer_config` of config.json holds other things than sizes of layers: {sizes!r}."
        )
    text.allow_global_per_layer_attribute_access = True
    text.per_layer_config = sizes


def forget_sizes(config: Any) -> None:
    """Takes them out of the config again: stock classes refuse them, and files have them in `pruned` alone."""
    text = config.get_text_config()
    text.per_layer_config = None
    vars(text).pop("allow_global_per_layer_attribute_access", None)


@contextmanager
def without_sizes(config: Any) -> Iterator[None]:
    """Inside, the config is as files have it."""
    forget_sizes(config)
    try:
        yield
    finally:
        if isinstance(getattr(config, "pruned", None), dict):
            tell_sizes(config)


class Pruned:
    """What a stock class needs besides."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        pruned = config.pruned
        if not (isinstance(pruned, dict) and {"shapes", "attributes"} <= pruned.keys()):
            raise ValueError(f"`pruned` of config.json must have `shapes` and `attributes`, it is {pruned!r}.")
        if (sizes := config.to_dict().get("per_layer_config")) is not None:  # where former versions wrote it
            config.pruned = {**pruned, "per_layer_config": sizes}
        forget_sizes(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shrink(self, pruned["shapes"], pruned["attributes"])  # type: ignore[arg-type]
        tell_sizes(config)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            raise explained(error, path) from error
        refuse_incomplete(info, path)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        with without_sizes(self.config):  # type: ignore[attr-defined]
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def refuse_incomplete(info: dict[str, Any], path: Any) -> None:
    """Raises `ValueError` for weights that the file does not have, which would stay at random values, or more of them.

    Args:
        info: What `from_pretrained` has found out.
        path: Where the file is.
    """
    replaced = {
        key[0] if isinstance(key, (tuple, list)) else key for key in info["mismatched_keys"]
    }  # as was asked for
    missing = sorted(set(info["missing_keys"]) - replaced)
    problems = [f"no {name!r}" for name in missing]
    problems += [f"{name!r}, which the model does not have" for name in sorted(info["unexpected_keys"])]
    if problems:
        raise ValueError(
            f"The weights in {path!s} are not those of the model in its config.json: there is "
            f"{', '.join(problems[:10])} ({len(problems)} in all). Restore the files that were saved together."
        )


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
