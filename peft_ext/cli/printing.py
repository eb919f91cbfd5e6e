"""Tables and JSON on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..core import Column, Row
from ..inspection import PARAMETERS


SITES, NORM = Column("sites", "sites", "{:,}"), Column("norm", "norm", "{:.4g}")


def console() -> Console:
    """Of the terminal's width; as wide as the tables are where the output goes into a file or a pipe."""
    width = None if sys.stdout.isatty() else 1000
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_json(found: Any) -> None:
    """JSON, without NaN, which it does not have."""
    plain = json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN
    print(json.dumps(plain, indent=2))


def table_of(*headings: str, text: Collection[str] = ()) -> Table:
    """A table whose columns hold numbers, but the first and those of text."""
    table = Table(box=box.MARKDOWN)
    for place, heading in enumerate(headings):
        is_text = place == 0 or heading in text
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    return table


def print_pairs(out: Console, pairs: Mapping[str, Any]) -> None:
    """Two columns: what is said, and what there is to say."""
    table = Table.grid(padding=(0, 2))
    for key, value in pairs.items():
        if value not in (None, ""):
            table.add_row(key, number(value))
    out.print(table)
    out.print()


def print_rows(
    out: Console, title: str, first: str, rows: Mapping[str, Row], columns: Sequence[Column], shapes: bool = False
) -> None:
    """A table of rows, with those columns that any of them has and that do not repeat another one's counts.

    A dash stands where a value means nothing, as for a sum of what does not add up.
    """
    if not rows:
        return
    headings, cells, text = [first], [list(rows)], {"shapes"}
    for column in (SITES, PARAMETERS, *columns, NORM):
        values = [row.get(column.key) for row in rows.values()]
        written = ["-" if value is None else column.form.format(value) for value in values]
        if column.heading and any(value is not None for value in values) and written not in cells:
            headings.append(column.heading)
            cells.append(written)
            if any(isinstance(value, str) for value in values):
                text.add(column.heading)
    if shapes and any(row.get("shapes") for row in rows.values()):
        headings.append("shapes")
        cells.append([_shapes(row.get("shapes", {})) for row in rows.values()])
    table = table_of(*headings, text=text)
    for line in zip(*cells, strict=True):
        table.add_row(*line)
    out.print(title)
    out.print(table)


def _shapes(found: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{leaf.removesuffix('.weight')} {sizes(shape)}" for leaf, shape in found.items())


def number(value: Any) -> str:
    """A value, with thousands set apart in counts."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def shown(value: Any) -> str:
    """A value, or several by name."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {f'{v:.4g}' if isinstance(v, float) else number(v)}" for key, v in value.items())
    return number(value)


def brief(value: Any) -> str:
    """A value of a config in at most 60 characters."""
    text = "-" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sizes(shape: Sequence[int]) -> str:
    """`2x3` of `(2, 3)`."""
    return "x".join(map(str, shape))


def in_brackets(text: str | None) -> str:
    """`(text)`, or nothing."""
    return f"({text})" if text else ""


def in_bytes(count: int | None) -> str | None:
    """A number of bytes."""
    return None if count is None else f"{count:,} bytes"
