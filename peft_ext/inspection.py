"""What is in an adapter, read from its files alone: no base model is built or downloaded.

`describe` and `compare` return plain dictionaries, which can be written as JSON; `cli.py` shows them as tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from .cards import ADAPTER_CONFIG, ADAPTER_WEIGHTS, METHODS
from .core import layer_and_type
from .export.modeling_pruned import pruned_class
from .export.saving import dense_model, groups_of
from .sparse import decode_alone
from .tuners.sparse_ft.compose import overlap_of
from .tuners.spt.model import amounts
from .tuners.spt.parameters import number_of, parameter_of
from .tuners.vqt.families import FAMILIES


Row = dict[str, Any]
Figures = dict[str, Any]

CONFIG = "config.json"
ADAPTER_FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, "README.md"]  # what is fetched from the Hub to be read
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
UNDECIDED = -1  # in the masks of an adapter whose training is not done

# what is said of every adapter besides, and the fields of the config that say most about each method
_ELSEWHERE = {"peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "revision"}
_ELSEWHERE |= {"peft_version", "peft_ext_version", "target_modules"}
_HEADLINES: dict[str, tuple[str, ...]] = {
    "VQT": ("num_queries", "pooling", "num_selected_features"),
    "SPARSE_FT": ("selection", "density", "num_tunable_weights"),
    "SPT": ("budget", "structured", "r"),
    "MASK_PRUNING": ("r", "lora_alpha", "target_sparsity", "penalty"),
    "LORA": ("r", "lora_alpha"),
}


class BadInput(ValueError):
    """What was given cannot be used; the message says what was found and what would work."""


# Updates, as far as files tell them


class Update(Protocol):
    """A change of one tensor of the base."""

    def norm(self) -> float:
        """Its L2 norm."""

    def dot(self, other: Any) -> float | None:
        """Its inner product with another one of the same tensor, `None` where that cannot be told."""


@dataclass(frozen=True)
class LowRank:
    """`scale * up @ down`, of down `(r, inputs)` and up `(outputs, r)`, never multiplied out."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def norm(self) -> float:
        return math.sqrt(max(self.dot(self) or 0.0, 0.0))

    def dot(self, other: Any) -> float | None:
        if not isinstance(other, LowRank) or self.down.shape[1:] != other.down.shape[1:]:
            return None
        if len(self.up) != len(other.up):
            return None
        inner = (self.up.T @ other.up) * (self.down @ other.down.T)
        return self.scale * other.scale * inner.sum().item()


@dataclass(frozen=True)
class Sparse:
    """Values `(k,)` on the flat `places` `(k,)`, `None` if these can be read in several ways."""

    values: torch.Tensor
    places: torch.Tensor | None

    def norm(self) -> float:
        return self.values.norm().item()

    def dot(self, other: Any) -> float | None:
        if not isinstance(other, Sparse) or self.places is None or other.places is None:
            return None
        ours, theirs = torch.isin(self.places, other.places), torch.isin(other.places, self.places)
        return (self.values[ours] @ other.values[theirs]).item()  # places are sorted in both


@dataclass(frozen=True)
class Vector:
    """A value for every channel."""

    values: torch.Tensor

    def norm(self) -> float:
        return self.values.norm().item()

    def dot(self, other: Any) -> float | None:
        if not isinstance(other, Vector) or self.values.shape != other.values.shape:
            return None
        return (self.values @ other.values).item()


# Reading


@dataclass
class Site:
    """A module with what the adapter puts on it: tensors by their name behind the method's prefix."""

    module: str
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    def matrix(self, *names: str) -> torch.Tensor | None:
        """The first of the leaves that is there, as `(rows, columns)` in fp64; convolutions are flattened."""
        tensor = next((self.leaves[name] for name in names if name in self.leaves), None)
        return None if tensor is None else tensor.double().flatten(1)


@dataclass
class Adapter:
    """The files of one adapter."""

    source: str
    directory: Path
    config: dict[str, Any]
    sites: dict[str, Site]
    others: dict[str, torch.Tensor]  # what is saved as it is: heads, embeddings of tokens

    @property
    def method(self) -> str:
        """`peft_type`."""
        return self.config["peft_type"]

    @property
    def base_class(self) -> str | None:
        """The class of the model that it was trained on, if that is written down."""
        return (self.config.get("auto_mapping") or {}).get("base_model_class")

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the file."""
        return [*(leaf for site in self.sites.values() for leaf in site.leaves.values()), *self.others.values()]


def directory_of(source: str, patterns: Sequence[str] = ADAPTER_FILES) -> Path:
    """The directory that `source` is, or the copy of that repository on the Hub.

    Raises:
        BadInput: It is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in PICKLES:
        raise BadInput(f"{source} is no safetensors file, and nothing else is read. {_resave()}")
    if path.exists():
        raise BadInput(f"{source} is a file: give the directory that it is in.")
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise BadInput(f"{source} does not exist: give a directory, or a repository of the Hub (user/name).") from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # whatever can go wrong on the way to the Hub
        raise BadInput(
            f"{source} is no directory here, and no repository of that name came from the Hub "
            f"({type(error).__name__}): check the name, the connection, and `hf auth login` if it is private."
        ) from error


def read_adapter(source: str, besides: Sequence[str] = ()) -> Adapter:
    """Reads an adapter from a directory or the Hub.

    Args:
        source: The directory, or the repository.
        besides: Patterns of further files to fetch from the Hub.

    Raises:
        BadInput: There is none, its method is unknown, or its files do not fit together.
    """
    directory = directory_of(source, [*ADAPTER_FILES, *besides])
    if not (directory / ADAPTER_CONFIG).is_file():
        raise BadInput(_no_adapter(source, directory))
    config = _json(directory / ADAPTER_CONFIG)
    method = config.get("peft_type")
    if method not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:  # compared, for it may be of any type
        raise BadInput(
            f"{source} is of the method {method!r}, which neither the installed peft nor peft_ext has: "
            "`pip install -U peft peft-ext`, or import the package that it comes from in Python."
        )
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        found = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        has = f"has {', '.join(found)}, which is not read" if found else f"has no {ADAPTER_WEIGHTS}"
        raise BadInput(f"{source} {has}. {_resave()}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise BadInput(
            f"{ADAPTER_WEIGHTS} of {source} is no safetensors file ({error}): a damaged copy, or a pointer of git LFS "
            "(`git lfs pull`)."
        ) from None
    sites, others = by_site(tensors, method)
    if not sites and method in _SITES.keys() | METHODS.keys():
        raise BadInput(
            f"{ADAPTER_CONFIG} of {source} says {method}, but {ADAPTER_WEIGHTS} has no tensor of that method "
            f"({_some(tensors) or 'it is empty'}): restore the two that were saved together."
        )
    return Adapter(source, directory, config, sites, others)


def is_pruned(directory: Path) -> bool:
    """Whether `save_pruned` wrote a model there."""
    if (directory / ADAPTER_CONFIG).is_file() or not (directory / CONFIG).is_file():
        return False
    config = _json(directory / CONFIG)
    return "pruned" in config or "unpruned" in config


def _no_adapter(source: str, directory: Path) -> str:
    found = [path.parent.name for path in sorted(directory.glob(f"*/{ADAPTER_CONFIG}"))]
    if found:
        return (
            f"{source} has no {ADAPTER_CONFIG}, but there are adapters in it: {', '.join(found)}. Give one of these."
        )
    if (directory / CONFIG).is_file():
        return f"{source} is a whole model and was not pruned: give an adapter, or what `save_pruned` wrote."
    names = _some(path.name for path in directory.iterdir())
    return f"{source} has no {ADAPTER_CONFIG} ({names or 'it is empty'}): give what `model.save_pretrained` wrote."


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is no JSON ({error}): restore the file that was saved.") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object but a {type(content).__name__}: restore the file that was saved.")
    return content


def _resave() -> str:
    return "Only safetensors are read, for other files can run code: load it in Python and `save_pretrained` it again."


def _some(names: Iterable[str]) -> str:
    chosen = sorted(names)
    return ", ".join(chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")


def by_site(tensors: Mapping[str, torch.Tensor], method: str) -> tuple[dict[str, Site], dict[str, torch.Tensor]]:
    """The tensors of a method, as they are saved, by the module that they are on; and the others."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[method]  # type: ignore[index]  # its keys hash like their values
    sites: dict[str, Site] = {}
    others = {}
    for key, tensor in tensors.items():
        names = key.removeprefix("base_model.model.").split(".")
        at = next((i for i, name in enumerate(names) if name.startswith(prefix)), None)
        if at is None:
            others[".".join(names)] = tensor
            continue
        module = ".".join(names[:at]).removesuffix(".base_layer")
        leaf = ".".join(names[at:]).removeprefix(prefix)
        if method == "SPT" and "_" in leaf.split(".")[0]:  # `delta_<key>.weight`, on the parameter `key` of the module
            key = leaf.split(".")[0].partition("_")[2]
            module, leaf = f"{module}.{key}", leaf.replace(f"_{key}", "", 1)
        sites.setdefault(module, Site(module)).leaves[leaf] = tensor
    return sites, others


# What each method says of a site: figures, and its updates by the tensor of the base


Found = tuple[Figures, dict[str, Update]]


def _low_rank(site: Site, down: Sequence[str], up: Sequence[str], scale: float) -> LowRank | None:
    first, second = site.matrix(*down), site.matrix(*up)
    if first is None or second is None or len(first) != second.shape[1]:
        return None
    return LowRank(first, second, scale)


def _scale_of(config: Mapping[str, Any], r: int, alpha: float | None) -> float:
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _lora(adapter: Adapter, site: Site) -> Found:
    config = adapter.config
    down, up = ("A.weight", "embedding_A"), ("B.weight", "embedding_B")
    first = site.matrix(*down)
    if first is None:
        return {}, {}
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", site.module)), None)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    update = _low_rank(site, down, up, _scale_of(config, len(first), alpha))
    # a leaf besides the two (the magnitude of DoRA, a bias) makes the update another one
    is_plain = update is not None and set(site.leaves) <= {*down, *up}
    return {"rank": len(first)}, {"weight": update} if is_plain and update is not None else {}


def _sparse(adapter: Adapter, site: Site) -> Found:
    figures: Figures = {"tuned": 0, "size": 0}
    updates: dict[str, Update] = {}
    for leaf, tensor in (("delta", "weight"), ("bias", "bias")):
        values = site.leaves.get(f"{leaf}.weight")
        if values is None:
            continue
        code = site.leaves.get(f"{leaf}.index", torch.zeros(0, dtype=torch.uint8))
        ways = decode_alone(code, len(values))
        if len(values) and not ways:
            raise BadInput(
                f"{ADAPTER_WEIGHTS} of {adapter.source} is damaged: the index of {site.module!r} does not name "
                f"{len(values)} places. Restore the file that was saved."
            )
        smallest, largest = min((way[1] for way in ways), default=0), max((way[2] for way in ways), default=0)
        # the code tells the size of the weight about as exactly as there are places in it
        is_known = largest <= 1.5 * smallest and figures["size"] is not None
        figures["tuned"] += len(values)
        figures["size"] = figures["size"] + (smallest + largest) // 2 if is_known else None
        updates[tensor] = Sparse(values.double(), ways[0][0].long() if len(ways) == 1 else None)
    return figures, updates


def _spt(adapter: Adapter, site: Site) -> Found:
    kinds, config = adapter.config.get("kinds") or {}, adapter.config
    if matrices := _matrices(adapter, site):
        return _spt_parameter(adapter, site, matrices)
    got = {key: kinds.get(f"{site.module}.{key}") for key in ("weight", "bias")}
    names = {key: kind for key, kind in got.items() if kind is not None}
    if not names:
        raise BadInput(
            f"{ADAPTER_WEIGHTS} of {adapter.source} has {site.module!r}, of which {ADAPTER_CONFIG} says nothing: "
            "restore the two that were saved together."
        )
    _, updates = _sparse(adapter, site)
    low_rank = None
    if names.get("weight") == "lora":
        r = len(site.leaves["down.weight"])
        scale = _scale_of(config, config.get("r", r), config.get("lora_alpha"))
        low_rank = _low_rank(site, ("down.weight",), ("up.weight",), scale)
    for key, kind in names.items():
        if kind == "whole":  # then the code is of no use, every place is in it
            leaf = site.leaves["delta.weight" if key == "weight" else "bias.weight"]
            updates[key] = Sparse(leaf.double(), torch.arange(len(leaf)))
    if low_rank is not None:
        updates["weight"] = low_rank
    said = {key: f"{kind} {_amount(site, key, kind)}".strip() for key, kind in names.items()}
    return {"gets": ", ".join(text if key == "weight" else f"bias: {text}" for key, text in said.items())}, updates


def _matrices(adapter: Adapter, site: Site) -> list[str]:
    """The matrices of the parameter that the site is, those with an update, in order; none if it is a module."""
    kinds, module = adapter.config.get("kinds") or {}, site.module
    names = [name for name in kinds if name.startswith(module) and parameter_of(name) == module]
    return sorted(names, key=number_of)


def _spt_parameter(adapter: Adapter, site: Site, matrices: list[str]) -> Found:
    kinds, counts, ranks = (adapter.config.get(key) or {} for key in ("kinds", "counts", "ranks"))
    _, updates = _sparse(adapter, site)
    structured = [name for name in matrices if name in ranks]
    for place, name in enumerate(structured if "lora" in kinds.values() else ()):
        down, up = (site.leaves[f"{leaf}.weight"][place].double() for leaf in ("down", "up"))
        updates[name] = LowRank(down, up, _scale_of(adapter.config, len(down), adapter.config.get("lora_alpha")))
    return {"gets": amounts(matrices, kinds, counts, ranks)}, updates


def _amount(site: Site, key: str, kind: str) -> str:
    if kind == "whole":
        return ""
    if kind == "sparse":
        return f"{len(site.leaves['delta.weight' if key == 'weight' else 'bias.weight']):,}"
    return str(len(site.leaves["down.weight"]))


def _ssf(adapter: Adapter, site: Site) -> Found:
    figures: Figures = {}
    updates: dict[str, Update] = {}
    for leaf in ("scale", "shift"):  # gamma - 1, and beta
        values = site.leaves.get(f"{leaf}.weight")
        if values is not None:
            updates[leaf] = Vector(values.double())
            figures |= {f"{leaf}_mean": values.double().mean().item(), f"{leaf}_std": _spread(values)}
    return figures, updates


def _spread(values: torch.Tensor) -> float:
    return values.double().std(correction=0).item()


def _mask_pruning(adapter: Adapter, site: Site) -> Found:
    config = adapter.config
    figures: Figures = {}
    updates: dict[str, Update] = {}
    down = site.matrix("down.weight")
    keep = None
    if (kept := site.leaves.get("gate.kept")) is not None:
        is_decided = bool((kept != UNDECIDED).all())
        logits = site.leaves["gate.weight"].double() * config.get("mask_lr_ratio", 1.0)
        keep = kept.double() if is_decided else (logits > 0).double()
        expected = keep if is_decided else logits.sigmoid()
        figures |= {"units": len(kept), "kept": round(expected.sum().item(), 3), "decided": is_decided}
    if down is not None:
        scale = _scale_of(config, len(down), config.get("lora_alpha"))
        figures["rank"] = len(down)
        if keep is not None and down.shape[1] % len(keep) == 0:  # masked inputs do not reach the update
            down = down * keep.repeat_interleave(down.shape[1] // len(keep))
        if (up := site.matrix("up.weight")) is not None:
            updates["weight"] = LowRank(down, up, scale)
    return figures, updates


_SITES: dict[str, Callable[[Adapter, Site], Found]] = {
    "LORA": _lora,
    "MASK_PRUNING": _mask_pruning,
    "SPARSE_FT": _sparse,
    "SPT": _spt,
    "SSF": _ssf,
}


def _found(adapter: Adapter, site: Site) -> Found:
    look = _SITES.get(adapter.method)
    try:
        return look(adapter, site) if look else ({}, {})
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(
            f"{ADAPTER_WEIGHTS} of {adapter.source} does not fit its {ADAPTER_CONFIG} ({site.module!r}: "
            f"{type(error).__name__} {error}): restore the two that were saved together."
        ) from error


def _vqt_rows(adapter: Adapter) -> list[Row]:
    """VQT adapts no module; a row here is a layer whose keys and values the queries read, or the class token."""
    site = next(iter(adapter.sites.values()))
    try:
        queries, head = site.leaves["queries.weight"].double(), site.leaves["head.weight"].double()
        layers, count, width = queries.shape
        features = _vqt_features(adapter, site, layers, count, width)
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"{ADAPTER_WEIGHTS} of {adapter.source} does not fit a VQT adapter ({error}): restore the file that was "
            "saved."
        ) from None
    columns = site.leaves.get("head.columns", torch.arange(head.shape[1]))
    squares = head.square().sum(0)
    chosen = adapter.config.get("layers_to_transform")
    indices = range(layers) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
    rows = []
    for place, (start, end) in enumerate(features):
        own = (columns >= start) & (columns < end)
        row: Row = {"module": "class token", "layer": -1, "type": "class token", "parameters": 0}
        if place:
            index = indices[place - 1]
            row = {"module": f"layer {index}", "layer": index, "type": "queries", "parameters": count * width}
            row |= {"queries": count, "norm": queries[place - 1].norm().item()}
        kept = int(own.sum())
        share = (squares[own].sum() / squares.sum()).item() if squares.any() else 0.0
        rows.append(row | {"features": end - start, "kept_features": kept, "head_share": share})
    head_row = {"module": "head", "layer": -1, "type": "head", "shapes": {"head.weight": list(head.shape)}}
    trained = sum(_is_trained(leaf) * leaf.numel() for leaf in site.leaves.values()) - queries.numel()
    return [*rows, {**head_row, "parameters": trained}]


def _vqt_features(adapter: Adapter, site: Site, layers: int, count: int, width: int) -> list[tuple[int, int]]:
    """First and last column of the class token and of each layer, among all features."""
    families = {family.model: family.class_tokens for family in FAMILIES.values()}
    first = width * families.get(adapter.base_class or "", 1)
    size = width * (count if adapter.config.get("pooling") == "concatenate" else 1)
    total, columns = first + layers * size, site.leaves.get("head.columns")
    read = site.leaves["head.weight"].shape[1] if columns is None else len(columns)
    if read > total or (columns is None and read != total):
        raise ValueError(f"its head reads {read} features, {layers} layers make {total}")
    return [(0, first), *((first + i * size, first + (i + 1) * size) for i in range(layers))]


# Describing


def _is_trained(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()  # the others are places, masks that are decided, counts of steps


def rows_of(adapter: Adapter) -> list[Row]:
    """A row for each module: its layer and type, parameters, shapes, and what the method tells."""
    if adapter.method == "VQT":
        return _vqt_rows(adapter)
    rows = []
    for site in adapter.sites.values():
        figures, updates = _found(adapter, site)
        layer, kind = layer_and_type(site.module)
        row: Row = {"module": site.module, "layer": layer, "type": kind or site.module}
        row["parameters"] = sum(leaf.numel() for leaf in site.leaves.values() if _is_trained(leaf))
        row |= figures
        if updates:
            row["norm"] = math.hypot(*(update.norm() for update in updates.values()))
        shapes = {name: list(leaf.shape) for name, leaf in sorted(site.leaves.items()) if _is_trained(leaf)}
        rows.append(_with_ratios(row) | {"shapes": shapes})
    return sorted(rows, key=lambda row: (row["layer"] < 0, row["layer"], row["module"]))  # what is in no layer last


def _with_ratios(row: Row) -> Row:
    if "size" in row:
        row["density"] = row["tuned"] / row["size"] if row["size"] else None
    if row.get("units"):
        row["keep_ratio"] = row["kept"] / row["units"]
    return row


def totals(rows: Sequence[Row]) -> Row:
    """What rows have together: sums, the norm over all, and ratios of the sums."""
    result: Row = {"sites": len(rows)}
    keys = ["parameters", "tuned", "size", "queries", "features", "kept_features"]
    if len({row.get("kind", row["type"]) for row in rows if "units" in row}) == 1:  # heads and channels do not add up
        keys += ["units", "kept"]
    for key in keys:
        values = [row[key] for row in rows if key in row]
        if values:
            result[key] = None if None in values else sum(values)
    norms = [row["norm"] for row in rows if "norm" in row]
    if norms:
        result["norm"] = math.hypot(*norms)
    return _with_ratios(result)


def grouped(rows: Iterable[Row], key: str) -> dict[str, Row]:
    """`totals` of the rows with the same value of a key."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row[key])].append(row)
    return {name: totals(group) for name, group in groups.items()}


def describe(source: str) -> dict[str, Any]:
    """What is in an adapter, or what is left in a pruned model.

    Args:
        source: A directory, or a repository on the Hub.

    Raises:
        BadInput: It is neither.
    """
    directory = directory_of(source)
    if is_pruned(directory):
        return describe_pruned(source, directory)
    adapter = read_adapter(source)
    rows, tensors = rows_of(adapter), adapter.tensors()
    parameters = sum(tensor.numel() for tensor in tensors if _is_trained(tensor))
    others = sum(tensor.numel() for tensor in adapter.others.values()) if adapter.sites else 0
    file_bytes = (adapter.directory / ADAPTER_WEIGHTS).stat().st_size
    return {
        "kind": "adapter",
        "source": source,
        "method": adapter.method,
        "name": METHODS[adapter.method].name if adapter.method in METHODS else adapter.method,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "base_class": adapter.base_class,
        "task": adapter.config.get("task_type"),
        "written_by": _versions(adapter.config),
        "settings": settings(adapter.config),
        "parameters": {"all": parameters, "method": parameters - others, "saved_whole": others},
        "saved_whole": {name: list(tensor.shape) for name, tensor in adapter.others.items()},
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors if _is_trained(t)}),
        "file_bytes": file_bytes,
        "bytes_per_parameter": file_bytes / parameters if parameters else None,
        "totals": totals(rows),
        "figures": _figures(adapter, rows),
        "by_type": grouped(rows, "type"),
        "by_layer": grouped((row for row in rows if row["layer"] >= 0), "layer"),
        "modules": rows,
    }


def _versions(config: Mapping[str, Any]) -> str:
    names = {"peft_ext": config.get("peft_ext_version"), "peft": config.get("peft_version")}
    return ", ".join(f"{name} {version}" for name, version in names.items() if version)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say most about the method, and the short ones that are not as they are by default."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config_class)
    }
    chosen = {key: config[key] for key in _HEADLINES.get(config["peft_type"], ()) if config.get(key) is not None}
    for key, value in config.items():
        is_short = not isinstance(value, dict) and len(json.dumps(value)) < 80
        if key in defaults and key not in _ELSEWHERE and value != defaults[key] and is_short:
            chosen.setdefault(key, value)
    return chosen


def _figures(adapter: Adapter, rows: Sequence[Row]) -> Figures:
    """What the method tells of the whole adapter, besides sums over its sites."""
    if adapter.method == "SSF":
        leaves = defaultdict(list)
        for site in adapter.sites.values():
            for leaf in ("scale", "shift"):
                if f"{leaf}.weight" in site.leaves:
                    leaves[leaf].append(site.leaves[f"{leaf}.weight"].double())
        joined = {leaf: torch.cat(values) for leaf, values in leaves.items()}
        return {
            leaf: {"mean": v.mean().item(), "std": _spread(v), "min": v.min().item(), "max": v.max().item()}
            for leaf, v in joined.items()
        }
    if adapter.method == "SPT":
        allocation: dict[str, Row] = {}
        for site in adapter.sites.values():
            for leaf, tensor in site.leaves.items():
                if not _is_trained(tensor):
                    continue
                kinds = adapter.config.get("kinds") or {}
                key = f"{site.module}.{'bias' if leaf == 'bias.weight' else 'weight'}"
                # of a parameter the matrices that this leaf is for, else the one tensor
                is_sparse = leaf == "delta.weight"
                names = [n for n in _matrices(adapter, site) if (kinds[n] == "sparse") == is_sparse] or [key]
                entry = allocation.setdefault(kinds.get(names[0], "unknown"), {"tensors": set(), "parameters": 0})
                entry["tensors"].update(names)
                entry["parameters"] += tensor.numel()
        return {kind: {**entry, "tensors": len(entry["tensors"])} for kind, entry in allocation.items()}
    if adapter.method == "MASK_PRUNING":
        steps = {
            int(site.leaves["gate.progress"]) for site in adapter.sites.values() if "gate.progress" in site.leaves
        }
        return {"decided": all(row["decided"] for row in rows if "decided" in row), "steps": max(steps, default=0)}
    return {}


def describe_pruned(source: str, directory: Path) -> dict[str, Any]:
    """Which sizes a pruned model has, beside those that it had. It is built without weights.

    Raises:
        BadInput: Its config is of no class of transformers, or does not say what that class could be built from.
    """
    try:
        config = AutoConfig.from_pretrained(directory)
        name = (getattr(config, "architectures", None) or [""])[0]
        stock = getattr(transformers, name)
        with torch.device("meta"):
            model: PreTrainedModel = (pruned_class(stock) if hasattr(config, "pruned") else stock)(config)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise BadInput(
            f"{CONFIG} of {source} does not describe a pruned model ({error}): restore the one that `save_pruned` wrote."
        ) from error
    dense = dense_model(model)
    before, after = groups_of(dense), groups_of(model)
    rows = []
    for key, group in before.items():
        layer, kind = layer_and_type(key)
        row: Row = {"module": key, "layer": layer, "type": kind, "kind": group.kind}
        rows.append(_with_ratios(row | {"units": group.units, "kept": after[key].units}))
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in (("before", dense), ("now", model))}
    files = sorted(directory.glob("model*.safetensors"))
    return {
        "kind": "pruned model",
        "source": source,
        "base_class": name,
        "loads_with": "peft_ext.load_pruned, or trust_remote_code" if hasattr(config, "pruned") else "transformers",
        "parameters": parameters,
        "left": parameters["now"] / parameters["before"],
        "file_bytes": sum(file.stat().st_size for file in files) or None,
        "by_kind": grouped(rows, "kind"),
        "modules": rows,
    }


# Comparing


def compare(first: str, second: str) -> dict[str, Any]:
    """Two adapters side by side.

    Raises:
        BadInput: One of them is none.
    """
    ours, theirs = read_adapter(first), read_adapter(second)
    keys = dict.fromkeys([*ours.config, *theirs.config])
    return {
        "first": _short(ours),
        "second": _short(theirs),
        "config": {
            key: [ours.config.get(key), theirs.config.get(key)]
            for key in keys
            if ours.config.get(key) != theirs.config.get(key)
        },
        "sites": {
            "common": [name for name in ours.sites if name in theirs.sites],
            "only_first": [name for name in ours.sites if name not in theirs.sites],
            "only_second": [name for name in theirs.sites if name not in ours.sites],
        },
        **_relations(ours, theirs),
    }


def _short(adapter: Adapter) -> dict[str, Any]:
    return {
        "source": adapter.source,
        "method": adapter.method,
        "sites": len(adapter.sites),
        "parameters": sum(tensor.numel() for tensor in adapter.tensors() if _is_trained(tensor)),
        "file_bytes": (adapter.directory / ADAPTER_WEIGHTS).stat().st_size,
    }


def _relations(ours: Adapter, theirs: Adapter) -> dict[str, Any]:
    """Overlap of supports, and cosine of updates, where the files tell them."""
    updates = [
        {site.module: _found(adapter, site)[1] for site in adapter.sites.values()} for adapter in (ours, theirs)
    ]
    return {"overlap": _overlap(*updates), "cosine": _cosine(*updates) if ours.method == theirs.method else None}


Updates = dict[str, dict[str, Update]]


def _overlap(ours: Updates, theirs: Updates) -> dict[str, Row] | None:
    supports = [
        {
            module if key == "weight" else f"{module}.{key}": (update.places, update.values)
            for module, parts in updates.items()
            for key, update in parts.items()
            if isinstance(update, Sparse) and update.places is not None
        }
        for updates in (ours, theirs)
    ]
    if not all(supports):
        return None
    return {
        module: {**dataclasses.asdict(found), "jaccard": found.jaccard}
        for module, found in overlap_of(*supports).items()  # type: ignore[arg-type]
    }


def _cosine(ours: Updates, theirs: Updates) -> dict[str, Any] | None:
    """By module and over all; a module that only one adapter changes counts as unchanged by the other."""
    products: dict[str, float | None] = {}
    for module in ours.keys() & theirs.keys():
        first, second = ours[module], theirs[module]
        parts = [first[key].dot(second[key]) for key in first.keys() & second.keys()]
        products[module] = None if None in parts else sum(part for part in parts if part is not None)
    norms = [
        {module: math.hypot(*(update.norm() for update in parts.values())) for module, parts in updates.items()}
        for updates in (ours, theirs)
    ]
    if not any(norms[0].values()) or not any(norms[1].values()):
        return None
    modules = {
        module: None if products[module] is None else _ratio(products[module], norms[0][module] * norms[1][module])
        for module in ours
        if module in products
    }
    known = [product for product in products.values() if product is not None]
    length = math.hypot(*norms[0].values()) * math.hypot(*norms[1].values())
    return {"all": _ratio(sum(known), length) if len(known) == len(products) else None, "modules": modules}


def _ratio(product: float | None, length: float) -> float | None:
    return product / length if product is not None and length else None
