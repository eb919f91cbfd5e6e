"""The table of what each method can do, read off the tests that show it.

    python tests/capabilities.py                   # print the table
    python tests/capabilities.py --write docs/capabilities.md # between <!-- capabilities --> and <!-- /capabilities -->

A test of the conformance kit that shows a capability says so, `@shows("merge")`, for all methods in
`test_conformance.py` that it is run on, or, `@shows("adapter_names", only_if="mixes_batches")`, for those whose
`Method` says yes in that field; it shows that the others refuse. Any other test is marked,
`@pytest.mark.capability("4-bit base", "ssf")`, with `refused=True` where it shows that the method refuses; its methods
are those it names, or those it is parametrised over. A method without a test gets no tick.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):  # as a script, only the first is there
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from test_conformance import METHODS

from peft_ext import METHODS as PEFT_TYPES
from peft_ext.core import about_of
from peft_ext.testing import MethodConformance, models_of


YES, REFUSED, UNTESTED = "✓", "refused", "-"
BLOCK = re.compile(r"(<!-- capabilities -->\n).*?(<!-- /capabilities -->)", re.DOTALL)
COLUMNS = {peft_type.lower(): about_of(peft_type).name for peft_type in PEFT_TYPES}


@dataclass
class Capabilities:
    """What the marked tests show.

    Attributes:
        cells: By capability and method, `YES` or `REFUSED`.
        models: By method, the architectures that any of these tests runs it on.
    """

    cells: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    models: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, test: Callable[..., Any]) -> None:
        """Reads the marks of one test.

        Raises:
            ValueError: A mark names a method that does not exist, or two tests contradict each other.
        """
        for mark in marks(test, "capability"):
            capability, *named = mark.args
            found = [pair for name in named for pair in cases(test, name)] if named else cases(test)
            for method, model in found:
                self._enter(test.__name__, capability, method, model, mark.kwargs.get("refused", False))

    def add_kit(self, case: type[MethodConformance]) -> None:
        """Reads what the tests of the kit show of one method."""
        claims = case.method
        tests = [test for group in case.__mro__ for test in vars(group).values()]
        for test in tests:
            if callable(test) and hasattr(test, "shows"):
                capability, only_if = test.shows
                refused = bool(only_if) and not getattr(claims, only_if)
                for model in models_of(test, claims):
                    self._enter(test.__name__, capability, claims.prefix.rstrip("_"), model, refused)

    def _enter(self, test: str, capability: str, method: str, model: str | None, refused: bool) -> None:
        if method not in COLUMNS:
            raise ValueError(f"{test} shows {capability!r} of {method!r}, which is no method.")
        cell = REFUSED if refused else YES
        if self.cells[capability].setdefault(method, cell) != cell:
            raise ValueError(f"{test} contradicts another test on {capability!r} of {method!r}.")
        if model is not None and model.partition("-")[0] not in METHODS:  # tests are parametrised over methods, too
            self.models[method].add(model)

    def table(self) -> str:
        """Markdown: a row for each capability, a column for each method; below, what the tests run on."""
        lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{':---:|' * len(COLUMNS)}"]
        for capability, cells in self.cells.items():
            lines.append(f"| {capability} | {' | '.join(cells.get(method, UNTESTED) for method in COLUMNS)} |")
        legend = f"{YES}: a test shows it. {REFUSED}: a test shows the error that says why not. {UNTESTED}: no test."
        lines += [
            "",
            f"{legend} Mask pruning is converted by `prune_and_unload(model, keep_lora=True)`, the others by `save_as_lora`.",
            "",
            "Made by `python tests/capabilities.py`, from the tests. They run on tiny models of:",
            "",
        ]
        lines += [f"- {title}: {', '.join(sorted(self.models[method]))}" for method, title in COLUMNS.items()]
        return "\n".join([*lines, ""])


def marks(test: Callable[..., Any], name: str) -> list[Any]:
    return [mark for mark in getattr(test, "pytestmark", []) if mark.name == name]


def values(test: Callable[..., Any], argument: str) -> list[Any]:
    """What a test is parametrised over in one argument."""
    return [value for mark in marks(test, "parametrize") if mark.args[0] == argument for value in mark.args[1]]


def cases(test: Callable[..., Any], method: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Methods, and models where there are some, that a test is run on; of `method` alone if it is given."""
    if method is not None:
        yield from ((method, name) for name in [None, *values(test, "name")])
        return
    for mark in marks(test, "parametrize"):
        if mark.args[0] == ("method", "name"):
            yield from mark.args[1]
    yield from ((method, None) for method in values(test, "method"))


def collect() -> Capabilities:
    """Reads the conformance kit, then all test files."""
    found = Capabilities()
    for case in METHODS.values():
        found.add_kit(case)
    for path in sorted(TESTS.glob("test_*.py")):
        if "mark.capability(" in path.read_text():  # the others need not be imported
            module = importlib.import_module(path.stem)
            for test in vars(module).values():
                if getattr(test, "__module__", None) == path.stem:
                    found.add(test)
    return found


def updated(text: str) -> str:
    """A page with the table between its markers made anew."""
    table = collect().table()
    return BLOCK.sub(lambda match: match[1] + table + match[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers in FILE")
    file = parser.parse_args().write
    if file is None:
        print(collect().table())
    elif not BLOCK.search(file.read_text()):
        parser.error(f"{file} has no line `<!-- capabilities -->` followed by `<!-- /capabilities -->`")
    else:
        file.write_text(updated(file.read_text()))


if __name__ == "__main__":
    main()
