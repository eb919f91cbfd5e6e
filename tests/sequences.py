"""Many random sequences for every method, others at each call; prints a line for each method.

python tests/sequences.py --number 20000 [--methods ssf spt] [--seed 1] [--results tests/sequences_results.json]
python tests/sequences.py --results tests/sequences_results.json --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import conftest  # noqa: F401  one thread, no network
from test_sequences import METHODS

from peft_ext.testing.sequences import run_sequences


BLOCK = re.compile(r"(<!-- sequences -->\n).*?(<!-- /sequences -->)", re.DOTALL)


def table(lines: list[dict[str, Any]]) -> str:
    """In Markdown: the sequences of each method in the runs that found nothing."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts[line["method"]] += line["sequences"] if line["outcome"].startswith("no fault") else 0
    rows = [f"| {name} | {number:,} |" for name, number in [*counts.most_common(), ("all", counts.total())]]
    return "\n".join(["| method | sequences without a fault |", "|---|---:|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20_000, help="sequences for each method")
    parser.add_argument("--steps", type=int, default=10, help="the most steps in one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--as-found", action="store_true", help="do not look for the shortest that fails")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, help="a JSON file that what was found is added to")
    parser.add_argument("--write", type=Path, help="a page to put the table of --results in; runs nothing")
    options = parser.parse_args()
    failed, lines = [], json.loads(options.results.read_text()) if options.results and options.results.exists() else []
    if options.write:
        page, count = BLOCK.subn(lambda match: f"{match[1]}{table(lines)}\n{match[2]}", options.write.read_text())
        if not (count and lines):
            parser.error("--write needs --results, and a page with `<!-- sequences -->` and `<!-- /sequences -->`")
        options.write.write_text(page)
        return
    for name in options.methods:
        start = time.monotonic()
        try:
            run_sequences(METHODS[name], options.number, options.steps, options.seed, shorten=not options.as_found)
            outcome = "no fault"
        except Exception as error:  # noqa: BLE001  whatever a fault ends in; the other methods are still to come
            failed.append(name)
            found = [error, *getattr(error, "exceptions", [])]  # several faults come as a group
            outcome = "\n".join(
                line for one in found for line in (f"{type(one).__name__}: {one}", *getattr(one, "__notes__", []))
            )
        seconds = round(time.monotonic() - start)
        print(f"{name}: {options.number} sequences, {seconds} s: {outcome}", flush=True)
        lines.append(
            {"method": name, "sequences": options.number, "seed": options.seed, "seconds": seconds, "outcome": outcome}
        )
        if options.results:
            options.results.write_text(json.dumps(lines, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
