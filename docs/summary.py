"""Writes the README's table of results from the raw results of the comparison and of the cost benchmark.

python docs/summary.py            # the table between <!-- summary --> and <!-- /summary -->
python docs/summary.py --check    # exit status 1 if the README is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "benchmark"))
from chosen_runs import RESULTS, load_results
from pareto import Point, points


BLOCK = re.compile(r"(<!-- summary -->\n).*?(<!-- /summary -->)", re.DOTALL)
ROWS = {  # as `methods.py` names them, and as the table does
    "probe": "linear probe",
    "full": "full fine-tuning",
    "lora": "LoRA r=8 (PEFT)",
    "ssf": "SSF",
    "random": 'sparse, `selection="random"`',
    "spiel-ag": "sparse, SpIEL-AG",
    "spt": "SPT",
    "mask-25": "mask pruning, a quarter cut",
    "vqt": "VQT, 4 queries",
    "unipt": "UniPT",
    "pasta": "PASTA",
    "s2ft": "S2FT",
    "wegeft": "WeGeFT",
    "bi-lora": "Bi-LoRA, 1 bit",
}
SAME_COST = {"random": "spiel-ag"}  # a fixed support; the step of SpIEL counts its reselections besides
OF_A_RUN_OF_ITS_OWN = {"bi-lora": "cost-{}-bi-lora-cpu.json"}  # measured again after its code had changed


def cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def table(task: str = "trec", costs: str = "minilm") -> str:
    """A row for each method: its score on a task, and what it costs beside LoRA."""
    runs = load_results(RESULTS)
    measured = json.loads((RESULTS.parent / f"cost-{costs}-cpu.json").read_text())
    found = {point.method: point for point in points(task, runs, measured)}
    for name, file in OF_A_RUN_OF_ITS_OWN.items():
        own = json.loads((RESULTS.parent / file.format(costs)).read_text())
        found |= {point.method: point for point in points(task, runs, own) if point.method == name}
    memory = found["lora"].costs["memory"]
    lines = ["| method | accuracy | trained, with head | kept for the backward | training step |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, title in ROWS.items():
        point: Point = found[name]
        spread = f" ± {point.spread:.3f}" if point.spread else ""
        same = found[SAME_COST.get(name, name)].costs
        kept = None if "memory" not in same else same["memory"] / memory
        lines.append(
            f"| {title} | {point.score:.3f}{spread} | {int(point.costs['parameters']):,} "
            f"| {cell(kept, '{:.2f}')} | {cell(same.get('step'), '{:.2f}')} |"
        )
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """The text with the table of today."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = ROOT / "README.md"
    text = page.read_text()
    if updated(text) == text:
        return
    if check:
        sys.exit("README.md: the table of results is out of date: run `python docs/summary.py`.")
    page.write_text(updated(text))


if __name__ == "__main__":
    main()
