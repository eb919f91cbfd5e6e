"""Trainings that are killed and resumed, for two methods; `make chaos` does it for all, and more often."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_killed_and_resumed_trainings_end_in_the_same_bits(tmp_path: Path) -> None:
    """In a process of its own, since it forks: ours has threads by now."""
    script, results = Path(__file__).with_name("chaos.py"), tmp_path / "results.json"
    options = ["--methods", "ssf", "spiel-ag", "--rounds", "1", "--kills", "2", "--results", str(results)]
    run = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(results.read_text())
    assert found["wrong"] == []
    assert all(counts["rounds"] == counts["the same bits"] == 1 for counts in found["methods"].values())
