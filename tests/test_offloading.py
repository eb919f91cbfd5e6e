"""Every method on a base that accelerate keeps on the host or on disk, and on one whose weights come later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from test_conformance import METHODS
from torch import nn

import peft_ext
from peft_ext import LoraSBConfig, MaskLoraConfig, S2FTConfig, SCTConfig, SparseFTConfig, SPTConfig
from peft_ext.calibrate import measure
from peft_ext.core import weight_of
from peft_ext.testing import Method


CPU = torch.device("cpu")
WAYS = ("cpu", "disk", "map")


def model_of(method: Method) -> str:
    return next(name for name in ("llama", "bert", "vit") if name in method.models)


def offloaded(name: str, way: str, folder: Path) -> Any:
    """A tiny model whose parameters (those of its last block, with `map`) are on `meta` between forwards."""
    model = tiny(name)
    if way == "cpu":
        return cpu_offload(model, execution_device=CPU).eval()
    if way == "disk":
        return disk_offload(model, str(folder / "offload"), execution_device=CPU).eval()
    model.save_pretrained(folder / "whole")
    blocks = [key for key, module in model.named_modules() if type(module).__name__ in set(model._no_split_modules)]
    places = dict.fromkeys(blocks[:-1], "cpu") | {blocks[-1]: "disk"}
    for key, _ in model.named_parameters():
        if not key.startswith(tuple(f"{block}." for block in blocks)):
            places[key.rpartition(".")[0] if key.endswith((".weight", ".bias")) else key] = "cpu"
    return (
        type(model).from_pretrained(folder / "whole", device_map=places, offload_folder=str(folder / "offload")).eval()
    )


def gradients(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss(model, inputs(name)).backward()
    model.eval()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def adapted(method: Method, base: Any, config: Any) -> Any:
    model = get_peft_model(base, copy.deepcopy(config))
    method.randomize(model)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_base(method: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes what is merged on disk beneath the working directory
    case = METHODS[method].method
    name = model_of(case)
    config = case.config_for(name)
    plain = adapted(case, tiny(name), config)
    right, slopes = logits(plain, inputs(name)).detach(), gradients(plain, name)
    model = adapted(case, offloaded(name, way, tmp_path), config)
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(logits(model, inputs(name)).detach(), right, atol=1e-5, rtol=1e-4)
    found = gradients(model, name)
    assert found.keys() == slopes.keys()
    for key in found:
        torch.testing.assert_close(found[key], slopes[key], atol=1e-5, rtol=1e-3, msg=key)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    optimizer.step()
    right = logits(model.eval(), inputs(name)).detach()
    model.save_pretrained(tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, inputs(name)).detach(), right, atol=1e-5, rtol=1e-4)
    if way == "map":
        return  # PEFT's own dispatch wants a device besides the host
    for low_cpu_mem_usage in (False, True):
        base = offloaded(name, way, tmp_path / str(low_cpu_mem_usage))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(logits(loaded, inputs(name)).detach(), right, atol=1e-5, rtol=1e-4)
    if case.merges:
        if method in ("sct", "ssf"):  # which give a bias to modules without one
            with pytest.raises(ValueError, match="offloaded Linear: it would get a bias"):
                loaded.merge_and_unload()
            return
        torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs(name)), right, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_weights_that_come_later(method: str) -> None:
    """The model is made without memory, the adapter put on it, and both are loaded with `assign=True`."""
    lora = Method("lora_", lambda: LoraConfig(r=2, target_modules=["q_proj"]), ("llama",))  # type: ignore[arg-type, return-value]
    case = METHODS[method].method if method in METHODS else lora
    name = model_of(case)
    config = case.config_for(name)
    plain = adapted(case, tiny(name), config)
    whole = tiny(name)
    with init_empty_weights(include_buffers=False):
        base = type(whole)(whole.config)
    model = get_peft_model(base, copy.deepcopy(config))
    model.load_state_dict(plain.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    torch.testing.assert_close(logits(model.eval(), inputs(name)), logits(plain, inputs(name)), atol=1e-5, rtol=1e-4)
    assert gradients(model, name).keys() == gradients(plain, name).keys()


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_offloaded_weights(way: str, tmp_path: Path) -> None:
    model, base = tiny("llama"), offloaded("llama", way, tmp_path)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for kind in ("sensitivity", "snip"):
        found, right = (
            measure(m, {n: weight_of(m.get_submodule(n)) for n in names}, [inputs("llama")], kind=kind, progress=False)
            for m in (base, model)
        )
        for name in names:
            torch.testing.assert_close(found.of(name), right.of(name), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        LoraSBConfig(r=2),
        SparseFTConfig(selection="sensitivity", num_tunable_weights=64),
        MaskLoraConfig(r=2, total_steps=5, init_logits="sensitivity"),
        S2FTConfig(ratios=0.25, selection="gradient"),
        S2FTConfig(ratios=0.25, selection="weight"),
        SCTConfig(num_channels=4),
        SPTConfig(budget=100, r=2, target_modules=["q_proj", "down_proj"]),
    ],
    ids=lambda config: f"{config.METHOD}-{getattr(config, 'selection', '')}",
)
def test_calibrated_on_an_offloaded_base(config: Any, tmp_path: Path) -> None:
    base = offloaded("llama", "cpu", tmp_path)
    if getattr(config, "selection", "") != "weight":
        peft_ext.calibrate(base, config, [inputs("llama")], progress=False)
    model = get_peft_model(base, config)
    assert gradients(model, "llama")


def test_magnitudes_on_an_offloaded_base(tmp_path: Path) -> None:
    """DoRA starts at the norms of weights that are not there."""
    config = SPTConfig(
        budget=300, r=2, structured="dora", matrix_threshold=4.0, target_modules=["q_proj", "down_proj"]
    )
    peft_ext.calibrate(tiny("llama"), config, [inputs("llama")], progress=False)
    plain = get_peft_model(tiny("llama"), copy.deepcopy(config))
    away = get_peft_model(offloaded("llama", "cpu", tmp_path), copy.deepcopy(config))
    right = {key: tensor for key, tensor in plain.state_dict().items() if "magnitude" in key}
    assert right and all(torch.equal(away.state_dict()[key], tensor) for key, tensor in right.items())
    torch.testing.assert_close(logits(away.eval(), inputs("llama")), logits(plain.eval(), inputs("llama")))


def test_norms_of_an_offloaded_base_cannot_be_measured(tmp_path: Path) -> None:
    config = SPTConfig(budget=100, r=2, target_modules=["q_proj", "input_layernorm"])
    with pytest.raises(ValueError, match=r"input_layernorm.*offloaded or not loaded.*calibrate on the model"):
        peft_ext.calibrate(offloaded("llama", "cpu", tmp_path), config, [inputs("llama")], progress=False)
