"""The committed model cards: whole, valid for the Hub, and with no measured number that is not in `results.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from hub_server import card_errors
from huggingface_hub import ModelCard


ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted(path for path in (ROOT / "model_cards").iterdir() if path.is_dir())
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?")


def leaves(tree: Any) -> Iterator[Any]:
    """The values in what a JSON file holds."""
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def as_shown(tree: Any) -> set[str]:
    """All numbers in `results.json` the way a card writes them: `1234`, `0.12346`; in text, as they stand there."""
    shown: set[str] = set()
    for leaf in leaves(tree):
        if isinstance(leaf, str):
            shown |= {leaf.replace(",", "")} if NUMBER.fullmatch(leaf) else set()
        elif leaf is not None:
            shown.add(f"{leaf:.5g}" if isinstance(leaf, float) else str(leaf))
    return shown


def numbers_of(card: str) -> Iterator[str]:
    """The numbers in a card: cells of tables that are one, the sizes, and any decimal in its limits."""
    for line in card.splitlines():
        if line.startswith("|"):
            yield from (cell for cell in re.split(r"\s*(?<!\\)\|\s*", line) if NUMBER.fullmatch(cell))
    for heading, pattern in (("Size", NUMBER), ("Limits", re.compile(r"\d+\.\d+%?"))):
        section = re.search(rf"^## {heading}\n(.*?)(?=^## )", card, re.MULTILINE | re.DOTALL)
        yield from pattern.findall(section[1]) if section else ()


def check(folder: Path) -> None:
    """Raises AssertionError unless every number of the card in `folder` is in its `results.json`."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {"command", "settings", "machine", "versions", "results"} <= results.keys()
    known = as_shown(results)
    unknown = [number for number in numbers_of(text) if number.replace(",", "") not in known]
    assert not unknown, f"{folder.name}: in the card, but not in results.json: {', '.join(unknown)}"
    index = {(result.metric_type, result.metric_value) for result in ModelCard(text).data.eval_results}
    assert index == {(result["metric"], result["value"]) for result in results["results"]}


def test_every_method_has_a_card() -> None:
    tags = {tag for folder in CARDS for tag in ModelCard.load(folder / "README.md").data.tags}
    assert {"ssf", "vqt", "spt", "sparse-fine-tuning", "mask-pruning-lora"} <= tags


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_hub_takes_the_card(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert card_errors(text) == ([], [])
    assert "/root/" not in text and "[More Information Needed]" not in text
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.json"}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_every_number_was_measured(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_means_are_those_of_the_runs(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {row["Method"]: row for row in results["comparison"] if "Method" in row}
    assert rows.keys() == {run["method"] for run in results.get("runs", [])}
    for method, row in rows.items():
        scores = [run["accuracy"] for run in results["runs"] if run["method"] == method]
        assert row["Accuracy"] == pytest.approx(mean(scores), abs=1e-12)
        if len(scores) > 1:
            assert row["Standard deviation"] == pytest.approx(stdev(scores), abs=1e-12)


CARD = """---
model-index:
- name: x
  results:
  - task: {type: text-classification}
    dataset: {name: y, type: y}
    metrics: [{type: accuracy, value: 0.7654321}]
---
# x

| learning rate | Value |
| --- | --- |
| LoRA r=8 | 0.76543 |

## Size

1,234 trainable parameters.

## Limits

- Accuracy is lower by 0.5.

## Citation
"""
RESULTS = {
    **{key: {} for key in ("command", "settings", "machine", "versions")},
    "results": [{"metric": "accuracy", "value": 0.7654321}],
    "adapter": {"trainable_parameters": 1234},
    "difference": 0.5,
}


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ("| 0.76543 |", "| 0.76544 |"),
        ("1,234", "1,235"),
        ("by 0.5", "by 0.6"),
        ("value: 0.7654321", "value: 0.7654322"),
    ],
)
def test_a_number_from_nowhere_is_found(tmp_path: Path, true: str, false: str) -> None:
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(FileNotFoundError):
        check(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    check(tmp_path)
    assert true in CARD
    (tmp_path / "README.md").write_text(CARD.replace(true, false))
    with pytest.raises(AssertionError):
        check(tmp_path)
