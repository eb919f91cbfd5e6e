"""Adapters that share modules: saved apart, loaded together or alone; and heads in a mixed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

import peft_ext
from peft_ext import MaskLoraConfig, PeftMixedModel, SparseFTConfig, SPTConfig, SSFConfig


def config_of(method: str, **fields: Any) -> PeftConfig:
    targets = {"target_modules": ["q_proj", "down_proj"]}
    if method == "lora":
        return LoraConfig(r=2, init_lora_weights=False, **targets, **fields)
    if method == "ssf":
        return SSFConfig(**targets, **fields)
    if method == "sparse":
        return SparseFTConfig(num_tunable_weights=40, selection="random", **targets, **fields)
    if method == "masks":
        return MaskLoraConfig(r=2, target_sparsity=0.25, total_steps=4, **targets, **fields)
    config = SPTConfig(budget=90, r=2, matrix_threshold=4.0, dropout=0.0, drop_path=0.0, **targets, **fields)
    return peft_ext.calibrate(tiny("llama"), config, [inputs("llama")], progress=False)


def trained(model: PeftMixedModel, name: str, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        loss(model, inputs(name)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def output(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return logits(model.eval(), inputs(name))


PAIRS = [
    *((ours, "lora") for ours in ("ssf", "sparse", "spt", "masks")),
    *(("lora", ours) for ours in ("ssf", "sparse", "spt", "masks")),
    *(("ssf", "sparse"), ("spt", "ssf"), ("sparse", "spt"), ("masks", "ssf")),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_adapters_on_the_same_modules_are_saved_and_loaded(first: str, second: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PeftMixedModel(tiny("llama"), config_of(first), "a")
    model.add_adapter("b", config_of(second))
    model.set_adapter(["a", "b"])
    trained(model, "llama")
    both = output(model, "llama")
    alone = {}
    for name in ("a", "b"):
        model.set_adapter([name])
        alone[name] = output(model, "llama")
        assert (alone[name] - both).abs().max() > 1e-3
    model.set_adapter(["a", "b"])
    model.save_pretrained(tmp_path)
    for name in ("a", "b"):
        single = PeftModel.from_pretrained(tiny("llama"), tmp_path / name)
        torch.testing.assert_close(output(single, "llama"), alone[name])
    together = PeftMixedModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(output(together, "llama"), both)
    one_by_one = PeftMixedModel.from_pretrained(tiny("llama"), tmp_path / "a", "first")
    one_by_one.load_adapter(tmp_path / "b", "second")
    one_by_one.set_adapter(["first", "second"])
    torch.testing.assert_close(output(one_by_one, "llama"), both)
    merged = together.merge_and_unload()
    torch.testing.assert_close(output(merged, "llama"), both, atol=1e-4, rtol=1e-4)


def test_the_order_is_that_of_the_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PeftMixedModel(tiny("llama"), config_of("ssf"), "z")
    model.add_adapter("a", config_of("lora"))
    model.add_adapter("y", config_of("ssf"))
    model.set_adapter(["a", "y"])
    model.delete_adapter("z")
    trained(model, "llama")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mixed_adapters.json").read_text()) == {
        "adapters": ["a", "y"],
        "active": ["a", "y"],
    }
    again = PeftMixedModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(output(again, "llama"), output(model, "llama"))


@pytest.mark.parametrize("damage", ['{"adapters": ["gone"], "active": []}', "[]", "{", '{"adapters": []}'])
def test_a_damaged_order_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "mixed_adapters.json").write_text(damage)
    with pytest.raises(ValueError, match="load them one by one"):
        PeftMixedModel.from_pretrained(tiny("llama"), tmp_path)


@pytest.mark.parametrize("lora_first", [True, False])
def test_the_head_of_a_task_is_trained_and_saved(lora_first: bool, tmp_path: Path) -> None:
    targets = {"target_modules": ["query", "value"]}
    lora = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False, **targets)
    ssf = SSFConfig(**targets)
    configs = [("lora", lora), ("ssf", ssf)] if lora_first else [("ssf", ssf), ("lora", lora)]
    model = PeftMixedModel(tiny("bert"), configs[0][1], configs[0][0])
    model.add_adapter(*configs[1])
    model.set_adapter(["lora", "ssf"])
    head = model.base_model.model.classifier
    before = output(model, "bert")
    trained(model, "bert")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save.lora" in name for name in trainable)
    moved = head.modules_to_save["lora"].weight - head.original_module.weight
    assert moved.abs().max() > 0.01 and not torch.equal(output(model, "bert"), before)
    model.save_pretrained(tmp_path)
    model.set_adapter(["lora"])
    single = PeftModel.from_pretrained(tiny("bert"), tmp_path / "lora")
    torch.testing.assert_close(output(single, "bert"), output(model, "bert"))
    assert lora.modules_to_save is None


@pytest.mark.parametrize("head", [None, ["classifier"]])
@pytest.mark.parametrize("ours", ["ssf", "sparse"])
def test_all_linear_beside_another_method(ours: str, head: list[str] | None, tmp_path: Path) -> None:
    """LoRA on "all-linear" goes by the names of the model, not by those inside of other adapters, and loads alone."""
    torch.manual_seed(0)
    first = {"ssf": SSFConfig, "sparse": SparseFTConfig}[ours](target_modules="all-linear", modules_to_save=head)
    model = PeftMixedModel(tiny("vit"), first, "a")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, modules_to_save=head)
    model.add_adapter("b", config)
    alone = get_peft_model(tiny("vit"), LoraConfig(r=2, target_modules="all-linear", modules_to_save=head))
    found, expected = (m.peft_config[name].target_modules for m, name in ((model, "b"), (alone, "default")))
    assert {name for name in found if "classifier" not in name} == {n for n in expected if "classifier" not in n}
    model.save_pretrained(tmp_path)
    model.set_adapter(["b"])
    again = PeftModel.from_pretrained(tiny("vit"), tmp_path / "b")
    torch.testing.assert_close(output(again, "vit"), output(model, "vit"))


def test_adapter_names_are_refused() -> None:
    """PEFT's mixed model hands them to the base model, where they vanish."""
    model = PeftMixedModel(tiny("llama"), config_of("lora"), "a")
    model.add_adapter("b", config_of("ssf"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="takes no `adapter_names`"):
            call(**inputs("llama"), adapter_names=["a", "b"])


def test_loading_a_mixed_model_as_one_adapter_says_what_to_do(tmp_path: Path) -> None:
    PeftMixedModel(tiny("llama"), config_of("ssf"), "a").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"PeftMixedModel\.from_pretrained"):
        peft_ext.load(tmp_path, tiny("llama"))


def test_methods_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(TypeError, match="only supports"):
        PeftMixedModel(tiny("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model = PeftMixedModel(tiny("llama"), config_of("ssf"), "a")
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert list(model.peft_config) == ["a"]
