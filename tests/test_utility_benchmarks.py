"""The benchmarks of what goes with every method: jobs, resuming and tables, on a tiny model; never scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_comparison import BENCHMARK, folder  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, LlamaConfig


sys.path[:0] = [str(BENCHMARK), str(BENCHMARK.parent)]
import compare
import compress_check
import growth
import head_check
import large
import many
import razor_check
import recipes
import resumable
import sampling_loss
import tasks
import workloads


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
    monkeypatch.setattr(razor_check, "STEPS", small / "steps.json")  # what was measured has a table of its own
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


def test_a_plain_variant_is_a_run_of_the_comparison(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = small / "compare.jsonl"
    lengths = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    common = ["cola", "--data", str(small), "--methods", "lora", "--seeds", "1", *lengths]
    monkeypatch.setattr(sys, "argv", ["compare", *common, "--results", str(comparison), "--rates", "1e-3", "3e-3"])
    compare.main()
    rows = {row["learning_rate"]: row for row in map(json.loads, comparison.read_text().splitlines())}
    arguments = ("--methods", "lora", "--variants", "dense", "--seeds", "1")
    dense = command(razor_check, monkeypatch, small, *arguments, "--rates", "3e-3")
    assert all(dense[0][name] == rows[3e-3][name] for name in ("validation", "test", "trained", "settings"))

    monkeypatch.setattr(resumable, "RESULTS", comparison)
    found = command(
        razor_check, monkeypatch, small, "--methods", "lora", "--seeds", "1", "--variants", *razor_check.KEEPS
    )
    best = max(rows.values(), key=lambda row: row["validation"])["learning_rate"]
    assert [(line["variant"], line["learning_rate"]) for line in found[1:]] == [("keep 0.3", best), ("keep 0.1", best)]
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


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "use_cache": False}


def _small_llama() -> Any:
    config = LlamaConfig(**SMALL, num_attention_heads=2, num_key_value_heads=1)
    return AutoModelForCausalLM.from_config(config)


def test_many_adapters_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        workloads.PRESETS, "vit-6x384", workloads.Workload("vit-6x384", _small_llama, "causal", 1, length=8)
    )
    monkeypatch.setattr(many, "PRESETS", ("vit-6x384",))
    results, page = tmp_path / "many.json", tmp_path / "page.md"
    page.write_text("<!-- many -->\nold\n<!-- /many -->\n")
    options = ["many", "--number", "12", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", [*options, "--methods", "SSF", "VQT, 4 queries"])
    many.main()
    lora, ssf = json.loads(results.read_text())
    assert (lora["method"], ssf["method"]) == ("LoRA r=8", "SSF")  # VQT reads no model that generates
    for row in (lora, ssf):
        assert row["others_bytes"] == pytest.approx(11 * row["first_bytes"], rel=0.05)
        assert row["switch_s"] > 0 and row["exchange_s"] > 0
    monkeypatch.setattr(sys, "argv", [*options, "--write", str(page)])
    many.main()
    assert "old" not in page.read_text() and "12 adapters" in page.read_text()


def test_growth_is_measured_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [growth.Point(64, depth, tokens=8) for depth in (1, 2)]
    monkeypatch.setattr(growth, "SWEEPS", {"depth": points})
    results, page = tmp_path / "growth.jsonl", tmp_path / "page.md"
    page.write_text("<!-- growth-depth -->\n<!-- /growth-depth -->\n")
    options = ["growth", "--results", str(results), "--sweeps", "depth", "--rounds", "1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*options, "--methods", "ssf", "random", "--output", str(tmp_path)])
        growth.main()
    rows = growth.load_results(results)
    assert [row["point"]["depth"] for row in rows] == [1, 2] and (tmp_path / "growth.png").exists()
    assert all(row["trained"].keys() == {"lora", "ssf", "random"} and not row["skipped"] for row in rows)
    assert rows[1]["trained"]["random"] == rows[1]["trained"]["lora"]
    monkeypatch.setattr(sys, "argv", [*options, "--write", str(page)])
    growth.main()
    assert "| SSF |" in page.read_text()


def test_a_large_model_goes_through_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        workloads.PRESETS, "llama-1b", workloads.Workload("llama-1b", _small_llama, "causal", 1, length=8)
    )
    monkeypatch.setattr(large, "_LOWEST_TOKEN", 1)
    row = large.one("s2ft", "llama-1b", 8)
    assert row["loaded_differs_by"] == 0 and row["merged_differs_by"] < 0.2 and row["trained"] > 0
    assert {"inject_s", "steps_s", "save_s", "load_s", "merge_s", "peak_gib"} <= row.keys()


def test_recipes_look_at_validation_alone() -> None:
    settings = {"task": "trec", "settings": "some", "budget": 1.0, "seed": 0, "metric": "accuracy"}
    rows = [
        settings | {"method": method, "learning_rate": rate, "validation": score, "test": 1 - score}
        for method, found in {"lora": {1e-3: 0.9, 3e-3: 0.8}, "ssf": {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6}}.items()
        for rate, score in found.items()
    ]
    made = recipes.table(rows, ["lora", "ssf"])
    assert "| LoRA | 0.001 * (1) |" in made and "| SSF | 0.003 (3) |" in made
    assert "trec" not in recipes.variants_table(rows)
    variants = [row | {"method": {"lora": "spt", "ssf": "spt-random"}[row["method"]]} for row in rows]
    assert "| SPT | a budget by sensitivity; by chance | trec | 0.900; 0.800 |" in recipes.variants_table(variants)
    assert "trec" not in recipes.variants_table(variants[1:]), "one rate is no grid"
