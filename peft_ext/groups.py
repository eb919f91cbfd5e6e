"""Which channels hang together, so that they can only be cut as one.

A group belongs to one linear module, its consumer: unit u of the group is a run of the consumer's input columns,
together with the rows of the modules that make them. In a feed-forward block a unit is one channel (rows of gate and
up, a column of down), in attention a head, or a key-value head with all its queries (rows of q, k and v, columns of o).
What a unit contributes passes through those columns only, so a mask on the consumer's input is the same as its absence.

Which modules these are says the table of architectures, or, in a config, an entry of `groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import ARCHITECTURES, Attention, FeedForward, architecture_of
from .core import linear_features, unadapted_modules


KINDS = ("ffn", "heads")
TITLES = {"ffn": "feed-forward channels", "heads": "attention heads (with their keys)"}


@dataclass(frozen=True)
class Rule:
    """Where groups of a kind are, in names relative to a block of the model.

    Args:
        kind: `"ffn"` or `"heads"`.
        rows: The modules whose rows go with a unit: of a feed-forward block all that make its channels; of attention
            query, key and value in this order, or one module that makes all three.
        columns: The module whose columns go with it.
        optional: Further modules like `rows`, which not every model of the architecture has.
        tables: Parameters with one entry per head in their last dimension.
        order: How one module for query, key and value arranges its rows: `"blocks"`, one after the other, or
            `"heads"`, those of a head together.
    """

    kind: str
    rows: tuple[str, ...]
    columns: str
    optional: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    order: str = "blocks"


@dataclass(frozen=True)
class Rows:
    """Unit u has the rows from `start + u * width` to `start + (u + 1) * width` of a module."""

    module: str
    start: int
    width: int


@dataclass(frozen=True)
class Group:
    """Channels of one consumer, in units that can be cut.

    Attributes:
        name: The consumer: the module whose input columns they are. Unit u has those from `u * width` on.
        kind: `"ffn"` or `"heads"`.
        units: How many there are.
        width: Columns of a unit.
        rows: What goes with the columns in other modules.
        tables: Names of parameters with one entry per unit in their last dimension.
        attention: The module that keeps the number of heads, of `"heads"`.
        head_dim: Channels of a head, of `"heads"`; a unit has `width / head_dim` heads.
        parameters: What each unit has of them.
        tower: The class of the config that the consumer is built from: a model of two towers has two.
    """

    name: str
    kind: str
    units: int
    width: int
    rows: tuple[Rows, ...]
    tables: tuple[str, ...]
    attention: str | None
    head_dim: int
    parameters: int
    tower: str = ""


ENTRY = '{"kind": "ffn", "rows": ["mlp.fc1"], "columns": "mlp.fc2"}'  # what a user may declare, in messages
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size")
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def find_groups(
    model: nn.Module, kinds: Sequence[str] | None = None, declared: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Group]:
    """The groups of a model, by the name of their consumer, in the order of its modules.

    Args:
        model: A model, with adapters on it or not.
        kinds: The kinds that are wanted; `None`: all that the model has.
        declared: Instead of the table: the fields of a `Rule` each, for an architecture that it does not have.

    Raises:
        ValueError: The architecture is unknown, has none of the kinds, or the modules do not have the shapes that
            the rules say.
        TypeError: `declared` is no list of mappings.
    """
    if isinstance(declared, str) or not isinstance(declared, Iterable | None):
        raise TypeError(f"`groups` must be a list of {ENTRY}, or None, got {declared!r}.")
    rules = [Rule(**_as_tuples(entry)) for entry in declared] if declared is not None else _rules_of(model)
    modules = dict(unadapted_modules(model))
    found: dict[str, Group] = {}
    obstacles: dict[str, str] = {}
    for rule in rules:
        if rule.kind not in KINDS:
            raise ValueError(f"`kind` of a group must be one of {', '.join(KINDS)}, got {rule.kind!r}.")
        if kinds is not None and rule.kind not in kinds:
            continue
        for block in _blocks_of(rule, modules):
            obstacle = _obstacle(rule, block, modules)
            if obstacle is not None:
                obstacles[rule.kind] = obstacle
                continue
            group = _group(rule, block, modules)
            found[group.name] = group
    there = {group.kind for group in found.values()}
    if kinds is None and not there:
        raise ValueError(
            f"This {type(model).__name__} has no channels that could be pruned: {_reasons(model, obstacles)}."
        )
    for kind in kinds or ():
        if kind not in there:
            offered = sorted(there | {rule.kind for rule in rules} - {kind})
            raise ValueError(
                f"This {type(model).__name__} has no groups of kind {kind!r} that could be pruned: "
                f"{_reasons(model, obstacles, kind)}. Leave {kind!r} out of `prune`; "
                f"{'it has ' + ', '.join(offered) if offered else 'there is nothing else either'}."
            )
    _refuse_shared_rows(found)
    return {name: found[name] for name in modules if name in found}


def _reasons(model: nn.Module, obstacles: Mapping[str, str], kind: str | None = None) -> str:
    """Why there are no groups, of one kind or of any."""
    architecture = architecture_of(_model_type(model))
    fixed = {**(architecture.fixed if architecture is not None else {}), **obstacles}
    reasons = dict.fromkeys(reason for key, reason in fixed.items() if kind in (None, key))
    return ", and ".join(reasons) or "it has no modules where the rules look for them"


def _as_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"An entry of `groups` must look like {ENTRY}, got {entry!r}.")
    try:
        fields: dict[str, Any] = {k: value if isinstance(value, str) else tuple(value) for k, value in entry.items()}
        Rule(**fields)
    except TypeError as error:
        raise ValueError(
            f"An entry of `groups` is not understood ({error}): {dict(entry)!r}. One looks like {ENTRY}."
        ) from None
    return fields


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _rules_of(model: nn.Module) -> list[Rule]:
    """What the table of architectures says about the model, as rules.

    Raises:
        ValueError: It does not know the architecture.
    """
    model_type = _model_type(model)
    architecture = architecture_of(model_type)
    if architecture is None:
        raise ValueError(
            f"It is not known which channels of a {model_type!r} model hang together, so none is pruned. Declare it, "
            f"for example `groups=[{ENTRY}]`. Known are "
            f"{', '.join(name for name, entry in ARCHITECTURES.items() if entry.prunable)}."
        )
    rules = [*map(_heads_rule, architecture.attention), *map(_ffn_rule, architecture.ffn)]
    return [rule for rule in rules if rule.kind in architecture.prunable]


def _heads_rule(names: Attention) -> Rule:
    return Rule("heads", names.rows, names.o, names.further, names.tables, names.order or "blocks")


def _ffn_rule(names: FeedForward) -> Rule:
    return Rule("ffn", names.rows, names.down)


def _blocks_of(rule: Rule, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names, with a dot at the end, of the blocks that the rule fits."""
    for name in modules:
        if name != rule.columns and not name.endswith(f".{rule.columns}"):
            continue
        block = name.removesuffix(rule.columns)
        if all(block + row in modules for row in rule.rows):
            yield block


def _obstacle(rule: Rule, block: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the heads of this block cannot leave one by one, if they cannot."""
    if rule.kind != "heads":
        return None
    attention = (block + rule.rows[0]).rpartition(".")[0]
    head_dim = _head_dim(modules[attention])
    for key in _HEAD_NORMS:
        norm = modules.get(f"{attention}.{key}")
        weight = getattr(norm, "weight", None)
        if norm is not None and list(norm.parameters()) and (weight is None or weight.shape != (head_dim,)):
            return f"{attention}.{key} has parameters for all heads together"
    return None


def _features(name: str, module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module, Conv1D and quantised ones included."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    features = linear_features(module)
    if features is None:
        raise ValueError(f"{name!r} is a {type(module).__name__}; only the channels of linear modules can be pruned.")
    return features


def features_of(model: nn.Module, name: str) -> tuple[int, int]:
    """Inputs and outputs of a linear module of the model, by its name without adapters."""
    module = model.get_submodule(name)
    return _features(name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)


def _group(rule: Rule, block: str, modules: Mapping[str, nn.Module]) -> Group:
    consumer = block + rule.columns
    columns, outputs = _features(consumer, modules[consumer])
    names = [block + row for row in (*rule.rows, *rule.optional) if block + row in modules]
    sizes = {name: _features(name, modules[name])[1] for name in names}
    attention, head_dim, units = None, 0, columns
    if rule.kind == "heads":
        attention = names[0].rpartition(".")[0]
        head_dim = _head_dim(modules[attention])
        if not head_dim:
            raise ValueError(f"{attention!r} does not say how wide its heads are (it has no `head_dim`).")
        if columns % head_dim:
            raise ValueError(f"{consumer!r} has {columns} columns, which are no whole heads of {head_dim}.")
        keys = (sizes[names[0]] - columns) // 2 if len(rule.rows) == 1 else sizes[names[1]]
        if rule.order not in ("blocks", "heads") or (rule.order == "heads" and keys != columns):
            raise ValueError(
                f"`order` of {names[0]!r} is {rule.order!r}, which does not fit its {sizes[names[0]]} rows."
            )
        units = keys // head_dim
        if not units or (columns // head_dim) % units:
            raise ValueError(f"{attention!r} has {columns // head_dim} heads for {units} key-value heads.")
    rows: list[Rows] = []
    for name in names:
        for start, size in _sections(rule, name, sizes[name], columns):
            if size % units:
                raise ValueError(f"The {size} rows of {name!r} do not go with the {units} units of {consumer!r}.")
            rows.append(Rows(name, start, size // units))
    per_unit = outputs * (columns // units)
    for row in rows:
        inputs = _features(row.module, modules[row.module])[0]
        per_unit += row.width * (inputs + (getattr(modules[row.module], "bias", None) is not None))
    tables = tuple(block + table for table in rule.tables if (block + table).rpartition(".")[0] in modules)
    for table in tables:
        owner, _, key = table.rpartition(".")
        per_unit += getattr(modules[owner], key).shape[0]
    width, tower = columns // units, _config_type(modules, consumer)
    return Group(consumer, rule.kind, units, width, tuple(rows), tables, attention, head_dim, per_unit, tower)


def _config_type(modules: Mapping[str, nn.Module], name: str) -> str:
    """The class of the config that a module is built from, empty if there is none."""
    while name:
        name = name.rpartition(".")[0]
        if (config := getattr(modules.get(name), "config", None)) is not None:
            return type(config).__name__
    return ""


def _head_dim(attention: Any) -> int:
    return next((getattr(attention, key) for key in _HEAD_DIMS if hasattr(attention, key)), 0)


def _sections(rule: Rule, name: str, size: int, columns: int) -> list[tuple[int, int]]:
    """Start and size of the parts of a module's rows that belong to the units each."""
    if rule.kind == "heads":
        if len(rule.rows) > 1 or rule.order == "heads":
            return [(0, size)]
        keys = (size - columns) // 2
        return [(0, columns), (columns, keys), (columns + keys, keys)]
    if size % columns:
        raise ValueError(f"The {size} rows of {name!r} do not go with {columns} channels.")
    return [(start, columns) for start in range(0, size, columns)]


def _refuse_shared_rows(groups: Mapping[str, Group]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for group in groups.values():
        for row in group.rows:
            other = owners.setdefault((row.module, row.start), group.name)
            if other != group.name:
                raise ValueError(
                    f"The rows of {row.module!r} belong to the groups of {other!r} and of {group.name!r}."
                )
