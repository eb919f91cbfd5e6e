"""LoRA-SB and LoRA-XS: their starts against whole decompositions, the gradient, conversions, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, logits, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from test_integrations import quantised_llama
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import peft_ext
from peft_ext import LoraSBConfig, inspection
from peft_ext.calibrate import measure
from peft_ext.core import about_of
from peft_ext.tuners.lora_sb import LoraSBLinear
from peft_ext.tuners.lora_sb.layer import factors, leading_factors


def batch_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs(name, seed=seed).items()}


def calibrated(name: str, scale: float = 1.0, **fields: Any) -> tuple[Any, LoraSBConfig]:
    model = tiny(name).double()
    config = LoraSBConfig(**{"r": 3, "step_size": 0.01, **fields})
    batches = [batch_of(name), batch_of(name, seed=1)]
    loss_fn = lambda model, batch: model(**batch).loss * scale
    return model, peft_ext.calibrate(model, config, batches, loss_fn, progress=False)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, LoraSBLinear)
    }


def gradients(name: str, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Of the sum of the losses of the two batches, by module, as `(out, in)`."""
    model: Any = tiny(name).double().train()
    for seed in (0, 1):
        model(**batch_of(name, seed=seed)).loss.backward()
    return {
        key: module.weight.grad.T if name == "gpt2" else module.weight.grad
        for key, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and module.weight.grad is not None
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_start_is_the_best_approximation_of_the_first_step(name: str) -> None:
    model, config = calibrated(name)
    adapted, steps = get_peft_model(model, config), gradients(name)
    assert len(layers_of(adapted)) > 4
    for key, layer in layers_of(adapted).items():
        leaf = layer.low_rank_core_matrix["default"]
        step = -0.01 * steps[key].sign()
        values = torch.linalg.svdvals(step)
        update = leaf.up @ leaf.weight @ leaf.down
        # Eckart and Young: no matrix of rank 3 is nearer than the values that are left out
        assert (step - update).norm().item() == pytest.approx(values[3:].norm().item(), abs=1e-6)
        assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 3
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(leaf.up.T @ leaf.up, eye, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(leaf.down @ leaf.down.T, eye, atol=1e-5, rtol=0.0)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    one, other = (get_peft_model(*calibrated("llama", scale=scale)) for scale in (1.0, 128.0))
    for key, layer in layers_of(one).items():
        updates = [leaf.up @ leaf.weight @ leaf.down for leaf in (layer.low_rank_core_matrix["default"],)]
        leaf = layers_of(other)[key].low_rank_core_matrix["default"]
        torch.testing.assert_close(updates[0], leaf.up @ leaf.weight @ leaf.down, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_output_and_gradient_against_the_dense_model(name: str) -> None:
    """W + B R A in float64; the gradient of R is B^T g A^T, g being that of the weight."""
    model, config = calibrated(name, **({"exclude_modules": ["pooler.dense"]} if name == "bert" else {}))
    adapted, dense = get_peft_model(model, config).eval(), tiny(name).double().eval()
    batch = batch_of(name)
    layers = layers_of(adapted)
    modules: dict[str, Any] = {key: dense.get_submodule(key) for key in layers}
    with torch.no_grad():
        for key, layer in layers.items():
            leaf = layer.low_rank_core_matrix["default"]
            leaf.weight.normal_(std=0.3)
            update = leaf.up @ leaf.weight @ leaf.down
            modules[key].weight += update.T if name == "gpt2" else update
    torch.testing.assert_close(logits(adapted, batch), logits(dense, batch), atol=1e-10, rtol=0.0)
    for each in (adapted, dense):
        each(**batch).loss.backward()  # type: ignore[operator]
    for key, layer in layers.items():
        leaf, grad = layer.low_rank_core_matrix["default"], modules[key].weight.grad
        grad = grad.T if name == "gpt2" else grad
        torch.testing.assert_close(leaf.weight.grad, leaf.up.T @ grad @ leaf.down.T, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), batch), logits(dense, batch), atol=1e-10, rtol=0.0)


def test_lora_xs_starts_at_the_weights() -> None:
    model = get_peft_model(tiny("llama"), LoraSBConfig(r=4, init_weights="weights"))
    for key, layer in layers_of(model).items():
        leaf, weight = (
            layer.low_rank_core_matrix["default"],
            tiny("llama").get_submodule(key).get_parameter("weight").detach(),
        )
        values = torch.linalg.svdvals(weight)
        assert (weight - leaf.up @ leaf.down).norm().item() == pytest.approx(values[4:].norm().item(), abs=1e-5)
        assert 0 < leaf.weight.abs().max() < 1e-4
        # the singular values are on the side of the input
        torch.testing.assert_close(leaf.up.T @ leaf.up, torch.eye(4), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(leaf.down @ leaf.down.T, values[:4].square().diag(), atol=1e-4, rtol=1e-4)
    base = logits(tiny("llama").eval(), inputs("llama"))
    torch.testing.assert_close(logits(model.eval(), inputs("llama")), base, atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("shape", [(96, 80), (80, 120)])
def test_power_iterations_find_the_leading_factors(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    weight = left * torch.linspace(1, 0.01, len(right)) @ right  # falls as slowly as that of weights
    down, values, up = leading_factors(weight, 4)
    best = torch.linalg.svdvals(weight)
    assert (weight - up * values @ down).norm() < 1.002 * best[4:].norm()
    torch.testing.assert_close(values, best[:4], atol=0.0, rtol=0.03)
    torch.testing.assert_close(up.T @ up, torch.eye(4), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-5, rtol=0.0)
    for first, second in zip(leading_factors(weight, 4), (down, values, up), strict=True):
        assert torch.equal(first, second)  # whatever was drawn meanwhile
    whole = factors(weight, 20)  # as large as a quarter of it
    assert all(torch.equal(a, b) for a, b in zip(leading_factors(weight, 20), whole, strict=True))


def test_published_count() -> None:
    with torch.device("meta"):
        mistral = MistralForCausalLM(MistralConfig(vocab_size=64))
    config = LoraSBConfig(r=96, init_weights="weights")
    assert get_peft_model(mistral, config).get_nb_trainable_parameters()[0] == 2_064_384


def test_factors_stay_in_fp32() -> None:
    model, config = calibrated("llama")
    adapted = get_peft_model(model.bfloat16(), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # as TRL does
    adapted.train()
    for layer in layers_of(adapted).values():
        leaf = layer.low_rank_core_matrix["default"]
        assert {leaf.up.dtype, leaf.down.dtype, leaf.weight.dtype} == {torch.float32}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.capability("conversion to LoRA", "low_rank_core")
def test_as_lora(name: str, tmp_path: Path) -> None:
    adapted = get_peft_model(*calibrated(name, task_type="CAUSAL_LM")).eval()
    peft_ext.save_as_lora(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name).double(), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(logits(loaded, batch_of(name)), logits(adapted, batch_of(name)), atol=1e-10, rtol=0.0)


def test_the_calibrated_config_on_disk(tmp_path: Path) -> None:
    """It can be calibrated in one place, and trained in another, on a quantised base too."""
    model, config = calibrated("llama")
    config.save_pretrained(str(tmp_path))
    loaded = LoraSBConfig.from_pretrained(str(tmp_path))
    expected = logits(get_peft_model(model, config).eval(), batch_of("llama"))
    found = logits(get_peft_model(tiny("llama").double(), loaded).eval(), batch_of("llama"))
    torch.testing.assert_close(found, expected)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(ValueError, match=r"(?s)calibration in .* is damaged:.*no factors of rank 2"):
        LoraSBConfig.from_pretrained(str(tmp_path))


@pytest.mark.capability("4-bit base", "low_rank_core")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base() -> None:
    calibrated = peft_ext.calibrate(quantised_llama(), LoraSBConfig(r=2), [inputs("llama")], progress=False)
    for config in (calibrated, LoraSBConfig(r=2, init_weights="weights")):
        model = get_peft_model(quantised_llama(), config)
        model(**inputs("llama")).loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_the_gradient_is_the_signed_sum() -> None:
    model: Any = tiny("llama").double()
    target = model.model.layers[0].self_attn.q_proj.weight
    batches = [batch_of("llama"), batch_of("llama", seed=1)]
    found = measure(model, {"q": target}, batches, kind="gradient", progress=False).of("q")
    expected = gradients("llama")["model.layers.0.self_attn.q_proj"].flatten().float()
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert bool((found < 0).any())
    with pytest.raises(ValueError, match="change their sign"):
        measure(model, {"q": target}, batches, kind="gradient", memory="pool", progress=False)


def test_what_is_shown(tmp_path: Path) -> None:
    adapted = get_peft_model(*calibrated("llama"))
    adapted.save_pretrained(str(tmp_path))
    rows = {row["module"]: row for row in inspection.describe(str(tmp_path))["modules"]}
    layers = layers_of(adapted)
    assert rows.keys() == layers.keys()
    for key, layer in layers.items():
        down, up = layer.low_rank("default")
        assert rows[key]["parameters"] == 9  # R; A and B are frozen
        assert rows[key]["rank"] == 3 and rows[key]["norm"] == pytest.approx((up @ down).norm().item(), rel=1e-5)
    assert about_of("LOW_RANK_CORE").pictures(adapted, "default")
    with pytest.raises(ValueError, match="no LoRA-SB adapter named 'other'"):
        about_of("LOW_RANK_CORE").pictures(adapted, "other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"step_size": 0.0}, "`step_size` must be above 0 and finite"),
        ({"step_size": float("inf")}, "`step_size` must be "),
        ({"calibrated": "yes"}, "`calibrated` must be True or False"),
        ({"init_weights": "svd"}, "`init_weights` must be True, False or 'weights'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSBConfig(**fields)


def test_what_does_not_fit_is_refused_before_the_model_changes() -> None:
    model, config = calibrated("llama")
    with pytest.raises(ValueError, match=r"peft_ext\.calibrate\(model, config, dataloader\)"):
        get_peft_model(tiny("llama"), LoraSBConfig(r=2))
    with pytest.raises(ValueError, match=r"calibrated for another model.*no factors that fit 'model\.layers\.0\."):
        get_peft_model(tiny("llama", hidden_size=32), config)
    with pytest.raises(ValueError, match=r"`r` is 17, and '.*' has \(16, .*lower `r`"):
        get_peft_model(tiny("llama"), LoraSBConfig(r=17, init_weights="weights"))
    with pytest.raises(TypeError, match=r"`init_weights='weights'` looks at no data"):
        peft_ext.calibrate(model, LoraSBConfig(init_weights="weights"), [batch_of("llama")], progress=False)
    with pytest.raises(TypeError, match=r"LoRA-SB is for Linear modules.*not a LlamaRMSNorm"):
        get_peft_model(tiny("llama"), LoraSBConfig(r=2, init_weights="weights", target_modules=["norm"]))


def test_an_adapter_without_factors_does_not_run(tmp_path: Path) -> None:
    get_peft_model(*calibrated("llama")).save_pretrained(str(tmp_path))
    empty = get_peft_model(tiny("llama"), PeftConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match="has no factors yet: load its weights"):
        empty(**inputs("llama"))


def test_a_cast_of_what_is_trained_alone() -> None:
    """As trainers do it; the factors are buffers."""
    model = get_peft_model(tiny("llama").bfloat16(), LoraSBConfig(r=3, init_weights="weights"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.eval()(**inputs("llama"))
    parameters = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    torch.func.functional_call(model.train(), parameters, kwargs=inputs("llama"))


def test_a_saved_adapter_needs_no_decomposition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through transformers, too, whose loader reads the config as PEFT's."""
    adapted = get_peft_model(tiny("llama"), LoraSBConfig(r=4, init_weights="weights")).eval()
    adapted.save_pretrained(str(tmp_path))
    monkeypatch.setattr("peft_ext.tuners.lora_sb.layer.leading_factors", None)
    theirs = tiny("llama")
    theirs.load_adapter(str(tmp_path))
    for loaded in (theirs.eval(), PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()):
        torch.testing.assert_close(logits(loaded, inputs("llama")), logits(adapted, inputs("llama")))


def test_lora_xs_starts_at_the_weights_of_the_base_while_another_is_merged() -> None:
    model = get_peft_model(tiny("llama").double(), LoraSBConfig(r=3, init_weights=False), adapter_name="first")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", LoraSBConfig(r=3, init_weights="weights"))
    for layer in layers_of(model).values():
        values = torch.linalg.svdvals(layer.get_base_layer().weight)[:3]
        found = layer.low_rank_core_matrix["second"].down.norm(dim=1)
        torch.testing.assert_close(found.double(), values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sensitivity", "magnitude", "snip"])
def test_only_signed_sums_of_gradients_make_a_start(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"`kind='{kind}'` is not what this LoraSBConfig goes by.*'gradient'"):
        peft_ext.calibrate(tiny("llama"), LoraSBConfig(r=3), [inputs("llama")], kind=kind, progress=False)


def test_a_rank_that_is_too_large_is_refused_before_the_data_are_read() -> None:
    def data() -> Any:
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=r"`r` is 999, and '.*' has .* inputs and outputs"):
        peft_ext.calibrate(tiny("llama"), LoraSBConfig(r=999), data(), progress=False)


def test_lora_xs_takes_no_step() -> None:
    with pytest.raises(ValueError, match="`step_size` has no effect with `init_weights='weights'`"):
        LoraSBConfig(init_weights="weights", step_size=1.0)
