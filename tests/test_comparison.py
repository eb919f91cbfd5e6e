"""The comparison of `examples/benchmark`: metrics, tasks, methods, the runner, its tables and figures; never scores."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import matplotlib
import numpy as np
import pytest
import torch
from datasets import Dataset
from matplotlib.text import Text
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast


matplotlib.use("Agg")
BENCHMARK = Path(__file__).parent.parent / "examples" / "benchmark"
sys.path[:0] = [str(BENCHMARK), str(BENCHMARK.parent)]
import chosen_runs
import common
import compare
import compare_tables
import methods
import pareto
import ranks
import tasks
import where


pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm:UserWarning")  # PEFT's LN-tuning
WORDS = ["good", "fine", "nice", "great", "bad", "poor", "awful", "worse", "film", "plot", "cast", "the"]


# Metrics


def test_metrics_through_evaluate() -> None:
    def value(name: str, predictions: list[Any], references: list[Any]) -> float:
        module = evaluate.load(str(BENCHMARK.parent / "metrics" / name))
        return module.compute(predictions=predictions, references=references)[name]

    assert value("accuracy", [0, 1, 1], [1, 1, 1]) == pytest.approx(2 / 3)
    # one true positive, one false positive, one true negative: (1 * 1 - 1 * 0) / sqrt(2 * 1 * 2 * 1)
    assert value("matthews_correlation", [1, 1, 0], [1, 0, 0]) == pytest.approx(0.5)
    assert value("matthews_correlation", [1, 1], [1, 0]) == 0
    assert value("f1", [1, 1, 0], [1, 0, 1]) == pytest.approx(0.5)
    assert value("f1", [0, 0], [1, 0]) == 0
    # ranks are equal; Pearson of (1, 2, 3) and (1, 2, 4) is 3 / sqrt(2 * 14 / 3)
    assert value("pearson_spearman", [1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(
        (1 + 3 / math.sqrt(2 * 14 / 3)) / 2
    )
    assert value("pearson_spearman", [1.0, 1.0], [1.0, 2.0]) == 0
    assert value("exact_match", ["so it is 1,200.", "#### 7", "yes"], ["#### 1200", "8", " yes"]) == pytest.approx(
        2 / 3
    )


# Tasks


def test_a_task_may_describe_itself() -> None:
    assert tasks.find_task("sst2").metric == "accuracy"
    task = tasks.find_task("text:nyu-mll/glue:first+second:target:some/model:f1")
    assert (task.dataset, task.columns, task.model, task.metric) == (
        "nyu-mll/glue",
        ("first", "second", "target"),
        "some/model",
        "f1",
    )
    assert tasks.find_task("causal:me/qa:question:answer").less_is_better
    for name in ("sst3", "sound:me/data:audio:label", "text:me/data:text"):
        with pytest.raises(ValueError, match=r"KIND:DATASET:INPUT:TARGET"):
            tasks.find_task(name)


def test_a_task_on_another_model_and_of_other_images() -> None:
    task = tasks.find_task("signdigits@dinov2-small")
    assert (task.model, task.pixels, task.files) == ("dinov2-small", 98, tasks.TASKS["signdigits"].files)
    assert tasks.find_task("clothing10@dinov2-small@56").pixels == 56
    assert tasks.find_task("trec@some/model").model == "some/model"
    described = tasks.find_task("image:uoft-cs/cifar10:img:label@dinov2-small")
    assert (described.dataset, described.model, described.pixels) == ("uoft-cs/cifar10", "dinov2-small", 98)
    for name in ("trec@minilm@56", "signdigits@dinov2-small@big", "signdigits@dinov2-small@0"):
        with pytest.raises(ValueError, match="number of pixels"):
            tasks.find_task(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small data sets, a tiny BERT and its tokenizer, where `--data` looks for them."""
    rows = [{"sentence": f"the {WORDS[i % 8]} {WORDS[8 + i % 3]}", "label": int(i % 8 > 3)} for i in range(120)]
    (tmp_path / "text").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "text" / "cola_train.parquet"))
    Dataset.from_list(rows[:24]).to_parquet(str(tmp_path / "text" / "cola_validation.parquet"))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(**shape, vocab_size=len(vocabulary))).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The task `cola`, on the tiny model."""
    task = tasks.Task("text", "model", "matthews_correlation", ("sentence", "label"), tasks.TASKS["cola"].files)
    monkeypatch.setitem(tasks.TASKS, "cola", task)
    yield folder


def test_splits_are_disjoint_and_of_the_size_asked_for(small: Path) -> None:
    file = str(small / "text" / "cola_train.parquet")
    Dataset.from_dict({"sentence": [str(i) for i in range(200)], "label": [0, 1] * 100}).to_parquet(file)
    data = tasks.splits(tasks.TASKS["cola"], tasks.Limits(train=50, held_out=20, length=8), small)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 50, "validation": 20, "test": 24}
    assert not set(data["train"]["sentence"]) & set(data["validation"]["sentence"])
    whole = tasks.splits(tasks.TASKS["cola"], tasks.Limits(train=0, held_out=20, length=8), small)
    assert len(whole["train"]) == 180


# Methods


def setting(share: float, seed: int = 0) -> methods.Setting:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=20))
    batches: Any = [{"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}]
    return methods.Setting(model, "SEQ_CLS", share, steps=20, seed=seed, batches=batches)


@pytest.mark.parametrize(
    "method",
    ["lora", "shira", "super-tuning", "spiel-ag", "spiel-ma", "random", "smallest", "spt", "spt-random"],
)
def test_adapters_have_the_size_of_the_budget(method: str) -> None:
    for share in (1.0, 0.25):
        chosen = setting(share)
        budget = chosen.budget
        assert budget == int(share * 8 * 2 * (4 * (32 + 32) + 2 * (32 + 64)))
        model, _ = methods.adapt(method, chosen)
        trained = sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name
        )
        assert trained == pytest.approx(budget, rel=0.002)


def test_a_budget_below_rank_one_goes_to_queries_and_values() -> None:
    options = setting(1 / 16).ranked()  # half of rank 1 on all, which is 448 weights: rank 1 on four modules is 256
    assert options["r"] == 1 and len(options["target_modules"]) == 4
    assert all(name.endswith(("query", "value")) for name in options["target_modules"])
    with pytest.raises(ValueError, match="below rank 1"):
        setting(1 / 64).ranked()


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_the_head_and_something_of_its_own(method: str) -> None:
    model, config = methods.adapt(method, setting(1.0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name or "_head." in name for name in trained)
    own = {name for name in trained if "classifier" not in name}
    assert bool(own) != (method == "probe")
    assert (config is None) == (method in ("probe", "full"))


def test_experiments_are_in_the_format_of_pefts_comparison() -> None:
    folders = sorted(path.parent for path in (BENCHMARK / "experiments").glob("*/*/adapter_config.json"))
    assert len(folders) >= 4
    for path in folders:
        config = PeftConfig.from_pretrained(str(path))
        assert config.peft_type.lower() == path.parent.name
        rate = json.loads((path / "training_params.json").read_text())["optimizer_kwargs"]["lr"]
        assert 0 < rate < 0.1
        assert methods.is_experiment(str(path))


# The runner


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    results = folder / "results.jsonl"
    sizes = ["--train", "64", "--held-out", "16", "--epochs", "1", "--length", "8", "--seeds", "2"]
    options = ["--data", str(folder), "--results", str(results), *sizes, *arguments]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    compare.main()
    return chosen_runs.load_results(results)


def test_the_runner_trains_resumes_and_writes_its_table(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--rates", "1e-3", "3e-3"]
    names = ["lora", "lt-sft", "adalora", "magnitude-25"]
    rows = command(monkeypatch, small, "cola", *rates, "--methods", *names)
    assert [row["method"] for row in rows] == [name for name in names for _ in range(3)]  # two rates, then a seed
    for row in rows:
        assert -1 <= row["test"] <= 1 and row["sizes"] == {"train": 64, "validation": 16, "test": 24}
    again = command(monkeypatch, small, "cola", *rates, "--methods", *names)
    assert again == rows
    folder = str(BENCHMARK / "experiments" / "ssf" / "llama-3.2-3B-default")
    file = small / "README.md"
    file.write_text("<!-- compare:cola:* -->\n<!-- /compare -->\n")
    longer = command(
        monkeypatch, small, "cola", "--rates", "1e-3", "--methods", folder, "--table", "--write", str(file)
    )
    assert [row["method"] for row in longer[len(rows) :]] == [folder] * 2
    text = file.read_text()
    assert "| cola (matthews_correlation) | lora |" in text and text in capsys.readouterr().out + text
    with pytest.raises(SystemExit):
        command(monkeypatch, small, "cola", "--methods", "lorra")
    with pytest.raises(SystemExit):
        command(monkeypatch, small, "kola")


def test_a_head_is_fitted_before_all_else(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    arguments = ["cola", "--rates", "1e-9", "--methods", "vqt", "sensitivity-drawn"]
    fresh = command(monkeypatch, small, *arguments)
    rows = command(monkeypatch, small, *arguments, "--fit-head")[len(fresh) :]
    assert len(rows) == len(fresh) == 4 and not any("probe" in row for row in fresh)
    for row in rows:
        assert row["settings"] == f"{fresh[0]['settings']}, head fitted first"
        assert row["probe"].keys() == {"C", "held_out", "seconds"}
    # at a rate of nothing only the fit can have taught anything; VQT's own head reads features that tell the labels
    assert all(row["test"] > 0.7 for row in rows if row["method"] == "vqt")
    assert any(row["test"] > 0.2 for row in rows if row["method"] == "sensitivity-drawn")
    assert all(row["test"] < 0.2 for row in fresh)
    assert any(common.cache_directory().rglob("features-*.safetensors"))
    with pytest.raises(SystemExit):
        command(monkeypatch, small, "gsm8k", "--methods", "lora", "--fit-head")


def row(
    method: str, rate: float, seed: int, validation: float, test: float, metric: str = "accuracy"
) -> dict[str, Any]:
    return {
        "task": "cola",
        "method": method,
        "budget": 1.0,
        "learning_rate": rate,
        "seed": seed,
        "settings": "few",
        "validation": validation,
        "test": test,
        "metric": metric,
        "trained": 10,
        "seconds": 1.0,
        "sizes": {"train": 1},
    }


def test_the_rate_is_chosen_on_validation_with_the_first_seed() -> None:
    rows = [row("lora", 1e-3, 0, 0.5, 0.9), row("lora", 3e-3, 0, 0.6, 0.1), row("lora", 1e-2, 1, 0.9, 0.9)]
    assert chosen_runs.best_rate(rows, "cola", "lora", 1.0, "few") == 3e-3
    losses = [row("lora", 1e-3, 0, 0.5, 0.9, "loss"), row("lora", 3e-3, 0, 0.6, 0.1, "loss")]
    assert chosen_runs.best_rate(losses, "cola", "lora", 1.0, "few") == 1e-3
    assert chosen_runs.best_rate([], "cola", "lora", 1.0, "few") is None


def test_how_few_columns_hold_half_of_the_choice() -> None:
    assert where.holds_half(torch.tensor([5, 5, 5, 1]), 8) == 1 / 8
    assert where.holds_half(torch.arange(8), 8) == 4 / 8


def test_a_task_run_in_two_settings_has_two_names() -> None:
    rows = [{**row("lora", 1e-3, 0, 0.5, 0.9), "settings": f"few, {epochs} epochs"} for epochs in (1, 2)]
    lines = compare_tables.table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| cola, {n} epochs (accuracy)" for n in (1, 2)]
    assert compare_tables.table(rows[:1]).splitlines()[4].startswith("| cola (accuracy)")


@pytest.mark.parametrize(
    ("best_first", "expected"),
    [
        ([1e-3, 3e-3], 3e-4),
        ([3e-3, 1e-3], 1e-2),
        ([1e-3, 3e-4, 3e-3], None),
        ([1e-5, 3e-5], None),
        ([0.1, 0.03], None),
    ],
)
def test_the_grid_is_extended_while_the_best_rate_is_at_its_end(
    best_first: list[float], expected: float | None
) -> None:
    assert compare.beyond(dict.fromkeys(best_first)) == expected


def test_extended_plans_end(tmp_path: Path) -> None:
    args = Namespace(
        train=1, epochs=1, batch=1, length=1, tasks=["cola"], methods=["lora"], budgets=[1.0], rates=[1e-3, 3e-3]
    )
    args.extend, args.seeds, args.part, args.results = True, 2, "0/1", tmp_path / "results.jsonl"
    found = []
    for plan in compare.plans(args):
        found.append((plan.learning_rate, plan.seed))
        scored = {**row("lora", plan.learning_rate, plan.seed, -abs(math.log(plan.learning_rate / 1e-4)), 0.5)}
        with args.results.open("a") as file:
            file.write(json.dumps({**scored, "settings": plan.settings}) + "\n")
    assert found == [(1e-3, 0), (3e-3, 0), (3e-4, 0), (1e-4, 0), (3e-5, 0), (1e-4, 1)]


def test_the_table_compares_with_lora_seed_by_seed() -> None:
    rows = [row("lora", 1e-3, seed, 0.5, 0.5 + 0.1 * seed) for seed in (0, 1)]
    rows += [row("ssf", 1e-3, seed, 0.5, 0.6 + 0.1 * seed) for seed in (0, 1)]
    text = compare_tables.table(rows)
    assert "0.550 ± 0.071" in text and "+0.100 (+0.100 to +0.100)" in text


def test_ranks_by_hand() -> None:
    found = ranks.ranks_of(np.array([0.5, 0.9, 0.5, 0.1]))
    assert found.tolist() == [2.5, 1, 2.5, 4]
    scores = {
        "first": {"lora": {0: 0.5, 1: 0.7}, "ssf": {0: 0.6, 1: 0.8, 2: 0.0}, "spt": {0: 0.1, 1: 0.2}},
        "second": {"lora": {0: 0.5}, "ssf": {0: 0.4}, "spt": {0: 0.3}, "dora": {0: 1.0}},
    }
    assert ranks.complete(scores) == ["lora", "ssf", "spt"]  # and the third seed of SSF is nobody else's
    found = {rank.method: rank for rank in ranks.mean_ranks(scores, "lora")}
    assert [(name, rank.mean, rank.difference) for name, rank in found.items()] == [
        ("lora", 1.5, 0),
        ("ssf", 1.5, 0),
        ("spt", 3, 1.5),
    ]
    assert found["ssf"].interval == (1, 2) and found["ssf"].difference_interval == (-1, 1)  # one task, or the other
    assert found["spt"].interval == (3, 3) and found["lora"].difference_interval == (0, 0)
    with pytest.raises(ValueError, match="dora has not been run on all of first, second"):
        ranks.mean_ranks(scores, "dora")
    with pytest.raises(ValueError, match="no seed in common on third"):
        ranks.mean_ranks({"third": {"lora": {0: 0.1}, "ssf": {1: 0.2}}}, "lora")


def test_runs_of_another_precision_or_start_are_others() -> None:
    plain = {"train": 10, "epochs": 1, "batch": 2, "length": 8}
    flags: list[dict[str, bool]] = [{}, {"bf16": True}, {"fit_head": True}, {"bf16": True, "fit_head": True}]
    found = [compare.settings_of(Namespace(**plain, **given)) for given in flags]
    assert len(set(found)) == len(found) and all(text.startswith(found[0]) for text in found)


def test_the_interval_of_a_rank_counts_the_seeds() -> None:
    """Two methods whose order is settled by the seed alone: with one task, each bootstrap draws two of two seeds."""
    scores = {"only": {"lora": {0: 0.5, 1: 0.5}, "ssf": {0: 0.9, 1: 0.2}}}
    found = {rank.method: rank for rank in ranks.mean_ranks(scores, "lora")}
    assert found["ssf"].mean == 1 and found["ssf"].interval == (1, 2)


def test_the_table_of_ranks(tmp_path: Path) -> None:
    rows = [row("lora", 1e-3, seed, 0.5, 0.5) for seed in (0, 1)]
    rows += [row("ssf", 1e-3, seed, 0.5, 0.6) for seed in (0, 1)]
    rows += [{**row("random", 1e-3, 0, 0.5, 0.1), "budget": 0.25}]
    losses = [("lora", 1.0), ("ssf", 2.0), ("probe", 3.0)]
    rows += [{**row(method, 1e-3, 0, 0.5, loss, "loss"), "task": "gsm8k"} for method, loss in losses]
    file = tmp_path / "results.md"
    file.write_text("<!-- ranks:cola,gsm8k:lora,ssf,probe:1 -->\n<!-- /ranks -->\n")
    compare_tables.write_table(file, rows)
    text = file.read_text()
    assert "Mean rank of 2 methods on cola, gsm8k" in text and "so left out: probe." in text
    assert "| lora | 1.5 (1.0 to 2.0) |  |" in text and "| ssf | 1.5 (1.0 to 2.0) | +0.0 (-1.0 to +1.0) |" in text


# Figures


def test_the_front_is_what_nothing_beats_in_both_respects() -> None:
    pairs = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (0.5, 0.1)]
    assert pareto.front(pairs, less_is_better=False) == [(0.5, 0.1), (1.0, 0.5), (3.0, 0.9)]
    assert pareto.front(pairs, less_is_better=True) == [(0.5, 0.1)]


def test_figures_join_scores_and_costs() -> None:
    def seconds(step: float) -> dict[str, list[float]]:
        return {"step": [step, step], "unmerged": [3.0, 3.0], "merged": [1.0, 1.0]}

    costs = {
        "rows": {
            "LoRA r=8": {"saved_bytes": 2**21, "seconds": seconds(2.0)},
            "SSF": {"saved_bytes": 2**20, "seconds": seconds(1.0)},
            "linear probe": {"saved_bytes": 0, "seconds": {"step": [1.0, 1.0]}},
        },
        "base_seconds": [1.0, 1.0],
    }
    rows = [row(method, 1e-3, seed, 0.5, 0.5 + seed) for method in ("lora", "ssf", "probe", "spt") for seed in (0, 1)]
    found = {point.method: point for point in pareto.points("cola", rows, costs)}
    assert found["ssf"].score == 1.0 and found["ssf"].spread == pytest.approx(math.sqrt(0.5))
    assert found["ssf"].costs == {"parameters": 10.0, "memory": 1.0, "step": 0.5, "inference": 1.0}
    assert found["probe"].costs["inference"] == 1.0
    assert found["spt"].costs == {"parameters": 10.0}  # not measured
    crowd = [pareto.Point("random", 1.0 + 0.001 * i, 0.0, found["ssf"].costs) for i in range(12)]
    figure = pareto.draw("cola", [*found.values(), *crowd])
    assert len(figure.axes) == 4 and all(panel.get_xlabel() and panel.get_xscale() == "log" for panel in figure.axes)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for panel in figure.axes:
        frame = panel.get_window_extent(renderer)
        names = [text for text in panel.texts if not text.get_text().startswith("linear probe")]
        boxes = [Text.get_window_extent(text, renderer) for text in names]
        assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
        assert all(frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "SSF" in {text.get_text() for text in figure.axes[0].texts}
    matplotlib.pyplot.close(figure)


def test_tasks_take_pairs_and_numbers() -> None:
    assert tasks.TASKS["stsb"].columns == ("sentence1", "sentence2", "label")
    compute = tasks.scores(tasks.TASKS["stsb"])
    assert compute is not None
    scored = compute(Namespace(predictions=torch.tensor([[1.0], [2.0], [3.0]]).numpy(), label_ids=[1.0, 2.0, 3.0]))
    assert scored["score"] == pytest.approx(1.0)
    assert tasks.scores(tasks.TASKS["gsm8k"]) is None
    assert isinstance(setting(1.0).model, nn.Module)


def test_tables_leave_out_what_was_run_elsewhere_with_the_reference_alone() -> None:
    rows = [row(method, 1e-3, 0, 0.5, 0.5) for method in ("lora", "ssf")]
    longer = [{**other, "settings": "long"} for other in rows]
    assert chosen_runs.without_lone_references([*rows, longer[0]]) == rows
    assert chosen_runs.without_lone_references([*rows, *longer]) == [*rows, *longer]
    assert chosen_runs.without_lone_references(rows[:1]) == rows[:1]
    assert chosen_runs.of_most_methods([*rows, longer[0]]) == rows
