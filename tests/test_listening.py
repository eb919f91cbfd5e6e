"""Layers that go by what another module reads, where that module is copied, wrapped or taken out of its place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import inputs, logits, tiny
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_ext
from peft_ext import BinaryAdapterConfig, PeftMixedModel, SCTConfig, SSFConfig, WeGeFTConfig
from peft_ext.core import Listener
from peft_ext.tuners.binary_adapter.layer import BinaryAdapterLinear


CASES: list[tuple[str, str, list[str]]] = [  # architecture, method, what the listened modules are called
    ("vit", "adapter", ["layernorm_after"]),
    ("llama", "adapter", ["gate_proj"]),
    ("vit", "sct", ["layernorm_before"]),
    ("llama", "sct", ["input_layernorm"]),
]


def adapted(name: str, method: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = tiny(name)
    if method == "adapter":
        config: Any = BinaryAdapterConfig(r=4, bits=32, init_weights=False, **fields)
    else:
        config = SCTConfig(num_channels=4, **fields)
        config = peft_ext.calibrate(model, config, [inputs(name)], progress=False)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sct_map" in key:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize(("name", "method", "modules"), CASES)
def test_a_module_that_is_trained_in_full_is_listened_to(name: str, method: str, modules: list[str]) -> None:
    batch = inputs(name)
    plain, kept = adapted(name, method), adapted(name, method, modules_to_save=modules)
    torch.testing.assert_close(logits(kept, batch), logits(plain, batch))
    with kept.disable_adapter():
        torch.testing.assert_close(logits(kept, batch), logits(tiny(name), batch))
    twice = copy.deepcopy(kept)
    with torch.no_grad():
        for key, parameter in kept.named_parameters():
            if "modules_to_save" in key:
                parameter.mul_(1.5)
    assert not torch.allclose(logits(kept, batch), logits(plain, batch))  # its own is the one that is run
    torch.testing.assert_close(logits(twice, batch), logits(plain, batch))
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(twice)), batch), logits(plain, batch))


def test_copies_of_a_block_have_listeners_of_their_own() -> None:
    model = adapted("llama", "adapter")
    block = model.base_model.model.model.layers[0]
    twin = copy.deepcopy(block)
    own, others = (
        {id(hook) for module in part.modules() for hook in module._forward_pre_hooks.values()}
        for part in (block, twin)
    )
    assert own and others and not own & others
    assert {id(listener) for listener in twin.mlp.down_proj.listeners.values()} == others


def reads(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first feed-forward part of a Llama reads, and what its adapter takes for that."""
    heard: dict[str, torch.Tensor] = {}
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    layer = next(module for module in mlp.modules() if isinstance(module, BinaryAdapterLinear))
    handles = [
        mlp.register_forward_pre_hook(lambda module, args: heard.update(input=args[0])),
        layer.register_forward_pre_hook(
            lambda module, args: heard.update(taken=next(iter(module.listeners.values())).value)
        ),
    ]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return heard["input"], heard["taken"]


@pytest.mark.parametrize("first", ["adapter", "wegeft"])
def test_an_edited_input_is_not_what_the_block_reads(first: str) -> None:
    """WeGeFT changes what `gate_proj` itself gets."""
    configs: dict[str, Any] = {
        "adapter": BinaryAdapterConfig(r=4, bits=32, init_weights=False),
        "wegeft": WeGeFTConfig(r=4, share="none", target_modules=["gate_proj"], init_weights=False),
    }
    second = next(name for name in configs if name != first)
    model = PeftMixedModel(tiny("llama"), configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    model.set_adapter(list(configs))
    given, taken = reads(model.eval(), inputs("llama"))
    assert torch.equal(given, taken)


@pytest.mark.parametrize(
    "other",
    [SSFConfig(target_modules=["input_layernorm"], init_weights="identity"), LoraConfig(target_modules=["q_proj"])],
)
def test_adapters_around_the_norm_that_sct_listens_to(other: Any) -> None:
    """Put on later; with SSF the norm itself is wrapped."""
    batch = inputs("llama")
    model = tiny("llama")
    config = peft_ext.calibrate(model, SCTConfig(num_channels=4), [batch], progress=False)
    mixed = PeftMixedModel(model, config, adapter_name="sct")
    with torch.no_grad():
        for key, parameter in mixed.named_parameters():
            if "sct_map" in key:
                parameter.normal_(std=0.2)
    before = logits(mixed.eval(), batch)
    mixed.add_adapter("other", other)
    mixed.set_adapter(["sct", "other"])
    torch.testing.assert_close(logits(mixed.eval(), batch), before)  # the other starts as the identity


def test_no_hook_is_left_when_the_adapter_is_taken_off() -> None:
    model = adapted("llama", "adapter", modules_to_save=["gate_proj"]).unload()
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(isinstance(hook, Listener) for hook in hooks)
