"""What PEFT's own tests rest on: configs without arguments, a start that is no identity, nothing left by a deletion."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

import peft_ext
from peft_ext import SparseFTConfig, SSFConfig
from peft_ext.core import methods
from peft_ext.testing import models
from peft_ext.testing.models import tiny


FIELDS: dict[str, dict[str, Any]] = {"SPARSE_FT": {"selection": "random"}, "MASK_PRUNING": {"prune": ["ffn"]}}
MODELS = {"VQT": "vit", "VPT": "vit", "UNIPT": "vit"}
HOLDERS = (dict, set, list, nn.ModuleDict)
OURS = ["SSF", "VQT", "UNIPT", "SPT", "SPARSE_FT", "MASK_PRUNING", "VPT"]


def config_of(peft_type: str, base: nn.Module, **fields: Any) -> Any:
    """A config of the method that `get_peft_model` takes."""
    config = methods()[peft_type].config(**FIELDS.get(peft_type, {}), **fields)
    if peft_type == "SPT":
        config = peft_ext.calibrate(base, config, [models.inputs(MODELS.get(peft_type, "llama"))], progress=False)
    return config


def base_of(peft_type: str) -> Any:
    return tiny(MODELS.get(peft_type, "llama"))


@pytest.mark.parametrize("peft_type", OURS)
def test_configs_without_arguments(peft_type: str, tmp_path: Path) -> None:
    config = methods()[peft_type].config()
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()


def test_defaults_are_the_papers() -> None:
    assert peft_ext.SparseFTConfig().density == 0.01
    assert peft_ext.SparseFTConfig(num_tunable_weights=5).density is None
    assert peft_ext.SparseFTConfig(selection="nonzero").density is None
    assert peft_ext.MaskLoraConfig().target_sparsity == 0.25
    assert peft_ext.MaskLoraConfig(penalty=1.0).target_sparsity is None
    assert peft_ext.SPTConfig().budget == 0.004


@pytest.mark.parametrize("peft_type", OURS)
def test_a_start_that_is_no_identity(peft_type: str) -> None:
    """`init_weights=False` moves every trainable leaf away from the published start, and the output with it."""
    base = base_of(peft_type)
    batch = models.inputs(MODELS.get(peft_type, "llama"))
    with torch.no_grad():
        before = models.logits(base, batch)
        model = get_peft_model(base, config_of(peft_type, base, init_weights=False)).eval()
        after = models.logits(model, batch)
    assert (after - before).abs().max() > 1e-2
    prefix = methods()[peft_type].model.prefix
    leaves = {name: p for name, p in model.named_parameters() if f".{prefix}" in name}
    assert leaves and all(len(p.unique()) > 1 or p.numel() == 1 for p in leaves.values())
    torch.manual_seed(1)
    again = base_of(peft_type)
    again = get_peft_model(again, config_of(peft_type, again, init_weights=False))
    values = dict(again.named_parameters())
    assert not any(torch.equal(p, values[name]) for name, p in leaves.items())  # random, each time


@pytest.mark.parametrize("peft_type", OURS)
@pytest.mark.parametrize("value", ["zeros", None, 1.0])
def test_other_starts_are_refused(peft_type: str, value: Any) -> None:
    if isinstance(value, str) and methods()[peft_type].config.STARTS_FROM_ADAPTER:
        value = ""  # any other may be the name of an adapter
    with pytest.raises(ValueError, match=rf"`init_weights` must be True.* or .* for {peft_type}, got"):
        methods()[peft_type].config(init_weights=value)


@pytest.mark.parametrize("peft_type", OURS)
def test_nothing_of_a_deleted_adapter_stays(peft_type: str) -> None:
    base = base_of(peft_type)
    model = get_peft_model(base, config_of(peft_type, base), adapter_name="gone")
    model.add_adapter("other", config_of(peft_type, base_of(peft_type)))
    model.set_adapter("other")
    model.delete_adapter("gone")
    for module in model.modules():
        held = {**module.__dict__, **module._modules}
        assert not [name for name, value in held.items() if isinstance(value, HOLDERS) and "gone" in value]


@pytest.mark.parametrize("peft_type", OURS)
def test_a_layer_has_the_mode_of_the_model(peft_type: str) -> None:
    """An adapter that is put on a model in eval mode drops nothing out."""
    base = base_of(peft_type).eval()
    model = get_peft_model(base, config_of(peft_type, base))
    model.add_adapter("other", config_of(peft_type, base_of(peft_type), layers_to_transform=[1]))
    assert not [name for name, module in model.base_model.named_modules() if name and module.training]


def test_features_of_layers() -> None:
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 4),
            "convolution": nn.Conv2d(3, 5, 2),
            "transposed": nn.ConvTranspose1d(3, 6, 2),
            "embedding": nn.Embedding(9, 7),
            "norm": nn.LayerNorm(8),
            "batch_norm": nn.BatchNorm1d(8),
            "group_norm": nn.GroupNorm(2, 8),
        }
    )
    gpt2 = tiny("gpt2")
    net["conv1d"] = gpt2.transformer.h[0].attn.c_attn
    model = get_peft_model(net, peft_ext.SSFConfig(target_modules=list(net)))
    found = {name: (layer.in_features, layer.out_features) for name, layer in model.base_model.model.items()}
    wanted = {"linear": (3, 4), "convolution": (3, 5), "transposed": (3, 6), "embedding": (9, 7), "conv1d": (16, 48)}
    assert found == wanted | dict.fromkeys(["norm", "batch_norm", "group_norm"], (8, 8))


@pytest.mark.parametrize("peft_type", OURS)
def test_the_config_of_another_method_is_returned_with_a_warning(peft_type: str, tmp_path: Path) -> None:
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match=f"the method LORA, not {peft_type}: it is returned as a LoraConfig"):
        config = methods()[peft_type].config.from_pretrained(str(tmp_path))
    assert type(config) is LoraConfig


@pytest.mark.parametrize("peft_type", OURS)
def test_input_casting_can_be_switched_off(peft_type: str) -> None:
    base = base_of(peft_type)
    model = get_peft_model(base, config_of(peft_type, base, init_weights=False)).eval()
    batch = models.inputs(MODELS.get(peft_type, "llama"))
    with torch.no_grad():
        wanted = models.logits(model, batch)
        with disable_input_dtype_casting(model):
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            assert not any(layer.cast_input_dtype_enabled for layer in layers)
            torch.testing.assert_close(models.logits(model, batch), wanted)
    assert all(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("config", [SSFConfig, partial(SparseFTConfig, selection="random", density=0.05)])
def test_tasks_whose_head_pefts_class_names_afterwards(task: str, config: Any, tmp_path: Path) -> None:
    base = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}[task]

    def made() -> Any:
        torch.manual_seed(0)
        fields = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return base(BertConfig(**fields, num_hidden_layers=2))

    asked = config(task_type=task)
    model = get_peft_model(made(), asked)
    head = "classifier" if task == "TOKEN_CLS" else "qa_outputs"
    trained = [name for name, p in model.named_parameters() if p.requires_grad and f"{head}.modules_to_save" in name]
    assert trained and head in model.modules_to_save
    model.add_adapter("second", config(task_type=task))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(1.0)
    model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    tokens = torch.arange(3, 10)[None]
    expected = model.eval()(input_ids=tokens)[0]
    loaded = PeftModel.from_pretrained(made(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(input_ids=tokens)[0], expected)
