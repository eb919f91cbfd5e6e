"""`peft-ext compare`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..inspection import compare
from .printing import brief, console, in_bytes, number, print_json, table_of


def main(arguments: argparse.Namespace) -> None:
    found = compare(arguments.first, arguments.second)
    if arguments.json:
        print_json(found)
        return
    out = console()
    first, second = found["first"], found["second"]
    table = table_of("", "first", "second")
    for key in ("source", "method", "sites", "parameters"):
        table.add_row(key, *(number(side[key]) for side in (first, second)))
    table.add_row("file", in_bytes(first["file_bytes"]), in_bytes(second["file_bytes"]))
    out.print(table)
    if found["config"]:
        table = table_of("config", "first", "second")
        for key, values in found["config"].items():
            table.add_row(key, *(brief(value) for value in values))
        out.print(table)
    sites = found["sites"]
    out.print(f"Sites in common: {len(sites['common'])}")
    for key, name in (("only_first", "first"), ("only_second", "second")):
        if sites[key]:
            out.print(f"Only in the {name}: {', '.join(sites[key])}")
    overlap, cosine = found["overlap"] or {}, found["cosine"]
    if cosine is not None:
        out.print("Cosine of the updates: " + ("unknown" if cosine["all"] is None else f"{cosine['all']:.4f}"))
    if overlap:
        out.print(f"Tuned by both: {_overlap_line(overlap[''])}")
    cosines = cosine["modules"] if cosine is not None else {}
    if not cosines and not overlap:
        return
    table = table_of("module", "cosine", *(("first", "second", "shared", "same sign") if overlap else ()))
    for module in dict.fromkeys([*cosines, *filter(None, overlap)]):
        value, shared = cosines.get(module), overlap.get(module)
        cells = [f"{shared[key]:,}" for key in ("first", "second", "shared", "same_sign")] if shared else []
        table.add_row(module, "" if value is None else f"{value:.4f}", *cells)
    out.print(table)


def _overlap_line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['shared']:,} of {found['first']:,} and {found['second']:,} weights (Jaccard {found['jaccard']:.4f}), "
        f"{found['same_sign']:,} in the same direction"
    )
