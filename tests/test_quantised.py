"""Every method on bitsandbytes' bases, and the gradient of a weight that has none; the table: `tests/quantised.py`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import inputs, loss
from peft import get_peft_model
from quantised import CASES, CONFORMING, dense_copy, life, load_base
from torch import nn

import peft_ext
from peft_ext import SNELLConfig, SparseFTConfig, SSFConfig
from peft_ext.calibrate import measure
from peft_ext.core import QuantisedWeight, dequantised, in_order, is_quantised, weight_of


pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quant_state.*", "ignore:.*ecompile.*", "ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]
KEPT_APART = "grid again would lose most of the small sparse changes"
REFUSALS = {
    **{(name, "merge"): KEPT_APART for name in CASES if CASES[name].method.prefix in ("sparse_ft_", "spt_")},
    ("binary_adapter", "dequantise"): "load it on the dequantised base",
}


@pytest.mark.capability("4-bit base", "pasta", "spt", "vqt", "vpt", "unipt")
@pytest.mark.capability("8-bit base", *CONFORMING)
@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "lora"])
def test_a_life_on_a_quantised_base(name: str, kind: str) -> None:
    for stage, outcome in life(name, kind).items():
        if (name, stage) in REFUSALS:
            assert outcome.startswith("refused") and REFUSALS[name, stage] in outcome, (stage, outcome)
        else:
            assert outcome == "works", (stage, outcome)


@pytest.mark.parametrize("kind", ["sensitivity", "magnitude", "snip", "fisher"])
def test_scores_are_those_of_the_dequantised_weights(kind: str) -> None:
    base = load_base("llama", "bnb-4bit")
    with torch.no_grad():  # a forward that may reorder the weights, which rounds their scales
        base(**inputs("llama"))
    dense = dense_copy("llama", base)
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    batches = [inputs("llama", seed=seed) for seed in (1, 2)]

    def scores(model: nn.Module) -> Any:
        candidates = {name: weight_of(model.get_submodule(name)) for name in names}
        return measure(model, candidates, batches, kind=kind, progress=False)

    found, right = scores(base), scores(dense)
    for name in names:
        assert is_quantised(base.get_submodule(name)) and not is_quantised(dense.get_submodule(name))
        torch.testing.assert_close(found.of(name), right.of(name), atol=1e-6, rtol=2e-3)


def test_a_weight_that_is_used_twice_has_one_gradient() -> None:
    base = load_base("llama", "bnb-4bit")
    linear = base.model.layers[0].mlp.gate_proj
    weight = QuantisedWeight.of(linear)
    assert weight.shape == (64, 64) and weight.untyped_storage().nbytes() == 4
    handle = weight.attach()
    x = torch.randn(2, 5, 64, requires_grad=True)
    with in_order(base):
        (linear(x).sin().sum() + linear(2 * x).cos().sum()).backward()
    plain = dequantised("", linear).double().requires_grad_()
    y = x.detach().double().requires_grad_()
    ((y @ plain.T).sin().sum() + (2 * y @ plain.T).cos().sum()).backward()
    assert weight.grad is not None and plain.grad is not None and x.grad is not None and y.grad is not None
    torch.testing.assert_close(weight.grad.double(), plain.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert not linear(x.detach()).requires_grad


def test_a_calibration_leaves_the_base_as_it_was() -> None:
    base = load_base("llama", "bnb-4bit")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    config = SparseFTConfig(selection="sensitivity", num_tunable_weights=64)
    peft_ext.calibrate(base, config, [inputs("llama")], progress=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())
    assert not any("_peft_ext_may_reorder" in vars(module) for module in base.modules())


@pytest.mark.parametrize("config", [SSFConfig(), SNELLConfig(r=2)], ids=["ssf", "snell"])
def test_gradients_after_an_evaluation(config: object) -> None:
    """bitsandbytes reorders weights for some CPUs in an evaluation, and then has no gradient."""
    model = get_peft_model(load_base("llama", "bnb-4bit"), copy.copy(config)).train()  # type: ignore[arg-type]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss(model, inputs("llama")).backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        return [grad.clone() for grad in found if grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(**inputs("llama"))
    model.train()
    after = gradients()
    assert len(before) == len(after) > 0
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    flags = [getattr(m, "support_avx512bf16_for_cpu", None) for m in load_base("llama", "bnb-4bit").modules()]
    model.unload()
    assert [getattr(m, "support_avx512bf16_for_cpu", None) for m in model.base_model.model.modules()] == flags


def test_what_cannot_be_dequantised_says_how_to_calibrate() -> None:
    class Packed(nn.Module):
        weight = "of another library"

    with pytest.raises(ValueError, match=r"(?s)The weight of 'fc', a Packed, cannot be dequantised.*calibrate\(dense"):
        dequantised("fc", Packed())
