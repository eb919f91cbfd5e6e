"""`peft-ext export`."""

from __future__ import annotations

import argparse
import re
import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from ..cards import AUTO_CLASSES, CardInfo, update_card
from ..core import ADAPTER_CONFIG, Adapter, BadInput, Writer, about_of, method_of, methods
from ..export import FORMS, load_pruned, prune_and_unload, save_pruned
from ..export.loading import read_config
from ..inspection import by_site, read_adapter
from ..loading import load
from .running import explained


# what tokenizers and processors are made of; they are copied as they are, so that no code of theirs runs
PROCESSOR_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*preprocessor_config.json", "processor_config.json"),
)


def main(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.adapter, PROCESSOR_FILES)
    output: Path = arguments.output
    if arguments.to in FORMS:
        check_output(arguments, [adapter.directory])
        with explained(f"{adapter.source} cannot be made {arguments.to}"):
            packed = FORMS[arguments.to](adapter.directory)
            packed.save_pretrained(output)
        print(
            f"Wrote {output}: {packed.original_nbytes:,} bytes of tensors as {packed.nbytes:,}; `peft_ext.load` reads it"
        )
        return
    base: str | None = arguments.base or adapter.config.get("base_model_name_or_path")
    if not base:
        raise BadInput(f"{adapter.source} does not name its base model: give it with `--base`.")
    write = _writer(adapter, arguments.to)
    check_output(arguments, [adapter.directory, Path(base)])
    with explained(f"The base model {base} does not load"):
        model = _base_model(adapter, base, arguments)
    with explained(f"The adapter {adapter.source} does not fit {base}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # it would do nothing there
        adapted = load(adapter.directory, model)  # a packed one, too
        found, _ = by_site(get_peft_model_state_dict(adapted, save_embedding_layers=False), adapter.method)
        if lost := [name for name in adapter.sites if name not in found]:  # PEFT drops these without a word
            raise BadInput(f"{base} has no place for {lost[0]!r} and {len(lost) - 1} more of {adapter.source}.")
    with explained(f"{adapter.source} cannot be made {arguments.to}"):
        write(adapter, adapted.eval(), base, output)
    print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def check_output(arguments: argparse.Namespace, sources: list[Path]) -> None:
    """Raises `BadInput` unless the output can be written without harm to what is read or was there."""
    output: Path = arguments.output
    if output.is_file():
        raise BadInput(f"{output} is a file: give a directory.")
    if output.exists() and any(output.samefile(path) for path in sources if path.exists()):
        raise BadInput(f"{output} is what is read from: give another directory.")
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise BadInput(f"{output} is not empty: give another directory, or `--overwrite` to write into it.")


def _base_model(adapter: Adapter, base: str, arguments: argparse.Namespace) -> PreTrainedModel:
    """The model that the adapter goes on, of the class that it was trained on; from safetensors, with no remote code."""
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if arguments.dtype:
        options["dtype"] = getattr(torch, arguments.dtype)
    revision = None if arguments.base else adapter.config.get("revision")
    where = {} if revision is None else {"revision": revision}
    config = read_config(base, **where)
    load: Any = load_pruned
    if not hasattr(config, "pruned"):
        model_class = _base_class(adapter, config)
        load = model_class.from_pretrained
        heads = [t for key, t in adapter.others.items() if re.search(r"(classifier(\.out_proj)?|score)\.weight$", key)]
        if model_class.__name__.endswith("Classification") and heads and len(heads[-1]) != config.num_labels:
            options |= {"num_labels": len(heads[-1]), "ignore_mismatched_sizes": True}
    model, info = load(base, **options, **where)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    if random := sorted((set(info["missing_keys"]) | mismatched) - adapter.others.keys()):
        raise BadInput(
            f"{base} has no weights that fit {random[0]!r} and {len(random) - 1} more of a {type(model).__name__}, and "
            f"{adapter.source} does not bring them: give the model that it was trained on with `--base`."
        )
    return model


def _base_class(adapter: Adapter, config: Any) -> Any:
    mapping = adapter.config.get("auto_mapping") or {}
    library, name = mapping.get("parent_library", "transformers."), mapping.get("base_model_class")
    if not library.startswith("transformers."):
        raise BadInput(f"The base of {adapter.source} is a {name} of {library}, not of transformers: use Python.")
    name = name or AUTO_CLASSES.get(str(adapter.config.get("task_type"))) or (config.architectures or [None])[0]
    model_class = getattr(import_module(library.rstrip(".")), str(name), None)
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not (is_model or (model_class is not None and name in AUTO_CLASSES.values())):
        raise BadInput(f"transformers has no class {name!r} for the base model: set `task_type` in {ADAPTER_CONFIG}.")
    return model_class


# The forms


Write = Callable[[Adapter, PeftModel, str, Path], None]


def _writer(adapter: Adapter, form: str) -> Write:
    """What writes an adapter in this form.

    Raises:
        BadInput: The method does not offer it; the message says what would work.
    """
    about = about_of(adapter.method)
    offered = _forms(adapter)
    if form in offered:
        return offered[form]
    if form == "merged" and about.limits:
        advice = f"which cannot be merged ({about.limits[0]}) Load it as an adapter: `peft_ext.load`."
    elif form in about.instead:
        advice = f"and is not made {form}: {about.instead[form]}."
    elif form == "pruned":
        able = [name for name, method in methods().items() if method.cuts]
        advice = (
            f"which has no masks that say what to cut: only {', '.join(able)} has. `--to merged` writes a model of the "
            "base's size."
        )
    elif form == "lora":
        advice = (
            "and is not made lora: its changes have no low rank: `--to merged` writes a model that loads everywhere."
        )
    else:
        can = [*offered, *(f for f in FORMS if f not in about.instead and (about.offsets or f == "binarized"))]
        instead = f"`--to` can be {' or '.join(can)}" if can else "it has no other form"
        advice = f"and is not made {form}: {instead}."
    raise BadInput(f"{adapter.source} is of the method {adapter.method}, {advice}")


def _forms(adapter: Adapter) -> dict[str, Write]:
    """The forms that an adapter can be written in."""
    about, method = about_of(adapter.method), method_of(adapter.method)
    forms: dict[str, Write] = {"merged": _write_merged} if about.merges_with(adapter.config) else {}
    if method is not None and method.cuts:
        forms["pruned"] = _write_pruned
    for form, write in about.exports().items():
        forms[form] = partial(_write_form, write)
    return forms


def _write_form(write: Writer, adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    write(model, output)


def _write_merged(adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    if not hasattr(model.base_model, "merge_and_unload"):
        raise BadInput(f"The method {adapter.method} cannot be merged: load it as an adapter.")
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(output)
    if method_of(adapter.method) is not None:
        update_card(output, CardInfo(method=adapter.method, relation="finetune", base_model=_hub_id(base)))
    _copy_processor(adapter, base, output)


def _write_pruned(adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    pruned: Any = prune_and_unload(model)
    save_pruned(pruned, output, CardInfo(base_model=_hub_id(base), method=adapter.method))
    _copy_processor(adapter, base, output)


def _hub_id(base: str) -> str | None:
    return None if Path(base).exists() else base


def _copy_processor(adapter: Adapter, base: str, output: Path) -> None:
    """The tokenizer or processor that was saved with the adapter, or that of the base."""
    folders = [adapter.directory, Path(base) if Path(base).is_dir() else None]
    for folder in folders:
        source = folder or Path(snapshot_download(base, allow_patterns=list(PROCESSOR_FILES)))
        files = [file for file in source.iterdir() if any(fnmatch(file.name, pattern) for pattern in PROCESSOR_FILES)]
        for file in files:
            shutil.copy(file, output / file.name)
        if files:
            return
