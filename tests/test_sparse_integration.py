"""Sparse fine-tuning and SPT inside real models: in-place code, interrupts, inference mode, compilers, `torch.func`."""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import inputs, logits, loss, tiny
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_ext
from peft_ext import SparseFTConfig, SPTConfig
from peft_ext.delta import SparseDelta
from peft_ext.sparse import LinearOperation, random_indices, sparse_apply


def leaves_of(model: nn.Module) -> list[SparseDelta]:
    return [module for module in model.modules() if isinstance(module, SparseDelta)]


def with_adapter(
    method: str, model: nn.Module, batch: dict[str, Any], values: float = 0.1, **fields: Any
) -> PeftModel:
    """An adapter with default targets, and with values that are not zero."""
    config: Any
    if method == "spt":
        fields = {"budget": 0.02, "r": 2, "dropout": 0.0, "drop_path": 0.0} | fields
        config = peft_ext.calibrate(model, SPTConfig(**fields), [batch], loss_fn=loss)
    else:
        config = SparseFTConfig(**{"density": 0.02, "selection": "random"} | fields)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and values:
            parameter.data += values * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# In-place changes of what an adapted module puts out


class Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x


class Multiplies(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5)


class Before(nn.Module):
    """A module before an in-place operation, and one behind it."""

    def __init__(self, first: nn.Module, change: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.change, self.second = first, change, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.change(self.first(x)))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 2, 3, 6), (2, 4, 6, 6)])
@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), Adds(), Multiplies()])
@pytest.mark.parametrize("kind", ["sparse_ft", "spt", "lora in spt", "dora in spt", "norm"])
def test_what_a_module_puts_out_may_be_changed_in_place(kind: str, change: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    is_image = shape[-2] == 6 and len(shape) == 4
    if is_image and "spt" in kind:
        pytest.skip("SPT takes no convolutions")
    first: nn.Module = nn.Conv2d(4, 8, 3) if is_image else nn.Linear(6, 8)
    if kind == "norm":
        first = nn.LayerNorm(6)
    second: nn.Module = (
        nn.Conv2d(8 if kind != "norm" else 4, 2, 1) if is_image else nn.Linear(8 if kind != "norm" else 6, 2)
    )
    x = torch.randn(shape, dtype=torch.float64)
    model = Before(first, change, second).double()
    plain = copy.deepcopy(model)
    plain.change = {nn.ReLU: nn.ReLU(), Adds: Plain(1.0, 1.0), Multiplies: Plain(0.5, 0.0)}[type(change)]
    results = []
    for network in (model, plain):
        fields: dict[str, Any] = {"target_modules": ["first"]}
        if "in" in kind:
            fields |= {"structured": kind[:4], "unstructured": False, "budget": 2 * 14 + 8, "r": 2}
        elif kind == "spt":
            fields |= {"budget": 9, "structured": None}
        else:
            fields |= {"density": None, "num_tunable_weights": 5}
        method = "spt" if "spt" in kind else "sparse_ft"
        torch.manual_seed(1)
        adapted = with_adapter(method, network, {"x": x}, **fields).double()
        results.append((adapted(x), gradients(adapted, {"x": x})))
    (output, grads), (right, right_grads) = results
    torch.testing.assert_close(output, right)
    assert grads.keys() == right_grads.keys() and grads
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, right_grads[name])


class Plain(nn.Module):
    """`factor * x + shift`, in a new tensor."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.shift


_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
_SMALL |= {"intermediate_size": 24, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LED = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_LED |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": [4], "vocab_size": 40}
_LED |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_CTRL = {"vocab_size": 40, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def in_place_models() -> dict[str, Callable[[], nn.Module]]:
    """Models that change what a Linear puts out in place."""
    return {
        "deberta": lambda: tf.DebertaForSequenceClassification(
            tf.DebertaConfig(**_SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_dropout=0.0)
        ),
        "longformer": lambda: tf.LongformerForSequenceClassification(
            tf.LongformerConfig(**_SMALL, attention_window=[4, 4], max_position_embeddings=32)
        ),
        "swinv2": lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**_SWIN, num_labels=3, drop_path_rate=0.0)),
        "led": lambda: tf.LEDForConditionalGeneration(tf.LEDConfig(**_LED)),
        "ctrl": lambda: tf.CTRLLMHeadModel(tf.CTRLConfig(**_CTRL)),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the frozen head, and of what the loss does not use
@pytest.mark.parametrize("method", ["sparse_ft", "spt"])
@pytest.mark.parametrize("name", list(in_place_models()))
def test_models_that_change_outputs_in_place_train_with_defaults(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = in_place_models()[name]().double().train()
    ids = torch.randint(3, 40, (2, 8))
    labels = ids if name in ("led", "ctrl") else torch.tensor([0, 2])
    batch = {"pixel_values": torch.randn(2, 3, 16, 16).double()} if name == "swinv2" else {"input_ids": ids}
    batch["labels"] = labels
    dense = copy.deepcopy(model)
    loss(dense, batch).backward()
    whole = {key: p.grad for key, p in dense.named_parameters() if p.grad is not None}
    fields: dict[str, Any] = {"budget": 300} if method == "spt" else {"density": 0.03, "selection": "spiel-ag"}
    if name == "led":  # most of which is positions
        fields |= {} if method == "spt" else {"density": None, "num_tunable_weights": 300}
    adapted = with_adapter(method, model, batch, values=0.0, **fields)
    loss(adapted, batch).backward()
    checked = 0
    for key, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft_ext.delta.DeltaLayer):
            for suffix, container in (("weight", module.deltas), ("bias", module.bias_deltas)):
                for leaf in container.values():
                    right = whole.get(f"{key}.{suffix}")
                    found = leaf.weight.grad if leaf.weight.grad is not None else torch.zeros(leaf.k)
                    if right is not None:  # at zero values, the gradient is the dense model's
                        torch.testing.assert_close(
                            found.float(), right.flatten()[leaf.indices().long()].float(), atol=1e-6, rtol=1e-5
                        )
                        checked += 1
    assert checked > 5


# Failures


class Fails(TorchDispatchMode):
    """Raises at the n-th call of an operation."""

    def __init__(self, name: str, number: int, error: BaseException) -> None:
        super().__init__()
        self.name, self.left, self.error = name, number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(self.name):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


def a_product() -> tuple[nn.Linear, Callable[[], None]]:
    module = nn.Linear(32, 32).requires_grad_(False)
    indices = random_indices(100, 1024, torch.Generator().manual_seed(0)).int()
    values = torch.randn(100, requires_grad=True)
    x = torch.randn(4, 8, 32, requires_grad=True)

    def run() -> None:
        sparse_apply(module, LinearOperation((32, 32)), x, values, indices).sum().backward()

    return module, run


@pytest.mark.parametrize("number", [1, 2])  # in the forward, in the backward
@pytest.mark.parametrize("name", ["index_select", "index_add", "index_copy", "mm", "addmm", "_to_copy"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_the_weight_comes_back_and_no_lock_is_left(name: str, number: int, error: BaseException) -> None:
    module, run = a_product()
    before = module.weight.clone()
    try:
        with Fails(name, number, error):
            run()
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        pass
    assert torch.equal(module.weight, before)
    again = threading.Thread(target=run, daemon=True)
    again.start()
    again.join(timeout=60)
    assert not again.is_alive()
    assert torch.equal(module.weight, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of interrupts inside of callbacks
def test_interrupts_at_any_moment() -> None:
    module, run = a_product()
    before = module.weight.clone()

    fired = threading.Event()

    def interrupt(*_: Any) -> None:
        fired.set()  # for one in a callback of the interpreter is lost
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for shot in range(200):
            fired.clear()
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-5 * (shot % 60))
                while not fired.is_set():
                    run()
            except KeyboardInterrupt:
                pass
            assert torch.equal(module.weight, before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("method", ["sparse_ft", "spt"])
def test_training_after_a_first_forward_in_inference_mode(method: str, tmp_path: Path) -> None:
    batch = inputs("bert")
    with_adapter(method, tiny("bert"), batch, task_type="SEQ_CLS").save_pretrained(tmp_path)
    found = []
    for first in (torch.inference_mode, torch.no_grad):
        model = PeftModel.from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
        with first():
            model(**batch)
        found.append(gradients(model, batch))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


# Compilers and transforms


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", {"method": "sparse_ft"}),
        ("llama", {"method": "spt"}),
        ("gpt2", {"method": "spt", "structured": "dora"}),
    ],
)
def test_compiled_and_exported_unmerged(name: str, fields: dict[str, str], tmp_path: Path) -> None:
    batch = inputs(name)
    method = fields["method"]
    own = {key: value for key, value in fields.items() if key != "method"}
    with_adapter(method, tiny(name), batch, **own).save_pretrained(tmp_path)
    # never run eagerly, since a first forward decodes the indices
    exported = PeftModel.from_pretrained(tiny(name), tmp_path).base_model.model
    compiled = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True)
    eager = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True)
    batch.pop("labels")  # transformers logs about losses, which `fullgraph` does not take
    if name in ("llama", "gpt2"):
        batch["use_cache"] = False  # `torch.export` wants to know the types of all outputs
    right = logits(eager, batch)
    torch._dynamo.reset()
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(fast, batch), right)
    with torch.no_grad():
        program = torch.export.export(exported, (), batch)
    torch.testing.assert_close(logits(program.module(), batch), right)
    for network in (fast, eager):
        logits(network, batch).sin().sum().backward()
    for found, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_a_compiled_forward_decodes_what_was_only_copied_into_the_buffer() -> None:
    leaf = SparseDelta(torch.arange(20), 1000)
    other = SparseDelta(random_indices(20, 1000, torch.Generator().manual_seed(0)), 1000)
    leaf._decoded = None
    leaf.index.copy_(other.index)
    compiled = torch.compile(lambda: leaf.indices() + 0, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), other.indices())


@pytest.mark.parametrize("method", ["sparse_ft", "spt"])
def test_gradients_per_sample_by_torch_func(method: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    model = with_adapter(method, tiny("mlp").double(), {"x": x}, **({} if method == "spt" else {"density": 0.1}))
    model = model.double()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def of_one(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (sample[None],)).sin().sum()

    found = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(trained, x)
    for place, sample in enumerate(x):
        for name, gradient in gradients(model, {"x": sample[None]}).items():
            torch.testing.assert_close(found[name][place], gradient)


# Loading


def test_values_and_indices_are_loaded_together_or_not_at_all(tmp_path: Path) -> None:
    """With `ignore_mismatched_sizes`, the indices for another width are left out, and then the values must be, too."""
    config = SparseFTConfig(selection="random", target_modules=["query"], num_tunable_weights=8)
    model = get_peft_model(tiny("bert"), config)
    for leaf in leaves_of(model):
        leaf.weight.data.fill_(0.7)
    model.save_pretrained(tmp_path)
    wide = tiny("bert", hidden_size=128)
    right = logits(wide, inputs("bert"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(wide, tmp_path, ignore_mismatched_sizes=True)
    assert any("was not loaded either" in str(warning.message) for warning in caught)
    assert all(not leaf.weight.any() for leaf in leaves_of(loaded))
    for leaf in leaves_of(loaded):
        leaf.placeholder = False
    torch.testing.assert_close(logits(loaded, inputs("bert")), right)


@pytest.mark.filterwarnings("ignore:.*quant_state.*", "ignore:.*ecompile.*")
@pytest.mark.parametrize("method", ["sparse_ft", "spt"])
def test_dequantized_with_the_adapter_on_and_then_merged(method: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    dense = tiny("llama", hidden_size=64, intermediate_size=64, head_dim=32)
    batch = inputs("llama")
    adapter = with_adapter(method, copy.deepcopy(dense), batch)
    adapter.save_pretrained(tmp_path / "adapter")
    dense.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            device_map="cpu",
        )
        model = PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval()
        with pytest.raises(ValueError, match="dequantize"):
            model.merge_and_unload()
        model.base_model.model.dequantize()
        right = logits(model, batch)
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), right, atol=1e-4, rtol=1e-4)
    assert not any("Linear4bit" in type(module).__name__ for module in merged.modules())
