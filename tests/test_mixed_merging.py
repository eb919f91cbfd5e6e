"""Merging in mixed models: one by one as all at once, or refused; and adapters that stand inside of others as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_ext
from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    LoraFusionConfig,
    LoraSBConfig,
    PeftMixedModel,
    S2FTConfig,
    SNELLConfig,
    SparseFTConfig,
    SSFConfig,
    WeGeFTConfig,
)


IDS = torch.arange(12).view(2, 6)
TARGETS = ["down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "s2ft": lambda: S2FTConfig(ratios=0.5, target_modules=TARGETS, init_weights=False),
    "wegeft": lambda: WeGeFTConfig(r=4, target_modules=TARGETS, init_weights=False),
    "sparse": lambda: SparseFTConfig(selection="random", num_tunable_weights=200, target_modules=TARGETS, init_weights=False),
    "snell": lambda: SNELLConfig(r=4, target_modules=TARGETS, init_weights=False),
    "low_rank_core": lambda: LoraSBConfig(r=4, target_modules=TARGETS, init_weights=False),
    "binary": lambda: BinaryLoraConfig(r=4, target_modules=TARGETS, init_weights=False),
    "behind": lambda: BinaryAdapterConfig(r=4, site="sequential", target_modules=TARGETS, init_weights=False, dropout=0.0),
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).double().eval()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def mixed(inner: str, outer: str) -> PeftMixedModel:
    model = PeftMixedModel(llama(), CONFIGS[inner](), adapter_name="inside")
    model.add_adapter("outside", CONFIGS[outer]())
    model.set_adapter(["inside", "outside"])
    return model.double().eval()


def base_weights(model: nn.Module) -> list[torch.Tensor]:
    return [
        p.clone() for name, p in model.named_parameters() if name.endswith("down_proj.base_layer.base_layer.weight")
    ]


@pytest.mark.parametrize("order", [("inside", "outside"), ("outside", "inside")])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("lora", "s2ft"),
        ("s2ft", "lora"),
        ("sparse", "s2ft"),
        ("snell", "low_rank_core"),
        ("binary", "sparse"),
        ("lora", "sparse"),
    ],
)
def test_adapters_that_only_add_merge_one_by_one(inner: str, outer: str, order: tuple[str, str]) -> None:
    model = mixed(inner, outer)
    before, weights = output(model), base_weights(model)
    for name in order:
        model.merge_adapter([name])
    torch.testing.assert_close(output(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(base_weights(model), weights)
    torch.testing.assert_close(output(model), before)


@pytest.mark.parametrize("outer", ["lora", "s2ft"])
def test_nothing_is_merged_over_an_adapter_that_stands_behind_the_module(outer: str) -> None:
    """It reads what the module puts out, into which the merged one would go."""
    model = mixed("behind", outer)
    before = output(model)
    with pytest.raises(ValueError, match="Cannot merge adapter 'outside' without 'inside'"):
        model.merge_adapter(["outside"])
    torch.testing.assert_close(output(model), before)


@pytest.mark.parametrize(
    ("inner", "outer"), [("s2ft", "wegeft"), ("wegeft", "s2ft"), ("lora", "wegeft"), ("dora", "s2ft"), ("wegeft", "lora")]
)  # fmt: skip
def test_an_outer_adapter_is_not_merged_without_an_inner_one(inner: str, outer: str) -> None:
    model = mixed(inner, outer)
    before = output(model)
    with pytest.raises(ValueError, match=r"'outside' without 'inside'.*merge_adapter\(\['inside', 'outside'\]\)"):
        model.merge_adapter(["outside"])
    torch.testing.assert_close(output(model), before)
    model.merge_adapter(["inside"])
    model.merge_adapter(["outside"])
    torch.testing.assert_close(output(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model), before)


def test_nothing_is_merged_under_magnitudes(tmp_path: Path) -> None:
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        lora = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
        PeftModel(llama(), lora).save_pretrained(str(tmp_path / str(rank)))
    model = PeftMixedModel(llama(), CONFIGS["lora"](), adapter_name="inside")
    adapters = [str(tmp_path / "2"), str(tmp_path / "3")]
    model.add_adapter("outside", LoraFusionConfig(adapters=adapters, magnitude=True))
    model.set_adapter(["inside", "outside"])
    before = output(model.eval())
    with pytest.raises(ValueError, match=r"Cannot merge \['inside'\] inside of adapter 'outside', whose magnitudes"):
        model.merge_adapter(["inside"])
    torch.testing.assert_close(output(model), before)


@pytest.mark.parametrize("method", ["s2ft", "wegeft", "binary", "low_rank_core"])
def test_an_inner_adapter_is_written_as_a_lora_of_the_base(method: str, tmp_path: Path) -> None:
    model = mixed(method, "lora")
    model.set_adapter(["inside"])
    peft_ext.save_as_lora(model, tmp_path, "inside")
    torch.testing.assert_close(output(PeftModel.from_pretrained(llama(), tmp_path).double()), output(model))


def test_sparse_deltas_on_a_norm_stand_inside() -> None:
    def config(method: str) -> Any:
        fields: dict[str, Any] = {"target_modules": ["model.norm"], "init_weights": False}
        if method == "sparse":
            return SparseFTConfig(num_tunable_weights=9, selection="random", **fields)
        return SSFConfig(**fields)

    for first, second in (("sparse", "ssf"), ("ssf", "sparse")):
        model = PeftMixedModel(llama(), config(first), adapter_name=first)
        model.add_adapter(second, config(second))
        model.set_adapter([first, second])
        if first == "sparse":
            before = output(model.double().eval())
            torch.testing.assert_close(output(model.merge_and_unload()), before)
        else:
            with pytest.raises(ValueError, match=r"cannot act after 'ssf'.*Add the sparse adapter first"):
                output(model)
            model.set_adapter(["sparse"])
            assert output(model).isfinite().all()


def test_an_inner_snell_is_written_as_sparse_deltas(tmp_path: Path) -> None:
    model = mixed("snell", "lora")
    model.set_adapter(["inside"])
    peft_ext.core.about_of("SNELL").exports()["sparse"](model, tmp_path, "inside")
    found = output(PeftModel.from_pretrained(llama(), tmp_path).double())
    torch.testing.assert_close(found, output(model), atol=1e-6, rtol=1e-5)


def test_tokens_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`trainable_token_indices` names the tokens \[99\]; the model has 40"):
        PeftMixedModel(llama(), S2FTConfig(trainable_token_indices=[99]), adapter_name="inside")
