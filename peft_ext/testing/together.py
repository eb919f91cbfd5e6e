"""Through transformers, and beside other methods."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

import peft_ext

from .method import (
    ConformanceTests,
    among,
    close,
    differ,
    on_transformers,
    same,
    shows,
    trained_parameters,
    warns_only,
)
from .models import inputs, logits, loss, tiny


through_transformers = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {version('transformers')} takes adapters from PEFT {MIN_PEFT_VERSION} on",
)


class TogetherTests(ConformanceTests):
    """The method works where transformers drives it, and in one model with LoRA."""

    @shows("transformers' `add_adapter`")
    @through_transformers
    @on_transformers
    def test_the_adapter_methods_of_transformers(self, name: str, tmp_path: Path) -> None:
        model, batch = tiny(name), inputs(name)
        plain = logits(model, batch)
        model.add_adapter(self.config_for(name))
        self.randomize(model)
        expected = logits(model, batch)
        assert differ(plain, expected)
        model.disable_adapters()
        same(logits(model, batch), plain)
        model.enable_adapters()
        same(logits(model, batch), expected)
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "adapter_config.json").exists()
        other = tiny(name)
        other.load_adapter(str(tmp_path))
        same(logits(other.eval(), batch), expected)
        with warns_only("Already found a `peft_config` attribute"):
            other.load_adapter(str(tmp_path), adapter_name="second")
        other.set_adapter("second")
        same(logits(other.eval(), batch), expected)
        with warns_only("Adapter second was active which is now deleted"):
            other.delete_adapter("second")
        assert set(other.peft_config) == {"default"}

    @shows("Auto classes")
    @among("llama", "gpt2", "bert", "vit", "convnext")
    def test_auto_classes(self, name: str, tmp_path: Path) -> None:
        """`AutoModel*.from_pretrained(adapter)` and PEFT's Auto classes find the base by the adapter's config."""
        tiny(name).save_pretrained(str(tmp_path / "base"))
        auto: Any = AutoModelForCausalLM if name in ("llama", "gpt2") else AutoModelForSequenceClassification
        if name in ("vit", "convnext"):
            auto = AutoModel if self.method.adapts_modules else AutoModelForImageClassification
        base = auto.from_pretrained(tmp_path / "base")
        task = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}.get(name)
        batch = {key: value for key, value in inputs(name).items() if key != "labels"}

        def output(model: nn.Module) -> torch.Tensor:
            return model.eval()(**batch)[0]

        model = get_peft_model(base, self.config_for(name, base, task_type=task))
        self.randomize(model)
        expected = output(model)
        model.save_pretrained(str(tmp_path / "adapter"))
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert any(isinstance(module, BaseTunerLayer) for module in loaded.modules())
        same(output(loaded), expected)
        options: dict[str, Any] = {"num_labels": 3} if task == "SEQ_CLS" else {}
        same(output(peft_ext.load(tmp_path / "adapter", **options)), expected)
        same(output(peft_ext.load(tmp_path / "adapter", auto.from_pretrained(tmp_path / "base"))), expected)
        peft_auto: Any = {
            "CAUSAL_LM": AutoPeftModelForCausalLM,
            "SEQ_CLS": AutoPeftModelForSequenceClassification,
        }.get(task or "")
        if peft_auto is not None:
            same(output(peft_auto.from_pretrained(str(tmp_path / "adapter"), **options)), expected)

    @through_transformers
    @among("llama", "gpt2", "vit", "bert")
    @pytest.mark.parametrize("ours_first", [True, False])
    def test_beside_lora_through_transformers(self, name: str, ours_first: bool) -> None:
        model, batch = tiny(name), inputs(name)
        lora = LoraConfig(r=2, target_modules=["c_attn"] if name == "gpt2" else "all-linear", init_lora_weights=False)
        if name in ("bert", "vit"):
            lora.exclude_modules = ["classifier"]
        ours = self.config_for(name)
        plain = logits(model, batch)
        for adapter in ("ours", "lora") if ours_first else ("lora", "ours"):
            with warns_only("Already found a `peft_config` attribute|fan_in_fan_out"):
                model.add_adapter(ours if adapter == "ours" else lora, adapter_name=adapter)
        self.randomize(model)
        outputs = {}
        for adapters in (["ours"], ["lora"], ["ours", "lora"]):
            model.set_adapter(adapters)
            outputs[tuple(adapters)] = logits(model, batch)
        alone = tiny(name)
        alone.add_adapter(self.config_for(name))
        self.randomize(alone)
        close(outputs["ours",], logits(alone, batch))
        assert differ(outputs["ours",], plain) and differ(outputs["lora",], plain)
        assert differ(outputs["ours", "lora"], outputs["ours",]) and differ(outputs["ours", "lora"], outputs["lora",])
        model.set_adapter(["ours", "lora"])
        loss(model.train(), batch).backward()
        prefixes = ("lora_", self.method.prefix)
        assert all(
            p.grad is not None for key, p in model.named_parameters() if any(prefix in key for prefix in prefixes)
        )

    @shows("beside LoRA in one model")
    @among("mlp", "llama", "gpt2", "vit")
    @pytest.mark.parametrize("ours_first", [True, False])
    def test_beside_lora_in_a_mixed_model(self, name: str, ours_first: bool, tmp_path: Path) -> None:
        batch = inputs(name)
        targets = {"mlp": ["fc1", "fc2"], "gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        ours = self.config_for(name)
        configs = [("ours", ours), ("lora", lora)] if ours_first else [("lora", lora), ("ours", ours)]
        with warns_only("fan_in_fan_out|Adapter name"):
            model = peft_ext.PeftMixedModel(tiny(name), configs[0][1], adapter_name=configs[0][0])
            model.add_adapter(configs[1][0], configs[1][1])
        self.randomize(model)
        model.eval()
        outputs = {}
        for adapters in (["ours"], ["lora"], ["ours", "lora"]):
            model.set_adapter(adapters)
            outputs[tuple(adapters)] = logits(model, batch)
        assert differ(outputs["ours", "lora"], outputs["ours",]) and differ(outputs["ours", "lora"], outputs["lora",])
        single = get_peft_model(tiny(name), self.config_for(name))
        self.randomize(single)
        close(outputs["ours",], logits(single.eval(), batch))
        single.save_pretrained(str(tmp_path))
        model.set_adapter(["ours", "lora"])
        assert any("lora_" in key for key in trained_parameters(model))
        assert any(self.method.prefix in key for key in trained_parameters(model))
        with model.disable_adapter():
            same(logits(model, batch), logits(tiny(name), batch))
        if self.method.merges:
            merged = copy.deepcopy(model)
            merged.merge_adapter()
            close(logits(merged, batch), outputs["ours", "lora"], atol=1e-4)
            merged.unmerge_adapter()
            close(logits(merged, batch), outputs["ours", "lora"])
            unloaded = copy.deepcopy(model).merge_and_unload()
            assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
            close(logits(unloaded, batch), outputs["ours", "lora"], atol=1e-4)
        model.load_adapter(str(tmp_path), adapter_name="loaded")
        model.set_adapter(["loaded"])
        close(logits(model.eval(), batch), outputs["ours",])
        model.set_adapter(["ours", "lora"])
        with warns_only("Adapter .* was active which is now deleted"):
            model.delete_adapter("ours")
        assert set(model.peft_config) == {"lora", "loaded"} and model.active_adapters == ["lora"]
        close(logits(model, batch), outputs["lora",])
