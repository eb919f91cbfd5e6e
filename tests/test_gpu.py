"""Every method on an accelerator: equal to the CPU, in the precisions and wrappers that are used there.

They are skipped where there is none. `PEFT_EXT_DEVICE=cpu` runs them on the CPU, so that the tests are known to work.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_conformance import METHODS
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_ext.testing import Method
from peft_ext.testing.models import inputs, logits, loss, tiny


DEVICE = os.environ.get("PEFT_EXT_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no accelerator")
CASES = [
    pytest.param(case.method, name, id=f"{key}-{name}") for key, case in METHODS.items() for name in case.method.few
]


def on_device(batch: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A batch on the accelerator, its floating inputs in `dtype`."""
    moved = {key: value.to(DEVICE) for key, value in batch.items()}
    return {key: value.to(dtype) if dtype and value.is_floating_point() else value for key, value in moved.items()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: p.grad.float().cpu() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_outputs_and_gradients_are_those_of_the_cpu(method: Method, name: str) -> None:
    model = method.adapted(name)
    there = copy.deepcopy(model).to(DEVICE)
    batch = inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(logits(there, on_device(batch)).cpu(), logits(model, batch), atol=1e-4, rtol=1e-3)
    loss(model, batch).backward()
    loss(there, on_device(batch)).backward()
    expected, found = gradients(model), gradients(there)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        if not re.fullmatch(method.estimated, key):
            torch.testing.assert_close(
                found[key], gradient, atol=1e-4, rtol=1e-2, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("precision", ["bfloat16 base", "autocast"])
def test_training_saving_and_merging(method: Method, name: str, precision: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16 base" else torch.float32
    model = get_peft_model(tiny(name).to(DEVICE, dtype), method.config_for(name)).train()
    batch = on_device(inputs(name), dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=DEVICE == "cuda")
    losses = []
    for _ in range(4):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
            value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert all(torch.tensor(losses).isfinite())
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name).to(DEVICE, dtype), str(tmp_path)).eval()
    with torch.no_grad():
        expected = logits(model, batch)
        torch.testing.assert_close(logits(loaded, batch), expected, atol=2e-2, rtol=2e-2)
        if method.merges:
            merged = model.merge_and_unload()
            error = (logits(merged, batch) - expected).abs().float().mean()
            assert error <= 0.1 * expected.abs().float().mean()  # each weight is rounded once


# inductor's advice
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", r"ignore:\s*Online softmax is disabled")
@pytest.mark.parametrize(("method", "name"), [case for case in CASES if "mlp" not in case.id])
def test_compiled(method: Method, name: str) -> None:
    model = method.adapted(name).to(DEVICE)
    batch = on_device(inputs(name))
    with torch.no_grad():
        expected = logits(model, batch)
        compiled = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-3, rtol=1e-2)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if "mlp" not in case.id])
def test_fully_sharded_in_one_process(method: Method, name: str, one_process: None) -> None:
    plain = method.adapted(name).to(DEVICE).train()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh(DEVICE, (1,)))
    batch = on_device(inputs(name))
    for model in (plain, sharded):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = {key: p for key, p in plain.named_parameters() if p.requires_grad}
    for key, parameter in sharded.named_parameters():
        if key in expected:
            whole: Any = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(whole, expected[key], atol=1e-4, rtol=1e-3)


def test_sparse_gradients_by_every_route() -> None:
    """The gradient of the values: the number of rows decides how it is computed."""
    method = METHODS["sparse_ft"].method
    model = method.adapted("mlp").to(DEVICE)
    for rows in (2, 64, 2048):
        batch = inputs("mlp", batch=rows)
        model.zero_grad()
        reference = copy.deepcopy(model).cpu()
        logits(model, on_device(batch)).sin().sum().backward()
        logits(reference, batch).sin().sum().backward()
        expected = gradients(reference)
        for key, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-3, rtol=1e-2)
