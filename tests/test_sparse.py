"""The sparse core: the code of the places, their choice, and the products."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_ext.sparse import (
    EmbeddingOperation,
    LinearOperation,
    decode,
    decode_alone,
    encode,
    encoded_size,
    index_dtype,
    operation_of,
    random_indices,
    sparse_apply,
    top_indices,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The code


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 1 << 22), st.integers(1, 300), st.integers(0, 99))
def test_a_code_can_be_read_without_the_size(n: int, k: int, seed: int) -> None:
    k = min(k, n)
    places = random_indices(k, n, generator(seed))
    ways = decode_alone(encode(places, n), k)
    right = [bounds for found, *bounds in ways if torch.equal(found.long(), places)]
    assert any(smallest <= n <= largest for smallest, largest in right)
    assert all((largest - smallest) * k <= 8 * largest for smallest, largest in right)
    if k >= 100:
        assert len(ways) == 1


def test_a_damaged_code_cannot_be_read_without_the_size() -> None:
    code = encode(random_indices(100, 5000, generator()), 5000)
    assert decode_alone(code.bitwise_not(), 100) == [] and decode_alone(code[:-20], 100) == []


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_code_round_trip(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    indices = random_indices(k, n, generator(data.draw(st.integers(0, 9))))
    code = encode(indices, n)
    assert len(code) == encoded_size(k, n)
    assert code.dtype == torch.uint8
    assert torch.equal(decode(code, k, n).long(), indices)


@pytest.mark.parametrize(("density", "at_most"), [(0.01, 1.08), (0.001, 1.50), (0.0001, 1.92)])
def test_code_is_small(density: float, at_most: float) -> None:
    n = 4096 * 4096
    k = int(n * density)
    entropy = (-density * math.log2(density) - (1 - density) * math.log2(1 - density)) / density / 8
    assert entropy < encoded_size(k, n) / k <= at_most


def test_code_of_many_places_spans_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_ext.sparse.codec.CHUNK", 64)
    indices = random_indices(1000, 77_777, generator())
    assert torch.equal(decode(encode(indices, 77_777), 1000, 77_777).long(), indices)


def test_places_beyond_32_bits() -> None:
    n = 2**33
    indices = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**32 + 12345, n - 1])
    decoded = decode(encode(indices, n), 6, n)
    assert decoded.dtype == torch.int64 == index_dtype(n)
    assert torch.equal(decoded, indices)
    assert index_dtype(2**31 - 1) == torch.int32


def test_damaged_code_is_refused() -> None:
    code = encode(random_indices(100, 5000, generator()), 5000)
    with pytest.raises(ValueError, match="has 96 bytes, got 95"):
        decode(code[:-1], 100, 5000)
    broken = code.clone()
    broken[-3] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        decode(broken, 100, 5000)
    with pytest.raises(ValueError, match="damaged"):
        decode(torch.zeros_like(code), 100, 5000)


# The choice


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 6), min_size=1, max_size=60), st.integers(0, 70))
def test_top_indices(scores: list[int], k: int) -> None:
    tensor = torch.tensor(scores, dtype=torch.float32) / 4
    found = top_indices(lambda start, stop: tensor[start:stop], len(scores), k).tolist()
    valid = [i for i in range(len(scores)) if scores[i] >= 0]
    assert found == sorted(sorted(valid, key=lambda i: (-scores[i], i))[:k])


def test_top_indices_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_ext.sparse.selection.CHUNK", 100)
    scores = torch.rand(1234, generator=generator())
    found = top_indices(lambda start, stop: scores[start:stop], 1234, 77)
    assert torch.equal(found, scores.topk(77).indices.sort().values)


def test_top_indices_passes_over_nan() -> None:
    scores = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    assert top_indices(lambda start, stop: scores[start:stop], 4, 4).tolist() == [0, 2, 3]


def test_random_indices_are_reproducible_and_even() -> None:
    assert torch.equal(random_indices(50, 10_000, generator(3)), random_indices(50, 10_000, generator(3)))
    counts = torch.zeros(40)
    for seed in range(2000):
        counts[random_indices(5, 40, generator(seed))] += 1
    assert (counts / 2000 - 5 / 40).abs().max() < 0.04


# The products


def modules() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(6, 8), torch.randn(2, 3, 6)),
        "large linear": (nn.Linear(40, 60), torch.randn(2, 3, 40)),
        "linear without bias": (nn.Linear(6, 8, bias=False), torch.randn(4, 6)),
        "conv1d": (Conv1D(8, 6), torch.randn(2, 3, 6)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 7, 7)),
        "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), torch.randn(2, 4, 5, 5)),
        "conv2d circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 5, 5)),
        "embedding": (nn.Embedding(9, 5, padding_idx=2), torch.tensor([[1, 2, 3], [1, 8, 0]])),
    }


def prepared(kind: str, dtype: torch.dtype = torch.float64, k: int = 12) -> tuple:
    module, x = modules()[kind]
    module.requires_grad_(False).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    n = module.weight.numel()
    indices = random_indices(k, n, generator(1)).int()
    values = torch.randn(k, dtype=torch.promote_types(dtype, torch.float32), generator=generator(2))
    return module, x, operation_of(module), values, indices


def dense_output(module: nn.Module, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The same by plain autograd, in the precision of the values."""
    state = {name: p.detach().to(values.dtype) for name, p in module.named_parameters()}
    weight = state["weight"]
    delta = torch.zeros(weight.numel(), dtype=values.dtype).index_add(0, indices, values)
    state["weight"] = weight + delta.view(weight.shape)
    return torch.func.functional_call(module, state, x.to(values.dtype) if x.is_floating_point() else x)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kind", list(modules()))
def test_output_and_gradients_are_those_of_the_dense_product(kind: str, additive: bool) -> None:
    module, x, op, values, indices = prepared(kind)
    if additive:
        module.register_forward_hook(lambda *args: None)
    before = module.weight.clone()
    results = []
    for function in (sparse_apply, dense_output):
        leaves = [values.clone().requires_grad_()]
        inputs = x
        if x.is_floating_point():
            inputs = x.clone().requires_grad_()
            leaves.append(inputs)
        if function is sparse_apply:
            output = sparse_apply(module, op, inputs, leaves[0], indices)
        else:
            output = dense_output(module, inputs, leaves[0], indices)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append((output, *gradients))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("kind", ["linear", "large linear", "conv1d", "conv2d", "embedding"])
def test_gradcheck(kind: str, additive: bool) -> None:
    module, x, op, values, indices = prepared(kind, k=6)
    if additive:
        module.register_forward_hook(lambda *args: None)
    inputs = x.requires_grad_() if x.is_floating_point() else x
    torch.autograd.gradcheck(lambda x, v: sparse_apply(module, op, x, v, indices), (inputs, values.requires_grad_()))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_small_deltas_count_on_a_half_precision_base(kind: str) -> None:
    module, x, op, values, indices = prepared(kind, torch.bfloat16)
    values = 1e-4 * values  # lost in a bf16 weight
    values.requires_grad_()
    output = sparse_apply(module, op, x, values, indices)
    assert output.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(output.float().sum(), [values])
    reference_values = values.detach().clone().requires_grad_()
    reference = dense_output(module, x, reference_values, indices)
    (expected,) = torch.autograd.grad(reference.sum(), [reference_values])
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)
    if kind == "linear":
        exact = op.sparse_product(x, values, indices)
        torch.testing.assert_close(
            exact, (reference - dense_output(module, x, 0 * values, indices)), rtol=1e-2, atol=1e-5
        )
        assert exact.abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast(kind: str) -> None:
    module, x, op, values, indices = prepared(kind, torch.float32)
    values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sparse_apply(module, op, x, values, indices)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), dense_output(module, x, values, indices), rtol=0.05, atol=0.05)
    assert values.grad is not None and values.grad.dtype == torch.float32


def test_an_input_without_rows() -> None:
    """An expert that no token was sent to, on a half-precision base."""
    module = nn.Linear(6, 8).bfloat16().requires_grad_(False)
    x = torch.zeros(0, 6, dtype=torch.bfloat16, requires_grad=True)
    values, indices = torch.ones(1, requires_grad=True), torch.tensor([3])
    output = sparse_apply(module, operation_of(module), x, values, indices)
    output.sum().backward()
    assert output.shape == (0, 8) and x.grad.shape == (0, 6) and values.grad.tolist() == [0.0]


def test_places_of_several_adapters_add_up() -> None:
    module, x, op, values, indices = prepared("linear")
    indices = torch.cat([indices, indices[3:9]])
    values = torch.cat([values, torch.randn(6, dtype=values.dtype)])
    before = module.weight.clone()
    torch.testing.assert_close(sparse_apply(module, op, x, values, indices), dense_output(module, x, values, indices))
    assert torch.equal(module.weight, before)
    module.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(sparse_apply(module, op, x, values, indices), dense_output(module, x, values, indices))


def test_the_gradient_of_the_input_of_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """No whole weight is made for it; of several adapters the values add up."""
    _, x, op, values, indices = prepared("large linear", torch.bfloat16)
    indices, values = torch.cat([indices, indices[3:9]]), torch.cat([values, values[:6]])
    grad = torch.randn(2, 3, 60)
    expected = grad @ torch.zeros(op.n).index_add(0, indices, values).view(60, 40)
    monkeypatch.setattr(op, "dense", None)
    found = op.sparse_grad_input(x, grad, values, indices)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_only_input_values_and_places_are_saved() -> None:
    module = nn.Linear(256, 256).requires_grad_(False)
    indices = random_indices(655, 256 * 256, generator()).int()
    values = torch.zeros(655, requires_grad=True)
    x = torch.randn(8, 256, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sparse_apply(module, LinearOperation((256, 256)), x, values, indices)
    assert saved == {t.data_ptr(): t.untyped_storage().nbytes() for t in (x, values, indices)}


def test_weight_is_whole_again_after_an_error() -> None:
    module, x, op, values, indices = prepared("linear")
    before = module.weight.clone()
    with pytest.raises(RuntimeError):
        sparse_apply(module, op, x[..., :3], values, indices)
    assert torch.equal(module.weight, before)
    sparse_apply(module, op, x, values, indices)  # and no lock is left behind


def test_threads_do_not_see_each_others_delta() -> None:
    module = nn.Linear(64, 64).requires_grad_(False)
    op = LinearOperation((64, 64))
    x = torch.randn(32, 64)
    before = module.weight.clone()
    indices = random_indices(400, 4096, generator()).int()
    failures: list[int] = []

    def work(seed: int) -> None:
        values = torch.randn(400, generator=generator(seed))
        expected = dense_output(module, x, values, indices) if seed == -1 else None
        for _ in range(100):
            output = sparse_apply(module, op, x, values, indices)
            expected = output if expected is None else expected
            if not torch.equal(output, expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert torch.equal(module.weight, before)


def test_gradient_checkpointing_and_other_keepers_of_the_weight() -> None:
    module, x, op, values, indices = prepared("linear")
    values.requires_grad_()
    x = x.clone().requires_grad_()
    plain = module(x)  # keeps the weight for its own backward
    output = checkpoint(sparse_apply, module, op, x, values, indices, use_reentrant=False)
    (plain.sum() + output.sum()).backward()
    assert values.grad is not None and x.grad is not None


def test_embedding_scale() -> None:
    module, x, _, values, indices = prepared("embedding")
    op = EmbeddingOperation(module, scale=3.0)
    torch.testing.assert_close(
        op.sparse_product(x, values, indices), 3.0 * EmbeddingOperation(module).sparse_product(x, values, indices)
    )
