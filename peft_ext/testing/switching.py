"""Adapters on, off, several, and one for each sample."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .method import (
    ConformanceTests,
    assert_same_state,
    close,
    differ,
    everywhere,
    on_a_few,
    on_any_few,
    same,
    shows,
    tensors_of,
    trained_parameters,
)
from .models import inputs, logits, tiny


def _mentions(model: nn.Module, adapter: str) -> set[str]:
    """Where an adapter's name stands as a key or an item: attributes of modules, by `module.attribute`."""
    found = set()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key != "_active_adapter" and isinstance(value, (dict, list, tuple, set)) and adapter in value:
                found.add(path if key in ("_modules", "_parameters", "_buffers") else f"{path}.{key}")
    return found


class SwitchingTests(ConformanceTests):
    """The active adapters act, and no others."""

    @shows("switching off")
    @everywhere
    def test_disabling(self, name: str) -> None:
        base, model, batch = tiny(name), self.adapted(name), inputs(name)
        expected, plain = logits(model, batch), logits(base, batch)
        assert differ(expected, plain)
        with model.disable_adapter():
            same(logits(model, batch), plain)
            with model.disable_adapter():
                same(logits(model, batch), plain)
            same(logits(model, batch), plain)
        same(logits(model, batch), expected)
        if self.method.merges:
            model.merge_adapter()
            with model.disable_adapter():
                same(logits(model, batch), plain)
            close(logits(model, batch), expected)

    @shows("several active adapters", only_if="adapts_modules")
    @everywhere
    def test_several_active_adapters_and_deletion(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        model.add_adapter("second", self.config_for(name))
        self.randomize(model, "second", seed=1)
        first = logits(model, batch)
        model.set_adapter("second")
        second = logits(model, batch)
        assert differ(first, second)
        model.base_model.set_adapter(["default", "second"])
        if self.method.adapts_modules:
            both = logits(model, batch)
            assert differ(first, both) and differ(second, both)
        else:
            with pytest.raises(ValueError, match="head of its own"):
                logits(model, batch)
        model.set_adapter("default")
        same(logits(model, batch), first)
        model.delete_adapter("second")
        assert "second" not in model.peft_config and not any(".second" in key for key, _ in model.named_parameters())
        same(logits(model, batch), first)
        with pytest.raises(ValueError, match="does not exist"):
            model.delete_adapter("second")
        model.add_adapter("third", self.config_for(name))
        with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
            model.delete_adapter("default")
        assert model.active_adapters == ["third"]

    @on_a_few
    def test_deleting_the_last_adapter_leaves_the_base(self, name: str) -> None:
        model = self.adapted(name)
        model.delete_adapter("default")
        # PeftModel.forward itself looks the deleted adapter up and fails, for LoRA as well
        same(logits(model.base_model.model, inputs(name)), logits(tiny(name), inputs(name)))

    @on_a_few
    def test_requires_grad(self, name: str) -> None:
        model = self.adapted(name)
        assert trained_parameters(model)
        assert all(self.method.prefix in key or "modules_to_save" in key for key in trained_parameters(model))
        first = trained_parameters(model)
        model.add_adapter("second", self.config_for(name))
        assert trained_parameters(model) == first  # a second adapter is not trained until it is active
        model.set_adapter("second")
        assert trained_parameters(model) == {key.replace(".default", ".second") for key in first}
        model.base_model.set_adapter(["default", "second"])
        assert {key for key in trained_parameters(model) if self.method.prefix in key} == {
            key.replace(".default", other)
            for key in first
            for other in (".default", ".second")
            if "modules_to" not in key
        }
        model.set_requires_grad("default", False)
        assert not any(".default" in key and self.method.prefix in key for key in trained_parameters(model))
        model.set_adapter("default", inference_mode=True)
        assert not trained_parameters(model)
        frozen = get_peft_model(tiny(name), self.config_for(name, inference_mode=True))
        assert not trained_parameters(frozen)

    @on_a_few
    def test_status(self, name: str) -> None:
        model = self.adapted(name)
        status = model.get_model_status()
        assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
        assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
        assert status.num_adapter_layers == len(model.get_layer_status())
        trainable, total = model.get_nb_trainable_parameters()
        assert 0 < trainable < total
        assert self.method.prefix in repr(model)

    @shows("several adapters in one batch", only_if="mixes_batches")
    @everywhere
    def test_one_batch_through_several_adapters(self, name: str) -> None:
        batch = inputs(name, batch=3)
        model = self.adapted(name)
        model.add_adapter("second", self.config_for(name))
        self.randomize(model, "second", seed=1)
        names = ["second", "__base__", "default"]
        if not self.method.mixes_batches:
            with pytest.raises(ValueError, match="does not support `adapter_names`"):
                logits(model, {**batch, "adapter_names": names})
            return
        if name in self.method.unmixable:
            with pytest.raises(ValueError, match="not per sample"):
                logits(model, {**batch, "adapter_names": names})
            return
        with model.disable_adapter():
            rows = {"__base__": logits(model, batch)}
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            rows[adapter] = logits(model, batch)
        mixed = logits(model, {**batch, "adapter_names": names})
        close(mixed, torch.stack([rows[adapter][i] for i, adapter in enumerate(names)]))
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
            logits(model, {**batch, "adapter_names": ["typo", "default", "default"]})
        with pytest.raises(ValueError, match="training mode"):
            logits(model.train(), {**batch, "adapter_names": names})

    @on_any_few
    def test_a_deleted_adapter_leaves_nothing_behind(self, name: str) -> None:
        model = self.adapted(name)
        model.add_adapter("second", self.config_for(name))
        assert _mentions(model, "second")
        model.delete_adapter("second")
        left = _mentions(model, "second")
        assert not left, f"delete_adapter leaves entries of the adapter in {sorted(left)[:5]}"

    @on_any_few
    def test_a_forward_changes_nothing(self, name: str) -> None:
        """In eval mode neither tensors of the model nor what its modules are given."""
        model = self.adapted(name)
        given: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def keep(path: str, args: Any, kwargs: Any) -> None:
            found = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            given.extend((path, value, value.clone()) for value in found)

        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                assert isinstance(module, nn.Module)
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: keep(path, args, kwargs), with_kwargs=True
                )
        before = copy.deepcopy(tensors_of(model))
        with torch.no_grad():
            logits(model, inputs(name))
        assert_same_state(tensors_of(model), before)
        changed = {path for path, value, kept in given if not torch.equal(value, kept)}
        assert not changed, f"these layers change their input in place: {sorted(changed)}"

    @on_any_few
    def test_samples_do_not_see_each_other(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name, batch=3)
        alone = [logits(model, {key: value[i : i + 1] for key, value in batch.items()}) for i in range(3)]
        close(logits(model, batch), torch.cat(alone), what="A batch and its samples one by one")

    @on_any_few
    def test_threads_do_not_see_each_other(self, name: str) -> None:
        """A server's pool runs one model in eval mode: what a forward needs is not kept where another one finds it."""
        model, batches = self.adapted(name), [inputs(name, seed=seed) for seed in range(3)]
        with torch.no_grad():
            expected = [logits(model, batch) for batch in batches]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(len(batches)) as pool:
                outputs = list(pool.map(lambda i: _in_inference(model, batches[i]), [*range(len(batches))] * 10))
        finally:
            sys.setswitchinterval(interval)
        for i, output in enumerate(outputs):
            close(output, expected[i % len(batches)], what="A forward beside those of other threads")


@torch.no_grad()
def _in_inference(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient mode is a thread's own."""
    return logits(model, batch)
