"""Every method under `torch.compile`: inference, training, adapters that are switched and disabled afterwards.

A method may end the graph where a compiler cannot follow it. What comes out must be what comes out without a compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, loss, tiny
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from test_conformance import METHODS
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_ext import VQTConfig


CASES = [("ssf", "bert"), ("sparse_ft", "llama"), ("spt", "llama"), ("mask_pruning", "bert"), ("vqt", "vit")]
BY_NAME = pytest.mark.parametrize(("method", "name"), CASES, ids=[method for method, _ in CASES])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_adapters(method: str, name: str) -> PeftModel:
    """One layer in float64 and eval mode, with other values in each adapter."""
    case = METHODS[method].method
    base = tiny(name, num_hidden_layers=1)
    model = get_peft_model(base, case.config_for(name, base, init_weights=False))
    torch.manual_seed(1)
    model.add_adapter("second", case.config_for(name, base, init_weights=False))
    return model.double().eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs(name).items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(model: PeftModel, compiled: Any, eager: PeftModel, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs and gradients of the compiled model are those of the other; returns the logits."""
    found, expected = compiled(**data), eager(**data)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    if any(p.requires_grad for p in model.parameters()):
        loss(compiled, data).backward()
        loss(eager, data).backward()
        ours, theirs = gradients(model), gradients(eager)
        assert ours.keys() == theirs.keys() and ours
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )
    return expected.logits.detach()


@BY_NAME
def test_adapters_are_switched_and_disabled_after_compiling(method: str, name: str) -> None:
    model = two_adapters(method, name)
    eager, data = copy.deepcopy(model), batch(name)
    compiled = torch.compile(model, backend="eager")
    seen = []
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter)
        eager.set_adapter(adapter)
        seen.append(assert_same(model, compiled, eager, data))
    with model.disable_adapter(), eager.disable_adapter(), torch.no_grad():
        found, expected = compiled(**data).logits, eager(**data).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    seen.append(found)
    torch.testing.assert_close(seen[0], seen[2])
    assert not any(torch.allclose(seen[0], other) for other in (seen[1], seen[3]))
    assert_same(model, compiled, eager, data)


def trainer_args(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


def test_trainer_compiles_vqt(tmp_path: Path) -> None:
    """`torch_compile=True` trains what is trained without, in as many steps and to the same bits."""
    samples = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % 3)} for i in range(8)]
    trained = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("vit"), VQTConfig(num_queries=2))
        args = trainer_args(tmp_path)
        if compiles:
            args = dataclasses.replace(args, torch_compile=True, torch_compile_backend="aot_eager")
        trainer = Trainer(model=model, args=args, train_dataset=samples)
        trainer.train()
        trainer.evaluate(samples)
        trained.append(get_peft_model_state_dict(model))
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())
    assert not any("_orig_mod" in key for key in trained[1])


def test_vqt_leaves_the_model_as_it_was() -> None:
    """What keeps the compiler out belongs to the adapter, also in copies and where `accelerate` replaced a forward."""
    base, data = tiny("vit"), inputs("vit")
    forward = base.forward
    model = get_peft_model(base, VQTConfig(num_queries=2))
    twin = copy.deepcopy(model)
    assert twin.base_model.model.forward.__self__ is twin.base_model.model
    restored = model.unload()
    assert "forward" not in vars(restored) and restored.forward == forward
    with torch.no_grad():
        expected = restored(**data).logits
        with twin.disable_adapter():
            torch.testing.assert_close(twin(**data).logits, expected, rtol=0, atol=0)

    own = functools.partial(forward)
    base.forward = own
    get_peft_model(base, VQTConfig(num_queries=2)).unload()
    assert base.forward is own
