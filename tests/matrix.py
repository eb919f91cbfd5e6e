"""Runs the core of the tests with other versions of the packages that peft_ext stands on.

    python tests/matrix.py                                  # all corners, results into tests/matrix_results.json
    python tests/matrix.py transformers-5.0 --tests tests/test_export.py
    python tests/matrix.py --write docs/reliability.md      # the table, between its markers

A corner is a folder below `.matrix` with these packages and what they need, which stands before the environment's own
on the path: an environment of its own would install PyTorch again each time. What is not run here, other
interpreters and versions of PyTorch, is run by starting this script from an environment that has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("matrix_results.json")
CORNERS = {  # what each installs; hub 2 is newer than what older transformers allow
    "transformers-5.0": ["transformers==5.0.0", "huggingface_hub<2"],
    "transformers-5.8": ["transformers==5.8.0", "huggingface_hub<2"],
    "transformers-5.17": ["transformers==5.17.0", "huggingface_hub<2"],
    "transformers-5.24": ["transformers==5.24.0"],
    "peft-0.21.0": ["peft==0.21.0"],  # the oldest that has what peft_ext imports
    "as-installed": [],
}
SHARED = ("torch", "numpy", "nvidia", "triton", "sympy", "accelerate", "psutil", "yaml", "_yaml", "packaging", "rich")
TESTS = ["tests/test_conformance.py", "tests/test_export.py", "tests/test_vqt.py", "tests/test_vpt.py"]
BLOCK = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)


def overlay(name: str) -> Path:
    """The folder of a corner, filled if it is not there yet."""
    folder = ROOT / ".matrix" / name
    if not folder.exists() and CORNERS[name]:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        needs_peft = any(wanted.startswith("peft==") for wanted in CORNERS[name])
        # PEFT depends on PyTorch, which is not to be installed again
        subprocess.run([*pip, "--target", folder, *["--no-deps"] * needs_peft, *CORNERS[name]], check=True)
        for path in folder.iterdir():
            if path.name.lower().startswith(SHARED):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def run(name: str, tests: list[str]) -> dict[str, Any]:
    """Runs the tests in a corner; what came out, with the versions."""
    path = os.pathsep.join([str(overlay(name)), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    packages = ("transformers", "peft", "huggingface_hub", "torch")
    ask = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    start = time.monotonic()
    # a warning of another version is no fault of ours: what is deprecated there is looked at where it is current
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-W", "default", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", done.stdout[-400:])
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if not counts:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return {
        "versions": json.loads(asked.stdout.splitlines()[-1]),
        "python": platform.python_version(),
        "tests": tests,
        "seconds": round(time.monotonic() - start),
        "counts": counts,
        "failed": failed,
    }


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| transformers | PEFT | torch | Python | passed | failed | skipped |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in results.values():
        counts, versions = row["counts"], row["versions"]
        failed = counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0)
        lines.append(
            f"| {versions['transformers']} | {versions['peft']} | {versions['torch']} | {row['python']} | "
            f"{counts.get('passed', 0):,} | {failed} | {counts.get('skipped', 0)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corners", nargs="*", help=f"{', '.join(CORNERS)}; all if none is named")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--write", type=Path, help="a page with the markers, to put the table there; runs nothing")
    options = parser.parse_args()
    if unknown := set(options.corners) - set(CORNERS):
        parser.error(f"no corner {', '.join(sorted(unknown))}: take {', '.join(CORNERS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.write:
        page, count = BLOCK.subn(lambda match: f"{match[1]}{table(results)}\n{match[2]}", options.write.read_text())
        if not count:
            parser.error(f"{options.write} has no line `<!-- matrix -->` followed by `<!-- /matrix -->`")
        options.write.write_text(page)
        return
    failed = False
    for name in options.corners or CORNERS:
        row = run(name, options.tests)
        failed |= bool(row["failed"]) or not row["counts"]
        key = f"{name}, torch {row['versions']['torch']}, Python {row['python']}"
        results[key] = row
        order = sorted(results, key=lambda key: list(CORNERS).index(key.split(",")[0]))
        RESULTS.write_text(json.dumps({key: results[key] for key in order}, indent=1) + "\n")
        print(f"{name}: {row['counts']}, {row['seconds']} s")
        for test in row["failed"][:20]:
            print(f"  {test}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
