"""Many random sequences for every method, others at each call; prints a line for each method.

python tests/sequences.py --number 20000 [--methods ssf spt] [--seed 1]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


for folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import conftest  # noqa: F401  one thread, no network
from test_sequences import METHODS

from peft_ext.testing.sequences import run_sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20_000, help="sequences for each method")
    parser.add_argument("--steps", type=int, default=10, help="the most steps in one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--as-found", action="store_true", help="do not look for the shortest that fails")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    failed = []
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
        print(f"{name}: {options.number} sequences, {time.monotonic() - start:.0f} s: {outcome}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
