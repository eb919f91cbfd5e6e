"""What PEFT tests for its own tuners, for every method of this package on every kind of model.

A new method adds one row to `METHODS`.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PLAIN_TARGETS, inputs, logits, loss, tiny
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import peft_ext
from peft_ext import ExtConfig, MaskLoraConfig, SparseFTConfig, SPTConfig, SSFConfig, VQTConfig
from peft_ext.calibrate import ExactScores
from peft_ext.core import tuner_of


@dataclass(frozen=True)
class Method:
    """One row of the matrix.

    Args:
        prefix: Of the method's parameters.
        config: Makes a config from keyword arguments.
        models: The architectures it is run on.
        merges: Whether it can be merged.
        mixes_batches: Whether it takes `adapter_names`.
        unmixable: Models on which it does not, since an adapted module sees what is not per sample.
        inert: Regular expression of parameters whose gradient is zero by the method's maths.
        keeps_fp32: Parameters that stay in fp32 on a half-precision base, even if PEFT is told not to cast.
        looks_at_data: Whether it is calibrated first; here with random scores.
        counts: Buffers that change as steps go by.
        always: Modules of Llama that are adapted whatever `target_modules` says.
        adapts_modules: Whether it changes modules of the backbone. If not, it reads a frozen one into a head of its own,
            so that one adapter is active at a time, and what is peculiar to targets is not asked of it.
    """

    prefix: str
    config: Callable[..., ExtConfig]
    models: tuple[str, ...]
    merges: bool = True
    mixes_batches: bool = True
    unmixable: tuple[str, ...] = ()
    inert: str = r"(?!)"
    keeps_fp32: str = r"(?!)"
    looks_at_data: bool = False
    counts: str = r"(?!)"
    always: str = r"(?!)"
    adapts_modules: bool = True


METHODS = {
    "ssf": Method(
        prefix="ssf_",
        config=SSFConfig,
        models=(
            *("mlp", "conv2d", "conv1d_embedding"),
            *("llama", "gemma2", "gpt2", "opt", "t5", "bart", "bert", "roberta", "deberta-v2"),
            *("vit", "swin", "convnext"),
        ),
        # a shift of all keys alike adds the same number to all scores of a query, and softmax takes it out
        # (and a batch norm subtracts the shift of the convolution before it)
        unmixable=("deberta-v2",),
        inert=r".*(\.k_proj|\.key|\.key_proj|\.conv1)\.ssf_shift\..*",
    ),
    "sparse_ft": Method(
        prefix="sparse_ft_",
        config=partial(SparseFTConfig, selection="random", num_tunable_weights=256),
        models=(
            *("mlp", "conv1d_embedding"),
            *("llama", "gemma2", "gpt2", "opt", "t5", "bart", "bert", "roberta", "deberta-v2"),
            *("vit", "swin", "convnext"),
        ),
        mixes_batches=False,
        keeps_fp32=r".*",
    ),
    "spt": Method(
        prefix="spt_",
        config=partial(SPTConfig, budget=120, r=2, dropout=0.0, drop_path=0.0),
        models=(
            *("mlp", "llama", "gemma2", "gpt2", "opt", "t5", "bart", "bert", "roberta", "deberta-v2"),
            *("vit", "swin", "convnext"),
        ),
        mixes_batches=False,
        keeps_fp32=r".*\.spt_(delta|bias)\..*",
        looks_at_data=True,
        inert=r".*(\.k_proj|\.key|\.key_proj)\.spt_bias\..*",
    ),
    "mask_pruning": Method(
        prefix="mask_pruning_",
        config=partial(
            MaskLoraConfig, r=2, lora_alpha=2, total_steps=10, warmup_ratio=0.0, penalty=1.0, mask_lr_ratio=1.0, seed=4
        ),
        models=(
            *("mlp", "llama", "gemma2", "gpt2", "opt", "t5", "bart", "bert", "roberta", "deberta-v2"),
            *("vit", "swin", "convnext"),
        ),
        mixes_batches=False,
        keeps_fp32=r".*\.mask_pruning_gate\..*",
        counts=r".*\.mask_pruning_gate\..*\.progress",
        always=r".*\.(o_proj|down_proj)",
        # a model of one key-value head: its gradient is a sum that bfloat16 does not resolve
        inert=r".*\.self_attn\.o_proj\.mask_pruning_gate\..*",
    ),
    "vqt": Method(
        prefix="vqt_",
        config=partial(VQTConfig, num_queries=2, dropout=0.0),
        models=("bert", "roberta", "vit"),
        merges=False,
        mixes_batches=False,
        adapts_modules=False,
    ),
}
CASES = [(method, model) for method, row in METHODS.items() for model in row.models]
FEW = [case for case in CASES if METHODS[case[0]].adapts_modules and case[1] in ("mlp", "llama", "vit")]

everywhere = pytest.mark.parametrize(("method", "name"), CASES)
on_a_few = pytest.mark.parametrize(("method", "name"), FEW)
mergeable = pytest.mark.parametrize(("method", "name"), [case for case in CASES if METHODS[case[0]].merges])
per_method = pytest.mark.parametrize("method", METHODS)


def config_for(method: str, name: str, model: nn.Module | None = None, **fields: Any) -> ExtConfig:
    """A config for the tiny model `name`, or for `model`, if that is another one."""
    if name in PLAIN_TARGETS:
        fields.setdefault("target_modules", PLAIN_TARGETS[name])
    if method == "mask_pruning":
        if name == "mlp":
            fields["target_modules"] = ["fc1", "fc2"]
            fields["groups"] = [{"kind": "ffn", "rows": ["fc1"], "columns": "fc2"}]
        if name in ("mlp", "t5", "convnext"):
            fields.setdefault("prune", ["ffn"])
    config = METHODS[method].config(**fields)
    if METHODS[method].looks_at_data:
        model, tuner = model or tiny(name), tuner_of(config)
        scores = ExactScores({key: p.numel() for key, p in tuner.candidates(config, model).items()})
        generator = torch.Generator().manual_seed(0)
        for sums in scores.sums.values():
            sums.copy_(torch.rand(len(sums), generator=generator) * torch.rand(1, generator=generator))
        tuner.take_scores(config, model, scores)
    return config


@torch.no_grad()
def randomize(model: nn.Module, method: str, adapter: str = "", seed: int = 0) -> None:
    """Moves the adapters (or one) far from the identity; the values depend on the site and `seed` alone."""
    for key, parameter in model.named_parameters():
        site, _, leaf = key.partition("." + METHODS[method].prefix)
        if leaf and adapter in [*leaf.split(".")[1:], ""]:
            site = re.sub(r"base_model\.model\.|\.base_layer", "", site) + leaf.split(".")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(site.encode()) + seed)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(method: str, name: str, *, dtype: torch.dtype | None = None, **fields: Any) -> PeftModel:
    """A tiny model with one random adapter, in eval mode."""
    model = get_peft_model(tiny(name).to(dtype or torch.float32), config_for(method, name, **fields))
    randomize(model, method)
    return model.eval()


def trained_parameters(model: nn.Module) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def warns_only(message: str) -> Iterator[None]:
    """Lets through the one warning that PEFT gives here; all others stay errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the last bits: two runs of one product may differ by where in memory its factors lie."""
    torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-4)


# Saving and loading


@pytest.mark.capability("save and load")
@everywhere
def test_save_and_load(method: str, name: str, tmp_path: Path) -> None:
    model, batch = adapted(method, name), inputs(name)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored and not any(".default" in key for key in stored)
    assert all(METHODS[method].prefix in key for key in stored)
    assert not (tmp_path / "adapter_model.bin").exists()
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert not trained_parameters(loaded)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        same(logits(loaded.eval(), batch), expected)
    again = PeftModel.from_pretrained(tiny(name), str(tmp_path), is_trainable=True)
    assert trained_parameters(again) == trained_parameters(model)


@on_a_few
def test_selected_adapters_whose_names_contain_each_other(method: str, name: str, tmp_path: Path) -> None:
    model, batch = adapted(method, name), inputs(name)
    expected = {}
    names = ["default", "default2", "fault", method]  # `method` is a part of the prefix
    for adapter in names[1:]:
        with warns_only("Adapter name '.*' should not be contained in the prefix"):
            model.add_adapter(adapter, config_for(method, name))
    for seed, adapter in enumerate(names):
        model.set_adapter(adapter)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{adapter}." in key and METHODS[method].prefix in key:
                    parameter.fill_(0.1 * (seed + 1))
        expected[adapter] = logits(model, batch)
    model.save_pretrained(tmp_path, selected_adapters=["default2", "fault", method])
    assert not (tmp_path / "adapter_model.safetensors").exists()  # that is where "default" would be
    for adapter in names[1:]:
        loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path / adapter))
        same(logits(loaded.eval(), batch), expected[adapter])
    base = PeftModel.from_pretrained(tiny(name), str(tmp_path / "fault"), adapter_name="fault")
    base.load_adapter(str(tmp_path / "default2"), adapter_name="default2")
    base.set_adapter("default2")
    same(logits(base.eval(), batch), expected["default2"])


@everywhere
def test_direct_injection(method: str, name: str) -> None:
    source = adapted(method, name)
    state = get_peft_model_state_dict(source)
    for low_cpu_mem_usage in (False, True):
        model = inject_adapter_in_model(
            config_for(method, name), tiny(name), adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        result = set_peft_model_state_dict(model, state, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        same(logits(model.eval(), inputs(name)), logits(source, inputs(name)))
        prefix = "base_model.model."
        again = get_peft_model_state_dict(model, adapter_name="other")
        assert {key.removeprefix(prefix) for key in again} == {key.removeprefix(prefix) for key in state}


@on_a_few
def test_injection_from_a_state_dict(method: str, name: str) -> None:
    source = adapted(method, name)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    state = {key: value for key, value in state.items() if METHODS[method].prefix in key}
    model = inject_adapter_in_model(config_for(method, name), tiny(name), state_dict=state)
    layers = {key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert layers == {key.split("." + METHODS[method].prefix)[0] for key in state}


@everywhere
def test_state_dict_of_the_whole_model_copy_and_pickle(method: str, name: str) -> None:
    model, batch = adapted(method, name), inputs(name)
    expected = logits(model, batch)
    same(logits(copy.deepcopy(model), batch), expected)
    same(logits(pickle.loads(pickle.dumps(model)), batch), expected)
    other = get_peft_model(tiny(name, seed=5), config_for(method, name)).eval()
    other.load_state_dict(model.state_dict())
    same(logits(other, batch), expected)


def test_loading_with_mismatched_shapes_names_the_module(tmp_path: Path) -> None:
    adapted("ssf", "llama").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)does not fit this model.*size mismatch for model\.layers\.0\."):
        PeftModel.from_pretrained(tiny("llama", hidden_size=32), str(tmp_path))


# Merging


@pytest.mark.capability("merge")
@mergeable
def test_merge_and_unload(method: str, name: str, tmp_path: Path) -> None:
    model, batch = adapted(method, name), inputs(name)
    expected = logits(model, batch)
    merged = copy.deepcopy(model).merge_and_unload(progressbar=False)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    close(logits(merged, batch), expected)
    safely = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    same(logits(safely, batch), logits(merged, batch))
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(tmp_path)
        reloaded, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        same(logits(reloaded.eval(), batch), logits(merged, batch))


@mergeable
def test_merge_and_unmerge(method: str, name: str) -> None:
    model, batch = adapted(method, name), inputs(name)
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


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@mergeable
def test_unload_gives_the_base_back(method: str, name: str) -> None:
    model = adapted(method, name)
    base = model.unload()
    assert_same_state(
        {key: value for key, value in base.state_dict().items() if "classifier" not in key},
        {key: value for key, value in tiny(name).state_dict().items() if "classifier" not in key},
    )
    assert [key for key, _ in base.named_modules()] == [key for key, _ in tiny(name).named_modules()]


@pytest.mark.capability("merge in fp16 and bf16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@mergeable
def test_merge_in_half_precision(method: str, name: str, dtype: torch.dtype) -> None:
    model = adapted(method, name, dtype=dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
    expected = logits(model, batch)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert all(p.dtype == dtype for key, p in model.named_parameters() if METHODS[method].prefix not in key)
    eps = torch.finfo(dtype).eps
    scale = max(expected.abs().max().item(), 1.0)
    assert (logits(model, batch) - expected).abs().max() < 40 * eps * scale
    model.unmerge_adapter()
    assert_same_state(model.state_dict(), before)


@pytest.mark.capability("merge of several adapters")
@mergeable
def test_merging_several_adapters(method: str, name: str) -> None:
    model, batch = adapted(method, name), inputs(name)
    model.add_adapter("second", config_for(method, name))
    randomize(model, method, "second", seed=1)
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


@mergeable
def test_safe_merge_finds_nan_and_changes_nothing(method: str, name: str) -> None:
    model = adapted(method, name)
    last = [p for key, p in model.named_parameters() if METHODS[method].prefix in key][-1]
    with torch.no_grad():
        last.view(-1)[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected") as info:
            merge(safe_merge=True)
        assert str(info.value) == "NaNs detected in the merged weights. The adapter default seems to be broken"
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in state.items())


@per_method
def test_training_a_merged_model_is_refused(method: str) -> None:
    if not METHODS[method].merges:
        pytest.skip("cannot be merged")
    model = adapted(method, "mlp")
    model.merge_adapter()
    model.train()
    with pytest.raises(ValueError, match=r"merged into the base model.*unmerge_adapter"):
        model(**inputs("mlp"))
    with torch.no_grad():
        model(**inputs("mlp"))
    model.unmerge_adapter()
    model(**inputs("mlp")).sum().backward()


# Switching


@pytest.mark.capability("switching off")
@everywhere
def test_disabling(method: str, name: str) -> None:
    base, model, batch = tiny(name), adapted(method, name), inputs(name)
    expected, plain = logits(model, batch), logits(base, batch)
    assert differ(expected, plain)
    with model.disable_adapter():
        same(logits(model, batch), plain)
        with model.disable_adapter():
            same(logits(model, batch), plain)
        same(logits(model, batch), plain)
    same(logits(model, batch), expected)
    if METHODS[method].merges:
        model.merge_adapter()
        with model.disable_adapter():
            same(logits(model, batch), plain)
        close(logits(model, batch), expected)


@pytest.mark.capability("several active adapters", only_if="adapts_modules")
@everywhere
def test_several_active_adapters_and_deletion(method: str, name: str) -> None:
    model, batch = adapted(method, name), inputs(name)
    model.add_adapter("second", config_for(method, name))
    randomize(model, method, "second", seed=1)
    first = logits(model, batch)
    model.set_adapter("second")
    second = logits(model, batch)
    assert differ(first, second)
    model.base_model.set_adapter(["default", "second"])
    if METHODS[method].adapts_modules:
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
    model.add_adapter("third", config_for(method, name))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["third"]


@on_a_few
def test_deleting_the_last_adapter_leaves_the_base(method: str, name: str) -> None:
    model = adapted(method, name)
    model.delete_adapter("default")
    # PeftModel.forward itself looks the deleted adapter up and fails, for LoRA as well
    same(logits(model.base_model.model, inputs(name)), logits(tiny(name), inputs(name)))


@on_a_few
def test_requires_grad(method: str, name: str) -> None:
    model = adapted(method, name)
    assert trained_parameters(model)
    assert all(METHODS[method].prefix in key or "modules_to_save" in key for key in trained_parameters(model))
    first = trained_parameters(model)
    model.add_adapter("second", config_for(method, name))
    assert trained_parameters(model) == first  # a second adapter is not trained until it is active
    model.set_adapter("second")
    assert trained_parameters(model) == {key.replace(".default", ".second") for key in first}
    model.base_model.set_adapter(["default", "second"])
    assert {key for key in trained_parameters(model) if METHODS[method].prefix in key} == {
        key.replace(".default", other) for key in first for other in (".default", ".second") if "modules_to" not in key
    }
    model.set_requires_grad("default", False)
    assert not any(".default" in key and METHODS[method].prefix in key for key in trained_parameters(model))
    model.set_adapter("default", inference_mode=True)
    assert not trained_parameters(model)
    frozen = get_peft_model(tiny(name), config_for(method, name, inference_mode=True))
    assert not trained_parameters(frozen)


@on_a_few
def test_status(method: str, name: str) -> None:
    model = adapted(method, name)
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    assert status.num_adapter_layers == len(model.get_layer_status())
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total
    assert METHODS[method].prefix in repr(model)


@pytest.mark.capability("several adapters in one batch", only_if="mixes_batches")
@everywhere
def test_one_batch_through_several_adapters(method: str, name: str) -> None:
    batch = inputs(name, batch=3)
    model = adapted(method, name)
    model.add_adapter("second", config_for(method, name))
    randomize(model, method, "second", seed=1)
    names = ["second", "__base__", "default"]
    if not METHODS[method].mixes_batches:
        with pytest.raises(ValueError, match="does not support `adapter_names`"):
            logits(model, {**batch, "adapter_names": names})
        return
    if name in METHODS[method].unmixable:
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


# Training


@everywhere
def test_every_trainable_parameter_moves_and_nothing_else(method: str, name: str) -> None:
    torch.manual_seed(0)
    model, batch = adapted(method, name).train(), inputs(name)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = trained_parameters(model)
    running = r".*\.(running_mean|running_var|num_batches_tracked)"
    still = {key for key in trained if torch.equal(before[key], model.state_dict()[key])}
    assert not {key for key in still if not re.fullmatch(METHODS[method].inert, key)}
    for key, value in model.state_dict().items():
        if key not in trained and not re.fullmatch(running, key) and not re.fullmatch(METHODS[method].counts, key):
            assert torch.equal(before[key], value), key


@pytest.mark.capability("`modules_to_save`")
@on_a_few
def test_modules_to_save(method: str, name: str, tmp_path: Path) -> None:
    head = {"mlp": "head", "llama": "lm_head", "vit": "classifier"}[name]
    context = warns_only("Model has `tie_word_embeddings=True`")
    with context:
        model = adapted(method, name, modules_to_save=[head]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, inputs(name)).backward()
    optimizer.step()
    expected = logits(model.eval(), inputs(name))
    with warns_only("Setting `save_embedding_layers`|Could not find a config file"):
        model.save_pretrained(tmp_path)
    assert any(f".{head}." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    same(logits(loaded, inputs(name)), expected)
    if METHODS[method].merges:
        close(logits(loaded.merge_and_unload(), inputs(name)), expected)


@pytest.mark.capability("fp16 and bf16 base")
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@on_a_few
def test_half_precision_base(method: str, name: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    base = tiny(name).to(dtype)
    model = get_peft_model(base, config_for(method, name), autocast_adapter_dtype=autocast_adapter_dtype).train()
    for key, parameter in model.named_parameters():
        if METHODS[method].prefix in key:
            stays = autocast_adapter_dtype or re.fullmatch(METHODS[method].keeps_fp32, key)
            assert parameter.dtype == (torch.float32 if stays else dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
    assert logits(model, batch).dtype == dtype
    loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.capability("fp16 and bf16 autocast")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@everywhere
def test_autocast(method: str, name: str, dtype: torch.dtype) -> None:
    model, batch = adapted(method, name).train(), inputs(name)
    loss(model, batch).backward()
    exact = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(model, batch)
    value.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not re.fullmatch(METHODS[method].inert, key):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            error = (parameter.grad - exact[key]).norm() / (exact[key].norm() + 1e-3)
            assert error < 0.25, (key, error)


@pytest.mark.capability("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] not in (*PLAIN_TARGETS, "swin")])
def test_gradient_checkpointing(method: str, name: str, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base = tiny(name)
        if not base.supports_gradient_checkpointing:
            pytest.skip(f"{name} does not support it")
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            base.config.use_cache = False
        model = get_peft_model(base, config_for(method, name)).train()
        randomize(model, method)
        if checkpointing and name in ("vit", "convnext"):
            model.enable_input_require_grads()
        loss(model, inputs(name)).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for key, gradient in plain.items():
        if gradient is not None:
            close(checkpointed[key], gradient)


@pytest.mark.capability("`layers_to_transform`")
@pytest.mark.parametrize("layers", [0, [0], [1], [0, 1]])
@pytest.mark.parametrize(("method", "name"), [case for case in FEW if case[1] != "mlp"])
def test_layers_to_transform(method: str, name: str, layers: int | list[int]) -> None:
    model = adapted(method, name, layers_to_transform=layers)
    wanted = {layers} if isinstance(layers, int) else set(layers)
    found = {
        int(match.group(1)) if (match := re.search(r"\.layers\.(\d+)\.", key)) else None
        for key in trained_parameters(model)
        if METHODS[method].prefix in key
    }
    assert found == wanted


@pytest.mark.parametrize(
    "method", [method for method, row in METHODS.items() if row.adapts_modules and not row.looks_at_data]
)
def test_targets(method: str) -> None:
    def sites(**fields: Any) -> set[str]:
        model = adapted(method, "llama", **fields)
        names = {key.removeprefix("base_model.model.") for key in model.base_model.targeted_module_names}
        return {key for key in names if not re.fullmatch(METHODS[method].always, key)}

    linears = {key for key, module in tiny("llama").named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    extra = {key for key in linears if re.fullmatch(METHODS[method].always, key)}
    assert sites(target_modules="all-linear") == linears - extra
    assert sites(target_modules=r".*\.1\..*q_proj") == {"model.layers.1.self_attn.q_proj"}
    assert sites(target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == {"model.layers.1.self_attn.q_proj"}
    model = adapted(method, "llama", target_modules="all-linear")
    model.add_adapter("second", METHODS[method].config(target_modules="all-linear"))
    assert set(model.peft_config["second"].target_modules) == linears


@pytest.mark.capability("`generate`")
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] in ("llama", "gpt2", "t5", "bart")])
def test_generate(method: str, name: str) -> None:
    model = adapted(method, name, task_type="SEQ_2_SEQ_LM" if name in ("t5", "bart") else "CAUSAL_LM")
    ids = inputs(name)["input_ids"]
    greedy = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert greedy.shape[0] == len(ids)
    if METHODS[method].merges:
        merged = copy.deepcopy(model).merge_and_unload()
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(merged.generate(input_ids=ids, **options), greedy)
    if METHODS[method].mixes_batches:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        mixed = model.generate(input_ids=ids, adapter_names=["default"] * len(ids), **options)
        assert torch.equal(mixed, model.generate(input_ids=ids, **options))


# Configs


@per_method
def test_config_round_trip(method: str, tmp_path: Path) -> None:
    task = "CAUSAL_LM" if METHODS[method].adapts_modules else "SEQ_CLS"
    config = METHODS[method].config(target_modules=["b", "a"], layers_to_transform=[0], task_type=task)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert type(again) is type(config) and again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
    assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()


@per_method
def test_config_of_a_newer_version(method: str, tmp_path: Path) -> None:
    METHODS[method].config(target_modules=["a"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "a_later_field": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['a_later_field'\]"):
        PeftConfig.from_pretrained(str(tmp_path))
    path.write_text(json.dumps({**fields, "peft_ext_version": "99.0"}))
    with pytest.warns(UserWarning, match=r"written by peft_ext 99\.0.*pip install -U peft-ext"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_an_adapter_of_an_unknown_method(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "A_LATER_METHOD"}))
    with pytest.raises(ValueError, match=r"method 'A_LATER_METHOD', which neither .*pip install -U"):
        peft_ext.load(tmp_path, tiny("mlp"))


# Through transformers, and beside other methods


@pytest.mark.capability("transformers' `add_adapter`")
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] not in PLAIN_TARGETS])
def test_the_adapter_methods_of_transformers(method: str, name: str, tmp_path: Path) -> None:
    model, batch = tiny(name), inputs(name)
    plain = logits(model, batch)
    model.add_adapter(config_for(method, name))
    randomize(model, method)
    expected = logits(model, batch)
    assert differ(plain, expected)
    model.disable_adapters()
    same(logits(model, batch), plain)
    model.enable_adapters()
    same(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
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


@pytest.mark.capability("Auto classes")
@pytest.mark.parametrize(
    ("method", "name"), [case for case in CASES if case[1] in ("llama", "gpt2", "bert", "vit", "convnext")]
)
def test_auto_classes(method: str, name: str, tmp_path: Path) -> None:
    """`AutoModel*.from_pretrained(adapter)` and PEFT's Auto classes find the base by the adapter's config."""
    tiny(name).save_pretrained(tmp_path / "base")
    auto = AutoModelForCausalLM if name in ("llama", "gpt2") else AutoModelForSequenceClassification
    if name in ("vit", "convnext"):
        auto = AutoModel if METHODS[method].adapts_modules else AutoModelForImageClassification
    base = auto.from_pretrained(tmp_path / "base")
    task = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}.get(name)
    batch = {key: value for key, value in inputs(name).items() if key != "labels"}

    def output(model: nn.Module) -> torch.Tensor:
        return model.eval()(**batch)[0]

    model = get_peft_model(base, config_for(method, name, base, task_type=task))
    randomize(model, method)
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert any(isinstance(module, BaseTunerLayer) for module in loaded.modules())
    same(output(loaded), expected)
    options = {"num_labels": 3} if task == "SEQ_CLS" else {}
    same(output(peft_ext.load(tmp_path / "adapter", **options)), expected)
    same(output(peft_ext.load(tmp_path / "adapter", auto.from_pretrained(tmp_path / "base"))), expected)
    peft_auto = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_CLS": AutoPeftModelForSequenceClassification}.get(task)
    if peft_auto is not None:
        same(output(peft_auto.from_pretrained(str(tmp_path / "adapter"), **options)), expected)


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] in ("llama", "gpt2", "vit", "bert")])
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_lora_through_transformers(method: str, name: str, ours_first: bool) -> None:
    model, batch = tiny(name), inputs(name)
    lora = LoraConfig(r=2, target_modules=["c_attn"] if name == "gpt2" else "all-linear", init_lora_weights=False)
    if name in ("bert", "vit"):
        lora.exclude_modules = ["classifier"]
    ours = config_for(method, name)
    plain = logits(model, batch)
    for adapter in ("ours", "lora") if ours_first else ("lora", "ours"):
        with warns_only("Already found a `peft_config` attribute|fan_in_fan_out"):
            model.add_adapter(ours if adapter == "ours" else lora, adapter_name=adapter)
    randomize(model, method)
    outputs = {}
    for adapters in (["ours"], ["lora"], ["ours", "lora"]):
        model.set_adapter(adapters)
        outputs[tuple(adapters)] = logits(model, batch)
    alone = tiny(name)
    alone.add_adapter(config_for(method, name))
    randomize(alone, method)
    close(outputs["ours",], logits(alone, batch))
    assert differ(outputs["ours",], plain) and differ(outputs["lora",], plain)
    assert differ(outputs["ours", "lora"], outputs["ours",]) and differ(outputs["ours", "lora"], outputs["lora",])
    model.set_adapter(["ours", "lora"])
    loss(model, batch).backward()
    prefixes = ("lora_", METHODS[method].prefix)
    assert all(p.grad is not None for key, p in model.named_parameters() if any(prefix in key for prefix in prefixes))


@pytest.mark.capability("beside LoRA in one model")
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] in ("mlp", "llama", "gpt2", "vit")])
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_lora_in_a_mixed_model(method: str, name: str, ours_first: bool, tmp_path: Path) -> None:
    batch = inputs(name)
    targets = {"mlp": ["fc1", "fc2"], "gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ours = config_for(method, name)
    configs = [("ours", ours), ("lora", lora)] if ours_first else [("lora", lora), ("ours", ours)]
    with warns_only("fan_in_fan_out|Adapter name"):
        model = peft_ext.PeftMixedModel(tiny(name), configs[0][1], adapter_name=configs[0][0])
        model.add_adapter(configs[1][0], configs[1][1])
    randomize(model, method)
    model.eval()
    outputs = {}
    for adapters in (["ours"], ["lora"], ["ours", "lora"]):
        model.set_adapter(adapters)
        outputs[tuple(adapters)] = logits(model, batch)
    assert differ(outputs["ours", "lora"], outputs["ours",]) and differ(outputs["ours", "lora"], outputs["lora",])
    single = get_peft_model(tiny(name), config_for(method, name))
    randomize(single, method)
    close(outputs["ours",], logits(single.eval(), batch))
    single.save_pretrained(tmp_path)
    model.set_adapter(["ours", "lora"])
    assert any("lora_" in key for key in trained_parameters(model))
    assert any(METHODS[method].prefix in key for key in trained_parameters(model))
    with model.disable_adapter():
        same(logits(model, batch), logits(tiny(name), batch))
    if METHODS[method].merges:
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
