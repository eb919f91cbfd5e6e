"""`peft-ext methods`."""

from __future__ import annotations

import argparse
from typing import Any

from ..core import Method, methods
from .printing import console, print_json, table_of


def main(arguments: argparse.Namespace) -> None:
    """Lists the registered methods."""
    found = [_described(method) for method in methods().values()]
    if arguments.json:
        print_json(found)
        return
    table = table_of("method", "peft_type", "config", "package", "merges", text=("peft_type", "config", "package"))
    for row in found:
        package = " ".join(filter(None, (row["package"], row["version"])))
        table.add_row(row["name"], row["method"], row["config"], package, "yes" if row["merges"] else "no")
    console().print(table)


def _described(method: Method) -> dict[str, Any]:
    about = method.about
    return {
        "method": method.peft_type,
        "name": about.name,
        "config": f"{method.config.__module__.partition('.')[0]}.{method.config.__name__}",
        "package": method.distribution or method.package,
        "version": method.version,
        "merges": about.merges,
        "paper": about.paper or None,
        "page": about.page or None,
    }
