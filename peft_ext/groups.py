"""Which channels hang together, so that they can only be cut as one.

A group belongs to one linear module, its consumer: unit u of the group is a run of the consumer's input columns,
together with the rows of the modules that make them. In a feed-forward block a unit is one channel (rows of gate and
up, a column of down), in attention a head, or a key-value head with all its queries (rows of q, k and v, columns of o).
What a unit contributes passes through those columns only, so a mask on the consumer's input is the same as its absence.

A new architecture is a line in `ARCHITECTURES`, or, in a config, an entry of `groups`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .core import linear_features, unadapted_modules


KINDS = ("ffn", "heads")
TITLES = {"ffn": "feed-forward channels", "heads": "attention heads (with their keys)"}


@dataclass(frozen=True)
class Rule:
    """Where groups of a kind are, in names relative to a block of the model.

    Args:
        kind: `"ffn"` or `"heads"`.
        rows: The modules whose rows go with a unit: of a feed-forward block all that make its channels; of attention
            query, key and value in this order, or one module that makes all three one after the other.
        columns: The module whose columns go with it.
        optional: Further modules like `rows`, which not every model of the architecture has.
        tables: Parameters with one entry per head in their last dimension.
    """

    kind: str
    rows: tuple[str, ...]
    columns: str
    optional: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


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


def _heads(rows: str, columns: str, **further: tuple[str, ...]) -> Rule:
    return Rule("heads", tuple(rows.split()), columns, **further)


def _ffn(rows: str, columns: str) -> Rule:
    return Rule("ffn", tuple(rows.split()), columns)


_BERT = (
    _heads("attention.self.query attention.self.key attention.self.value", "attention.output.dense"),
    _heads(
        "crossattention.self.query crossattention.self.key crossattention.self.value", "crossattention.output.dense"
    ),
    _ffn("intermediate.dense", "output.dense"),
)
_MLP = _ffn("mlp.fc1", "mlp.fc2")
_VIT = (_heads("attention.q_proj attention.k_proj attention.v_proj", "attention.o_proj"), _MLP)
_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_CLIP = (_heads(_ATTENTION, "self_attn.out_proj"), _MLP)
_BART = (
    _heads(_ATTENTION, "self_attn.out_proj"),
    _heads("encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj", "encoder_attn.out_proj"),
    _ffn("fc1", "fc2"),
)
_LLAMA = (_heads(_ATTENTION, "self_attn.o_proj"), _ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj"))
_SWIN_TABLE = "attention.relative_position_bias.relative_position_bias_table"

# by model type; a type stands for its text and vision parts too
ARCHITECTURES: dict[str, tuple[Rule, ...]] = {
    "albert": (
        _heads("attention.query attention.key attention.value", "attention.dense"),
        _ffn("ffn", "ffn_output"),
    ),
    "audio-spectrogram-transformer": _VIT,
    "bart": _BART,
    "bert": _BERT,
    "clip": _CLIP,
    "convnext": (_ffn("pwconv1", "pwconv2"),),
    "deberta-v2": (
        _heads(
            "attention.self.query_proj attention.self.key_proj attention.self.value_proj",
            "attention.output.dense",
            optional=("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
        ),
        _ffn("intermediate.dense", "output.dense"),
    ),
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "distilbert": (
        _heads("attention.q_lin attention.k_lin attention.v_lin", "attention.out_lin"),
        _ffn("ffn.lin1", "ffn.lin2"),
    ),
    "electra": _BERT,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": (*_LLAMA, *_CLIP),
    "gpt2": (_heads("attn.c_attn", "attn.c_proj"), _ffn("mlp.c_fc", "mlp.c_proj")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _BART,
    "phi3": (_heads("self_attn.qkv_proj", "self_attn.o_proj"), _ffn("mlp.gate_up_proj", "mlp.down_proj")),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "siglip": _CLIP,
    "swin": (
        _heads("attention.q_proj attention.k_proj attention.v_proj", "attention.o_proj", tables=(_SWIN_TABLE,)),
        _MLP,
    ),
    # the heads of T5 share one relative position bias over all layers, so a layer cannot lose its own
    "t5": (
        _ffn("DenseReluDense.wi", "DenseReluDense.wo"),
        _ffn("DenseReluDense.wi_0 DenseReluDense.wi_1", "DenseReluDense.wo"),
    ),
    "vit": _VIT,
    "whisper": _BART,
    "xlm-roberta": _BERT,
}
_HEAD_DIMS = ("head_dim", "attention_head_size")


def find_groups(
    model: nn.Module, kinds: Sequence[str] = KINDS, declared: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Group]:
    """The groups of a model, by the name of their consumer, in the order of its modules.

    Args:
        model: A model, with adapters on it or not.
        kinds: The kinds that are wanted.
        declared: Instead of the table: the fields of a `Rule` each, for an architecture that it does not have.

    Raises:
        ValueError: The architecture is unknown, has none of the kinds, or the modules do not have the shapes that
            the rules say.
    """
    rules = [Rule(**_as_tuples(entry)) for entry in declared] if declared is not None else _rules_of(model)
    modules = dict(unadapted_modules(model))
    found: dict[str, Group] = {}
    for rule in rules:
        if rule.kind not in KINDS:
            raise ValueError(f"`kind` of a group must be one of {', '.join(KINDS)}, got {rule.kind!r}.")
        if rule.kind in kinds:
            found.update((group.name, group) for group in _groups_of(rule, modules))
    for kind in kinds:
        if not any(group.kind == kind for group in found.values()):
            there = sorted({group.kind for group in found.values()} | {rule.kind for rule in rules})
            raise ValueError(
                f"This {type(model).__name__} has no groups of kind {kind!r} that could be pruned; its rules have "
                f"{', '.join(there) or 'none'}. Leave {kind!r} out of `prune`."
            )
    _refuse_shared_rows(found)
    return {name: found[name] for name in modules if name in found}


def _as_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = {k: value if isinstance(value, str) else tuple(value) for k, value in entry.items()}
        Rule(**fields)
    except TypeError as error:
        raise ValueError(
            f"An entry of `groups` is not understood ({error}): {dict(entry)!r}. One looks like "
            '{"kind": "ffn", "rows": ["mlp.fc1"], "columns": "mlp.fc2"}.'
        ) from None
    return fields


def _rules_of(model: nn.Module) -> tuple[Rule, ...]:
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    for name in (model_type, model_type.removesuffix("_text_model"), model_type.removesuffix("_vision_model")):
        if (rules := ARCHITECTURES.get(name.removesuffix("_text"))) is not None:
            return rules
    raise ValueError(
        f"It is not known which channels of a {model_type!r} model hang together, so none is pruned. Declare it, for "
        'example `groups=[{"kind": "ffn", "rows": ["mlp.fc1"], "columns": "mlp.fc2"}]`. Known are '
        f"{', '.join(sorted(ARCHITECTURES))}."
    )


def _groups_of(rule: Rule, modules: Mapping[str, nn.Module]) -> Iterator[Group]:
    for name in modules:
        if name != rule.columns and not name.endswith(f".{rule.columns}"):
            continue
        block = name.removesuffix(rule.columns)
        if all(block + row in modules for row in rule.rows):
            yield _group(rule, block, modules)


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
        sizes_of: Any = modules[attention]
        head_dim = next((getattr(sizes_of, key) for key in _HEAD_DIMS if hasattr(sizes_of, key)), 0)
        if not head_dim:
            raise ValueError(f"{attention!r} does not say how wide its heads are (it has no `head_dim`).")
        if columns % head_dim:
            raise ValueError(f"{consumer!r} has {columns} columns, which are no whole heads of {head_dim}.")
        keys = (sizes[names[0]] - columns) // 2 if len(rule.rows) == 1 else sizes[names[1]]
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
    return Group(consumer, rule.kind, units, columns // units, tuple(rows), tables, attention, head_dim, per_unit)


def _sections(rule: Rule, name: str, size: int, columns: int) -> list[tuple[int, int]]:
    """Start and size of the parts of a module's rows that belong to the units each."""
    if rule.kind == "heads":
        if len(rule.rows) > 1:
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
