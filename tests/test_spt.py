"""SPT: allocation against a plain computation and published figures, structures, errors, conversion to LoRA."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import peft_ext
from peft_ext import SPTConfig
from peft_ext.core import layer_and_type
from peft_ext.scores import ExactScores, Scores
from peft_ext.tuners.spt import allocate
from peft_ext.tuners.spt.allocation import Prices
from peft_ext.tuners.spt.model import SPTModel


SHAPES = {"a": (12, 8), "b": (8, 12), "c": (30, 20), "v": (10,), "w": (25,)}


def random_scores(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    scores = ExactScores({name: torch.Size(shape).numel() for name, shape in shapes.items()})
    for sums in scores.sums.values():
        sums.copy_(torch.rand(len(sums), generator=generator) ** 3 * torch.rand(1, generator=generator))
    return scores


def plain_allocation(scores: Scores, config: SPTConfig, budget: int) -> tuple[dict[str, int], dict[str, str]]:
    """Sensitive weights and kinds by trying every tau."""
    names = [name for name in SHAPES for _ in range(scores.sizes[name])]
    values = torch.cat([scores.of(name) for name in SHAPES])
    order = values.argsort(descending=True).tolist()
    sensitive = dict.fromkeys(SHAPES, 0)
    best: tuple[dict[str, int], dict[str, str]] = (dict(sensitive), {})
    for place in order:
        sensitive[names[place]] += 1
        total, kinds = 0, {}
        for name, shape in SHAPES.items():
            n = sensitive[name]
            if len(shape) == 1 and n >= shape[0] / config.vector_threshold:
                kinds[name], price = "whole", shape[0]
            elif (
                len(shape) == 2
                and n >= 2 * sum(shape) / config.matrix_threshold
                and 2 * sum(shape) < shape[0] * shape[1]
            ):
                kinds[name], price = "lora", 2 * sum(shape)
            else:
                price = n
            total += price
        if total > budget:
            break
        best = (dict(sensitive), kinds)
    return best


@pytest.mark.parametrize("budget", [1, 5, 17, 60, 100, 150, 200])
def test_allocation(budget: int) -> None:
    config = SPTConfig(budget=budget, r=2)
    for seed in range(3):
        scores = random_scores(SHAPES, seed)
        sensitive, kinds = plain_allocation(scores, config, budget)
        found = allocate(scores, SHAPES, config, budget)
        assert found.sensitive == sensitive
        assert {name: kind for name, kind in found.kinds.items() if kind != "sparse"} == kinds
        assert found.total == budget
        spent = sum(found.counts.values()) + sum(2 * sum(SHAPES[name]) for name in found.ranks)
        assert spent == budget
        for name, places in found.support.items():
            assert found.counts[name] == len(places) >= sensitive[name]
            least = scores.of(name)[places].min()
            assert (scores.of(name) > least).sum() == len(places) - 1  # the largest of the tensor


def test_only_structures_and_only_single_weights() -> None:
    scores = random_scores(SHAPES)
    found = allocate(scores, SHAPES, SPTConfig(budget=150, r=2, unstructured=False, vector_threshold=None), 150)
    assert found.ranks and not found.counts and found.total <= 150
    found = allocate(scores, SHAPES, SPTConfig(budget=150, r=2, unstructured=False), 150)
    assert found.counts and set(found.kinds.values()) == {"lora", "whole"} and found.total <= 150
    assert set(found.counts) <= {"v", "w"}
    found = allocate(scores, SHAPES, SPTConfig(budget=35, structured=None, unstructured=False), 35)
    assert found.kinds == {"v": "whole", "w": "whole"}
    found = allocate(scores, SHAPES, SPTConfig(budget=200, structured=None), 200)
    assert not found.ranks and found.total == 200
    with pytest.raises(ValueError, match="smaller than one structure of rank 2"):
        allocate(scores, SHAPES, SPTConfig(budget=9, r=2, unstructured=False), 9)
    with pytest.raises(ValueError, match=r"the targets take .* at most"):
        allocate(scores, SHAPES, SPTConfig(budget=2000, r=2), 2000)


def test_published_arithmetic() -> None:
    """ViT-B/16 at r = 8: thresholds, and the total of the published allocation of the 0.4M budget."""
    square, wide = (768, 768), (3072, 768)
    prices = Prices({"square": square, "wide": wide}, SPTConfig(budget=1))
    assert prices.whole.tolist() == [12_288, 30_720]
    assert [int(threshold.ceil()) for threshold in prices.thresholds] == [1_229, 3_072]
    assert prices.of(torch.tensor([1_228, 3_071])).tolist() == [1_228, 3_071]
    assert prices.of(torch.tensor([1_229, 3_072])).tolist() == [12_288, 30_720]
    # 14 matrices in five blocks and 23,789 single entries, plus the class token's 768: 0.381M
    structured = {f"s{i}": square for i in range(4)} | {f"w{i}": wide for i in range(10)}
    prices = Prices({**structured, "rest": (3072, 3072)}, SPTConfig(budget=1, matrix_threshold=10))
    counts = torch.tensor([1_229] * 4 + [3_072] * 10 + [4_915])
    assert int(prices.of(counts)[:-1].sum()) == 356_352
    assert 356_352 + 23_789 + 768 == 380_909


def calibrated(name: str, budget: float = 400, **fields: Any) -> tuple[Any, SPTConfig]:
    model = tiny(name)
    config = SPTConfig(budget=budget, r=2, **fields)
    peft_ext.calibrate(model, config, [batch_of(name)] * 2, progress=False)
    return model, config


def batch_of(name: str) -> dict[str, torch.Tensor]:
    batch = dict(inputs(name))
    first = next(iter(batch.values()))
    batch["labels"] = batch["input_ids"] if name in ("llama", "gpt2") else torch.zeros(len(first), dtype=torch.long)
    return batch


@pytest.mark.parametrize("structured", ["lora", "dora", "adapter", None])
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_the_budget_is_met_and_the_adapter_comes_back(name: str, structured: str | None, tmp_path: Path) -> None:
    model, config = calibrated(name, structured=structured)
    base = copy.deepcopy(model)
    batch = {key: value for key, value in batch_of(name).items() if key != "labels"}
    before = model.eval()(**batch).logits
    adapted = get_peft_model(model, config).eval()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 400
    assert (structured is None) == (not config.ranks)
    torch.testing.assert_close(adapted(**batch).logits, before)
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    expected = adapted(**batch).logits
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "calibration.safetensors").exists()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    if structured == "adapter":
        with pytest.raises(ValueError, match="a bottleneck with a nonlinearity cannot be merged"):
            loaded.merge_and_unload()
    else:
        torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_low_rank_scale_dropout_and_drop_path() -> None:
    model, config = calibrated("bert", lora_alpha=8, use_rslora=True, unstructured=False, dropout=0.0, drop_path=0.5)
    assert config.scale == 8 / 2**0.5
    adapted = get_peft_model(model, config)
    name = next(iter(config.ranks or {})).removesuffix(".weight")
    layer = adapted.get_base_model().get_submodule(name)
    nn.init.normal_(layer.spt_up["default"].weight)
    x = torch.randn(64, 3, layer.spt_down["default"].in_features)
    added = layer.eval()(x) - layer.base_layer(x)
    product = x @ layer.spt_down["default"].weight.T @ layer.spt_up["default"].weight.T
    torch.testing.assert_close(added, config.scale * product, atol=1e-4, rtol=1e-4)
    dropped = layer.train()(x) - layer.base_layer(x)
    ratio = (dropped / added).flatten(1).mean(1)  # by sample: none of it, or twice
    assert set(ratio.round(decimals=2).abs().tolist()) == {0.0, 2.0}


def test_several_budgets_from_one_pass() -> None:
    model = tiny("bert")
    configs = peft_ext.calibrate(
        model, SPTConfig(budget=50, r=2), [batch_of("bert")], budgets=[100, 200], progress=False
    )
    assert list(configs) == [100, 200]
    for budget, config in configs.items():
        adapted = get_peft_model(copy.deepcopy(model), config)
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == budget == config.budget


def test_a_calibrated_config_on_disk(tmp_path: Path) -> None:
    model, config = calibrated("bert", structured=None)
    config.save_pretrained(tmp_path)
    again = SPTConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, SPTConfig) and again.to_dict() == config.to_dict()
    assert again.support is not None and config.support is not None
    assert all(torch.equal(places, config.support[name]) for name, places in again.support.items())
    assert "support" not in json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "calibration.safetensors").unlink()
    alone = get_peft_model(model, PeftConfig.from_pretrained(str(tmp_path)))  # the JSON names no places
    with pytest.raises(ValueError, match="no saved adapter was loaded"):
        alone(**batch_of("bert"))


def test_without_or_with_anothers_calibration() -> None:
    with pytest.raises(ValueError, match=r"config = peft_ext.calibrate\(model, config, dataloader\)"):
        get_peft_model(tiny("bert"), SPTConfig(budget=100))
    _, config = calibrated("bert")
    with pytest.raises(ValueError, match="calibrated on a BertForSequenceClassification and tunes 'bert"):
        get_peft_model(tiny("llama"), config)


@pytest.mark.filterwarnings("ignore:Already unmerged")  # of modules that none of the active adapters is on
@pytest.mark.parametrize("order", list(itertools.permutations(["single", "lora", "dora", "other dora"], 2)))
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_several_active_adapters_are_merged_as_they_act(name: str, order: tuple[str, ...]) -> None:
    """DoRA takes the norm of what the adapters before it make of the weight."""
    targets = ["query", "dense"] if name == "bert" else ["c_attn", "c_fc"]
    adapted: Any = None
    for kind in ("single", "lora", "dora", "other dora"):
        structured = None if kind == "single" else kind.split()[-1]
        fields = {"structured": structured, "unstructured": kind == "single", "vector_threshold": None}
        _, config = calibrated(name, target_modules=targets, **fields)  # on a model of its own
        if adapted is None:
            adapted = get_peft_model(tiny(name), config, adapter_name=kind)
        else:
            adapted.add_adapter(kind, config)
    for parameter_name, parameter in adapted.named_parameters():
        if ".spt_" in parameter_name:
            parameter.data += 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(parameter_name))
            )
    batch = {key: value for key, value in batch_of(name).items() if key != "labels"}
    adapted = adapted.double().eval()
    for active in (list(order), [*order, "single"] if "single" not in order else list(order)):
        adapted.base_model.set_adapter(active)
        right = adapted(**batch).logits
        adapted.merge_adapter(active)
        merged = adapted(**batch).logits
        adapted.unmerge_adapter()
        torch.testing.assert_close(right, merged, atol=1e-6, rtol=1e-6)


def test_dora_refuses_a_weight_that_it_cannot_take_the_norm_of() -> None:
    fields: dict[str, Any] = {"target_modules": ["query"], "unstructured": False, "vector_threshold": None}
    _, config = calibrated("bert", 160, structured="dora", **fields)
    adapted = get_peft_model(tiny("bert"), config)
    _, config = calibrated("bert", 164, structured="adapter", **fields)
    adapted.add_adapter("bottleneck", config)
    adapted.base_model.set_adapter(["bottleneck", "default"])
    with pytest.raises(ValueError, match="takes the norm of the weight that it changes, which 'bottleneck' cannot"):
        adapted(**batch_of("bert"))
    adapted.base_model.set_adapter(["default", "bottleneck"])
    adapted(**batch_of("bert"))


@pytest.mark.capability("conversion to LoRA", "spt")
def test_as_lora(tmp_path: Path) -> None:
    model, config = calibrated("llama", unstructured=False, vector_threshold=None, task_type="CAUSAL_LM")
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    batch = {"input_ids": batch_of("llama")["input_ids"]}
    peft_ext.save_as_lora(adapted, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, adapted(**batch).logits, atol=1e-5, rtol=1e-5)
    model, config = calibrated("llama")
    adapted = get_peft_model(model, config)
    with pytest.raises(ValueError, match="has tuned single weights or vectors, which LoRA cannot hold"):
        peft_ext.save_as_lora(adapted, tmp_path)
    with pytest.raises(TypeError, match=r"no adapter named 'other' on this model, only \['default'\]"):
        peft_ext.save_as_lora(adapted, tmp_path, "other")
    with pytest.raises(TypeError, match=r"of the method SSF, which is not written as LoRA; adapters of .*SPT"):
        peft_ext.save_as_lora(get_peft_model(tiny("llama"), peft_ext.SSFConfig()), tmp_path)


def test_heads_and_tokens_follow_into_the_lora(tmp_path: Path) -> None:
    fields = {"trainable_token_indices": [4, 9], "modules_to_save": ["classifier"]}
    model, config = calibrated("bert", unstructured=False, vector_threshold=None, **fields)
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    batch = {**batch_of("bert"), "labels": None}
    batch["input_ids"][:, 2] = 4
    peft_ext.save_as_lora(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, adapted(**batch).logits, atol=1e-5, rtol=1e-5)


def test_norms_and_biases_are_trained() -> None:
    """The reference counts their entries and never trains them."""
    model, config = calibrated("bert", structured=None, target_modules=["LayerNorm", "query"])
    adapted = get_peft_model(model, config)
    kinds = {name.rsplit(".", 2)[-2] for name in config.kinds or {}}
    assert "LayerNorm" in kinds
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch_of("bert")).loss.backward()
    optimizer.step()
    moved = [name for name, p in adapted.named_parameters() if "LayerNorm" in name and ".spt_" in name and p.any()]
    assert moved


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "`budget` must be positive"),
        ({"budget": 2.5}, "a whole number, or a fraction below 1"),
        ({"budget": 10, "structured": "loha"}, "`structured` must be one of lora, dora, adapter"),
        (
            {"budget": 10, "structured": None, "unstructured": False, "vector_threshold": None},
            "leave nothing to train",
        ),
        ({"budget": 10, "r": 0}, "`r` must be a positive integer"),
        ({"budget": 10, "dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"budget": 10, "matrix_threshold": 0.5}, "`matrix_threshold` must be at least 1"),
        ({"budget": 10, "use_rslora": True}, "set `lora_alpha` too"),
        ({"budget": 10, "lora_alpha": 0.0}, "`lora_alpha` must not be zero"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPTConfig(**fields)


@pytest.mark.parametrize(("field", "value"), [("target_parameters", 5), ("structured", ["lora"])])
def test_config_refuses_other_types(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{field}` must be a"):
        SPTConfig(**{field: value})


def test_candidates_leave_out_heads_and_embeddings() -> None:
    names = SPTModel.candidates(SPTConfig(budget=10), tiny("bert"))
    assert names and not any("classifier" in name or "embeddings.word" in name for name in names)


def test_the_allocation_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from peft_ext import plots

    base = tiny("bert")
    config = SPTConfig(budget=400, r=2, task_type="SEQ_CLS")
    peft_ext.calibrate(base, config, [inputs("bert")], full_report=True)
    lines = capsys.readouterr().out.splitlines()
    assert config.kinds is not None and config.counts is not None
    assert lines[0] == "400 trainable parameters for a BertForSequenceClassification:"
    header = [cell.strip() for cell in lines[1].strip("|").split("|")]
    rows = {line.split("|")[1].strip(): line.strip("|").split("|") for line in lines[3:]}
    assert any("encoder.layer." in name for name in config.kinds)
    for name, kind in config.kinds.items():
        layer, _, rest = name.partition("encoder.layer.")[2].partition(".")
        rest, layer = (rest, layer) if rest else (name, "-")  # the pooler and the norm of the embeddings
        cell = rows[layer][header.index(rest.removesuffix(".weight"))].strip()
        size = "" if kind == "whole" else f" {(config.ranks or {}).get(name) or config.counts[name]}"
        assert cell == kind + size
    assert list(rows) == [*sorted(rows)[1:], "-"]  # what is in no layer comes last
    model = get_peft_model(base, config)
    figure = plots.plot(model)
    values = figure.axes[0].images[0].get_array()
    assert values is not None and values.sum() == 400
    figure.savefig(tmp_path / "allocation.png")
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        plots.plot(model, "other")


def test_the_summary_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    base = tiny("bert")
    config = SPTConfig(budget=400, r=2, task_type="SEQ_CLS")
    peft_ext.calibrate(base, config, [inputs("bert")])
    title, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "400 trainable parameters for a BertForSequenceClassification:"
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("type", "tensors", "sparse", "lora 2", "weights")
    ]
    assert all(len(line) <= 80 for line in (header, *rows)) and config.kinds is not None
    types = [line.split("|")[1].strip() for line in rows]
    order = [layer_and_type(name.removesuffix(".weight"))[1] for name, _ in base.named_parameters()]
    assert types == sorted(types, key=order.index)
    assert sum(int(line.split("|")[2]) for line in rows) == len(config.kinds)
    assert sum(int(line.split("|")[5].strip() or 0) for line in rows) == sum((config.counts or {}).values())


def test_layers_of_two_stacks_are_told_apart() -> None:
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    assert [layer_and_type(name) for name in names] == [
        (0, "layer.0.SelfAttention.q"),
        (0, "decoder.layer.0.SelfAttention.q"),
    ]
    assert layer_and_type("bert.encoder.layer.3.attention.self.query") == (3, "attention.self.query")
    assert layer_and_type("shared") == (-1, "shared")
