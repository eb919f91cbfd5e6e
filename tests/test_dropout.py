"""Dropout of adapters is that of `nn.Dropout` modules, which others turn off, as TRL does for DPO and reward models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import inputs, logits, tiny
from peft import get_peft_model
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    MaskLoraConfig,
    PASTAConfig,
    SPTConfig,
    VPTConfig,
    VQTConfig,
    WeGeFTConfig,
    calibrate,
)


CASES: dict[str, tuple[str, Any]] = {
    "bi-lora": ("llama", BinaryLoraConfig(r=4, dropout=0.5, init_weights=False)),
    "bottleneck": ("vit", BinaryAdapterConfig(r=4, dropout=0.5, init_weights=False)),
    "wegeft": ("llama", WeGeFTConfig(r=4, dropout=0.5, init_weights=False)),
    "masks": ("llama", MaskLoraConfig(r=4, lora_dropout=0.5, total_steps=100, init_weights=False)),
    "spt": ("vit", SPTConfig(budget=900, r=2, dropout=0.5, drop_path=0.0, unstructured=False, init_weights=False)),
    "pasta": ("vit", PASTAConfig(dropout=0.5, init_weights=False)),
    "vpt": ("vit", VPTConfig(num_tokens=4, prompt_dropout=0.5, init_weights=False)),
    "vqt": ("vit", VQTConfig(num_queries=2, dropout=0.5, init_weights=False)),
}


def adapted(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model_name, config = CASES[name]
    base, batch = tiny(model_name).eval(), inputs(model_name)
    config = copy.deepcopy(config)
    if name == "spt":
        config = calibrate(base, config, [batch], progress=False)
    model = get_peft_model(base, config)
    for module in base.modules():
        if isinstance(module, nn.Dropout) and module.p != 0.5:  # the base's own
            module.p = 0.0
    return model, batch


def moves(model: Any, batch: dict[str, torch.Tensor]) -> bool:
    """Whether two forwards differ."""
    with torch.no_grad():
        return not torch.equal(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize("name", CASES)
def test_whoever_turns_dropout_off_finds_that_of_the_adapter(name: str) -> None:
    model, batch = adapted(name)
    assert not moves(model, batch)  # the base was in evaluation
    model.train()
    assert moves(model, batch)
    assert not moves(model.eval(), batch)
    model.train()
    disable_dropout_in_model(model)
    assert not moves(model, batch)


@pytest.mark.parametrize("name", CASES)
def test_dropout_goes_with_its_adapter(name: str) -> None:
    model, batch = adapted(name)
    model.train()
    assert moves(copy.deepcopy(model), batch)
    count = sum(isinstance(module, nn.Dropout) for module in model.modules())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) > count
    model.delete_adapter("other")
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == count
    assert moves(model, batch)
