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
from models import inputs, tiny
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from test_conformance import METHODS
from transformers import Trainer, TrainingArguments

from peft_ext import VQTConfig


# one architecture for each method, so that each of the three has several
MODELS = dict.fromkeys(METHODS, "vit") | {
    **dict.fromkeys(("pasta", "sparse_ft", "spt", "binary_low_rank", "sct"), "llama"),
    **dict.fromkeys(("ssf", "mask_pruning", "binary_adapter"), "bert"),
}
READERS = {"vqt", "unipt"}  # hooks come and go inside their forward, which runs without the compiler
BREAKS_IN_TRAINING = {"mask_pruning"}  # the masks of each step are drawn outside the graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_adapters(method: str) -> PeftModel:
    """In float64, with other values in each adapter."""
    case, name = METHODS[method].method, MODELS[method]
    base = tiny(name, **({} if method == "fused_low_rank" else {"num_hidden_layers": 1}))
    model = get_peft_model(base, case.config_for(name, base))
    model.add_adapter("second", case.config_for(name, base))
    for seed, adapter in enumerate(("default", "second")):
        case.randomize(model, adapter, seed)
    return model.double()


def batch(name: str) -> dict[str, Any]:
    """Without labels: transformers logs about its losses, which ends a graph."""
    data = {key: x.double() if x.is_floating_point() else x for key, x in inputs(name).items() if key != "labels"}
    return data | ({"use_cache": False} if name == "llama" else {})


class Trained:
    """What runs a model, and the optimizer of its active adapter."""

    def __init__(self, model: PeftModel, run: Any) -> None:
        self.run = run
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(self, data: dict[str, Any]) -> torch.Tensor:
        """The loss before the step."""
        loss = self.run(**data).logits.sin().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.capability("torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch, where a graph ends
@pytest.mark.parametrize("method", sorted(METHODS))
def test_training_inference_and_switching(method: str) -> None:
    """As without the compiler, in one graph but where the docs say otherwise, and compiled once for all steps."""
    model, data = two_adapters(method), batch(MODELS[method])
    twin = copy.deepcopy(model)
    in_one = method not in READERS | BREAKS_IN_TRAINING
    backend = "aot_eager" if in_one else "eager"  # many small graphs take long
    compiled = Trained(model, torch.compile(model, backend=backend, fullgraph=in_one))
    eager = Trained(twin, twin)
    model.train()
    twin.train()

    def steps(count: int) -> None:
        for _ in range(count):
            torch.testing.assert_close(compiled.step(data), eager.step(data), rtol=1e-8, atol=1e-9)

    steps(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(2)
    for (key, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")

    run = torch.compile(model.eval(), backend="eager", fullgraph=method not in READERS)
    twin.eval()
    with torch.no_grad():
        seen = [outputs(run, twin, data)]
        for half in (model, twin):
            half.set_adapter("second")
        seen.append(outputs(run, twin, data))
        with model.disable_adapter(), twin.disable_adapter():
            seen.append(outputs(run, twin, data))
        for half in (model, twin):
            half.set_adapter("default")
        torch.testing.assert_close(outputs(run, twin, data), seen[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs(run, twin, data)
    assert not any(torch.allclose(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def outputs(compiled: Any, eager: PeftModel, data: dict[str, Any]) -> torch.Tensor:
    """The logits, which are the same by both."""
    found, expected = compiled(**data).logits, eager(**data).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    return expected


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


MERGES = sorted(name for name, case in METHODS.items() if case.method.merges)


@pytest.mark.filterwarnings("ignore")  # of the exporters about themselves
@pytest.mark.parametrize("method", MERGES)
def test_merged_models_are_exported(method: str) -> None:
    """A merged model is as the stock one to `torch.export`."""
    model, data = two_adapters(method), batch(MODELS[method])
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        expected = merged(**data).logits
        found = torch.export.export(merged, (), data).module()(**data).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ssf", "sparse_ft", "wegeft"])
def test_merged_models_in_onnx(method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="running it needs onnxruntime")
    case = METHODS[method].method
    model = case.adapted("vit")
    case.randomize(model)
    merged, pixels = model.merge_and_unload().eval(), inputs("vit")["pixel_values"]
    torch.onnx.export(merged, (pixels,), str(tmp_path / "model.onnx"), input_names=["pixel_values"], dynamo=True)
    found = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixel_values": pixels.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), merged(pixels).logits, rtol=0, atol=1e-4)
