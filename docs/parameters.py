"""Writes the parameter tables of the method pages from the configs, and the list of methods from the registry.

python docs/parameters.py            # between <!-- parameters:CONFIG --> and <!-- /parameters -->, <!-- methods --> and so on
python docs/parameters.py --check    # exit status 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path

from peft import PeftConfig

import peft_ext
from peft_ext import ExtConfig
from peft_ext.core import methods


DOCS = Path(__file__).resolve().parent
INDEX = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- parameters:(\w+) -->\n).*?(<!-- /parameters -->)", re.DOTALL)


def descriptions(config: type) -> dict[str, str]:
    """What the `Args:` of the config's docstring say of each field, on one line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(config.__doc__ or ""), re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


def default(field: Field) -> str:
    """The default as one writes it in Python."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')


def rows(config: type[ExtConfig]) -> list[tuple[str, str, str]]:
    """Name, default and meaning: the fields that the class adds, and those that it gives a meaning of its own.

    Raises:
        ValueError: The docstring leaves a field out, or has one that does not exist.
    """
    parent = PeftConfig if config is ExtConfig else ExtConfig
    inherited = {field.name for field in fields(parent)}
    meanings = descriptions(config)
    chosen = [field for field in fields(config) if field.name not in inherited or field.name in meanings]
    if wrong := {field.name for field in chosen} ^ set(meanings):
        raise ValueError(f"The docstring of {config.__name__} and its fields differ in {', '.join(sorted(wrong))}.")
    chosen.sort(key=lambda field: field.name in inherited)  # the class's own come first
    return [(field.name, default(field), meanings[field.name]) for field in chosen]


def table(config: type[ExtConfig]) -> str:
    """The fields of a config as a Markdown table."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, value, meaning in rows(config):
        meaning = meaning.replace("|", r"\|").replace("[`", "`").replace("`]", "`")
        lines.append(f"| `{name}` | `{value}` | {meaning} |")
    return "\n".join(lines) + "\n"


def index() -> str:
    """The registered methods with their pages, as a Markdown table."""
    lines = ["| page | method | |", "|---|---|---|"]
    for method in methods().values():
        page = method.about.page.removeprefix("docs/")
        if method.package == "peft_ext":
            lines.append(f"| [{page}]({page}) | {method.about.name} | {method.about.idea} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """The page with its tables made anew."""
    text = INDEX.sub(lambda match: match[1] + index() + match[2], text)
    return BLOCK.sub(lambda match: match[1] + table(getattr(peft_ext, match[2])) + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [page for page in sorted(DOCS.glob("*.md")) if updated(page.read_text()) != page.read_text()]
    if check and stale:
        sys.exit(f"Not up to date: {', '.join(page.name for page in stale)}. Run `python docs/parameters.py`.")
    for page in stale:
        page.write_text(updated(page.read_text()))
        print(page)


if __name__ == "__main__":
    main()
