"""The notebook runs from top to bottom, in a process of its own, as in a fresh kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_tour_runs(tmp_path: Path) -> None:
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join(cells("code")))
    path = os.pathsep.join([str(ROOT / "examples"), str(ROOT)])
    settings = {"PYTHONPATH": path, "MPLBACKEND": "agg", "TOUR_EPOCHS": "2", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "loaded adapter gives the same logits: True" in run.stdout


def test_tour_is_committed_with_its_figures() -> None:
    outputs = [
        output
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    ]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
