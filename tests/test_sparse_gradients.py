"""Several sparse adapters on one module: outputs and gradients are those of plain autograd on the whole weight in fp64.

Every kind of module, on every route that a product can take, with one to three adapters that are apart, overlap or
nearly fill the weight, in either order, of which some are trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import SparseFTConfig
from peft_ext.delta import SparseDelta
from peft_ext.sparse import Gradient, random_indices
from peft_ext.tuners.sparse_ft.model import deltas


NAMES = ("first", "second", "third")


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def modules() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(6, 8), torch.randn(2, 3, 6)),
        "linear 2-D": (nn.Linear(6, 8, bias=False), torch.randn(5, 6)),
        "conv1d": (Conv1D(8, 6), torch.randn(2, 3, 6)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 5, 5)),
        "embedding": (nn.Embedding(9, 5, padding_idx=2), torch.tensor([[1, 2, 3], [1, 8, 0]])),
        "embedding by frequency": (nn.Embedding(9, 5, scale_grad_by_freq=True), torch.tensor([[1, 2, 1], [1, 8, 0]])),
        "layer norm": (nn.LayerNorm(12), torch.randn(2, 3, 12)),
        "rms norm": (nn.RMSNorm(12), torch.randn(4, 12)),
    }


ROUTES = {
    "written": (torch.float64, 1e-9),
    "written fp32": (torch.float32, 1e-5),
    "product": (torch.float64, 1e-9),  # a hook on the module
    "half": (torch.bfloat16, 3e-2),
    "autocast": (torch.float32, 3e-2),
    "compiled": (torch.float64, 1e-9),  # the plain operations that compilers and `torch.func` get
}


def supports(size: int, overlap: str) -> list[torch.Tensor]:
    """Those of three adapters."""
    generator = torch.Generator().manual_seed(3)
    if overlap == "dense":
        return [random_indices(max(1, size * 6 // 10), size, generator) for _ in range(3)]
    places = torch.randperm(size, generator=generator)
    third = max(1, size // 4)
    parts = [places[i * third : (i + 1) * third] for i in range(3)]
    if overlap == "overlapping":
        parts = [parts[0], torch.cat([parts[0][: third // 2 + 1], parts[1]]), torch.cat([parts[0], parts[2]])]
    return [part.sort().values for part in parts]


def adapted(module: nn.Module, overlap: str, dtype: torch.dtype) -> PeftModel:
    parameters = {"module": module.weight, "module.bias": getattr(module, "bias", None)}
    own = {name: supports(p.numel(), overlap) for name, p in parameters.items() if p is not None}
    model: Any = Holder(module.to(dtype))
    for number, name in enumerate(NAMES):
        config = SparseFTConfig(selection="given", target_modules=["module"])
        config.use_support({key: parts[number] for key, parts in own.items()})
        if number == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for place, (_, leaf) in enumerate(deltas(model, name)):
            generator = torch.Generator().manual_seed(10 * number + place)
            leaf.weight.data = (
                torch.randn(leaf.k, generator=generator).to(torch.promote_types(dtype, torch.float32)) / 2
            )
    return model


@dataclass
class Reference:
    """Plain autograd in fp64, with the whole weight a leaf of the graph."""

    output: torch.Tensor
    grad_x: torch.Tensor | None
    whole: dict[str, torch.Tensor]


def reference(
    module: nn.Module, model: PeftModel, active: list[str], x: torch.Tensor, weights: torch.Tensor
) -> Reference:
    parameters = {key: p.detach().double().clone() for key, p in module.named_parameters()}
    for name in active:
        for key, leaf in deltas(model, name):
            own = parameters["bias" if key.endswith(".bias") else "weight"].view(-1)
            own.index_add_(0, leaf.indices().long(), leaf.weight.detach().double())
    for parameter in parameters.values():
        parameter.requires_grad_()
    inputs = x.double().clone().requires_grad_() if x.is_floating_point() else x
    output = torch.func.functional_call(module, parameters, (inputs,))
    (output * weights).sum().backward()
    grads = {key: p.grad for key, p in parameters.items() if p.grad is not None}
    return Reference(output.detach(), inputs.grad if x.is_floating_point() else None, grads)


def cases() -> Iterator[tuple[list[str], list[str]]]:
    """The active adapters in their order, and those that are trained."""
    for count in (1, 2, 3):
        for active in {NAMES[:count], NAMES[:count][::-1]}:
            yield list(active), list(active)
            if count > 1:
                for trained in active:
                    yield list(active), [trained]


def run(model: PeftModel, route: str, x: torch.Tensor) -> torch.Tensor:
    if route == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)
    if route == "compiled":
        return torch.compile(model.base_model, backend="eager", fullgraph=True)(x)
    return model(x)


def combinations() -> Iterator[tuple[str, str, str]]:
    """Module, route and overlap; what takes long is not run for every overlap."""
    for kind, route in itertools.product(modules(), ROUTES):
        yield kind, route, "overlapping"
        if route in ("written", "product"):
            yield kind, route, "dense"
        if kind == "linear" and route != "compiled":
            yield kind, route, "apart"


@pytest.mark.parametrize(("kind", "route", "overlap"), list(combinations()))
def test_several_adapters_have_the_gradients_of_the_whole_weight(kind: str, route: str, overlap: str) -> None:
    dtype, tolerance = ROUTES[route]
    module, x = modules()[kind]
    model = adapted(module, overlap, dtype)
    if route == "product":
        module.register_forward_hook(lambda *args: None)
    x = x.to(dtype) if x.is_floating_point() else x
    before = {key: p.clone() for key, p in module.named_parameters()}
    torch._dynamo.reset()
    todo = list(cases()) if route != "compiled" else [(list(NAMES[:2]), ["first"]), (list(NAMES[::-1]), list(NAMES))]
    for active, trained in todo:
        model.base_model.set_adapter(active)
        model.zero_grad()
        for name in NAMES:
            for _, leaf in deltas(model, name):
                leaf.weight.requires_grad_(name in trained)
        inputs = x.clone().requires_grad_(x.is_floating_point())
        output = run(model, route, inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        weights = weights.to(output.dtype).double()
        right = reference(module, model, active, x, weights)
        (output.double() * weights).sum().backward()
        close(output, right.output, tolerance)
        if right.grad_x is not None:
            close(inputs.grad, right.grad_x, tolerance)
        for name in NAMES:
            for key, leaf in deltas(model, name):
                if name not in trained:
                    assert leaf.weight.grad is None
                    continue
                whole = right.whole["bias" if key.endswith(".bias") else "weight"].flatten()
                close(leaf.weight.grad, whole[leaf.indices().long()], tolerance)
        assert all(torch.equal(p, before[key]) for key, p in module.named_parameters())


def close(found: torch.Tensor | None, right: torch.Tensor, tolerance: float) -> None:
    assert found is not None
    assert (found.double() - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))


@dataclass
class Recorder:
    """A tracker that writes down what it is shown."""

    seen: list[tuple[Gradient, torch.Tensor]] = field(default_factory=list)

    def enter(self, layer: Any) -> None:
        """It is told of the layer that it is on."""

    def was_written(self, leaf: SparseDelta) -> bool:
        """Nobody else writes the indices here."""
        return False

    def see(self, values: torch.Tensor) -> None:
        """A forward reads the values."""

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        self.seen.append((gradient, values))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_observers_see_the_gradient_of_the_whole_weight(kind: str) -> None:
    module, x = modules()[kind]
    model = adapted(module, "overlapping", torch.float64)
    x = x.double() if x.is_floating_point() else x
    for active in itertools.permutations(NAMES):
        model.base_model.set_adapter(list(active))
        leaves = {name: dict(deltas(model, name))["module"] for name in active}
        for leaf in leaves.values():
            leaf.tracker = Recorder()
        output = model(x)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        right = reference(module, model, list(active), x, weights).whole["weight"].flatten()
        (output * weights).sum().backward()
        for name, leaf in leaves.items():
            ((gradient, values),) = leaf.tracker.seen
            close(values, right[leaf.indices().long()], 1e-9)
            shuffled = torch.randperm(len(right), generator=torch.Generator().manual_seed(len(name)))
            close(gradient.at(shuffled), right[shuffled], 1e-9)
            close(right[gradient.top_indices(5)].abs(), right.abs().topk(5).values.sort().values, torch.inf)
            assert set(gradient.top_indices(5).tolist()) == set(right.abs().float().topk(5).indices.tolist())


def test_a_task_trained_on_a_frozen_language_is_the_same_in_both_orders() -> None:
    """LT-SFT's recipe: the language adapter is active and frozen while the one of the task is trained."""
    losses = []
    for order in (["first", "second"], ["second", "first"]):
        module, x = modules()["linear"]
        model = adapted(module, "overlapping", torch.float64)
        model.base_model.set_adapter(order)
        for _, leaf in deltas(model, "first"):
            leaf.weight.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        target = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(20):
            loss = (model(x.double()) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_quantised_base() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(4, 64)
    linear(x)  # quantises
    model: Any = Holder(linear)
    for number, name in enumerate(NAMES[:2]):
        config = SparseFTConfig(selection="given", target_modules=["module"])
        config.use_support({"module": supports(64 * 32, "overlapping")[number]})
        model = get_peft_model(model, config, adapter_name=name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
        for _, leaf in deltas(model, name):
            leaf.weight.data.normal_()
    model.base_model.set_adapter(["second", "first"])
    whole = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state).double()
    for name in NAMES[:2]:
        for _, leaf in deltas(model, name):
            whole.view(-1).index_add_(0, leaf.indices().long(), leaf.weight.detach().double())
    whole.requires_grad_()
    right = x.double() @ whole.T
    right.square().sum().backward()
    output = model(x)
    output.square().sum().backward()
    close(output, right.detach(), 1e-4)
    for name in NAMES[:2]:
        for _, leaf in deltas(model, name):
            close(leaf.weight.grad, whole.grad.flatten()[leaf.indices().long()], 1e-4)
