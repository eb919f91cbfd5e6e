"""Configs that are used more than once: for a second model, for a second training, for a copy of an adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

import peft_ext
from peft_ext import (
    LoraFusionConfig,
    LoraSBConfig,
    MaskLoraConfig,
    SNELLConfig,
    SparseFTConfig,
    SPTConfig,
    SSFConfig,
    VQTConfig,
    WeGeFTConfig,
)
from peft_ext.tuners.mask_pruning.model import kept_units
from peft_ext.tuners.sparse_ft.deltas import deltas


def spt(model: Any, name: str) -> SPTConfig:
    config = SPTConfig(budget=600, r=2, matrix_threshold=4.0, dropout=0.0, drop_path=0.0)
    return peft_ext.calibrate(model, config, [inputs(name)], progress=False)


# by name: architecture, config
METHODS: dict[str, tuple[str, Callable[[Any, str], PeftConfig]]] = {
    "ssf": ("llama", lambda *_: SSFConfig()),
    "spiel": (
        "llama",
        lambda *_: SparseFTConfig(
            selection="spiel-ag", density=0.05, reselection_steps=3, accumulation_steps=1, total_steps=20
        ),
    ),
    "random": ("llama", lambda *_: SparseFTConfig(density=0.05, selection="random")),
    "given": (
        "llama",
        lambda *_: SparseFTConfig(selection="given").use_support(
            {"model.layers.0.self_attn.q_proj": torch.arange(3, 200, 11)}
        ),
    ),
    "spt": ("llama", spt),
    "masks": ("llama", lambda *_: MaskLoraConfig(r=2, target_sparsity=0.25, total_steps=8)),
    "vqt": ("bert", lambda *_: VQTConfig(num_queries=2, dropout=0.0)),
}


def trained(method: str, steps: int = 10) -> tuple[PeftModel, str]:
    name, make = METHODS[method]
    torch.manual_seed(0)
    base = tiny(name)
    model = get_peft_model(base, make(base, name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        loss(model, inputs(name)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, name


def copied_as_trl_does(model: PeftModel, config: PeftConfig) -> None:
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def outputs_of(model: PeftModel, name: str, adapter: str) -> torch.Tensor:
    active = model.active_adapter
    model.set_adapter(adapter)
    with torch.no_grad():
        found = logits(model.eval(), inputs(name))
    model.set_adapter(active)
    return found


@pytest.mark.parametrize("of", ["trained", "loaded", "loaded for training", "deepcopy"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_adapter_is_the_same_function(method: str, of: str, tmp_path: Path) -> None:
    model, name = trained(method)
    if of.startswith("loaded"):
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=of == "loaded for training")
    config = model.peft_config["default"]
    copied_as_trl_does(model, copy.deepcopy(config) if of == "deepcopy" else config)
    expected = outputs_of(model, name, "default")
    assert torch.equal(outputs_of(model, name, "ref"), expected)
    with torch.no_grad(), model.disable_adapter():
        assert (logits(model, inputs(name)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["given", "spt"])
def test_a_forward_through_a_placeholder_is_refused(method: str, tmp_path: Path) -> None:
    model, name = trained(method)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)  # knows how many weights, but not which
    fresh = get_peft_model(tiny(name), config)
    with pytest.raises(ValueError, match="not which they are"):
        fresh(**inputs(name))
    # the same beside the trained one: it is no copy of that
    model.add_adapter("second", PeftConfig.from_pretrained(tmp_path))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="not which they are"):
        model(**inputs(name))


def test_masks_of_a_copy_are_decided_and_those_of_a_second_adapter_are_not() -> None:
    config = MaskLoraConfig(r=2, target_sparsity=0.25, total_steps=8, layers_to_transform=None)
    name = "llama"
    model = get_peft_model(tiny(name), config)
    peft_ext.fix_masks(model)
    model.add_adapter("fresh", config)
    model.add_adapter("copy", model.peft_config["default"])
    assert len(kept_units(model, "copy"))
    with pytest.raises(ValueError, match="not decided"):
        kept_units(model, "fresh")


# A config that was used before


def test_a_config_that_was_saved_alone_is_a_new_one(tmp_path: Path) -> None:
    """Only what a saved adapter has waits for weights."""
    get_peft_model(tiny("llama"), LoraConfig(r=2)).save_pretrained(str(tmp_path / "lora"))
    for config in (LoraSBConfig(r=4, init_weights="weights"), LoraFusionConfig(adapters=[str(tmp_path / "lora")])):
        config.save_pretrained(str(tmp_path))
        read = type(config).from_pretrained(str(tmp_path))
        logits(get_peft_model(tiny("llama"), read), inputs("llama"))
    SNELLConfig(target_modules=["out_proj"]).save_pretrained(str(tmp_path))
    with pytest.raises(TypeError, match="would not act"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), SNELLConfig.from_pretrained(str(tmp_path)))


def test_numbers_of_numpy_are_written_as_such(tmp_path: Path) -> None:
    config = WeGeFTConfig(r=np.int64(4), dropout=np.float32(0.5))  # type: ignore[arg-type]
    config.save_pretrained(str(tmp_path))
    read = WeGeFTConfig.from_pretrained(str(tmp_path))
    assert (type(read.r), read.r, read.dropout) == (int, 4, 0.5)


def test_a_config_keeps_what_the_user_asked_for() -> None:
    for name, make in METHODS.values():
        base = tiny(name)
        config = make(base, name)
        before = copy.deepcopy(config.to_dict())
        model = get_peft_model(base, config)
        assert config.to_dict() == before, name
        assert model.peft_config["default"] is not config
        assert model.peft_config["default"].target_modules is not None


@pytest.mark.parametrize("of_the_first_model", [False, True])
def test_a_budget_is_settled_anew_for_a_wider_model(of_the_first_model: bool) -> None:
    config = SparseFTConfig(density=0.05, selection="random")
    first = get_peft_model(tiny("llama"), config)
    again = first.peft_config["default"] if of_the_first_model else config
    wide: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    second = get_peft_model(tiny("llama", **wide), again)
    fresh = get_peft_model(tiny("llama", **wide), SparseFTConfig(density=0.05, selection="random"))
    assert second.get_nb_trainable_parameters() == fresh.get_nb_trainable_parameters()
    assert second.get_nb_trainable_parameters()[0] > first.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("of_the_first_model", [False, True])
def test_a_deeper_model_has_lora_in_all_of_its_layers(of_the_first_model: bool) -> None:
    config = MaskLoraConfig(r=2, target_sparsity=0.25, target_modules=["q_proj"])
    first = get_peft_model(tiny("llama"), config)
    second = get_peft_model(
        tiny("llama", num_hidden_layers=4), first.peft_config["default"] if of_the_first_model else config
    )
    with_lora = [name for name, _ in second.named_parameters() if "mask_pruning_down" in name]
    assert len(with_lora) == 4


@pytest.mark.parametrize("of_the_first_model", [False, True])
def test_labels_are_those_of_each_model(of_the_first_model: bool) -> None:
    config = VQTConfig(num_queries=2)
    first = get_peft_model(tiny("vit"), config)
    second = get_peft_model(tiny("vit", num_labels=5), first.peft_config["default"] if of_the_first_model else config)
    assert logits(second, inputs("vit")).shape[-1] == 5


def test_what_the_user_changed_since_stays() -> None:
    config = get_peft_model(tiny("llama"), SSFConfig()).peft_config["default"]
    config.target_modules = {"q_proj"}
    model = get_peft_model(tiny("llama"), config)
    assert all(".q_proj." in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_second_calibration_looks_at_all_targets() -> None:
    base = tiny("bert")
    config = SPTConfig(budget=40, structured=None, r=2)
    batch = [inputs("bert")]
    peft_ext.calibrate(base, config, batch, progress=False)
    first = dict(config.kinds or {})
    get_peft_model(tiny("bert"), config)
    config.budget = 600
    peft_ext.calibrate(base, config, batch, progress=False)
    whole = SPTConfig(budget=600, structured=None, r=2)
    peft_ext.calibrate(base, whole, batch, progress=False)
    assert config.kinds == whole.kinds and set(first) < set(config.kinds or {})


def _train(model: Any, steps: int, folder: Path, callback: Any) -> None:
    rows = [{key: value[0] for key, value in inputs("bert", batch=1, seed=seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=Dataset.from_list(rows).with_format("torch"), callbacks=[callback]).train()


def test_the_steps_of_a_training_end_with_it(tmp_path: Path) -> None:
    config = MaskLoraConfig(r=2, target_sparsity=0.25, task_type="SEQ_CLS")
    short = get_peft_model(tiny("bert"), config)
    _train(short, 4, tmp_path, peft_ext.MaskLoraCallback())
    assert config.total_steps is None and short.peft_config["default"].total_steps is None
    kept_units(short)  # are decided
    _train(short, 2, tmp_path, peft_ext.MaskLoraCallback())  # LoRA goes on
    again = get_peft_model(tiny("bert"), short.peft_config["default"])
    _train(again, 12, tmp_path, peft_ext.MaskLoraCallback())
    gates = [module for name, module in again.named_modules() if name.endswith("mask_pruning_gate.default")]
    assert gates and all(int(gate.progress) == 12 for gate in gates)


def test_spiel_reselects_to_the_end_of_each_training(tmp_path: Path) -> None:
    config = SparseFTConfig(
        selection="spiel-ag",
        density=0.02,
        reselection_steps=2,
        accumulation_steps=1,
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    first = get_peft_model(tiny("bert"), config)
    _train(first, 4, tmp_path, peft_ext.SparseFTCallback())
    first.save_pretrained(tmp_path / "saved")
    for model in (
        get_peft_model(tiny("bert"), config),
        PeftModel.from_pretrained(tiny("bert"), tmp_path / "saved", is_trainable=True),
    ):
        _train(model, 16, tmp_path, peft_ext.SparseFTCallback())
        assert max(len(leaf.tracker.reselections) for _, leaf in deltas(model, "default")) > 4


# TRL's references

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(37))]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


ARGUMENTS: dict[str, Any] = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
PROMPTS = [f"w{i} w{i + 1}" for i in range(4, 12)]


@pytest.mark.parametrize("method", ["ssf", "spiel", "given", "spt", "masks"])
def test_a_reference_that_trl_makes(method: str, tmp_path: Path) -> None:
    """At the first step the policy is its reference: DPO's loss is ln 2, KTO's one half, GRPO's and RLOO's KL zero."""
    model, name = trained(method)
    model.save_pretrained(tmp_path / "adapter")

    def again() -> PeftModel:
        return PeftModel.from_pretrained(tiny(name), tmp_path / "adapter", is_trainable=True)

    where = str(tmp_path / "runs")
    pairs = Dataset.from_dict({"prompt": PROMPTS, "chosen": [" w9 w8"] * 8, "rejected": [" w7 w20 w30"] * 8})
    dpo = DPOTrainer(again(), args=DPOConfig(where, **ARGUMENTS), train_dataset=pairs, processing_class=_tokenizer())
    dpo.train()
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    judged = Dataset.from_dict({"prompt": PROMPTS, "completion": [" w9 w8"] * 8, "label": [True, False] * 4})
    kto = KTOTrainer(again(), args=KTOConfig(where, **ARGUMENTS), train_dataset=judged, processing_class=_tokenizer())
    kto.train()
    assert kto.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-5)

    prompts = Dataset.from_dict({"prompt": PROMPTS})
    online: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    for trainer_cls, config_cls in ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)):
        trainer = trainer_cls(
            again(),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=config_cls(where, **ARGUMENTS, **online),
            train_dataset=prompts,
            processing_class=_tokenizer(),
        )
        assert "ref" in trainer.model.peft_config
        trainer.train()
        assert abs(trainer.state.log_history[0]["kl"]) < 1e-6


def test_a_copy_of_the_second_of_two_adapters_with_equal_configs() -> None:
    """What the function depends on besides parameters comes from the adapter whose own config was given."""
    model, _ = trained("masks")
    for source in ("default", "second"):
        model.add_adapter("second" if source == "default" else "third", model.peft_config[source])
        if source == "default":
            for name, buffer in model.named_buffers():
                if name.endswith("mask_pruning_gate.second.kept"):
                    buffer.copy_(1 - buffer)
    own = {name: buffer for name, buffer in model.named_buffers() if ".mask_pruning_gate." in name}
    for name, buffer in own.items():
        if ".third." in name:
            assert torch.equal(buffer, own[name.replace(".third.", ".second.")]), name
    assert any(
        not torch.equal(own[name.replace(".third.", ".default.")], own[name]) for name in own if ".third." in name
    )
