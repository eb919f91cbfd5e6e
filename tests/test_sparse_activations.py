"""Sparsified activations: what is kept, what the gradients are, with which adapters and trainers it goes."""

from __future__ import annotations

import copy
import io
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, tiny
from peft import LoraConfig, get_peft_model
from test_integrations import arguments, classification_data, sft_trainer
from torch import nn
from transformers import Trainer

import peft_ext
from peft_ext import SparseActivationsCallback, SparseFTConfig, SSFConfig, activation_report, sparse_activations
from peft_ext.core import AdapterVector
from peft_ext.training import sparsify
from peft_ext.training.activations import _handled


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def largest(x: torch.Tensor, keep: float) -> torch.Tensor:
    """x with zeros for all but the largest entries of each sample; one by one, in no clever way."""
    result = torch.zeros_like(x)
    for sample, out in zip(x, result, strict=True):
        entries = sorted(range(sample.numel()), key=lambda i: -abs(float(sample.reshape(-1)[i])))
        for i in entries[: math.ceil(keep * sample.numel())]:
            out.view(-1)[i] = sample.reshape(-1)[i]
    return result


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(3, 5, 8), (4, 8)])
def test_gradients_of_a_chain_of_linears(shape: tuple[int, ...]) -> None:
    """Those of inputs and biases are exact, those of weights are of the sparsified inputs."""
    first, second = nn.Linear(8, 16).double(), nn.Linear(16, 4).double()
    model = nn.Sequential(first, nn.SiLU(), second)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    dense = model(x)
    (dense * weights).sum().backward()
    exact, dx, x.grad = gradients(model), x.grad, None
    model.zero_grad()
    with sparse_activations(model, keep=0.3) as sparse:
        output = model(x)
    assert torch.equal(output, dense)
    (output * weights).sum().backward()  # after the context
    assert torch.equal(x.grad, dx)
    z = (x @ first.weight.T + first.bias).detach()
    hidden, sigmoid = z * z.sigmoid(), z.sigmoid()
    upstream = (weights @ second.weight) * sigmoid * (1 + z * (1 - sigmoid))
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (upstream, largest(x.detach(), 0.3))]
    torch.testing.assert_close(first.weight.grad, flat[0].T @ flat[1], rtol=1e-10, atol=1e-10)
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (weights, largest(hidden, 0.3))]
    torch.testing.assert_close(second.weight.grad, flat[0].T @ flat[1], rtol=1e-10, atol=1e-10)
    assert torch.equal(first.bias.grad, exact["0.bias"]) and torch.equal(second.bias.grad, exact["2.bias"])
    entries = [math.prod(shape[1:-1]) * width for width in (8, 16)]
    expected = sum(shape[0] * math.ceil(0.3 * n) * 8 + math.ceil(shape[0] * n / 8) for n in entries)
    assert (sparse.tensors, sparse.kept_bytes) == (2, expected)
    assert sparse.dense_bytes == sum(shape[0] * n * 8 for n in entries)


def test_gradient_of_a_norm_is_that_of_the_sparsified_input_with_exact_statistics() -> None:
    norm = nn.LayerNorm(16).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 16, dtype=torch.float64)
    with sparse_activations(norm, keep=0.5, norms=True):
        output = norm(x)
    output.backward(g)
    with torch.no_grad():
        mean, deviation = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        hat = (largest(x, 0.5) - mean) / deviation
        u = g * norm.weight
        dx = (u - u.mean(-1, keepdim=True) - hat * (u * hat).mean(-1, keepdim=True)) / deviation
    torch.testing.assert_close(x.grad, dx, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.weight.grad, (g * hat).sum((0, 1)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.bias.grad, g.sum((0, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_largest_entries_of_each_sample(dtype: torch.dtype, exact: bool) -> None:
    x = torch.randn(3, 7, 1001).to(dtype) * torch.tensor([1e-3, 1.0, 100.0], dtype=dtype)[:, None, None]
    state = torch.get_rng_state()
    packed = sparsify.sparsify(x, 3, 0.1, exact)
    assert packed is not None and torch.equal(torch.get_rng_state(), state)
    restored = packed.restore()
    kept = restored != 0
    assert torch.equal(restored[kept], x[kept]) and restored.shape == x.shape and restored.dtype == dtype
    shares = kept.double().mean((1, 2))
    for sample in range(3):
        assert x[sample][kept[sample]].abs().min() >= x[sample][~kept[sample]].abs().max()
    torch.testing.assert_close(shares, torch.full((3,), 0.1, dtype=torch.float64), rtol=1e-3 if exact else 0.2, atol=0)
    again = sparsify.sparsify(x, 3, 0.1, exact)
    assert again is not None and torch.equal(again.bits, packed.bits)


def test_what_would_not_take_less_stays_dense() -> None:
    x = torch.randn(2, 40)
    assert sparsify.sparsify(x, 2, 1.0, True) is None
    assert sparsify.sparsify(x.bfloat16(), 2, 0.95, True) is None
    zeros = sparsify.sparsify(torch.zeros(2, 40), 2, 0.1, False)
    assert zeros is not None and zeros.values.numel() == 0 and not zeros.restore().any()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_queries_keys_and_values_keep_their_input_once(adapter: str) -> None:
    model = tiny("bert")
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["query", "key", "value"]))
    with sparse_activations(model.train(), keep=0.1, modules=["query", "key", "value"]) as sparse:
        model(**inputs("bert")).loss.backward()
    assert sparse.tensors == 2 + (6 if adapter == "lora" else 0)  # one for each block, and the six of LoRA's B


ADAPTERS: dict[str, Any] = {
    "full": None,
    "lora": LoraConfig(target_modules="all-linear", init_lora_weights=False),
    "ssf": SSFConfig(init_weights=False),
    "sparse": SparseFTConfig(selection="random", density=0.05, init_weights=False),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_with_adapters(name: str, adapter: str) -> None:
    """The forward is the same bit for bit; with all entries the gradients are; with half they point the same way."""
    model = tiny(name)
    config = copy.deepcopy(ADAPTERS[adapter])
    if config is not None:
        config.fan_in_fan_out = name == "gpt2"
        model = get_peft_model(model, config)
    model.train()
    batch = inputs(name)
    found = {}
    norms = adapter == "ssf"  # else there would be nothing: its own functions keep outputs
    for keep in (None, 1.0, 0.5):
        model.zero_grad()
        if keep is None:
            loss = model(**batch).loss
        else:
            with sparse_activations(model, keep, norms=norms) as sparse:
                loss = model(**batch).loss
        loss.backward()
        found[keep] = loss.detach(), gradients(model)
    assert torch.equal(found[None][0], found[0.5][0]) and torch.equal(found[None][0], found[1.0][0])
    assert all(torch.equal(value, found[1.0][1][key]) for key, value in found[None][1].items())
    flat = [torch.cat([value.flatten() for value in found[keep][1].values()]) for keep in (None, 0.5)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.9 and not torch.equal(*flat)
    assert sparse.tensors and sparse.kept_bytes < 0.6 * sparse.dense_bytes


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_under_autocast_weights_stay_whole(adapter: str) -> None:
    """Gradients of inputs are exact, though the weights are copies in another type, some in the shape of the input."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=8, init_lora_weights=False))
    found = []
    for sparsified in (False, True):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            if sparsified:
                with sparse_activations(model, 0.2) as sparse:
                    output = model(x)
            else:
                output = model(x)
        output.float().square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and sparse.tensors == 2 + 2 * (adapter == "lora")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_nothing_that_could_be_sparsified(reentrant: bool) -> None:
    model = tiny("vit").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**inputs("vit")).loss.backward()
    dense = gradients(model)
    model.zero_grad()

    def sparsified() -> None:
        with sparse_activations(model, modules=r".*layers.*\.(q_proj|fc1)"):
            model(**inputs("vit")).loss.backward()

    with pytest.warns(UserWarning, match="gradient checkpointing"):
        sparsified()
    assert all(torch.equal(value, dense[key]) for key, value in gradients(model).items())


def test_under_ddp() -> None:
    model = tiny("bert").train()
    with sparse_activations(model):
        model(**inputs("bert")).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with sparse_activations(model) as sparse:
            wrapped(**inputs("bert")).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert sparse.tensors and all(torch.equal(value, expected[key]) for key, value in gradients(model).items())


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_trainer(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    callback = SparseActivationsCallback(keep=0.2)
    seen = []
    callback.on_step_end = lambda *args, **kwargs: seen.append(callback.sparse.tensors)  # type: ignore[method-assign]
    data = classification_data()
    options = {"max_steps": 3, "eval_steps": 1, "eval_strategy": "steps", "save_strategy": "no", **fields}
    Trainer(model, arguments(tmp_path, **options), train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    assert 0 < seen[0] < seen[1] < seen[2] and callback.sparse is None
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert not set(_handled) & set(model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_sft_trainer_with_the_context_and_layer_sampling(tmp_path: Path) -> None:
    """All at once; in full fine-tuning."""
    model = tiny("llama").train()
    peft_ext.layer_sampling(model, blocks=1, every=1)
    trainer = sft_trainer(tmp_path, model=model)
    trainer.args.activation_checkpointing = False  # which is TRL's default, and keeps nothing to sparsify
    model.gradient_checkpointing_disable()
    with sparse_activations(trainer.model, keep=0.2) as sparse:
        trainer.train()
    assert sparse.tensors and math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_training_reaches_the_loss_of_dense_activations() -> None:
    losses = {}
    for keep in (1.0, 0.2):
        model = tiny("vit").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with sparse_activations(model, keep):
            for _ in range(30):
                loss = model(**inputs("vit", batch=8)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses[keep] = loss.item()
    assert max(losses.values()) < 0.1  # from about 1.1


def test_what_its_maker_keeps_stays_dense() -> None:
    """A ReLU's output is kept by the ReLU; a copy of a share of it would be more."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Unflatten(1, (4, 4)), nn.Linear(4, 8)).train()
    with sparse_activations(model, keep=0.1) as sparse:
        model(torch.randn(6, 8)).sum().backward()
    assert sparse.dense_bytes == 6 * 8 * 4


def test_norms_are_left_alone_unless_asked_for() -> None:
    """The gradient of a Llama's embeddings is exact without them."""
    model = tiny("llama").train()
    found = []
    for fields in (None, {}, {"norms": True}):
        model.zero_grad()
        if fields is None:
            model(**inputs("llama")).loss.backward()
        else:
            with sparse_activations(model, 0.1, **fields):
                model(**inputs("llama")).loss.backward()
        found.append(gradients(model)["model.embed_tokens.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# bad input


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_share_out_of_range(keep: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"), sparse_activations(tiny("mlp"), keep):
        pass


def test_bad_use() -> None:
    model = tiny("mlp")
    with pytest.raises(ValueError, match=r"under `torch\.no_grad`"), torch.no_grad(), sparse_activations(model):
        pass
    message = r"names: fc9\. There are fc1, fc2, head, norm"
    with pytest.raises(ValueError, match=message), sparse_activations(model, modules=["fc1", "fc9"], norms=True):
        pass
    with pytest.raises(ValueError, match="names: fc"), sparse_activations(model, modules="fc"):
        pass
    with pytest.raises(ValueError, match="is empty"), sparse_activations(model, modules=[]):
        pass
    with (
        sparse_activations(model, modules=["fc1"]),
        pytest.raises(ValueError, match="1 modules, fc1 for one, are sparsified already"),
        sparse_activations(model),
    ):
        pass
    with sparse_activations(model, modules=["fc1"]), sparse_activations(model, modules=["head"]) as second:
        model(**inputs("mlp")).sum().backward()
    assert second.tensors == 1
    assert not set(_handled) & set(model.modules())


def test_gradients_of_gradients_are_refused() -> None:
    model = tiny("smooth_mlp")
    with sparse_activations(model, 0.2):
        output = model(**inputs("mlp")).sum()
    with pytest.raises(ValueError, match="create_graph=True"):
        torch.autograd.grad(output, list(model.parameters()), create_graph=True)


def test_nothing_to_sparsify_is_said() -> None:
    model = tiny("mlp").requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to sparsify"), sparse_activations(model):
        model(**inputs("mlp"))


def test_an_error_in_the_forward_leaves_no_hooks_behind() -> None:
    model = tiny("mlp")
    with pytest.raises(RuntimeError, match="shapes"), sparse_activations(model):
        model(torch.randn(2, 5))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


# the report


def kept_by_hand(model: nn.Module, batch: dict[str, Any]) -> int:
    """The memory behind everything that autograd keeps, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if (pointer := tensor.untyped_storage().data_ptr()) not in known:
            found[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
    del output
    return sum(found.values())


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "mlp", "conv2d"])
def test_report(name: str) -> None:
    model = tiny(name).train()
    report = activation_report(model, inputs(name))
    assert report.bytes == kept_by_hand(model, inputs(name)) > 0 and report.training
    names = dict(model.named_modules())
    assert all(type(names[row.module]).__name__ == row.kind and row.tensors for row in report.rows)
    assert sum(row.bytes for row in report.by_type()) == report.bytes
    lines = str(report).splitlines()
    assert lines[-1].startswith("all") and lines[-1].endswith("100.0%") and "train mode" in lines[-1]
    assert len({len(line) for line in lines}) == 1


def test_report_tells_what_is_saved() -> None:
    """LoRA keeps what full fine-tuning does; checkpointing less; sparsified Linears and norms a seventh of theirs."""
    full = tiny("vit", hidden_size=64, intermediate_size=256).train()
    batch = inputs("vit", batch=4)
    dense = activation_report(full, batch)
    linears = r".*layers.*(?<!o_proj)"
    with sparse_activations(full, keep=0.1, modules=linears, norms=True) as sparse:
        report = activation_report(full, batch)
    assert dense.bytes - report.bytes == sparse.dense_bytes - sparse.kept_bytes
    with sparse_activations(full, keep=0.1, modules=["o_proj"]) as outputs:
        assert activation_report(full, batch).bytes == dense.bytes
        outputs._forwards = 0  # or it would say so
    assert sparse.dense_bytes > 4 * sparse.kept_bytes
    by_module = {row.module: row.bytes for row in dense.rows}
    attention = "vit.layers.0.attention"
    assert {row.module: row.bytes for row in report.rows}[attention] == by_module[attention]  # left alone
    full.gradient_checkpointing_enable()
    assert activation_report(full, batch).bytes < 0.5 * dense.bytes
    figure = report.plot()
    assert "MiB" in figure.axes[0].get_title()


def test_report_without_gradients() -> None:
    model = tiny("mlp")
    with torch.no_grad(), pytest.raises(ValueError, match=r"under `torch\.no_grad`"):
        activation_report(model, inputs("mlp"))
    with pytest.raises(ValueError, match="keeps nothing"):
        activation_report(model.requires_grad_(False), inputs("mlp"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert isinstance(activation_report(AdapterModel(), torch.ones(2, 3)).bytes, int)


class AdapterModel(nn.Module):
    """Takes a tensor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = AdapterVector(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale()


# interrupted, copied, in several threads


def interrupt(module: nn.Module) -> Any:
    """A handle; until it is removed, Ctrl-C comes within the module's forward."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    return module.register_forward_hook(stop, prepend=True)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 2))


def top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.mark.parametrize("goes_on", [False, True])
def test_ctrl_c_leaves_no_hooks_behind(goes_on: bool) -> None:
    """After the context, and within it: the next forward begins anew, whether it is of all or of a part."""
    model, x = chain(), torch.randn(4, 5, 6)
    with sparse_activations(model, 0.2):
        model(x).sum().backward()
    expected = gradients(model)
    for call in (model, lambda x: model[4](model[3](model[2](model[1](model[0](x)))))):
        model.zero_grad()
        with sparse_activations(model, 0.2) as sparse:
            handle = interrupt(model[2])
            with pytest.raises(KeyboardInterrupt):
                call(x)
            handle.remove()
            if goes_on:
                call(x).sum().backward()
                assert top_hooks() is None and not sparse._thread.open
        assert top_hooks() is None
        if goes_on:
            assert all(torch.equal(value, expected[key]) for key, value in gradients(model).items())
    other = chain()
    other(x).sum().backward()
    dense = gradients(other)
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(value, dense[key]) for key, value in gradients(model).items())


def test_ctrl_c_in_a_report_within_the_context() -> None:
    model = chain()
    with sparse_activations(model, 0.2):
        handle = interrupt(model[2])
        with pytest.raises(KeyboardInterrupt):
            activation_report(model, torch.randn(4, 5, 6))
        handle.remove()
    assert top_hooks() is None


def test_copies_are_not_sparsified() -> None:
    model, x = chain(), torch.randn(4, 5, 6)
    model(x).sum().backward()
    dense = gradients(model)
    with sparse_activations(model, 0.2) as sparse:
        model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            before = sparse.tensors
            other.zero_grad()
            other(x).sum().backward()
            assert sparse.tensors == before
            assert all(torch.equal(value, dense[key]) for key, value in gradients(other).items())


def test_each_thread_has_its_own_calls() -> None:
    """While one is within a Linear, another begins and ends: no hook of the one is popped in the other."""
    model, x = chain(), torch.randn(4, 5, 6)
    with sparse_activations(model, 0.2):
        model(x).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    entered, goes_on = threading.Event(), threading.Event()
    left: list[Any] = []

    def wait(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            goes_on.wait(10)

    def run() -> None:
        model(x).sum().backward()
        left.append(top_hooks())

    with sparse_activations(model, 0.2) as sparse:
        model[2].register_forward_hook(wait, prepend=True)
        thread = threading.Thread(target=run)
        thread.start()
        entered.wait(10)
        model[2](torch.randn(4, 5, 12))
        assert top_hooks() is None
        goes_on.set()
        thread.join()
    assert left == [None] and sparse.tensors == 4
    assert all(torch.equal(value, expected[key]) for key, value in gradients(model).items())


class Mixing(nn.Module):
    """A Linear along the tokens, which torch keeps the weight of expanded over the samples."""

    def __init__(self, tokens: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(outputs, outputs), nn.Linear(tokens, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.first(x).transpose(1, 2))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("tokens", [10, 6])
def test_weights_of_a_transposed_input_stay_whole(precision: Any, trained: tuple[str, ...], tokens: int) -> None:
    """As many entries in weights, over all samples, as in the input: gradients of inputs are exact all the same."""
    torch.manual_seed(1)
    model = Mixing(tokens, 6, bias=True)
    for name, parameter in model.mix.named_parameters():
        parameter.requires_grad_(name in trained)
    x = torch.randn(4, tokens, 6)
    found = []
    for keep in (1.0, 0.1):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it is frozen there is nothing to sparsify
            with sparse_activations(model, keep, modules=["mix"]) as sparse:
                output = model(x)
        output.float().square().sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in ("first.weight", "first.bias"))
    assert sparse.tensors == ("weight" in trained)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (None, {}, "`model` is a NoneType: give the module"),
        ("mlp", {"keep": True}, "`keep` is True: give the share"),
        ("mlp", {"keep": "0.1"}, "`keep` is '0.1': give the share"),
        ("mlp", {"keep": float("nan")}, "above 0 and at most 1, not nan"),
        ("mlp", {"modules": "["}, r"`modules` is '\[', which is no regular expression"),
        ("mlp", {"modules": [1]}, "`modules` has 1: give names"),
        ("mlp", {"modules": 3}, "`modules` has 3: give names"),
        ("convolutions", {}, "This Sequential has no Linear, so there is nothing to sparsify"),
        ("convolutions", {"norms": True}, "no Linear and no norm, so there is nothing"),
        ("convolutions", {"modules": ["0"]}, "no Linear, so there is nothing to sparsify"),
    ],
)
def test_bad_input(model: Any, options: dict[str, Any], message: str) -> None:
    made = {None: None, "mlp": tiny("mlp"), "convolutions": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())}[model]
    with pytest.raises((ValueError, TypeError), match=message), sparse_activations(made, **options):
        pass


def test_the_callback_looks_at_its_values_when_it_is_made(tmp_path: Path) -> None:
    for options in ({"keep": 0}, {"keep": True}, {"modules": "["}, {"modules": []}):
        with pytest.raises((ValueError, TypeError), match=r"`keep`|`modules`"):
            SparseActivationsCallback(**options)
    model = tiny("bert")
    callback = SparseActivationsCallback(modules=(name for name in ("query",)))
    options = {"max_steps": 1, "save_strategy": "no"}
    for _ in range(2):
        Trainer(
            model, arguments(tmp_path, **options), train_dataset=classification_data(), callbacks=[callback]
        ).train()


def test_a_trainer_after_one_that_was_interrupted(tmp_path: Path) -> None:
    model = tiny("bert")
    first = SparseActivationsCallback()
    handle = interrupt(model.bert.encoder.layer[0])
    options = {"max_steps": 1, "save_strategy": "no"}

    def train(callback: SparseActivationsCallback) -> None:
        Trainer(
            model, arguments(tmp_path, **options), train_dataset=classification_data(), callbacks=[callback]
        ).train()

    with pytest.raises(KeyboardInterrupt):
        train(first)
    handle.remove()
    with pytest.raises(ValueError, match=r"interrupted call `close\(\)` of its `SparseActivationsCallback`"):
        train(SparseActivationsCallback())
    first.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    train(SparseActivationsCallback())


def test_report_leaves_running_statistics_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(model.state_dict())
    activation_report(model, torch.randn(8, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("model", "batch"), [(nn.Linear(2, 2), None), (None, torch.ones(1, 2)), (nn.Linear(2, 2), 3)])
def test_report_of_no_model_or_no_batch(model: Any, batch: Any) -> None:
    with pytest.raises(TypeError, match="`model` is a NoneType" if model is None else "`batch` is"):
        activation_report(model, batch)
