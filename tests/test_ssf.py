"""The maths of SSF against `y = gamma * op(x) + beta` in plain autograd, and what the issue promises of it."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import tiny
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from peft_ext import SSFConfig, core
from peft_ext.training.toys import kept_for_backward
from peft_ext.tuners.ssf import ScaledLinear, ScaleShift, SSFLayer, functional


class Net(nn.Module):
    """One operation, and a parameter that shows in which precision the model around it works."""

    def __init__(self, op: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.op = op
        self.other = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


def _tokens() -> torch.Tensor:
    return torch.tensor([[0, 3, 5], [1, 0, 6]])


# name: operation, shape of its input (None: token ids), channel dimension of its output
OPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, int]] = {
    "linear": (lambda: nn.Linear(3, 5), (4, 3), 1),
    "linear_no_bias": (lambda: nn.Linear(3, 5, bias=False), (2, 4, 3), 2),
    "linear_3d": (lambda: nn.Linear(3, 5), (2, 4, 3), 2),
    "linear_few_rows": (lambda: nn.Linear(3, 5), (2, 3), 1),
    "linear_one_row": (lambda: nn.Linear(1, 5), (1,), 0),
    "linear_no_row": (lambda: nn.Linear(3, 5), (0, 3), 1),
    "conv1d_gpt2": (lambda: Conv1D(5, 3), (2, 4, 3), 2),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5), 1),
    "conv1d_unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 5), 0),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (2, 4, 5, 5), 1),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), (2, 4, 5, 5), 1),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 4), 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 4, 4), 1),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), 1),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 1),
    "transposed2d_groups": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, output_padding=1, bias=False),
        (2, 4, 3, 3),
        1,
    ),
    "transposed3d_groups": (lambda: nn.ConvTranspose3d(6, 3, 2, groups=3), (2, 6, 2, 2, 2), 1),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), None, 2),
    "embedding_gemma": (lambda: Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=2.5), None, 2),
    "embedding_bart": (lambda: BartScaledWordEmbedding(7, 4, 0, embed_scale=2.0), None, 2),
    "layer_norm": (lambda: nn.LayerNorm(5), (2, 4, 5), 2),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(5, bias=False), (2, 4, 5), 2),
    "layer_norm_no_affine": (lambda: nn.LayerNorm(5, elementwise_affine=False), (2, 4, 5), 2),
    "layer_norm_2d": (lambda: nn.LayerNorm((4, 5)), (2, 4, 5), 2),
    "layer_norm_2d_no_affine": (lambda: nn.LayerNorm((4, 5), elementwise_affine=False), (2, 4, 5), 2),
    "layer_norm_channels_first": (lambda: ConvNextLayerNorm(4, data_format="channels_first"), (2, 4, 3, 3), 1),
    "layer_norm_channels_last": (lambda: ConvNextLayerNorm(4, data_format="channels_last"), (2, 3, 3, 4), 3),
    "rms_norm": (lambda: nn.RMSNorm(5), (2, 4, 5), 2),
    "rms_norm_llama": (lambda: LlamaRMSNorm(5), (2, 4, 5), 2),
    "rms_norm_one_row": (lambda: LlamaRMSNorm(5), (5,), 0),
    "rms_norm_gemma": (lambda: Gemma2RMSNorm(5), (2, 4, 5), 2),
    "rms_norm_t5": (lambda: T5LayerNorm(5), (2, 4, 5), 2),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3), 1),
    "group_norm_no_affine": (lambda: nn.GroupNorm(2, 4, affine=False), (2, 4, 3), 1),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (5, 4), 1),
    "batch_norm1d_long": (lambda: nn.BatchNorm1d(4), (5, 4, 3), 1),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3), 1),
    "batch_norm2d_no_affine": (lambda: nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3), 1),
}
# those norms compute in float32 whatever they are given
SINGLE_PRECISION = {"rms_norm_one_row": 1e-5, "rms_norm_llama": 1e-5, "rms_norm_gemma": 1e-5, "rms_norm_t5": 1e-5}
RMS_NORMS = {"rms_norm", *SINGLE_PRECISION}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor, int]:
    """An operation with random parameters, an input for it, and the channel dimension of its output."""
    build, shape, dim = OPS[name]
    op = build()
    models.randomize(op)
    op = op.to(dtype).eval().requires_grad_(False)
    return op, _tokens() if shape is None else torch.randn(shape, dtype=dtype), dim


def adapt(op: nn.Module, dtype: torch.dtype = torch.float64, **config: Any) -> PeftModel:
    """The operation under SSF with a shift wherever the method has one; in eval mode."""
    config = {"shift": True, **config}
    return get_peft_model(Net(copy.deepcopy(op), dtype), SSFConfig(target_modules=["op"], **config)).eval()


def layer_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, SSFLayer))


def channels(scale: torch.Tensor) -> torch.Tensor:
    """Scales of all kinds: zero, on either side of the limits of all dtypes, negative, ordinary."""
    kinds = torch.tensor([0.0, -1.3, 1e-5, 0.7, 1e-9, 1.1, -1e-2, 2.0], dtype=scale.dtype)
    return kinds.repeat(-(-len(scale) // 8))[: len(scale)]


@torch.no_grad()
def set_vectors(layer: Any, adapter: str = "default", plain: bool = False) -> None:
    leaf = layer.ssf_scale[adapter]
    leaf.weight.copy_(torch.randn_like(leaf.weight) * 0.3 if plain else channels(leaf.weight) - 1)
    if adapter in layer.ssf_shift:
        layer.ssf_shift[adapter].weight.normal_()


def expected(
    op: nn.Module, x: torch.Tensor, dim: int, *vectors: tuple[torch.Tensor, torch.Tensor | None]
) -> torch.Tensor:
    """The equation itself, for each adapter in turn."""
    y = op(x)
    shape = [1] * y.ndim
    shape[dim] = -1
    for gamma, beta in vectors:
        y = gamma.view(shape) * y
        if beta is not None:
            y = y + beta.view(shape)
    return y


def vectors_of(layer: Any, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor | None]:
    gamma = (layer.ssf_scale[adapter].weight + 1).detach().requires_grad_()
    if adapter not in layer.ssf_shift:
        return gamma, None
    return gamma, layer.ssf_shift[adapter].weight.detach().clone().requires_grad_()


def gradients(output: torch.Tensor, *leaves: torch.Tensor | None) -> list[torch.Tensor]:
    """Gradients of a loss in which all elements of the output have different weights."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((weights * output).sum(), [leaf for leaf in leaves if leaf is not None]))


def assert_close(actual: Any, reference: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, reference, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- one operation


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("recover", [True, False], ids=["recover", "keep"])
@pytest.mark.parametrize("name", OPS)
def test_output_and_gradients(name: str, recover: bool, training: bool) -> None:
    op, x, dim = make(name)
    tolerance = SINGLE_PRECISION.get(name, 1e-9)
    model = adapt(op, recover=recover).train(training)
    op.train(training and not isinstance(op, _BatchNorm))  # whose statistics stay frozen
    layer = layer_of(model)
    set_vectors(layer)
    gamma, beta = vectors_of(layer)
    assert beta is not None
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    reference = expected(op, x, dim, (gamma, beta))
    output = model(x)
    assert output.dtype == reference.dtype
    assert_close(output, reference, tolerance)
    leaves = [layer.ssf_scale["default"].weight, layer.ssf_shift["default"].weight]
    assert_close(gradients(output, *inputs, *leaves), gradients(reference, *inputs, gamma, beta), tolerance)
    assert_close(dict(layer.base_layer.named_buffers()), dict(op.named_buffers()), tolerance)  # running statistics


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which channels are kept is looked for in one forward of `LOOK_EVERY`."""
    monkeypatch.setattr(functional, "watches_sparingly", lambda output: True)


@pytest.mark.parametrize("name", ["linear", "linear_3d", "conv2d_groups", "layer_norm"])
def test_gradients_between_two_looks(name: str, as_on_a_gpu: None) -> None:
    """In every step those of a dense reference; and a second adapter has channels of its own that are kept."""
    op, x, dim = make(name)
    model = adapt(op).train()
    model.add_adapter("other", SSFConfig(target_modules=model.peft_config["default"].target_modules))
    layer = layer_of(model)
    set_vectors(layer)  # with zeros
    for adapter in ["default"] * (functional.LOOK_EVERY + 1) + ["other", "default"]:
        model.set_adapter(adapter)
        leaves = [layer.ssf_scale[adapter].weight, layer.ssf_shift[adapter].weight]
        gamma, beta = vectors_of(layer, adapter)
        actual = gradients(model(x), *leaves)
        assert_close(actual, gradients(expected(op, x, dim, (gamma, beta)), gamma, beta), 1e-9)


def test_channels_lost_between_two_looks_do_not_learn_and_are_told_of(as_on_a_gpu: None) -> None:
    watch, features = functional.OutputWatch(), torch.randn(6, 4, dtype=torch.float64)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    exact = features.sum(0)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(ScaleShift.apply(features, scale, None, watch).sum(), scale)[0]

    assert_close(gradient(), exact, 1e-9)
    with torch.no_grad():
        scale[:2] = torch.tensor([1e-12, 0.0])
    assert_close(gradient(), exact * torch.tensor([0.0, 0.0, 1.0, 1.0]), 1e-9)
    for _ in range(functional.LOOK_EVERY - 2):
        gradient()
    with pytest.warns(UserWarning, match="The scales of 2 channels .* did not learn"):
        assert_close(gradient(), exact, 1e-9)


def test_checkpointed_between_two_looks(as_on_a_gpu: None) -> None:
    """The backward computes again what the forward did, and must keep as many channels."""
    op, x, _ = make("linear")
    model = adapt(op).train()
    layer = layer_of(model)
    set_vectors(layer)
    leaves = [layer.ssf_scale["default"].weight, layer.ssf_shift["default"].weight]
    for step in range(functional.LOOK_EVERY + 1):
        if step == 4:
            set_vectors(layer, plain=True)  # none to be kept at the next look
        expected_gradients = torch.autograd.grad(model(x).square().sum(), leaves)
        again = checkpoint(model, x, use_reentrant=False).square().sum()
        assert_close(torch.autograd.grad(again, leaves), expected_gradients, 1e-9)


@pytest.mark.parametrize("name", [name for name in OPS if name not in {*SINGLE_PRECISION, "linear_no_row"}])
def test_gradcheck(name: str) -> None:
    op, x, _ = make(name)
    model = adapt(op)
    layer = layer_of(model)
    set_vectors(layer)

    def run(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {"ssf_scale.default.weight": scale, "ssf_shift.default.weight": shift}, (x,))

    vectors = [layer.ssf_scale["default"].weight, layer.ssf_shift["default"].weight]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in vectors]
    if x.is_floating_point():
        x.requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *leaves), atol=1e-6)


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("keep_input", [True, False])
def test_gradcheck_scaled_linear(keep_input: bool, with_bias: bool, with_shift: bool) -> None:
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    shift = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_shift else None
    scale = torch.tensor([0.0, 1e-9, -2.0, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    arguments = (x.requires_grad_(), weight, bias, scale, shift, keep_input)
    assert torch.autograd.gradcheck(ScaledLinear.apply, arguments)


@pytest.mark.parametrize("with_shift", [True, False])
def test_gradcheck_scale_shift(with_shift: bool) -> None:
    features = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_shift else None
    scale = torch.tensor([0.0, 1e-9, -2.0, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ScaleShift.apply, (features, scale, shift))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e-4, 0.99e-3, 1.01e-3, 1e-2, 1.0, -1.01e-3, 1e4])
@pytest.mark.parametrize("shift", [0.0, 0.5, -40.0])
def test_scale_gradient_in_single_precision(scale: float, shift: float) -> None:
    """Whatever the scale, dividing by it costs less than three digits of the seven."""
    features, weights = torch.randn(200, 3), torch.randn(200, 3)
    gamma = torch.full((3,), scale, requires_grad=True)
    output = ScaleShift.apply(features, gamma, torch.full((3,), shift))
    actual = torch.autograd.grad((output * weights).sum(), gamma)[0]
    reference = (features.double() * weights.double()).sum(0)
    size = (features * weights).square().sum(0).sqrt()
    assert ((actual - reference).abs() / size).max() < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-3, 1e-2, 4e-2, 6e-2, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.1)])
def test_scale_gradient_in_half_precision(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """What is recovered from rounded features is off by their rounding over the scale: kept within a tenth."""
    features, weights = torch.randn(200, 3).to(dtype), torch.randn(200, 3).to(dtype)
    gamma = torch.full((3,), scale, requires_grad=True)
    output = ScaleShift.apply(features, gamma, torch.full((3,), 0.5))
    actual = torch.autograd.grad((output * weights).sum(), gamma)[0]
    reference = (features.double() * weights.double()).sum(0)
    size = (features * weights).double().square().sum(0).sqrt()
    assert ((actual - reference).abs() / size).max() < tolerance


@pytest.mark.parametrize("name", ["linear", "linear_no_bias", "conv2d_groups", "layer_norm", "rms_norm_gemma"])
def test_only_some_gradients_are_asked_for(name: str) -> None:
    op, x, _ = make(name)
    model = adapt(op)
    layer = layer_of(model)
    set_vectors(layer)
    scale, shift = layer.ssf_scale["default"].weight, layer.ssf_shift["default"].weight
    everything = gradients(model(x.requires_grad_()), x, scale, shift)
    for chosen in ([0], [1], [2], [0, 1], [1, 2]):
        for index, leaf in enumerate((x, scale, shift)):
            leaf.requires_grad_(index in chosen)
        leaves = [(x, scale, shift)[index] for index in chosen]
        assert_close(gradients(model(x), *leaves), [everything[index] for index in chosen], 1e-6)


@pytest.mark.parametrize("name", OPS)
def test_several_adapters_are_composed(name: str) -> None:
    op, x, dim = make(name)
    tolerance = SINGLE_PRECISION.get(name, 1e-9)
    model = adapt(op)
    model.add_adapter("second", SSFConfig(target_modules=["op"], shift=True))
    model.add_adapter("third", SSFConfig(target_modules=["op"], shift=False))
    model.base_model.set_adapter(["default", "second", "third"])
    layer = layer_of(model)
    for adapter in ("default", "second", "third"):
        set_vectors(layer, adapter, plain=True)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    vectors = [vectors_of(layer, adapter) for adapter in ("default", "second", "third")]
    reference = expected(op, x, dim, *vectors)
    output = model(x)
    assert_close(output, reference, tolerance)
    leaves = [p for _, p in model.named_parameters() if p.requires_grad]
    assert len(leaves) == 5
    order = [vectors[0][0], vectors[1][0], vectors[2][0], vectors[0][1], vectors[1][1]]
    assert_close(gradients(output, *inputs, *leaves), gradients(reference, *inputs, *order), tolerance)

    model.base_model.set_adapter(["second", "default"])  # the order is the user's
    swapped = expected(op, x, dim, vectors[1], vectors[0])
    assert_close(model(x), swapped, tolerance)
    if name not in RMS_NORMS:
        model.merge_adapter(["second", "default"])
        assert_close(model(x), swapped, tolerance)


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("name", OPS)
def test_merge_and_unmerge_are_exact(name: str, safe: bool) -> None:
    op, x, _ = make(name)
    model = adapt(op, shift=name not in RMS_NORMS)
    layer = layer_of(model)
    set_vectors(layer)
    before = copy.deepcopy(layer.base_layer.state_dict())
    unmerged = model(x)
    model.merge_adapter(safe_merge=safe)
    assert_close(model(x), unmerged, SINGLE_PRECISION.get(name, 1e-12))
    model.unmerge_adapter()
    after = layer.base_layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(x), unmerged)

    plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain.op) is type(op)
    assert_close(plain(x), unmerged, SINGLE_PRECISION.get(name, 1e-12))


@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_shift_of_an_rms_norm_cannot_be_merged(name: str) -> None:
    op, _, _ = make(name)
    model = adapt(op)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'op'.*no place for a shift.*shift=None"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not layer_of(adapt(op, shift=None)).ssf_shift


@pytest.mark.parametrize("name", [name for name in OPS if name not in {*RMS_NORMS, "linear_no_row"}])
def test_merge_in_half_precision(name: str) -> None:
    """Merged in float32 and rounded once: as near to the exact weights as bfloat16 can be."""
    op, _, _ = make(name, torch.bfloat16)
    exact = adapt(op.double())
    model = adapt(op.bfloat16(), torch.bfloat16)
    set_vectors(layer_of(exact), plain=True)
    layer_of(model).load_state_dict(
        {key: value.float() for key, value in layer_of(exact).state_dict().items() if "ssf_" in key}, strict=False
    )
    exact.merge_adapter()
    model.merge_adapter()
    rounded = dict(layer_of(exact).base_layer.named_parameters())
    for key, value in layer_of(model).base_layer.named_parameters():
        assert value.dtype == torch.bfloat16
        assert_close(value.double(), rounded[key], 2**-8)


def test_published_start() -> None:
    torch.manual_seed(0)
    layer = layer_of(adapt(nn.Linear(2, 20_000)))
    for leaf in (layer.ssf_scale["default"], layer.ssf_shift["default"]):
        assert abs(leaf.weight.mean().item()) < 5e-4
        assert abs(leaf.weight.std().item() - 0.02) < 5e-4
    assert abs(layer.ssf_scale["default"]().mean().item() - 1) < 5e-4


@pytest.mark.parametrize("name", OPS)
def test_identity_start_is_exact(name: str) -> None:
    op, x, _ = make(name, torch.float32)
    model = adapt(op, torch.float32, init_weights="identity")
    assert torch.equal(model(x), op(x))
    with torch.no_grad():
        assert torch.equal(model(x), op(x))
    if x.numel():  # and it can be left: every vector has a gradient
        assert all(grad.any() for grad in gradients(model(x), *(p for p in model.parameters() if p.requires_grad)))


def test_trainable_bias_of_the_base_still_gets_its_gradient() -> None:
    op, x, _ = make("linear")
    model = adapt(op)
    layer = layer_of(model)
    set_vectors(layer)
    layer.base_layer.bias.requires_grad_()
    op.bias.requires_grad_()
    gamma, beta = vectors_of(layer)
    reference = gradients(expected(op, x, 1, (gamma, beta)), op.bias, gamma)
    assert_close(gradients(model(x), layer.base_layer.bias, layer.ssf_scale["default"].weight), reference, 1e-9)


def test_hooks_of_the_base_layer_see_the_features() -> None:
    for name in ("linear", "layer_norm"):
        op, x, _ = make(name)
        model = adapt(op)
        seen = []
        layer_of(model).base_layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        model(x)
        assert torch.equal(seen[0], op(x))


# ---------------------------------------------------------------- dtypes, autocast, compilers, checkpointing


class Small(nn.Module):
    """The kinds of sites that a transformer has, with attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=i % 2 == 0) for i in range(4))
        self.rms = LlamaRMSNorm(8)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, 4, T)`; returns `(B, T, 6)`."""
        h = self.norm(self.conv(x).transpose(1, 2))
        q, k, v = (m(h).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(F.gelu(self.rms(h + self.o(attended))))


SMALL_SITES = ["conv", "norm", "q", "k", "v", "o", "rms", "fc"]


def small(recover: bool = True) -> PeftModel:
    torch.manual_seed(3)
    net = Small()
    models.randomize(net)
    model = get_peft_model(net, SSFConfig(target_modules=SMALL_SITES, recover=recover))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "ssf_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def small_gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """All gradients of the vectors in one long vector."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    output = model(x).float()
    return torch.cat([grad.double().flatten() for grad in gradients(output, *leaves)])


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Gradients under autocast are as exact as those of the plain equation under autocast."""
    x = torch.randn(4, 4, 5)
    exact = small_gradients(small().double(), x.double())
    with torch.autocast("cpu", dtype):
        assert small()(x).dtype == small(recover=False)(x).dtype
        plain, ours = small_gradients(small(recover=False), x), small_gradients(small(), x)
    assert 0 < error(plain, exact) < 0.05
    assert error(ours, exact) < 2 * error(plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    """A base in half precision under vectors in float32."""
    x = torch.randn(4, 4, 5).to(dtype)

    def halved(recover: bool) -> PeftModel:
        model = small(recover)
        for name, parameter in model.named_parameters():
            if "ssf_" not in name:
                parameter.data = parameter.data.to(dtype)
        return model

    exact = small_gradients(halved(True).double(), x.double())
    model = halved(True)
    assert model(x).dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    plain, ours = small_gradients(halved(False), x), small_gradients(model, x)
    assert 0 < error(plain, exact) < 0.05
    assert error(ours, exact) < 2 * error(plain, exact)


def test_fresh_vectors_are_float32_on_a_half_precision_base() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = get_peft_model(Small().to(dtype), SSFConfig(target_modules=SMALL_SITES))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", ["linear", "conv1d_gpt2", "conv2d_groups", "embedding"])
def test_sums_do_not_overflow_in_half_precision(name: str) -> None:
    """Under a GradScaler gradients are large: the product with the features must not be formed in float16."""
    op, x, _ = make(name, torch.float16)
    model = adapt(op, torch.float16)
    output = model(x)
    output.backward(torch.full_like(output, 60_000.0))
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_float64_under_autocast() -> None:
    """Autocast leaves float64 alone, and so do we."""
    op, x, _ = make("linear")
    model = adapt(op)
    set_vectors(layer_of(model))
    reference = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x).dtype == torch.float64
        assert torch.equal(model(x), reference)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    batch = models.inputs(name)

    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(tiny(name), SSFConfig()).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        models.loss(model, batch).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    assert_close(run(True), run(False), 1e-6)


BACKENDS = [
    pytest.param("eager"),
    pytest.param("aot_eager"),
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str) -> None:
    x = torch.randn(4, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(small(), backend=backend, fullgraph=True)
    assert_close(compiled(x), small()(x), 1e-5)
    assert_close(small_gradients(compiled, x), small_gradients(small(), x), 1e-4)
    torch._dynamo.reset()


def test_compile_transformers_model() -> None:
    batch = models.inputs("llama")
    model = get_peft_model(tiny("llama"), SSFConfig()).train()
    models.loss(model, batch).backward()
    reference = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    models.loss(torch.compile(model, backend="aot_eager"), batch).backward()
    torch._dynamo.reset()
    assert_close({key: p.grad for key, p in model.named_parameters() if p.requires_grad}, reference, 1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d_groups"])
def test_double_backward_is_refused(name: str) -> None:
    op, x, _ = make(name)
    model = adapt(op)
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    model = adapt(op, recover=False)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()  # as the plain equation can
    assert layer_of(model).ssf_scale["default"].weight.grad is not None


@pytest.mark.parametrize(
    "name", ["linear", "linear_3d", "linear_no_bias", "conv1d_gpt2", "conv2d_groups", "embedding"]
)
def test_output_changed_in_place(name: str) -> None:
    op, x, _ = make(name)
    changes = {"relu": lambda y: y.relu_(), "add": lambda y: y.add_(1), "scale": lambda y: y.mul_(-0.5)}
    for change in changes.values():
        model, reference = adapt(op), adapt(op, recover=False)
        reference.load_state_dict(model.state_dict())
        for _ in range(2):  # the first step finds out, the second one knows
            for of in (model, reference):
                of.zero_grad()
                (change(of(x)) * torch.linspace(-1, 2, of(x).numel()).view(of(x).shape)).sum().backward()
            for actual, wanted in zip(model.parameters(), reference.parameters(), strict=True):
                assert_close(actual.grad, wanted.grad, 1e-9)
        assert layer_of(model).watch.changed


def test_output_changed_in_place_long_after() -> None:
    """Two hundred modules later, the features are no longer there: the step fails, the next one knows."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200))).double()
    model = get_peft_model(layers, SSFConfig(target_modules=r"\d+"))
    x = torch.randn(64, 4, dtype=torch.float64)

    def step() -> None:
        first = model.base_model.model[0](x)
        y = first
        for layer in list(model.base_model.model)[1:]:
            y = layer(y)
        (y + first.add_(1)).sum().backward()

    with pytest.raises(RuntimeError, match="Run this step again"):
        step()
    model.zero_grad()
    step()
    gradient = model.base_model.model[0].ssf_scale["default"].weight.grad.clone()
    for layer in model.base_model.model:
        layer.recover["default"] = False
    model.zero_grad()
    step()
    assert_close(gradient, model.base_model.model[0].ssf_scale["default"].weight.grad, 1e-9)


def test_first_step_keeps_features_of_few_modules() -> None:
    """What the first step keeps besides the outputs does not grow with the depth."""
    x, layers = torch.randn(512, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(60)))
    model = get_peft_model(layers, SSFConfig(target_modules=r"\d+"))
    output = model(x)
    alive = [kept() for kept in functional._pending]
    assert sum(kept is not None and kept.features is not None for kept in alive) <= functional.PENDING
    output.sum().backward()
    assert all(layer.watch.changed is False for layer in model.base_model.model)


@pytest.mark.parametrize("spread", [1e-2, 3e-3])
def test_scale_gradient_under_a_large_shift(spread: float) -> None:
    """In bfloat16 a shift of 0.5 rounds away features of a small spread, whatever the scale is."""
    torch.manual_seed(0)
    x, weights = torch.randn(4096, 16) * spread, torch.randn(4096, 16)
    op = nn.Linear(16, 16, bias=False)
    nn.init.eye_(op.weight)
    model = get_peft_model(nn.Sequential(op), SSFConfig(target_modules=["0"], shift=True, init_weights="identity"))
    layer = model.base_model.model[0]
    nn.init.constant_(layer.ssf_shift["default"].weight, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        (model(x).float() * weights).sum().backward()
    reference = (x.double() * weights.double()).sum(0)
    assert (layer.ssf_scale["default"].weight.grad - reference).norm() < 0.01 * reference.norm()


def test_second_derivatives_of_a_model_with_rms_norms() -> None:
    base = tiny("llama", attn_implementation="eager").double()  # other attentions have no second derivative
    model = get_peft_model(base, SSFConfig(recover=False)).double()
    leaves = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(models.loss(model, models.inputs("llama")), leaves, create_graph=True)
    torch.manual_seed(0)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, leaves)
    step, at = 1e-3, []  # the norms of Llama compute in fp32
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * step)
        at.append(torch.autograd.grad(models.loss(model, models.inputs("llama")), leaves))
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.sub_(direction, alpha=sign * step)
    for actual, plus, minus in zip(second, *at, strict=True):
        assert_close(actual, (plus - minus) / (2 * step), 5e-3)


@pytest.mark.parametrize("name", ["linear_3d", "layer_norm", "rms_norm", "conv2d_groups"])
def test_backward_hooks_of_the_base_module_run(name: str) -> None:
    op, x, _ = make(name)
    seen: list[int] = []
    op.register_full_backward_hook(lambda *_: seen.append(1))
    x.requires_grad_()
    adapt(op)(x).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("name", ["linear_3d", "layer_norm", "rms_norm", "conv2d_groups"])
def test_transforms_of_torch_func(name: str) -> None:
    """Gradients of each sample by `vmap` over `grad` are those of one sample after the other."""
    op, x, _ = make(name)
    model = adapt(op).eval()
    parameters = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, values, (sample.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
        wanted = torch.autograd.grad(loss(leaves, sample), list(leaves.values()))
        assert_close([each[key][i] for key in leaves], list(wanted), 1e-9)


class PairEmbedding(nn.Embedding):
    """Returns the rows and their norms."""

    def forward(self, ids: torch.Tensor) -> Any:
        rows = super().forward(ids)
        return rows, rows.norm(dim=-1)


def test_module_that_returns_a_tuple() -> None:
    model = get_peft_model(nn.Sequential(PairEmbedding(5, 4)), SSFConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"PairEmbedding returns a tuple.*`exclude_modules`"):
        model(torch.tensor([1, 2]))


# ---------------------------------------------------------------- memory, attention


def kept(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    return kept_for_backward(model, run)[0]


def test_bytes_saved_for_backward() -> None:
    """The issue's ViT: width 384, six layers, 224 pixels; at most 1.1 times what a frozen backbone keeps."""
    fields = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    base = tiny("vit", image_size=224, patch_size=16, num_labels=10, **fields).train().requires_grad_(False)
    pixels = torch.randn(2, 3, 224, 224)
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    frozen = kept(base, lambda: base(**{**batch, "pixel_values": pixels.clone().requires_grad_()}).loss)
    model = get_peft_model(base, SSFConfig()).train()
    ours = kept(model, lambda: model(**batch).loss)
    assert ours <= 1.1 * frozen, (ours, frozen, ours / frozen)
    for layer in model.modules():
        if isinstance(layer, SSFLayer):
            layer.recover["default"] = False
    plain = kept(model, lambda: model(**batch).loss)
    assert plain > 1.3 * frozen  # the measure sees the difference


@pytest.mark.parametrize("few", [False, True])
def test_frozen_vectors_keep_nothing(few: bool) -> None:
    """An adapter that is not trained, under something that is: gradients pass through, at no cost in memory."""
    op = nn.Linear(16, 64)
    x = torch.randn(8 if few else 32, 16, requires_grad=True)
    model = adapt(op, torch.float32).requires_grad_(False)
    scale, _ = layer_of(model).vectors(["default"])
    assert kept(model, lambda: model(x)) <= 4 * 64 * 2 + 8  # the vectors themselves
    assert_close(torch.autograd.grad(model(x).sum(), x)[0], (scale.unsqueeze(1) * op.weight).sum(0).expand_as(x), 1e-5)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "bart", "swin"])
def test_input_kept_by_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection after a fused attention keeps its input, which the attention keeps too; gradients are the same."""
    batch = models.inputs(name, batch=8)  # enough rows for the scale to be folded into the weight
    taken: list[bool] = []
    decide = functional.kept_by_attention

    def spy(x: torch.Tensor) -> bool:
        taken.append(decide(x))
        return taken[-1]

    monkeypatch.setattr(functional, "kept_by_attention", spy)

    def run(attention: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        taken.clear()
        torch.manual_seed(0)
        model = get_peft_model(tiny(name, attn_implementation=attention), SSFConfig()).train()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            models.loss(model, batch).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    sdpa = run("sdpa")
    attentions = {"vit": 2, "bert": 2, "gpt2": 2, "llama": 2, "bart": 6, "swin": 3}[name]
    assert sum(taken) == attentions
    eager = run("eager")
    assert not any(taken)
    assert_close(sdpa, eager, 1e-5)

    half = run("sdpa", torch.bfloat16)
    assert sum(taken) == attentions
    monkeypatch.setattr(functional, "kept_by_attention", lambda x: False)
    plain = run("sdpa", torch.bfloat16)
    size = torch.cat([grad.flatten() for grad in sdpa.values()]).norm()
    for key, grad in half.items():
        assert (grad - plain[key]).norm() < 0.02 * size, key


# ---------------------------------------------------------------- counts and default sites


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        (
            "vit",
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
            | {"image_size": 224, "patch_size": 16},
            205_824,
        ),
        (
            "swin",
            {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "image_size": 224}
            | {"patch_size": 4, "window_size": 7},
            274_432,
        ),
        (
            "convnext",
            {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3], "num_stages": 4, "patch_size": 4},
            260_608,
        ),
    ],
)
def test_published_parameter_counts(name: str, fields: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = get_peft_model(tiny(name, **fields), SSFConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in (models.ARCHITECTURES | models.MORE_ARCHITECTURES)),
    ("beit", {"use_mean_pooling": False}),
    ("dinov2", {"use_swiglu_ffn": True}),
    ("dinov2_with_registers", {"use_swiglu_ffn": True}),
    ("opt", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    ("t5", {"feed_forward_proj": "relu"}),
]


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SSFLayer)}


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(VARIANTS)])
def test_default_sites_are_used(name: str, fields: dict[str, Any]) -> None:
    """Every vector gets a gradient, and no operation of a block is left out but embeddings and heads."""
    model = get_peft_model(tiny(name, **fields), SSFConfig()).train()
    models.loss(model, models.inputs(name)).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            # a shift of all keys alike adds the same to all scores of a query, which a softmax does not see
            is_inert = bool(re.search(r"(k_proj|k_lin|key)\.ssf_shift", key))
            assert is_inert or parameter.grad.abs().max() > 1e-7, key
    base = model.get_base_model()
    in_blocks = re.compile(r".*\.(layers?|blocks?|block|h|stages)\.\d+\..*")
    for key, module in base.named_modules():
        is_operation = isinstance(module, (nn.Linear, nn.LayerNorm, Conv1D, nn.Conv2d)) or "RMSNorm" in str(module)
        if is_operation and in_blocks.fullmatch(key) and not any(module.children()) and "base_layer" not in key:
            assert "downsample.reduction" in key or "vision_tower" in key, key


@pytest.mark.parametrize(
    "name", ["ast", "bart", "beit", "bert", "clip", "gpt2", "llama", "swin", "t5", "vit", "whisper"]
)
def test_default_sites_of_the_bare_backbone(name: str) -> None:
    """A model without head has the same sites as one with a head."""
    model = tiny(name)
    backbone = copy.deepcopy(getattr(model, model.base_model_prefix, model))
    with_head = adapted_names(get_peft_model(model, SSFConfig()).get_base_model())
    bare = adapted_names(get_peft_model(backbone, SSFConfig()).get_base_model())
    prefix = f"{model.base_model_prefix}." if backbone is not model else ""
    assert {key.removeprefix(prefix) for key in with_head} == bare


# ---------------------------------------------------------------- the shift, and what a merged model can carry

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# name: modules that carry a shift after merging, and the flags that are set then
SHIFTS: dict[str, tuple[set[str], set[str]]] = {
    "llama": (ATTENTION | MLP, {"attention_bias", "mlp_bias"}),
    "qwen2": ({"q_proj", "k_proj", "v_proj"}, set()),
    "qwen3": (ATTENTION, {"attention_bias"}),
    "gemma2": (ATTENTION, {"attention_bias"}),
    "mistral": (set(), set()),
    "whisper": (
        {"q_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2", "layer_norm"}
        | {"self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"},
        set(),
    ),
}


def stir(model: nn.Module) -> None:
    """Moves the vectors far from where they start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ssf_" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("shift", [None, False])
@pytest.mark.parametrize("name", SHIFTS)
def test_merged_model_loads_in_the_stock_class(name: str, shift: bool | None, tmp_path: Any) -> None:
    batch = models.inputs(name)
    base = tiny(name)
    flags = {flag for flag in ("attention_bias", "mlp_bias") if hasattr(base.config, flag)}
    model = get_peft_model(base, SSFConfig(shift=shift)).eval()
    carriers, to_set = SHIFTS[name]
    shifted = {key.rsplit(".", 1)[1] for key, m in model.named_modules() if isinstance(m, SSFLayer) and m.ssf_shift}
    assert shifted == (carriers if shift is None else set())
    stir(model)
    with torch.no_grad():
        unmerged = models.logits(model, batch)
        merged = model.merge_and_unload()
        assert_close(models.logits(merged, batch), unmerged, 1e-5)
        assert {flag for flag in flags if getattr(merged.config, flag)} == (to_set if shift is None else set())
        merged.save_pretrained(tmp_path)
        reloaded, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_close(models.logits(reloaded, batch), unmerged, 1e-5)
        assert models.logits(reloaded, batch).std() > 0.1


def test_one_shifted_projection_gives_its_neighbours_a_bias_of_zero(tmp_path: Any) -> None:
    """`attention_bias` is one flag for all layers: a stock reload must not draw random biases for the rest."""
    batch = models.inputs("llama")
    model = get_peft_model(tiny("llama"), SSFConfig(target_modules=["q_proj"], layers_to_transform=[1])).eval()
    stir(model)
    unmerged = models.logits(model, batch)
    merged = model.merge_and_unload()
    assert merged.config.attention_bias and not merged.config.mlp_bias
    merged.save_pretrained(tmp_path)
    reloaded, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(models.logits(reloaded, batch), unmerged, 1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "whisper"])
def test_shift_that_a_merged_model_would_lose(name: str) -> None:
    batch = models.inputs(name)
    model = get_peft_model(tiny(name), SSFConfig(shift=True)).train()
    assert all(layer.ssf_shift for layer in model.modules() if isinstance(layer, SSFLayer))
    models.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    stir(model)
    model.eval()
    before, output = copy.deepcopy(model.state_dict()), models.logits(model, batch)
    modules = [name for name, _ in model.named_modules()]
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"no config flag|no place for a shift") as caught:
            merge()
        assert "shift=None" in str(caught.value) and re.search(r"'model\.\S+'", str(caught.value))
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(models.logits(model, batch), output)


def test_flags_are_left_alone_without_a_merge() -> None:
    model = get_peft_model(tiny("llama"), SSFConfig())
    assert not model.config.attention_bias
    assert not model.unload().config.attention_bias


def test_asking_the_architecture_for_its_flags_draws_no_random_numbers() -> None:
    torch.manual_seed(5)
    expected_numbers = torch.rand(3)
    base = tiny("llama")
    torch.manual_seed(5)
    core.bias_flags(base)
    assert torch.equal(torch.rand(3), expected_numbers)


def test_no_warnings_by_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        for name in ("llama", "vit", "ast", "clip_image"):
            get_peft_model(tiny(name), SSFConfig())


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    from peft_ext.plots import plot

    model = get_peft_model(tiny("vit"), SSFConfig(init_weights="identity"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layers.1.mlp.fc1.ssf_scale" in key:
                parameter.copy_(torch.tensor([0.0, 0.3] * 12))  # the offset from one
    figure = plot(model)
    scales, shifts = (axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_title())
    assert abs(scales.max() - 0.3 / 2**0.5) < 1e-6 and (scales > 0).sum() == 1 and shifts.max() == 0
    figure.savefig(tmp_path / "figure.png")
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        plot(model, "other")
