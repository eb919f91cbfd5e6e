"""Adapters in the weights of the base, and out of them again."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .method import ConformanceTests, assert_same_state, close, mergeable, on, same, shows
from .models import inputs, logits, loss, tiny


def _hooks(model: nn.Module) -> list[str]:
    """The modules that have hooks, once for each of them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [path for path, module in model.named_modules() for kind in kinds for _ in getattr(module, kind)]


class MergingTests(ConformanceTests):
    """A merged model is the same function, and an unmerged one has its own weights back."""

    @shows("merge")
    @mergeable
    def test_merge_and_unload(self, name: str, tmp_path: Path) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected = logits(model, batch)
        merged = copy.deepcopy(model).merge_and_unload(progressbar=False)
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        close(logits(merged, batch), expected)
        safely = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        same(logits(safely, batch), logits(merged, batch))
        if isinstance(merged, PreTrainedModel):
            merged.save_pretrained(str(tmp_path))
            loaded: Any = type(merged).from_pretrained(tmp_path, output_loading_info=True)
            reloaded, report = loaded
            assert not report["missing_keys"] and not report["unexpected_keys"]
            same(logits(reloaded.eval(), batch), logits(merged, batch))

    @mergeable
    def test_merge_and_unmerge(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        expected, before = logits(model, batch), copy.deepcopy(model.state_dict())
        model.merge_adapter()
        close(logits(model, batch), expected)
        merged = copy.deepcopy(model.state_dict())
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            model.merge_adapter()
        assert_same_state(model.state_dict(), merged)
        model.unmerge_adapter()
        assert_same_state(model.state_dict(), before)
        same(logits(model, batch), expected)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    @on(lambda method: method.few if method.merges and method.adapts_modules else ())
    def test_a_forward_with_the_adapters_off_ends_a_merge(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        model.add_adapter("second", self.config_for(name))
        expected = logits(model, batch)
        model.merge_adapter()
        with model.disable_adapter():
            logits(model, batch)
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
        same(logits(model, batch), expected)
        model.delete_adapter("second")  # refused while an adapter is merged

    @mergeable
    def test_unload_gives_the_base_back(self, name: str) -> None:
        model = self.adapted(name)
        base = model.unload()
        assert_same_state(
            {key: value for key, value in base.state_dict().items() if "classifier" not in key},
            {key: value for key, value in tiny(name).state_dict().items() if "classifier" not in key},
        )
        assert [key for key, _ in base.named_modules()] == [key for key, _ in tiny(name).named_modules()]
        assert _hooks(base) == _hooks(tiny(name))

    @shows("merge in fp16 and bf16")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @mergeable
    def test_merge_in_half_precision(self, name: str, dtype: torch.dtype) -> None:
        model = self.adapted(name, dtype=dtype)
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
        expected = logits(model, batch)
        before = copy.deepcopy(model.state_dict())
        model.merge_adapter()
        assert all(p.dtype == dtype for key, p in model.named_parameters() if self.method.prefix not in key)
        eps = torch.finfo(dtype).eps
        scale = max(expected.abs().max().item(), 1.0)
        assert (logits(model, batch) - expected).abs().max() < 40 * eps * scale
        model.unmerge_adapter()
        assert_same_state(model.state_dict(), before)

    @shows("merge of several adapters")
    @mergeable
    def test_merging_several_adapters(self, name: str) -> None:
        model, batch = self.adapted(name), inputs(name)
        model.add_adapter("second", self.config_for(name))
        self.randomize(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        expected = logits(model, batch)
        at_once = copy.deepcopy(model)
        at_once.merge_adapter(["default", "second"])
        one_by_one = copy.deepcopy(model)
        one_by_one.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="You are now additionally merging second"):
            one_by_one.merge_adapter(["second"])
        same(logits(at_once, batch), logits(one_by_one, batch))
        close(logits(at_once, batch), expected)
        at_once.unmerge_adapter()
        same(logits(at_once, batch), expected)
        with pytest.raises(ValueError, match="Cannot delete adapter"):
            one_by_one.delete_adapter("second")
        close(logits(model.merge_and_unload(adapter_names=["default", "second"]), batch), expected)

    @on(lambda method: method.few if method.merges else ())
    def test_merging_in_another_order_is_exact_or_refused(self, name: str) -> None:
        """What was merged acts before what is merged after it, whatever the order of the active adapters."""
        model, batch = self.adapted(name), inputs(name)
        model.add_adapter("second", self.config_for(name))
        self.randomize(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        expected = logits(model, batch)
        for merges in ([["second", "default"]], [["second"], ["default"]]):
            merged = copy.deepcopy(model)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of further adapters
                    for names in merges:
                        merged.merge_adapter(names)
            except ValueError as error:
                assert "'second' without 'default', which acts before it" in str(error)
                same(logits(merged, batch), expected)
            close(logits(merged, batch), expected)

    @mergeable
    def test_safe_merge_finds_nan_and_changes_nothing(self, name: str) -> None:
        model = self.adapted(name)
        last = [p for key, p in model.named_parameters() if self.method.prefix in key][-1]
        with torch.no_grad():
            last.view(-1)[0] = torch.nan
        before = copy.deepcopy(model.state_dict())
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="NaNs detected") as info:
                merge(safe_merge=True)
            assert str(info.value) == "NaNs detected in the merged weights. The adapter default seems to be broken"
            assert_same_state(model.state_dict(), before)

    @on(lambda method: method.few[:1] if method.merges else ())
    def test_training_a_merged_model_is_refused(self, name: str) -> None:
        model = self.adapted(name)
        model.merge_adapter()
        model.train()
        with pytest.raises(ValueError, match=r"merged into the base model.*unmerge_adapter"):
            model(**inputs(name))
        with torch.no_grad():
            model(**inputs(name))
        model.unmerge_adapter()
        loss(model, inputs(name)).backward()
