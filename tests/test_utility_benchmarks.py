"""The benchmarks of what goes with every method: jobs, resuming and tables, on a tiny model; never scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_comparison import BENCHMARK, folder  # noqa: F401 (a fixture)


sys.path[:0] = [str(BENCHMARK), str(BENCHMARK.parent)]
import compress_check
import head_check
import razor_check
import resumable
import sampling_loss
import tasks


SIZES = {"train": 24, "held_out": 8, "epochs": 1, "batch": 8, "length": 8}


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The task `cola` on the tiny model, with lengths of its own."""
    task = tasks.Task("text", "model", "accuracy", ("sentence", "label"), tasks.TASKS["cola"].files)
    monkeypatch.setitem(tasks.TASKS, "cola", task)
    monkeypatch.setitem(resumable.LENGTHS, "cola", SIZES)
    return folder


def command(script: Any, monkeypatch: pytest.MonkeyPatch, small: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the results hold after a run of the script."""
    results = small / f"{script.__name__}.jsonl"
    command = [script.__name__, "cola", "--data", str(small), "--results", str(results), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.parametrize(
    ("script", "options", "marker", "variants"),
    [
        (head_check, ("--methods", "lora"), "heads", [head_check.FRESH, head_check.FITTED]),
        (razor_check, ("--methods", "lora"), "razor", ["dense", "keep 0.3", "keep 0.1"]),
        (compress_check, ("--keep", "0.1", "0.3"), "compressed", ["keep 0.1, 0.3"]),
        (sampling_loss, ("--variants", "LISA, 2 blocks"), "sampling", ["LISA, 2 blocks"]),
    ],
)
def test_scripts_run_what_is_missing_and_write_their_table(
    script: Any,
    options: tuple[str, ...],
    marker: str,
    variants: list[str],
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = small / "page.md"
    page.write_text(f"<!-- {marker} -->\nold\n<!-- /{marker} -->\n")
    one = command(script, monkeypatch, small, *options, "--rates", "1e-3", "--seeds", "1")
    assert [row["variant"] for row in one] == variants and all(row["test"] >= 0 for row in one)
    two = command(script, monkeypatch, small, *options, "--rates", "1e-3", "--seeds", "2", "--write", str(page))
    assert two[: len(one)] == one and [row["seed"] for row in two[len(one) :]] == [1] * len(variants)
    text = page.read_text()
    assert "old" not in text and f"{len(two) // len(variants)}" in text
    # the shares of ComPEFT have a column of their own
    assert script is compress_check or all(variant in text for variant in variants)
    assert len({line.count("|") for line in text.splitlines() if "|" in line}) == 1


def test_the_rate_of_the_comparison_is_taken(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "task": "cola", "method": "lora", "budget": 1.0, "seed": 0, "metric": "accuracy",
        "settings": "24 examples, 1 epochs of batches of 8, at most 8 tokens",
    }  # fmt: skip
    comparison = small / "compare.jsonl"
    lines = [row | {"learning_rate": rate, "validation": value} for rate, value in ((1e-3, 0.5), (3e-3, 0.6))]
    comparison.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(resumable, "RESULTS", comparison)
    found = command(razor_check, monkeypatch, small, "--methods", "lora", "--variants", "dense", "--seeds", "1")
    assert [line["learning_rate"] for line in found] == [3e-3]
    with pytest.raises(ValueError, match=r"no run of full on cola with 24 examples.*give --rates"):
        command(razor_check, monkeypatch, small, "--methods", "full")


def test_steps_are_timed_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = razor_check.measure_steps("vit-tiny", 2, 1)
    kept = {(row["method"], row["way"]): row["bytes"] for row in found["rows"]}
    assert all(len(row["seconds"]) == 2 for row in found["rows"]) and len(kept) == 8
    for method in ("full fine-tuning", "LoRA r=8"):
        assert kept[method, "gradient checkpointing"] < kept[method, "keep 0.1"] < kept[method, "dense"]
    assert razor_check.steps_table(found).count("\n| ") == 8


def test_a_page_without_the_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no line `<!-- heads -->`"):
        resumable.write_between(page, {"heads": "table"})
