"""`peft-ext inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plots
from ..core import BadInput, Column, Row, about_of
from ..inspection import describe
from ..inspection.pruned import COLUMNS, pictures_of_rows
from ..inspection.tables import totals
from .printing import console, in_brackets, in_bytes, print_json, print_pairs, print_rows, shown, sizes
from .running import explained


SCREEN = 12  # rows of the table by layer


def main(arguments: argparse.Namespace) -> None:
    """Shows an adapter or a pruned model."""
    found = describe(arguments.adapter)
    if arguments.figure is not None:
        _draw(found, arguments.figure)
    if arguments.json:
        print_json(found)
        return
    out, rows = console(), found["modules"]
    if found["kind"] == "pruned model":
        columns: Sequence[Column] = COLUMNS
        print_pairs(out, _pairs_of_pruned(found))
        print_rows(out, "What is left", "kind", found["by_kind"], columns)
    else:
        columns = about_of(found["method"]).columns
        print_pairs(out, _pairs(found))
        print_rows(out, "By type", "type", {**found["by_type"], "all": found["totals"]}, columns)
        if not arguments.summary:
            print_rows(out, "By layer", "layer", _bands(rows, columns), columns)
    if arguments.modules:
        print_rows(out, "By module", "module", {row["module"]: row for row in rows}, columns, shapes=True)


def _pairs(found: Mapping[str, Any]) -> dict[str, Any]:
    counts, labels = found["parameters"], about_of(found["method"]).labels
    whole = f", {counts['saved_whole']:,} of them saved whole" if counts["saved_whole"] else ""
    per_parameter = found["bytes_per_parameter"]
    return {
        "adapter": found["source"],
        "method": found["name"],
        "base model": " ".join(filter(None, (found["base_model"], in_brackets(found["base_class"])))),
        "task": found["task"],
        "written by": found["written_by"],
        **{key.replace("_", " "): value for key, value in found["settings"].items()},
        "parameters": f"{counts['all']:,}{whole} ({', '.join(found['dtypes'])})",
        "file": f"{in_bytes(found['file_bytes'])}, {per_parameter:.2f} a parameter" if per_parameter else None,
        **{labels.get(key, key): shown(value) for key, value in found["figures"].items()},
        **{f"whole: {name}": sizes(shape) for name, shape in found["saved_whole"].items()},
    }


def _pairs_of_pruned(found: Mapping[str, Any]) -> dict[str, Any]:
    counts = found["parameters"]
    return {
        "model": f"{found['source']} (pruned {found['base_class']})",
        "loads with": found["loads_with"],
        "parameters": f"{counts['now']:,} of {counts['before']:,} ({found['left']:.1%})",
        "file": in_bytes(found["file_bytes"]),
    }


def _bands(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, Row]:
    """The sums by layer; of a deep model by several layers together, so that they fit on a screen."""
    layers = sorted({row["layer"] for row in rows if row["layer"] >= 0})
    size = -(-len(layers) // SCREEN)
    bands = {}
    for start in range(0, len(layers), size or 1):
        band = layers[start : start + size]
        name = f"{band[0]}-{band[-1]}" if len(band) > 1 else str(band[0])
        bands[name] = totals([row for row in rows if row["layer"] in band], columns)
    return bands


def _draw(found: Mapping[str, Any], path: Path) -> None:
    """The figure that fits the method."""
    rows: list[Row] = found["modules"]
    with explained(f"No figure was written to {path}"):
        if found["kind"] == "pruned model":
            pictures = pictures_of_rows(rows)
        else:
            pictures = about_of(found["method"]).pictures_of_rows(rows)
        if not pictures:
            raise BadInput(f"There is no figure for the method {found['method']}: leave `--figure` out.")
        plots.draw(pictures).savefig(path)
