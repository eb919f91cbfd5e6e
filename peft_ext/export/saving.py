"""Saving what is left, so that it loads again.

(a) If the stock class builds it from a changed config, the config is all that changes.
(b) If not, `pruned` in `config.json` lists what differs, and `modeling_pruned.py` beside the weights applies it.
(c) The sizes then stand in `pruned` also in the schema that transformers has for layers that differ
    (`per_layer_config`). Its model classes refuse it, and where it stands in the config as a whole, rotary embeddings
    and the validation of configs trip over it; but caches are made by it, so a live model's config has it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..cards import CardInfo, hub_ids, update_card
from ..core import methods
from ..groups import Group, find_groups
from . import modeling_pruned
from .loading import auto_classes, class_for, class_of, read_config
from .modeling_pruned import (
    ATTRIBUTES,
    HEADS,
    KEY_HEADS,
    WIDTHS,
    Pruned,
    forget_sizes,
    tell_sizes,
    without_sizes,
)


CODE = "modeling_pruned.py"
_OURS = ("pruned", "auto_map", "per_layer_config")  # in a config, besides the fields of the stock class

# by which classes say that they cannot be built with such a config
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
_RATIO = "mlp_ratio"

Fields = dict[str, Any]
Difference = tuple[dict[str, list[int]], dict[str, dict[str, Any]]]  # shapes and attributes, as `shrink` takes them


def settle(model: PreTrainedModel) -> None:
    """Lets a model that was cut describe itself, so that `save_pretrained` writes what loads again.

    Either its config changes and fits the stock class; or the config gets `pruned`, and the model becomes one of the
    class of that name in `modeling_pruned.py`. Of a model that was not cut, or is of no class of transformers, nothing
    changes.
    """
    stock = known_class(model)
    if stock is None:
        return
    config: Any = model.config
    forget_sizes(config)
    fields = {key: value for key, value in config.to_dict().items() if key not in _OURS}
    plain = _built(stock, config, fields)
    found = difference(plain, model)
    changed = fitting_fields(model, stock, fields, plain) if any(found) else fields
    for key in ("pruned", "auto_map"):
        config.__dict__.pop(key, None)
    if changed is not None:
        if changed != fields:
            config.unpruned = _merged(_replaced(changed, fields), getattr(config, "unpruned", {}))
            _assign(config, changed)
        model.__class__ = stock
        return
    config.pruned = {"shapes": found[0], "attributes": found[1]}
    config.auto_map = {name: f"{Path(CODE).stem}.{stock.__name__}" for name in auto_classes(stock, config)}
    if (per_layer := per_layer_sizes(model, plain)) is not None:
        config.pruned["per_layer_config"] = per_layer
    tell_sizes(config)
    model.__class__ = class_for(config, stock)


def known_class(model: nn.Module) -> type[PreTrainedModel] | None:
    """The class of transformers that a model is of, or extends as a pruned one; `None` if there is none."""
    known = [cls for cls in type(model).__mro__ if getattr(transformers, cls.__name__, None) is cls]
    return known[0] if known and known[0].__name__ == type(model).__name__ else None


def stock_class(model: nn.Module) -> type[PreTrainedModel]:
    """The same, or a `ValueError`."""
    if (stock := known_class(model)) is not None:
        return stock
    raise ValueError(
        f"{type(model).__name__} is no class of transformers, which alone can be saved with channels cut out."
    )


def difference(plain: nn.Module, model: nn.Module) -> Difference:
    """What distinguishes a model that was cut from the one that its config builds."""
    expected = dict(plain.named_parameters(remove_duplicate=False))
    shapes = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in expected and parameter.shape != expected[name].shape
    }
    attributes: dict[str, dict[str, Any]] = defaultdict(dict)
    modules: dict[str, Any] = dict(plain.named_modules())
    for name, module in model.named_modules():
        if name not in modules:
            continue
        for key in ATTRIBUTES:
            value = getattr(module, key, None)
            if isinstance(value, (int, float)) and value != getattr(modules[name], key, None):
                attributes[name][key] = value
        own = getattr(getattr(module, "config", None), "own", {})  # of a LayerConfig
        if own and any(value != getattr(modules[name].config, key) for key, value in own.items()):
            attributes[name]["config"] = dict(own)
    return shapes, dict(attributes)


def _built(stock: type[PreTrainedModel], config: PreTrainedConfig, fields: Fields) -> PreTrainedModel:
    with torch.device("meta"):
        return stock(type(config).from_dict(copy.deepcopy(fields)))


# (a)


def fitting_fields(
    model: PreTrainedModel, stock: type[PreTrainedModel], fields: Fields, plain: nn.Module
) -> Fields | None:
    """The config from which the stock class builds this model, if there is one; found by building."""
    best = difference(plain, model)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    sizes: dict[int, set[int]] = defaultdict(set)
    for name, shape in best[0].items():
        for old, new in zip(parameters[name].shape, shape, strict=True):
            if new != old:
                sizes[old].add(new)
    for path, change in _changes(fields, sizes):
        candidate = copy.deepcopy(fields)
        section = candidate
        for key in path:
            section = section[key]
        section.update(change)
        try:
            left = difference(_built(stock, model.config, candidate), model)
        except _REFUSALS:
            left = best
        if len(left[0]) + len(left[1]) < len(best[0]) + len(best[1]):
            best, fields = left, candidate
    return None if any(best) else fields


def _changes(
    fields: Fields, sizes: Mapping[int, set[int]], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Fields]]:
    """Changes of one section of a config each that may turn these old sizes into these new ones."""
    for key, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _changes(value, sizes, (*path, key))
    heads = next((key for key in HEADS if fields.get(key)), None)
    hidden = next((fields[key] for key in ("hidden_size", "n_embd", "dim", "d_model") if fields.get(key)), 0)
    for old, new in sizes.items():
        if len(new) > 2:  # two sections at most share a size; else these layers differ
            continue
        for size in new:
            for key in WIDTHS:
                if key in fields and fields[key] in (old, None):
                    yield path, {key: size}
            if fields.get(_RATIO):
                yield path, {_RATIO: fields[_RATIO] * size / old}
            head_dim = heads and (fields.get("head_dim") or hidden // fields[heads])
            if heads and head_dim and old == fields[heads] * head_dim and size % head_dim == 0:
                change = {heads: size // head_dim, "head_dim": head_dim}
                if fields.get(KEY_HEADS):
                    change[KEY_HEADS] = fields[KEY_HEADS] * change[heads] // fields[heads]
                yield path, change


def _replaced(new: Fields, old: Fields) -> Fields:
    """What `old` has in the places where `new` has something else."""
    changed = {key: value for key, value in new.items() if key in old and value != old[key]}
    return {key: _replaced(value, old[key]) if isinstance(value, dict) else old[key] for key, value in changed.items()}


def _merged(first: Fields, second: Fields) -> Fields:
    """Both, section by section; the second wins."""
    both = {key: _merged(first[key], second[key]) for key in first if isinstance(second.get(key), dict)}
    return {**first, **second, **both}


def _assign(config: Any, fields: Fields) -> None:
    """Sets the fields of a config that is in use; its modules share it."""
    for key, value in fields.items():
        current = getattr(config, key, None)
        if isinstance(current, PreTrainedConfig):
            _assign(current, value)
        elif key not in ("model_type", "transformers_version", "dtype") and value != current:
            setattr(config, key, value)


# (b) and (c)


def per_layer_sizes(model: nn.Module, plain: nn.Module) -> dict[int, dict[str, int]] | None:
    """The sizes of each layer by the names that the config has for them; `None` if it has none for layers like these.

    Of a model with several towers those of its text layers.
    """
    text: Any = plain.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or getattr(plain.config, "is_encoder_decoder", False):
        return None
    if dataclasses.is_dataclass(text):
        declared = {field.name for field in dataclasses.fields(text)}
    else:  # of older versions of transformers
        declared = set(type(text)().to_dict())
    heads = next((key for key in HEADS if key in declared), None)
    sizes: dict[int, dict[str, int]] = defaultdict(dict)
    before = groups_of(plain)
    for name, group in groups_of(model).items():
        if before[name].tower != type(text).__name__:
            continue
        numbers = re.findall(r"\.(\d+)\.", name)
        if len(numbers) != 1:
            return None
        if group.kind == "heads":
            own = {heads: group.units * group.width // group.head_dim}
            own |= {KEY_HEADS: group.units} if getattr(text, KEY_HEADS, None) else {}
            own |= {} if getattr(text, "head_dim", None) else {"head_dim": group.head_dim}
        else:
            width = next(
                (key for key in WIDTHS if key in declared and getattr(text, key) in (before[name].units, None)), None
            )
            own = {width: group.units}
        layer = sizes[int(numbers[0])]
        if None in own or own.keys() & layer.keys():  # no such name, or two groups for it
            return None
        layer.update(own)  # type: ignore[arg-type]
    return dict(sizes) if set(sizes) == set(range(layers)) else None


def groups_of(model: nn.Module) -> dict[str, Group]:
    """All groups of a model, none if its architecture is unknown."""
    found: dict[str, Group] = {}
    for kind in ("heads", "ffn"):
        try:
            found |= find_groups(model, [kind])
        except ValueError:
            continue
    return found


# files


def save_pruned(
    model: PreTrainedModel, path: str | os.PathLike[str], info: CardInfo | None = None, **kwargs: Any
) -> None:
    """Writes a model that was cut: weights, config, a card, and the code that loads it if no stock class can.

    Args:
        model: What `prune_and_unload` returned, or `load_pruned`, trained further or not.
        path: A directory.
        info: What the card says besides, metrics for example.
        kwargs: For `model.save_pretrained`.

    Raises:
        TypeError: The model has adapters.
        ValueError: It is of no class of transformers, the directory has another `modeling_pruned.py`, or what was
            written there would not load again.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "The model has adapters. Merge them first (`prune_and_unload(model)`, `model.merge_and_unload()`); or save "
            "base and adapter apart: `save_pruned(copy.deepcopy(model).unload(), base_path)` and "
            "`model.save_pretrained(adapter_path)`."
        )
    stock_class(model)
    settle(model)
    directory = Path(path)
    if isinstance(model, Pruned) and (directory / CODE).is_file():
        _refuse_other_code((directory / CODE).read_text(encoding="utf-8"), directory)
    model.save_pretrained(directory, **kwargs)
    _check_saved(model, directory)
    update_card(directory, _card_info(model, info or CardInfo()))


def push_pruned_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    info: CardInfo | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pruned model",
    **kwargs: Any,
) -> str:
    """Like `save_pruned`, to a repository on the Hub, which is made if need be; returns the commit's URL.

    Args:
        model: See `save_pruned`.
        repo_id: The repository.
        info: What the card says besides.
        private: Of a new repository.
        token: Of the Hub; by default the one that is stored.
        revision: A branch.
        commit_message: Of the commit.
        kwargs: For `model.save_pretrained`.

    Raises:
        TypeError, ValueError: As `save_pruned`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if api.file_exists(repo_id, CODE, revision=revision):
        there = Path(hf_hub_download(repo_id, CODE, revision=revision, token=token))
        _refuse_other_code(there.read_text(encoding="utf-8"), repo_id)
    with TemporaryDirectory() as folder:
        save_pruned(model, folder, dataclasses.replace(info or CardInfo(), repo_id=repo_id), **kwargs)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url


def _check_saved(model: PreTrainedModel, directory: Path) -> None:
    """Raises `ValueError` if the config that was written does not build the model again."""
    try:
        config = read_config(os.fspath(directory))
        with torch.device("meta"):
            built = class_of(config, directory)(config)
        left = difference(built, model)
    except _REFUSALS as error:
        raise ValueError(
            f"The model in {directory} was written, but cannot be loaded ({type(error).__name__}: {error}). Please report "
            "its architecture and config; `uniform=True` in `prune_and_unload` may lead around it."
        ) from error
    if any(left):
        raise ValueError(
            f"The model in {directory} was written, but its config builds another one; shapes and attributes that differ: "
            f"{left}. Was the model changed by hand after the cut?"
        )


def _refuse_other_code(code: str, where: Any) -> None:
    if code != Path(modeling_pruned.__file__).read_text(encoding="utf-8"):
        raise ValueError(
            f"{where} has another {CODE} already, on which a model there may depend. Save to an empty place, or delete "
            "that file if it is of no use."
        )


def _card_info(model: PreTrainedModel, info: CardInfo) -> CardInfo:
    bases = hub_ids([model.config.name_or_path])  # a directory would tell about a machine, and the Hub refuses it
    return dataclasses.replace(
        info,
        method=info.method or next(name for name, method in methods().items() if method.cuts),
        relation="finetune",
        base_model=info.base_model or next(iter(bases), None),
        base_class=info.base_class or stock_class(model).__name__,
        sizes=[*size_rows(dense_model(model), model), *info.sizes],
    )


def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """What the model was before anything was cut, on the meta device: its shapes, no weights."""
    config: Any = model.config
    with without_sizes(config):
        fields = {key: value for key, value in config.to_dict().items() if key not in (*_OURS, "unpruned")}
    return _built(stock_class(model), config, _merged(fields, getattr(config, "unpruned", {})))


def kept_shares(model: PreTrainedModel) -> dict[str, dict[str, tuple[float, float]]]:
    """How many units each group of a pruned model has, and how many it had, by kind and name of the group.

    Raises:
        ValueError: Nothing is cut out of it that could be shown.
    """
    shares: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    after = groups_of(model)
    for key, group in groups_of(dense_model(model)).items():
        shares[group.kind][key] = (after[key].units, group.units)
    if not shares:
        raise ValueError(
            f"This {type(model).__name__} has no masks, and nothing is cut out of it that could be shown."
        )
    return dict(shares)


def size_rows(dense: nn.Module, model: nn.Module) -> list[dict[str, Any]]:
    """A row for each kind of channels, and one for the parameters: how many there were, are, and share that is left."""
    before, after = groups_of(dense), groups_of(model)
    counts = {}
    for kind, name in (("ffn", "Feed-forward channels"), ("heads", "Attention heads (with their keys)")):
        old, new = (sum(group.units for group in found.values() if group.kind == kind) for found in (before, after))
        if old:
            counts[name] = old, new
    counts["Parameters"] = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in model.parameters())
    return [
        {"": name, "Before": f"{old:,}", "Now": f"{new:,}", "Left": f"{new / old:.1%}"}
        for name, (old, new) in counts.items()
    ]
