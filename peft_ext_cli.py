"""The command `peft-ext`: what is in an adapter, two side by side, what can be made of one, and its card.

This module stands outside the package, whose import loads torch, PEFT and transformers: here the command line is only
read, and what a command needs is imported when it is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version("peft-ext"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 0, or 2 after one line on stderr that says what was wrong."""
    arguments = _parser().parse_args(argv)
    command = import_module(f"peft_ext.cli.{arguments.command}")
    from peft_ext.cli.running import run

    return run(command.main, arguments)


def _parser() -> argparse.ArgumentParser:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("peft-ext", description=about, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, text: str, *adapters: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for adapter in adapters:
            sub.add_argument(adapter, help="a directory, or a repository of the Hub (user/name)")
        return sub

    sub = command("inspect", "Show what is in an adapter, or what is left in a pruned model.", "adapter")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--summary", action="store_true", help="the table by type only")
    what.add_argument("--modules", action="store_true", help="the table of all modules, too")
    what.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw it; needs matplotlib")

    sub = command("compare", "Show two adapters side by side.", "first", "second")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")

    sub = command("export", "Make something of an adapter that loads without it.", "adapter")
    sub.add_argument(
        "--to",
        required=True,
        metavar="FORM",
        help="merged, pruned, lora, compressed, binarized, or another form of the method",
    )
    sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write it")
    sub.add_argument("--base", metavar="MODEL", help="the base model, if not the one that the adapter names")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the base model; as it was saved if left out",
    )
    sub.add_argument("--overwrite", action="store_true", help="write into a directory that has files already")

    sub = command("card", "Write the model card of an adapter, or bring it up to date.", "adapter")
    sub.add_argument("--push", metavar="REPO", help="the adapter's repository on the Hub; its card is written there")
    sub.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE.json",
        help="results: fields of `EvalResult`, one or a list, or plain numbers as Trainer writes them",
    )

    sub = command("plan", "Show what a training step of each method needs on a model, before it is loaded.")
    sub.add_argument("model", help="a model: a directory, or a name on the Hub")
    sub.add_argument("--batch", type=int, default=1, help="samples")
    sub.add_argument("--length", type=int, default=512, help="tokens of a text")
    sub.add_argument("--memory", metavar="SIZE", help="the most that a step may need, such as 24GB")
    sub.add_argument(
        "--goal", choices=("memory", "parameters", "latency", "speed"), default="memory", help="best first"
    )
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; as saved if left out"
    )
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="peft types; all that are registered if left out")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("methods", "List the methods that are registered: peft_ext's own, and those of other packages.")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
