"""SNELL: its update and gradients against dense ones, quantiles, what is kept, the allocation, conversions, bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import inputs, logits, tiny
from peft import PeftModel, get_peft_model
from test_integrations import quantised_llama
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import peft_ext
from peft_ext import SNELLConfig, inspection
from peft_ext.cli import main
from peft_ext.core import about_of
from peft_ext.tuners.snell import SNELLLinear, kernel
from peft_ext.tuners.snell.allocation import allocate, first_kept, sparsity_at
from peft_ext.tuners.snell.kernel import kernel_product, quantile


def batch_of(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs(name, seed=seed).items()}


def dense_update(outputs: torch.Tensor, ins: torch.Tensor, sparsity: float, gate: str) -> torch.Tensor:
    """From the paper's formulas: every difference of two points, and `torch.quantile`."""
    near, far = ((outputs[head][:, None] - ins[head][None]).square().sum(-1).sqrt() for head in (0, 1))
    matrix = 0.1 * (near - far)
    if gate == "none":
        return matrix
    size = matrix.detach().abs()
    threshold = torch.quantile(size.flatten(), sparsity)
    kept = (size > threshold).double()
    return matrix * (kept * (size - threshold) if gate == "shrink" else kept * size)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, SNELLLinear)
    }


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model).values():
        for leaf in layer.points("default"):
            leaf.weight.copy_(torch.randn(leaf.weight.shape, generator=generator) * 3)


def points(*sizes: int, half: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, size, half, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


# The product


@pytest.mark.parametrize("chunk", [1 << 22, 20])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("gate", ["shrink", "weight", "none"])
def test_product_and_gradients(gate: str, plain: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    outputs, ins = points(11, 7)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 11, dtype=torch.float64)
    y = kernel_product(x, outputs, ins, 0.7, gate, plain)
    expected = x @ dense_update(outputs, ins, 0.7, gate).T
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0.0)
    leaves = (x, outputs, ins)
    for mine, theirs in zip(
        torch.autograd.grad((y * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0.0)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all arguments without a gate, and of the input with one, through which no gradient goes by design."""
    monkeypatch.setattr(kernel, "CHUNK", 10)
    outputs, ins = points(6, 5)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: kernel_product(*a, 0.5, "none", False), (x, outputs, ins))  # type: ignore[misc]
    for gate in ("shrink", "weight"):
        fixed = (outputs.detach(), ins.detach())
        assert torch.autograd.gradcheck(lambda x, gate=gate, f=fixed: kernel_product(x, *f, 0.5, gate, False), (x,))


def test_equal_points_have_no_gradient() -> None:
    outputs, ins = points(4, 4)
    with torch.no_grad():
        ins.copy_(outputs)
    x = torch.randn(3, 4, dtype=torch.float64)
    kernel_product(x, outputs, ins, 0.5, "none", False).sum().backward()
    assert outputs.grad is not None and bool(outputs.grad.isfinite().all()) and bool(outputs.grad.any())


def test_no_matrix_is_kept_for_the_backward() -> None:
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    outputs, ins = points(300, 200)
    x = torch.randn(2, 200, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kernel_product(x, outputs, ins, 0.9, "shrink", False)
    assert kept == x.numel() + outputs.numel() + ins.numel() + 1 < 300 * 200 / 10


# Quantiles


@pytest.mark.parametrize("direct", [1 << 24, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_quantiles_are_those_of_torch(
    q: float, dtype: torch.dtype, direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "DIRECT", direct)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 1000):
        values = torch.randn(size, generator=generator, dtype=dtype).abs()
        for sample in (values, (values * 3).round(), torch.zeros_like(values)):  # with ties, and nothing else
            found = quantile(lambda sample=sample: iter(sample.split(300)), size, q)
            torch.testing.assert_close(found, torch.quantile(sample.double(), q).to(dtype))


def test_a_quantile_of_more_values_than_torch_takes() -> None:
    size = (1 << 24) + 3
    values = torch.rand(size, generator=torch.Generator().manual_seed(0))
    rank = 0.9 * (size - 1)
    low = int(rank)
    first, second = (float(value) for value in numpy.partition(values.numpy(), (low, low + 1))[low : low + 2])
    found = float(quantile(lambda: iter(values.split(1 << 22)), size, 0.9))
    assert first <= found <= second and found == pytest.approx(first + (second - first) * (rank % 1), rel=1e-7)


@pytest.mark.parametrize("gate", ["shrink", "weight"])
def test_the_share_of_zeros_is_exact(gate: str) -> None:
    model = get_peft_model(tiny("llama").double(), SNELLConfig(r=4, sparsity=0.9, gate=gate))
    randomize(model)
    for layer in layers_of(model).values():
        update = layer.update("default")
        assert int((update == 0).sum()) == int(0.9 * (update.numel() - 1)) + 1


# Models


@pytest.mark.parametrize("gate", ["shrink", "weight", "none"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_output_gradient_and_merge_against_the_dense_model(name: str, gate: str) -> None:
    sparsity = None if gate == "none" else 0.6
    config = SNELLConfig(r=4, gate=gate, sparsity=sparsity, modules_to_save=["classifier"] if name == "vit" else None)
    adapted, dense = get_peft_model(tiny(name).double(), config).eval(), tiny(name).double().eval()
    randomize(adapted)
    layers, batch = layers_of(adapted), batch_of(name)
    assert len(layers) >= 8
    targets: list[torch.Tensor] = []
    for key, layer in layers.items():
        module: Any = dense.get_submodule(key)
        own = [leaf.weight.detach().clone().requires_grad_() for leaf in layer.points("default")]
        targets += own
        update = dense_update(*own, sparsity or 0.0, gate)
        weight = module.weight.detach()
        del module.weight
        module.weight = weight + (update.T if name == "gpt2" else update)
    torch.testing.assert_close(logits(adapted, batch), logits(dense, batch), atol=1e-10, rtol=0.0)
    for each in (adapted, dense):
        logits(each, batch).sin().sum().backward()
    found = [leaf.weight.grad for layer in layers.values() for leaf in layer.points("default")]
    for mine, theirs in zip(found, targets, strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-10, rtol=0.0)
    expected = logits(dense, batch)
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-10, rtol=0.0)


def test_published_count_and_start() -> None:
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=2))
    model = get_peft_model(vit, SNELLConfig(modules_to_save=["classifier"]))
    assert sum(p.numel() for key, p in model.named_parameters() if "snell_" in key) == 1_327_104
    torch.manual_seed(0)
    layer = next(iter(layers_of(get_peft_model(tiny("llama"), SNELLConfig())).values()))
    for leaf in layer.points("default"):
        bound = (leaf.weight[0].numel()) ** -0.5  # fan-in of a tensor (2, n, 4) is 4 n
        assert 0.8 * bound < float(leaf.weight.detach().abs().max()) <= bound
    assert float(layer.update("default").abs().max()) < 1e-2


def test_drop_path_takes_whole_samples() -> None:
    model = get_peft_model(tiny("llama"), SNELLConfig(r=4, drop_path=0.5, target_modules=["q_proj"]))
    randomize(model)
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(64, 3, 16)
    full = layer.eval().added("default", x)
    dropped = layer.train().added("default", x)
    is_zero = (dropped == 0).flatten(1).all(1)
    assert 10 < int(is_zero.sum()) < 54
    torch.testing.assert_close(dropped[~is_zero], 2 * full[~is_zero])


@pytest.mark.capability("4-bit base", "snell")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base() -> None:
    model = get_peft_model(quantised_llama(), SNELLConfig(r=4, sparsity=0.5))
    model(**inputs("llama")).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_points_stay_in_fp32() -> None:
    model = get_peft_model(tiny("llama").bfloat16(), SNELLConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # as TRL does
    model.train()
    assert {leaf.weight.dtype for layer in layers_of(model).values() for leaf in layer.points("default")} == {
        torch.float32
    }


# The allocation


def test_allocate() -> None:
    sizes = torch.tensor([100, 100, 100, 100])
    assert allocate(torch.tensor([1.0, 2.0, 3.0, 4.0]), sizes, 100).tolist() == [10, 20, 30, 40]
    # the last one is full, and what is over goes to the others in proportion, of which the third is full then
    assert allocate(torch.tensor([1.0, 2.0, 6.0, 91.0]), sizes, 260).tolist() == [20, 40, 100, 100]
    assert allocate(torch.zeros(4), sizes, 40).tolist() == [10, 10, 10, 10]
    assert allocate(torch.tensor([0.0, 1.0, 0.0, float("nan")]), sizes, 50).tolist() == [1, 50, 1, 1]
    assert allocate(torch.tensor([0.0, 1.0, 0.0, 0.0]), sizes, 250).tolist() == [50, 100, 50, 50]
    assert allocate(torch.rand(4), sizes, 400).tolist() == [100] * 4
    assert [sparsity_at(step, 10, 0.8) for step in (0, 10, 25)] == pytest.approx([0.01, 0.8, 0.8])
    assert sparsity_at(5, 10, 0.8) == pytest.approx(0.8 - 0.79 / 8)


def adaptive(total: int = 6) -> Any:
    config = SNELLConfig(r=4, sparsity=0.8, allocation="adaptive", total_steps=total, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config).train()
    randomize(model)
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(**inputs("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def kept_of(model: nn.Module) -> list[int]:
    return [int(layer.points("default")[0].kept) for layer in layers_of(model).values()]


def test_the_allocation_follows_the_sensitivities() -> None:
    """Every step of a training, with the moving averages and the budget computed here."""
    model, total = adaptive(), 6
    layers = list(layers_of(model).values())
    sizes = torch.tensor([layer.points("default")[0].size for layer in layers])
    assert kept_of(model) == [first_kept(size) for size in sizes.tolist()]
    optimizer, averages = optimizer_of(model), {}
    for step in range(1, total + 3):
        model(**inputs("llama", seed=step)).loss.backward()
        scores, before = [], kept_of(model)
        for layer in layers:
            score = 0.0
            for leaf in layer.points("default"):
                now = (leaf.weight * leaf.weight.grad).abs().detach()
                first, second = averages.get(leaf, (0.0, 0.0))
                first = 0.85 * first + 0.15 * now
                averages[leaf] = first, 0.85 * second + 0.15 * (now - first).abs()
                score += float((averages[leaf][0] * averages[leaf][1]).mean())
            scores.append(score)
        optimizer.step()
        optimizer.zero_grad()
        share = 0.8 + (0.01 - 0.8) * (1 - step / total) ** 3
        expected = allocate(torch.tensor(scores), sizes, (1 - share) * float(sizes.sum())).tolist()
        if step <= total:
            assert kept_of(model) == pytest.approx(expected, abs=1)
            assert sum(kept_of(model)) == pytest.approx((1 - share) * float(sizes.sum()), abs=len(layers) + 1)
        else:
            assert kept_of(model) == before  # the training is longer than it said
    assert len(set(kept_of(model))) > 3
    for layer in layers:
        update = layer.update("default")
        assert int((update != 0).sum()) == pytest.approx(int(layer.points("default")[0].kept), abs=1)


def test_a_training_is_resumed(tmp_path: Path) -> None:
    whole, part = adaptive(), adaptive()
    train(whole, optimizer_of(whole), range(5))
    first = optimizer_of(part)
    train(part, first, range(3))
    part.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(tiny("llama"), str(tmp_path), is_trainable=True).train()
    assert kept_of(again) == kept_of(part)
    second = optimizer_of(again)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(again, second, range(3, 5))
    assert kept_of(again) == kept_of(whole)
    assert {int(layer.points("default")[0].progress) for layer in layers_of(again).values()} == {5}


def test_copies_are_driven_by_their_own_optimizers() -> None:
    model = adaptive()
    train(model, optimizer_of(model), range(2))
    before, copied = kept_of(model), copy.deepcopy(model)
    train(copied, optimizer_of(copied), range(2))
    assert kept_of(model) == before != kept_of(copied)


def test_a_skipped_step_does_not_count() -> None:
    model = adaptive()
    optimizer: Any = optimizer_of(model)
    before = kept_of(model)
    optimizer.found_inf = torch.ones(())  # what a GradScaler tells a fused optimizer
    leaf = next(iter(layers_of(model).values())).points("default")[0]
    leaf.weight.grad = torch.ones_like(leaf.weight)
    leaf.after_step(optimizer, {}, False)
    assert kept_of(model) == before and not leaf.progress.any()


def test_shards_are_refused() -> None:
    """FSDP leaves each process a part of the points, flat."""
    model = adaptive()
    leaf = next(iter(layers_of(model).values())).points("default")[1]
    leaf.weight = nn.Parameter(leaf.weight.detach().flatten()[:10])
    leaf.weight.grad = torch.ones_like(leaf.weight)
    with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\).*`allocation='uniform'`"):
        torch.optim.SGD([leaf.weight], lr=0.1).step()


def test_an_optimizer_that_is_not_seen_is_told_of(tmp_path: Path) -> None:
    model = adaptive()
    model(**inputs("llama")).loss.backward()
    with pytest.warns(UserWarning, match=r"No optimizer step of the adapter 'default' was seen"):
        model.save_pretrained(str(tmp_path))


# Conversion


@pytest.mark.capability("conversion to a sparse adapter", "snell")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_a_sparse_adapter(name: str, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny(name).double(), SNELLConfig(r=4, sparsity=0.8, task_type="CAUSAL_LM")).eval()
    randomize(adapted)
    about_of("SNELL").exports()["sparse"](adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name).double(), tmp_path, autocast_adapter_dtype=False).double().eval()
    assert type(loaded.peft_config["default"]).__name__ == "SparseFTConfig"
    # a sparse adapter keeps its values in fp32
    torch.testing.assert_close(logits(loaded, batch_of(name)), logits(adapted, batch_of(name)), atol=1e-6, rtol=0.0)
    with pytest.raises(ValueError, match=r"no adapter named 'other'.*\['default'\]"):
        about_of("SNELL").exports()["sparse"](adapted, tmp_path, "other")
    dense = get_peft_model(tiny(name), SNELLConfig(gate="none"))
    with pytest.raises(ValueError, match="`gate='none'` an update has no zeros: merge it"):
        about_of("SNELL").exports()["sparse"](dense, tmp_path)


def test_what_is_shown(tmp_path: Path) -> None:
    for model in (adaptive(), get_peft_model(tiny("llama"), SNELLConfig(r=4, sparsity=0.8))):
        randomize(model)
        model.save_pretrained(str(tmp_path))
        rows = {row["module"]: row for row in inspection.describe(str(tmp_path))["modules"]}
        layers = layers_of(model)
        assert rows.keys() == layers.keys()
        for key, layer in layers.items():
            update = layer.update("default")
            assert rows[key]["rank"] == 4 and rows[key]["size"] == update.numel()
            assert rows[key]["tuned"] == pytest.approx(int((update != 0).sum()), abs=1)
            assert rows[key]["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
        assert about_of("SNELL").pictures(model, "default")
    with pytest.raises(ValueError, match="no SNELL adapter named 'other'"):
        about_of("SNELL").pictures(model, "other")


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 3}, "`r` must be an even number of at least 2, .*got 3"),
        ({"r": 0}, "`r` must be an even number"),
        ({"sparsity": 0.0}, "`sparsity` must be above 0 and below 1, got 0.0.*`gate='none'`"),
        ({"sparsity": 1.0}, "`sparsity` must be above 0 and below 1, got 1.0"),
        ({"gate": "soft"}, "`gate` must be one of 'shrink', 'weight', 'none', got 'soft'"),
        ({"gate": "none", "sparsity": 0.5}, "`sparsity` has no effect with `gate='none'`"),
        ({"gate": "none", "allocation": "adaptive"}, "`allocation` has no effect with `gate='none'`"),
        ({"allocation": "global"}, "`allocation` must be 'uniform' or 'adaptive'"),
        ({"allocation": "adaptive"}, "needs `total_steps`.*got None"),
        ({"total_steps": 5}, "`total_steps` has no effect with `allocation='uniform'`"),
        ({"drop_path": 1.0}, "`drop_path` must be at least 0 and below 1"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SNELLConfig(**fields)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"SNELL is for Linear modules.*not a LlamaRMSNorm"):
        get_peft_model(tiny("llama"), SNELLConfig(target_modules=["norm"]))
    model = adaptive()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"LBFGS\.step was given a closure.*without a closure"):
        optimizer.step(lambda: model(**inputs("llama")).loss)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 6}))
    with pytest.raises(RuntimeError, match=r"(?s)does not fit this model.*size mismatch"):
        peft_ext.load(tmp_path, tiny("llama"))


def test_the_command_line_writes_a_sparse_adapter(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, SNELLConfig(r=4, sparsity=0.8, task_type="CAUSAL_LM")).eval()
    randomize(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert not main(["export", str(tmp_path / "adapter"), "--to", "sparse", "--output", str(tmp_path / "out")])
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded, inputs("llama")), logits(adapted, inputs("llama")))


def test_an_empty_batch() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), SNELLConfig(r=4, target_modules=["0"]))
    assert model(torch.zeros(0, 8)).shape == (0, 2)
