"""An adapter on disk, in a state dict, in a copy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from .method import (
    ConformanceTests,
    assert_same_state,
    differ,
    everywhere,
    on_a_few,
    on_any_few,
    same,
    shows,
    tensors_of,
    trained_parameters,
    warns_only,
)
from .models import inputs, logits, loss, tiny


class SavingTests(ConformanceTests):
    """What is saved is the adapter, and loading it gives the same function."""

    @shows("save and load")
    @everywhere
    def test_save_and_load(self, name: str, tmp_path: Path) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected = logits(model, batch)
        model.save_pretrained(str(tmp_path))
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert stored and not any(".default" in key for key in stored)
        assert all(self.method.prefix in key for key in stored)
        assert not (tmp_path / "adapter_model.bin").exists()
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
            assert not trained_parameters(loaded)
            assert not any(parameter.is_meta for parameter in loaded.parameters())
            same(logits(loaded.eval(), batch), expected)
        again = PeftModel.from_pretrained(tiny(name), str(tmp_path), is_trainable=True)
        assert trained_parameters(again) == trained_parameters(model)

    @on_a_few
    def test_selected_adapters_whose_names_contain_each_other(self, name: str, tmp_path: Path) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected = {}
        names = ["default", "default2", "fault", self.method.prefix.rstrip("_")]  # the last is a part of the prefix
        for adapter in names[1:]:
            with warns_only("Adapter name '.*' should not be contained in the prefix"):
                model.add_adapter(adapter, self.config_for(name))
        for seed, adapter in enumerate(names):
            model.set_adapter(adapter)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if f".{adapter}." in key and self.method.prefix in key:
                        parameter.fill_(0.1 * (seed + 1))
            expected[adapter] = logits(model, batch)
        model.save_pretrained(str(tmp_path), selected_adapters=names[1:])
        assert not (tmp_path / "adapter_model.safetensors").exists()  # that is where "default" would be
        for adapter in names[1:]:
            loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path / adapter))
            same(logits(loaded.eval(), batch), expected[adapter])
        base = PeftModel.from_pretrained(tiny(name), str(tmp_path / "fault"), adapter_name="fault")
        base.load_adapter(str(tmp_path / "default2"), adapter_name="default2")
        base.set_adapter("default2")
        same(logits(base.eval(), batch), expected["default2"])

    @everywhere
    def test_direct_injection(self, name: str) -> None:
        source = self.adapted(name)
        state = get_peft_model_state_dict(source)
        for low_cpu_mem_usage in (False, True):
            model = inject_adapter_in_model(
                self.config_for(name), tiny(name), adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
            )
            result: Any = set_peft_model_state_dict(model, state, "other", low_cpu_mem_usage=low_cpu_mem_usage)
            assert not result.unexpected_keys
            same(logits(model.eval(), inputs(name)), logits(source, inputs(name)))
            prefix = "base_model.model."
            again = get_peft_model_state_dict(model, adapter_name="other")
            assert {key.removeprefix(prefix) for key in again} == {key.removeprefix(prefix) for key in state}

    @on_a_few
    def test_injection_from_a_state_dict(self, name: str) -> None:
        source = self.adapted(name)
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
        state = {key: value for key, value in state.items() if self.method.prefix in key}
        model = inject_adapter_in_model(self.config_for(name), tiny(name), state_dict=state)
        layers = {key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        expected = {key for key, module in source.named_modules() if isinstance(module, BaseTunerLayer)}
        assert layers == {key.removeprefix("base_model.model.") for key in expected}

    @everywhere
    def test_state_dict_of_the_whole_model_copy_and_pickle(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected = logits(model, batch)
        same(logits(copy.deepcopy(model), batch), expected)
        same(logits(pickle.loads(pickle.dumps(model)), batch), expected)
        other = get_peft_model(tiny(name, seed=5), self.config_for(name)).eval()
        other.load_state_dict(model.state_dict())
        same(logits(other, batch), expected)

    @on_any_few
    def test_loading_is_deterministic(self, name: str, tmp_path: Path) -> None:
        self.adapted(name).save_pretrained(str(tmp_path))
        loaded = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                loaded.append(tensors_of(PeftModel.from_pretrained(tiny(name), str(tmp_path))))
        assert_same_state(*loaded)

    @on_any_few
    def test_a_copy_is_independent(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected, before = logits(model, batch), copy.deepcopy(model.state_dict())
        copied = copy.deepcopy(model).train()
        loss(copied, batch).backward()
        self.randomize(copied, seed=7)
        copied.eval()
        assert differ(logits(copied, batch), expected)
        assert_same_state(model.state_dict(), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        same(logits(model, batch), expected)
