"""Sums over the rows of a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..core import Column, Row


PARAMETERS = Column("parameters", "parameters", "{:,}", adds_up=True)


def with_ratios(row: Row, columns: Sequence[Column]) -> Row:
    """The row with the columns that are quotients of others; `None` where the files do not tell the divisor."""
    for column in columns:
        if column.ratio is not None and set(column.ratio) <= row.keys():
            part, whole = (row[key] for key in column.ratio)
            row[column.key] = part / whole if part is not None and whole else None
    return row


def totals(rows: Sequence[Row], columns: Sequence[Column]) -> Row:
    """What rows have together: sums, the norm over all, and ratios of the sums."""
    result: Row = {"sites": len(rows)}
    for column in (PARAMETERS, *columns):
        having = [row for row in rows if column.key in row]
        if not (column.adds_up and having):
            continue
        if column.within is None or len({row.get(column.within, row["type"]) for row in having}) == 1:
            values = [row[column.key] for row in having]
            result[column.key] = None if None in values else sum(values)
    norms = [row["norm"] for row in rows if "norm" in row]
    if norms:
        result["norm"] = math.hypot(*norms)
    return with_ratios(result, columns)


def grouped(rows: Iterable[Row], key: str, columns: Sequence[Column]) -> dict[str, Row]:
    """`totals` of the rows with the same value of a key."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row[key])].append(row)
    return {name: totals(group, columns) for name, group in groups.items()}
