"""Which sizes a pruned model has, beside those that it had."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ..core import BadInput, Column, Fillings, Picture, Row, layer_and_type
from ..export.loading import class_of, read_config
from ..export.saving import dense_model, groups_of
from ..groups import TITLES
from .reading import CONFIG
from .tables import grouped, with_ratios


COLUMNS = (
    Column("units", "units", "{:,}", adds_up=True, within="kind"),
    Column("kept", "kept", "{:,g}", adds_up=True, within="kind"),
    Column("keep_ratio", "keep ratio", "{:.1%}", ratio=("kept", "units")),
)


def describe_pruned(source: str, directory: Path) -> dict[str, Any]:
    """Which sizes a pruned model has, beside those that it had. It is built without weights.

    Raises:
        BadInput: Its config is of no class of transformers, or does not say what that class could be built from.
    """
    try:
        config = read_config(str(directory))
        with torch.device("meta"):
            model: PreTrainedModel = class_of(config, directory)(config)
        dense = dense_model(model)
        before, after = groups_of(dense), groups_of(model)
        if before.keys() != after.keys():
            raise ValueError(f"it has the groups {sorted(after)}, uncut it would have {sorted(before)}")
    except (
        *(ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
        StrictDataclassError,
    ) as error:
        raise BadInput(
            f"{CONFIG} of {source} does not describe a pruned model ({error}): restore the one that `save_pruned` wrote."
        ) from error
    rows = []
    for key, group in before.items():
        layer, kind = layer_and_type(key)
        row: Row = {"module": key, "layer": layer, "type": kind, "kind": group.kind}
        rows.append(with_ratios(row | {"units": group.units, "kept": after[key].units}, COLUMNS))
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in (("before", dense), ("now", model))}
    files = sorted(directory.glob("model*.safetensors"))
    return {
        "kind": "pruned model",
        "source": source,
        "base_class": type(model).__name__,
        "loads_with": "peft_ext.load_pruned, or trust_remote_code" if hasattr(config, "pruned") else "transformers",
        "parameters": parameters,
        "left": parameters["now"] / parameters["before"],
        "file_bytes": sum(file.stat().st_size for file in files) or None,
        "by_kind": grouped(rows, "kind", COLUMNS),
        "modules": rows,
    }


def pictures_of_rows(rows: Sequence[Row]) -> list[Picture]:
    """For each kind of channels, a bar for every layer, filled as far as it keeps them."""
    shares: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        shares[row["kind"]][row["module"]] = (row["kept"], row["units"])
    return [Fillings(values, TITLES.get(kind, kind)) for kind, values in shares.items()]
