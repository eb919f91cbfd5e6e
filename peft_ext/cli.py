"""The command `peft-ext`: what is in an adapter, two side by side, what can be made of one, and its card."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from . import plots
from .cards import ADAPTER_CONFIG, AUTO_CLASSES, CARD, METHODS, CardInfo, push_card, update_card
from .export import load_pruned, prune_and_unload, save_pruned
from .inspection import Adapter, BadInput, Row, by_site, compare, describe, directory_of, read_adapter
from .tuners.spt import save_as_lora
from .version import __version__


# what tokenizers and processors are made of; they are copied as they are, so that no code of theirs runs
PROCESSOR_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "*preprocessor_config.json", "processor_config.json"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# columns of the tables: key, heading, format
_COLUMNS = (
    *(
        ("sites", "sites", "{:,}"),
        ("gets", "gets", "{}"),
        ("rank", "rank", "{}"),
        ("parameters", "parameters", "{:,}"),
    ),
    *(("tuned", "tuned", "{:,}"), ("density", "density", "{:.2g}"), ("units", "units", "{:,}")),
    *(("kept", "kept", "{:,g}"), ("keep_ratio", "keep ratio", "{:.1%}"), ("queries", "queries", "{}")),
    *(("features", "features", "{:,}"), ("kept_features", "kept", "{:,}"), ("head_share", "share of head", "{:.1%}")),
    *(("scale_mean", "gamma-1 mean", "{:+.4f}"), ("scale_std", "std", "{:.4f}")),
    *(("shift_mean", "beta mean", "{:+.4f}"), ("shift_std", "std", "{:.4f}"), ("norm", "norm", "{:.4g}")),
)

_NAMES = {"scale": "gamma - 1", "shift": "beta"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0, or 2 after one line on stderr that says what was wrong."""
    arguments = _parser().parse_args(argv)
    try:
        with _quiet():
            arguments.run(arguments)
    except BadInput as error:
        print(f"peft-ext: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers reports of its loading, and what libraries tell each other."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("peft-ext", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *adapters: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        for adapter in adapters:
            sub.add_argument(adapter, help="a directory, or a repository of the Hub (user/name)")
        return sub

    sub = command("inspect", _inspect, "Show what is in an adapter, or what is left in a pruned model.", "adapter")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw it; needs matplotlib")

    sub = command("compare", _compare, "Show two adapters side by side.", "first", "second")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")

    sub = command("export", _export, "Make something of an adapter that loads without it.", "adapter")
    sub.add_argument("--to", required=True, choices=_EXPORTS, help="a merged model, a pruned one, or a LoRA adapter")
    sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write it")
    sub.add_argument("--base", metavar="MODEL", help="the base model, if not the one that the adapter names")
    sub.add_argument("--dtype", choices=DTYPES, help="of the base model; as it was saved if left out")
    sub.add_argument("--overwrite", action="store_true", help="write into a directory that has files already")

    sub = command("card", _card, "Write the model card of an adapter, or bring it up to date.", "adapter")
    sub.add_argument("--push", metavar="REPO", help="the adapter's repository on the Hub; its card is written there")
    sub.add_argument(
        "--metrics", nargs="+", default=[], type=Path, metavar="FILE.json",
        help="results: fields of `EvalResult`, one or a list, or plain numbers as Trainer writes them",
    )  # fmt: skip
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What the libraries refuse is bad input too: they say it in errors of these types."""
    try:
        yield
    except BadInput:
        raise
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError, UserWarning) as error:
        raise BadInput(f"{what}: {_one_line(error)}") from error


# inspect


def _inspect(arguments: argparse.Namespace) -> None:
    found = describe(arguments.adapter)
    if arguments.figure is not None:
        _draw(found, arguments.figure)
    if arguments.json:
        _print_json(found)
        return
    console = _console()
    modules = found["modules"]
    if found["kind"] == "pruned model":
        counts = found["parameters"]
        _print_pairs(
            console,
            {
                "model": f"{found['source']} (pruned {found['base_class']})",
                "loads with": found["loads_with"],
                "parameters": f"{counts['now']:,} of {counts['before']:,} ({found['left']:.1%})",
                "file": _bytes(found["file_bytes"]),
            },
        )
        _print_rows(console, "What is left", "kind", found["by_kind"])
    else:
        counts = found["parameters"]
        whole = f", {counts['saved_whole']:,} of them saved whole" if counts["saved_whole"] else ""
        per_parameter = found["bytes_per_parameter"]
        _print_pairs(
            console,
            {
                "adapter": found["source"],
                "method": found["name"],
                "base model": " ".join(filter(None, (found["base_model"], _in_brackets(found["base_class"])))),
                "task": found["task"],
                "written by": found["written_by"],
                **{key.replace("_", " "): value for key, value in found["settings"].items()},
                "parameters": f"{counts['all']:,}{whole} ({', '.join(found['dtypes'])})",
                "file": f"{_bytes(found['file_bytes'])}, {per_parameter:.2f} a parameter" if per_parameter else None,
                **{_NAMES.get(key, key): _shown(value) for key, value in found["figures"].items()},
                **{f"whole: {name}": _shape(shape) for name, shape in found["saved_whole"].items()},
            },
        )
        _print_rows(console, "By type", "type", {**found["by_type"], "all": found["totals"]})
        _print_rows(console, "By layer", "layer", found["by_layer"])
    _print_rows(console, "By module", "module", {row["module"]: row for row in modules})


def _draw(found: Mapping[str, Any], path: Path) -> None:
    """The figure that fits the method."""
    rows: list[Row] = found["modules"]
    with _explained(f"No figure was written to {path}"):
        if any("head_share" in row for row in rows):
            figure = plots.bars_of_layers(
                {row["module"].replace(" ", "_"): row["head_share"] for row in rows if "head_share" in row}
            )
        elif any("units" in row for row in rows):
            shares: dict[str, dict[str, tuple[float, int]]] = {}
            for row in rows:
                if "units" in row:
                    shares.setdefault(str(row.get("kind", row["type"])), {})[row["module"]] = (
                        row["kept"],
                        row["units"],
                    )
            figure = plots.bars_of_kept(shares)
        else:
            key, title = (
                ("parameters", "trained parameters") if found["method"] == "SPT" else ("norm", "norm of the update")
            )
            values = {(row["layer"], row["type"]): row[key] for row in rows if key in row}
            if not values:
                raise BadInput(f"There is no figure for the method {found['method']}: leave `--figure` out.")
            figure = plots.heat_map(values, title)
        figure.savefig(path)


# compare


def _compare(arguments: argparse.Namespace) -> None:
    found = compare(arguments.first, arguments.second)
    if arguments.json:
        _print_json(found)
        return
    console = _console()
    first, second = found["first"], found["second"]
    table = _table("", "first", "second")
    for key in ("source", "method", "sites", "parameters"):
        table.add_row(key, *(_number(side[key]) for side in (first, second)))
    table.add_row("file", _bytes(first["file_bytes"]), _bytes(second["file_bytes"]))
    console.print(table)
    if found["config"]:
        table = _table("config", "first", "second")
        for key, values in found["config"].items():
            table.add_row(key, *(_brief(value) for value in values))
        console.print(table)
    sites = found["sites"]
    console.print(f"Sites in common: {len(sites['common'])}")
    for key, name in (("only_first", "first"), ("only_second", "second")):
        if sites[key]:
            console.print(f"Only in the {name}: {', '.join(sites[key])}")
    overlap, cosine = found["overlap"] or {}, found["cosine"]
    if cosine is not None:
        console.print("Cosine of the updates: " + ("unknown" if cosine["all"] is None else f"{cosine['all']:.4f}"))
    if overlap:
        console.print(f"Tuned by both: {_overlap_line(overlap[''])}")
    cosines = cosine["modules"] if cosine is not None else {}
    if not cosines and not overlap:
        return
    table = _table("module", "cosine", *(("first", "second", "shared", "same sign") if overlap else ()))
    for module in dict.fromkeys([*cosines, *filter(None, overlap)]):
        value, shared = cosines.get(module), overlap.get(module)
        cells = [f"{shared[key]:,}" for key in ("first", "second", "shared", "same_sign")] if shared else []
        table.add_row(module, "" if value is None else f"{value:.4f}", *cells)
    console.print(table)


def _overlap_line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['shared']:,} of {found['first']:,} and {found['second']:,} weights (Jaccard {found['jaccard']:.4f}), "
        f"{found['same_sign']:,} in the same direction"
    )


# export


def _export(arguments: argparse.Namespace) -> None:
    adapter = read_adapter(arguments.adapter, PROCESSOR_FILES)
    base: str | None = arguments.base or adapter.config.get("base_model_name_or_path")
    if not base:
        raise BadInput(f"{adapter.source} does not name its base model: give it with `--base`.")
    refuse, write = _EXPORTS[arguments.to]
    refuse(adapter)
    output: Path = arguments.output
    if output.is_file():
        raise BadInput(f"{output} is a file: give a directory.")
    if output.exists() and any(output.samefile(path) for path in (adapter.directory, Path(base)) if path.exists()):
        raise BadInput(f"{output} is what is read from: give another directory.")
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise BadInput(f"{output} is not empty: give another directory, or `--overwrite` to write into it.")
    with _explained(f"The base model {base} does not load"):
        model = _base_model(adapter, base, arguments)
    with _explained(f"The adapter {adapter.source} does not fit {base}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # it would do nothing there
        adapted = PeftModel.from_pretrained(model, str(adapter.directory))
        found, _ = by_site(get_peft_model_state_dict(adapted, save_embedding_layers=False), adapter.method)
        if lost := [name for name in adapter.sites if name not in found]:  # PEFT drops these without a word
            raise BadInput(f"{base} has no place for {lost[0]!r} and {len(lost) - 1} more of {adapter.source}.")
    with _explained(f"{adapter.source} cannot be made {arguments.to}"):
        write(adapter, adapted.eval(), base, output)
    print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def _base_model(adapter: Adapter, base: str, arguments: argparse.Namespace) -> PreTrainedModel:
    """The model that the adapter goes on, of the class that it was trained on; from safetensors, with no remote code."""
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if arguments.dtype:
        options["dtype"] = DTYPES[arguments.dtype]
    revision = None if arguments.base else adapter.config.get("revision")
    where = {} if revision is None else {"revision": revision}
    config = AutoConfig.from_pretrained(base, **where)
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
    if model_class is None:
        raise BadInput(f"transformers has no class {name!r} for the base model: set `task_type` in {ADAPTER_CONFIG}.")
    return model_class


def _check_merged(adapter: Adapter) -> None:
    method = METHODS.get(adapter.method)
    if method is not None and not method.mergeable:
        raise BadInput(
            f"{adapter.source} is of the method {adapter.method}, which cannot be merged ({method.limits[0]}) Load it "
            "as an adapter: `peft_ext.load`."
        )


def _write_merged(adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    if not hasattr(model.base_model, "merge_and_unload"):
        raise BadInput(f"The method {adapter.method} cannot be merged: load it as an adapter.")
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(output)
    if adapter.method in METHODS:
        update_card(output, CardInfo(method=adapter.method, relation="finetune", base_model=_hub_id(base)))
    _copy_processor(adapter, base, output)


def _check_pruned(adapter: Adapter) -> None:
    if adapter.method != "MASK_PRUNING":
        raise BadInput(
            f"{adapter.source} is of the method {adapter.method}, which has no masks that say what to cut: only "
            "MASK_PRUNING has. `--to merged` writes a model of the base's size."
        )


def _write_pruned(adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    pruned: Any = prune_and_unload(model)
    save_pruned(pruned, output, CardInfo(base_model=_hub_id(base)))
    _copy_processor(adapter, base, output)


def _check_lora(adapter: Adapter) -> None:
    if adapter.method == "SPT":
        return  # `save_as_lora` knows whether the adapter is nothing but low-rank
    advice = {
        "LORA": "it is a LoRA adapter already",
        "MASK_PRUNING": "its masks are no part of LoRA: `--to pruned` cuts them out, and in Python "
        "`prune_and_unload(model, keep_lora=True)` leaves a LoRA adapter on the smaller base",
        "VQT": "it has a head of its own and changes no weight: load it as an adapter, with `peft_ext.load`",
    }.get(adapter.method, "its changes have no low rank: `--to merged` writes a model that loads everywhere")
    raise BadInput(f"{adapter.source} is of the method {adapter.method} and is not made LoRA: {advice}.")


def _write_lora(adapter: Adapter, model: PeftModel, base: str, output: Path) -> None:
    save_as_lora(model, output)


_EXPORTS = {
    "merged": (_check_merged, _write_merged),
    "pruned": (_check_pruned, _write_pruned),
    "lora": (_check_lora, _write_lora),
}


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


# card


def _card(arguments: argparse.Namespace) -> None:
    info = _with_metrics(arguments.metrics)
    if Path(arguments.adapter).is_dir():
        directory = directory_of(arguments.adapter)
        with _explained(f"No card was written to {directory}"):
            update_card(directory, CardInfo(**info, repo_id=arguments.push))
        print(f"Wrote {directory / CARD}")
    elif arguments.push != arguments.adapter:
        directory_of(arguments.adapter)  # a `BadInput` if it is not on the Hub either
        raise BadInput(
            f"{arguments.adapter} is on the Hub; its card is written there with `--push {arguments.adapter}`."
        )
    if arguments.push:
        with _explained(f"No card was pushed to {arguments.push}"):
            print(f"Pushed {push_card(arguments.push, CardInfo(**info))}")


def _with_metrics(paths: Iterable[Path]) -> dict[str, Any]:
    """The fields of a `CardInfo` that hold what the files measured."""
    results: list[EvalResult] = []
    rows: list[dict[str, Any]] = []
    for path in paths:
        with _explained(f"{path} has no metrics that could be read"):
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = content if isinstance(content, list) else [content]
            for entry in entries:
                if "metric_value" in entry:
                    unknown = entry.keys() - {field.name for field in fields(EvalResult)}
                    if unknown:
                        raise BadInput(f"{path} has {', '.join(sorted(unknown))}, which is no field of `EvalResult`.")
                    results.append(EvalResult(**entry))
                    continue
                numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
                if not numbers:
                    raise BadInput(f"{path} has no numbers and no `metric_value`: give results, or `EvalResult`s.")
                rows.append({"Results": path.stem, **numbers})
    return {"results": results, "comparison": rows}


# printing


def _console() -> Console:
    """Of the terminal's width; as wide as the tables are where the output goes into a file or a pipe."""
    width = None if sys.stdout.isatty() else 1000
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _print_json(found: Any) -> None:
    plain = json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN
    print(json.dumps(plain, indent=2))


def _table(*headings: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for place, heading in enumerate(headings):
        is_text = place == 0 or heading in ("gets", "shapes")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    return table


def _print_pairs(console: Console, pairs: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for key, value in pairs.items():
        if value not in (None, ""):
            table.add_row(key, _number(value))
    console.print(table)
    console.print()


def _print_rows(console: Console, title: str, first: str, rows: Mapping[str, Row]) -> None:
    """A table of rows, with those columns that any of them has."""
    if not rows:
        return
    columns = [column for column in _COLUMNS if any(row.get(column[0]) is not None for row in rows.values())]
    has_shapes = any(row.get("shapes") for row in rows.values())
    table = _table(first, *(heading for _, heading, _ in columns), *(["shapes"] if has_shapes else []))
    for name, row in rows.items():
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, _, form in columns]
        if has_shapes:
            shapes = row.get("shapes", {}).items()
            cells.append(", ".join(f"{leaf.removesuffix('.weight')} {_shape(shape)}" for leaf, shape in shapes))
        table.add_row(name, *cells)
    console.print(title)
    console.print(table)


def _number(value: Any) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {f'{v:.4g}' if isinstance(v, float) else _number(v)}" for key, v in value.items())
    return _number(value)


def _brief(value: Any) -> str:
    text = "-" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _in_brackets(text: str | None) -> str:
    return f"({text})" if text else ""


def _bytes(count: int | None) -> str | None:
    return None if count is None else f"{count:,} bytes"
