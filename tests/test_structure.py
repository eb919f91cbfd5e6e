"""How the package is put together: who may import whom, how long files are, where methods are named."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_ext
from peft_ext.core import methods


ROOT = Path(peft_ext.__file__).resolve().parent
FILES = {path.relative_to(ROOT.parent): path for path in sorted(ROOT.rglob("*.py"))}
TUNERS = sorted(path.name for path in (ROOT / "tuners").iterdir() if (path / "__init__.py").is_file())
ASKING = ("inspection", "cards", "plots", "export", "cli", "loading", "training")  # they reach methods by the registry
SHARED = (
    "architectures",
    "batches",
    "calibrate",
    "channel_norms",
    "delta",
    "groups",
    "lora_files",
    "lora_start",
    "low_bit",
    "packed_files",
    "reading",
    "scores",
    "sparse",
    "sparse_files",
)
MAX_LINES, MAX_CORE_LINES = 500, 350


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): file for path, file in FILES.items()}


def imports_of(name: str) -> set[str]:
    """The modules of the package that one imports, wherever in the file; a package stands for its `__init__`."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in MODULES else source)
    return {found_name for found_name in found if found_name in MODULES and found_name != name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def part_of(name: str) -> str:
    """`core`, `tuners.ssf`, `cards`, ...: what a module belongs to; empty for `peft_ext` itself."""
    parts = name.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["tuners"] else 1])


def test_no_circles() -> None:
    # `from .x import y` in a package's own files is no import of the package's `__init__` in the graph's sense
    try:
        order = list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name)])
def test_imports_run_one_way(name: str) -> None:
    own = part_of(name)
    for other in IMPORTS[name]:
        part = part_of(other)
        if part == own:
            continue
        if own == "testing":  # a user of the package
            continue
        assert part or other == "peft_ext.version", f"{name} imports peft_ext itself"
        if own == "core":
            assert part == "version", f"core imports {other}"
        elif own.startswith("tuners"):
            assert part in ("core", *SHARED), f"{name} imports {other}: a method stands on core and the shared cores"
        elif own in SHARED:
            assert part in ("core", "version", *SHARED), f"{name} imports {other}: a shared core stands on core"
        elif own in ASKING:
            assert not part.startswith("tuners"), f"{name} imports {other}: ask the registry"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= (MAX_CORE_LINES if part_of(name) == "core" else MAX_LINES)


def code_of(path: Path) -> list[tuple[int, str]]:
    """The names and strings of a file with their lines, without comments and docstrings."""
    text = path.read_text()
    docs = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [tokenize.NAME, tokenize.STRING, *([tokenize.FSTRING_MIDDLE] if sys.version_info >= (3, 12) else [])]
    return [
        (token.start[0], token.string)
        for token in tokens
        if token.type in kinds and not (token.type == tokenize.STRING and token.start[0] in docs)
    ]


def test_methods_are_named_at_home_only() -> None:
    """Whatever names a method elsewhere is something that a new one would have to repeat."""
    ours = {key: m for key, m in methods().items() if m.package == "peft_ext"}
    classes = {cls.__name__ for m in ours.values() for cls in (m.config, m.model)}
    words = re.compile(rf"\b({'|'.join([*ours, *(key.lower() for key in ours), *classes, *TUNERS])})_?\b")
    found = [
        f"{path}:{line}: {text}"
        for path, file in FILES.items()
        if path != Path("peft_ext/__init__.py") and not path.is_relative_to("peft_ext/tuners")
        for line, text in code_of(file)
        if words.search(text) and not is_example(text)
    ]
    assert not found, "\n".join(found)


def is_example(text: str) -> bool:
    """Within a message, such as 'CardInfo(method="SSF")', a method may stand for any."""
    return " " in text.strip("rbf\"'")


def test_every_folder_describes_its_method() -> None:
    described = {m.config.__module__.split(".")[2]: m.about for m in methods().values() if m.package == "peft_ext"}
    assert sorted(described) == TUNERS
    index = (ROOT.parent / "docs" / "README.md").read_text()
    for about in described.values():
        assert about.idea.endswith(".") and about.paper in about.bibtex and (ROOT.parent / about.page).is_file()
        assert about.merges or about.limits
        assert f"({Path(about.page).name})" in index, "docs/README.md lists the pages"
