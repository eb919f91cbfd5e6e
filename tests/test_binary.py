"""Low-bit matrices, Bi-LoRA and Bi-AdaptFormer, against dense float64 references that are written anew here."""

from __future__ import annotations

import copy
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_integrations import check_training_and_merging_in_4_bit, quantised_llama
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import peft_ext
from peft_ext import BinaryAdapterConfig, BinaryLoraConfig
from peft_ext.low_bit import LowBitMatrix, codebook, decode, encode, used_values
from peft_ext.low_bit.codebook import latents
from peft_ext.testing.method import warns_only


NORMAL = NormalDist()
Lora = partial(BinaryLoraConfig, r=3, dropout=0.0, target_modules=["fc1", "fc2"])


def quantised(w: torch.Tensor, bits: int) -> torch.Tensor:
    """mu + sd * level, entry by entry."""
    levels, thresholds = codebook(bits)
    mu = w.sum() / w.numel()
    sd = ((w - mu).square().sum() / (w.numel() - 1)).sqrt()
    z = ((w - mu) / (sd + 1e-5)).flatten().tolist()
    used = [levels[sum(value > threshold for threshold in thresholds)] for value in z]
    return mu + sd * torch.tensor(used, dtype=w.dtype).view_as(w)


def as_double(name: str, config: Any) -> Any:
    model = get_peft_model(tiny(name).double(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "binary_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3 + 0.05)
    return model.eval()


def test_the_published_levels() -> None:
    levels, thresholds = codebook(1)
    assert levels == pytest.approx((-0.674490, 0.674490), abs=1e-6) and thresholds == (0.0,)
    levels, thresholds = codebook(2)
    assert levels == pytest.approx((-1.2657, -0.3778, 0.3778, 1.2657), abs=1e-4)
    assert thresholds == pytest.approx((-0.8217, 0.0, 0.8217), abs=1e-4)
    for bits in (3, 4):  # each level is the median of its cell, each threshold in the middle
        levels, thresholds = codebook(bits)
        edges = [0.0, *(NORMAL.cdf(t) for t in thresholds), 1.0]
        assert levels == pytest.approx([NORMAL.inv_cdf((a + b) / 2) for a, b in pairwise(edges)], abs=1e-7)
        assert thresholds == pytest.approx([(a + b) / 2 for a, b in pairwise(levels)], abs=1e-12)
    assert all(len(codebook(bits)[0]) == 2**bits == len(set(codebook(bits)[0])) for bits in range(1, 9))


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 3)], ids=["any", "one entry", "equal entries"])
def test_closed_form_of_the_gradient(shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.full(shape, 0.3) if shape == (3, 3) else torch.randn(shape)
    weight = weight.double().requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    values = used_values(weight, bits)
    closed = torch.autograd.grad(values, weight, grad)
    monkeypatch.setattr(sys.modules[used_values.__module__], "needs_plain_operations", lambda: True)
    plain = used_values(weight, bits)
    torch.testing.assert_close(values, plain, atol=0, rtol=0)
    torch.testing.assert_close(closed, torch.autograd.grad(plain, weight, grad), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_values_and_gradient_are_those_of_the_formula(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = (torch.randn(7, 5, generator=generator, dtype=torch.float64) * 0.02 + 0.01).requires_grad_()
    upstream = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    used = used_values(w, bits)
    assert (used - quantised(w.detach(), bits)).abs().max() < 1e-12
    (used * upstream).sum().backward()
    latent, n = w.detach(), w.numel()
    mu, sd = latent.mean(), latent.std()
    r = sd / (sd + 1e-5)
    z = (latent - mu) / (sd + 1e-5)
    level = (used.detach() - mu) / sd
    expected = r * upstream + (1 - r) * upstream.mean()
    expected += (latent - mu) / ((n - 1) * sd) * (upstream * (level - r * z)).sum()
    assert w.grad is not None and (w.grad - expected).abs().max() < 1e-10


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 5), (32, 7), (1, 2)])
def test_codes_come_back_bit_for_bit(bits: int, shape: tuple[int, int]) -> None:
    """Also where the entries fill no whole number of bytes: the published writer drops what is left over."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    coded = encode(w, bits)
    assert coded.codes.dtype == torch.uint8 and len(coded.codes) == -(-w.numel() * bits // 8)
    assert torch.equal(decode(coded, bits, shape), used_values(w, bits))
    with pytest.raises(ValueError, match=rf"in {bits} bits has \d+ bytes of codes, got {len(coded.codes) + 1}"):
        decode(type(coded)(torch.cat([coded.codes, coded.codes[:1]]), coded.stats), bits, shape)


def test_the_layout_of_the_published_files() -> None:
    """The first weight is in the lowest bits of a byte."""
    w = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0]])
    assert encode(w, 1).codes.tolist() == [0b01011001, 0b10]


def test_equal_entries_are_themselves() -> None:
    """z is zero throughout, which is the threshold: it is a level too, where the published code decodes 0."""
    w = torch.full((4, 4), 0.25, requires_grad=True)
    used = used_values(w, 1)
    assert torch.equal(used, w) and torch.equal(decode(encode(w.detach(), 1), 1, (4, 4)), w)
    used.sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


def test_statistics_of_what_is_used() -> None:
    w = torch.randn(400, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 2
    spreads = []
    for bits in (1, 2, 4, 8):
        used = used_values(w, bits)
        assert abs(used.mean() - w.mean()) < 2e-3
        spreads.append(float(used.std() / w.std()))
    assert spreads[0] == pytest.approx(0.6745, abs=1e-3) and spreads == sorted(spreads) and spreads[-1] > 0.99


@pytest.mark.parametrize(("bits", "skew"), [(1, 0.0), (1, 1.5), (2, 0.0), (2, 1.5), (4, 1.5), (8, 0.0)])
def test_latents_that_fit_a_file(bits: int, skew: float) -> None:
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) * 0.01
    w = (w * 100 * skew).exp() * w.abs() if skew else w
    coded = encode(w, bits)
    found = latents(coded, bits, (32, 48))
    assert torch.equal(encode(found, bits).codes, coded.codes)
    assert found.mean().item() == pytest.approx(w.mean().item(), abs=1e-3 * w.std().item())
    assert found.std().item() == pytest.approx(w.std().item(), rel=1e-3)


@pytest.mark.parametrize("bits", [1, 3, 32])
def test_lora_is_the_dense_update(bits: int) -> None:
    model = as_double("mlp", Lora(bits=bits, scale=2.0))
    dense = tiny("mlp").double()
    for name in ("fc1", "fc2"):
        layer: Any = model.base_model.model.get_submodule(name)
        down, up = (leaf["default"].weight.detach() for leaf in (layer.binary_low_rank_down, layer.binary_low_rank_up))
        if bits < 32:
            down, up = quantised(down, bits), quantised(up, bits)
        dense.get_submodule(name).get_parameter("weight").data += 2.0 * up @ down
    batch = {key: v.double() if v.is_floating_point() else v for key, v in inputs("mlp").items()}
    assert (logits(model, batch) - logits(dense, batch)).abs().max() < 1e-10
    merged = copy.deepcopy(model).merge_and_unload()
    for name in ("fc1", "fc2"):
        difference = merged.get_submodule(name).get_parameter("weight") - dense.get_submodule(name).get_parameter(
            "weight"
        )
        assert difference.abs().max() < 1e-10


def test_32_bits_are_a_plain_lora() -> None:
    ours = get_peft_model(tiny("llama"), BinaryLoraConfig(r=4, bits=32, scale=0.5, dropout=0.0))
    theirs = get_peft_model(tiny("llama"), LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    assert {key for key, _ in ours.named_parameters() if "_down.default" in key and "layers.0" in key} == {
        f"base_model.model.model.layers.0.self_attn.{name}.binary_low_rank_down.default.weight"
        for name in ("q_proj", "v_proj")
    }
    assert torch.equal(logits(ours, inputs("llama")), logits(tiny("llama"), inputs("llama")))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
                kind = "down" if "lora_A" in key else "up"
                own = key.split(".lora_")[0] + f".binary_low_rank_{kind}.default.weight"
                ours.get_parameter(own).copy_(parameter)
    found = [logits(model, inputs("llama")) for model in (ours, theirs)]
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fields", "reader", "behind", "width"),
    [
        ("vit", {}, "layernorm_after", "mlp.fc2", 1),
        ("vit", {"before_norm": False}, "mlp.fc1", "mlp.fc2", 1),
        ("bert", {}, "intermediate.dense", "output.dense", 1),
        ("llama", {"activation": "gelu", "bits": 32}, "mlp.gate_proj", "mlp.down_proj", 1),
        ("vit", {"site": "sequential", "activation": "tanh"}, None, "mlp.fc2", 1),
        ("llama", {"target_modules": ["o_proj"]}, "self_attn.o_proj", "self_attn.o_proj", 1),
    ],
)
def test_adapter_is_the_bottleneck(name: str, fields: Any, reader: str | None, behind: str, width: int) -> None:
    """Against the base with the term added by hooks; gradients of the latents by central differences at 32 bits."""
    config = BinaryAdapterConfig(**{"r": 4, "dropout": 0.0, "scale": 0.7, **fields})
    model = as_double(name, config)
    layers = {key: module for key, module in model.base_model.model.named_modules() if hasattr(module, "listeners")}
    assert len(layers) == 2 and all(key.endswith(f".{behind}") for key in layers)
    dense = tiny(name).double()
    act = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[fields.get("activation", "relu")]
    for key, layer in layers.items():
        down, up = (getattr(layer, f"binary_adapter_{end}")["default"].weight.detach() for end in ("down", "up"))
        if fields.get("bits") != 32:
            down, up = quantised(down, 1), quantised(up, 1)
        kept: dict[str, Any] = {}
        if reader is not None:
            module = dense.get_submodule(key.removesuffix(behind) + reader)
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(x=args[0]))

        def add(_: Any, args: Any, output: Any, kept: Any = kept, down: Any = down, up: Any = up) -> Any:
            return output + 0.7 * act(kept.get("x", output) @ down.T) @ up.T

        dense.get_submodule(key).register_forward_hook(add)
    batch = {key: v.double() if v.is_floating_point() else v for key, v in inputs(name).items()}
    assert (logits(model, batch) - logits(dense, batch)).abs().max() < 1e-10
    assert (logits(model, batch) - logits(tiny(name).double(), batch)).abs().max() > 1e-4


@pytest.mark.capability("merge", "binary_adapter", refused=True)
def test_merging_a_bottleneck_is_refused() -> None:
    model = get_peft_model(tiny("vit"), BinaryAdapterConfig(r=2))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="nonlinearity is no change of a weight"):
            merge()


def _vit_b(config: Any) -> Any:
    with init_empty_weights():
        return get_peft_model(ViTForImageClassification(ViTConfig()), config)


@pytest.mark.parametrize(
    ("config", "payload", "matrices"),
    [
        (BinaryLoraConfig(r=32), 147_456, 48),
        (BinaryAdapterConfig(r=32), 73_728, 24),
        (BinaryLoraConfig(bits=4), None, 48),
    ],
)
def test_published_sizes(config: Any, payload: int | None, matrices: int) -> None:
    """On ViT-B, as it would be on disk; its 1-bit codes are 1/32 of LoRA's bytes."""
    model = _vit_b(config)
    codes = [buffer for key, buffer in model.named_buffers() if key.endswith(".codes")]
    stats = [buffer for key, buffer in model.named_buffers() if key.endswith(".stats")]
    assert len(codes) == len(stats) == matrices and {tuple(s.shape) for s in stats} == {(2,)}
    parameters = sum(p.numel() for key, p in model.named_parameters() if p.requires_grad)
    assert sum(map(len, codes)) == parameters * config.bits // 8
    assert payload is None or sum(map(len, codes)) == payload


@pytest.mark.parametrize("config", [BinaryLoraConfig(r=3), BinaryAdapterConfig(r=3, bits=2)])
def test_a_file_holds_codes_only_and_the_same_function(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("vit"), config)
    for _ in range(2):
        _step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    expected = logits(model.eval(), inputs("vit"))
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"codes", "stats"}
    assert all(t.shape == (2,) for key, t in stored.items() if key.endswith("stats"))
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny("vit"), str(tmp_path), is_trainable=trainable)
        assert torch.equal(logits(loaded.eval(), inputs("vit")), expected)
        again = get_peft_model_state_dict(loaded)
        assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())
    # what is written into the latents afterwards counts
    with torch.no_grad():
        for key, parameter in loaded.named_parameters():
            if "binary_" in key:
                parameter.mul_(torch.linspace(-2, 2, parameter.numel()).view_as(parameter))
    changed = logits(loaded, inputs("vit"))
    assert not torch.allclose(changed, expected, atol=1e-4)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(tiny("vit"), str(tmp_path / "again"))
    assert torch.equal(logits(again.eval(), inputs("vit")), changed)


def _step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    value = loss(model, inputs("vit"))
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def test_a_training_resumes_exactly(tmp_path: Path) -> None:
    """The adapter's file has no latents, the optimizer's state has; the first gradient after loading is theirs too."""

    def start() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = get_peft_model(tiny("vit"), BinaryLoraConfig(r=3, dropout=0.0)).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)

    model, optimizer = start()
    losses = [_step(model, optimizer) for _ in range(4)]
    half, half_optimizer = start()
    assert [_step(half, half_optimizer) for _ in range(2)] == losses[:2]
    half.save_pretrained(str(tmp_path))
    torch.save(half_optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed, resumed_optimizer = start()
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    resumed_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert [_step(resumed, resumed_optimizer) for _ in range(2)] == losses[2:]
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(key)), key


def test_training_goes_on_from_a_published_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("vit"), BinaryLoraConfig(r=3, dropout=0.0)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = [_step(model, optimizer) for _ in range(8)]
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("vit"), str(tmp_path), is_trainable=True).train()
    fresh = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-9)
    first = _step(loaded, fresh)
    assert first == loss(model, inputs("vit")).item() < losses[0]
    assert loss(loaded, inputs("vit")).item() == pytest.approx(first, rel=1e-3)  # the latents act the same
    later = [
        _step(loaded, torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)) for _ in range(8)
    ]
    assert later[-1] < first


def _published(tmp_path: Path) -> Any:
    model = get_peft_model(tiny("llama"), BinaryLoraConfig(r=3, init_weights=False, dropout=0.0)).eval()
    model.save_pretrained(str(tmp_path))
    return model


def test_compiled_before_the_first_forward(tmp_path: Path) -> None:
    """transformers' loader gives the tensors past `load_state_dict`; a copy and a move make others of them."""
    batch, expected = inputs("llama"), logits(_published(tmp_path), inputs("llama"))
    theirs = tiny("llama")
    theirs.load_adapter(str(tmp_path))
    for model in (theirs, copy.deepcopy(theirs), theirs._apply(torch.clone)):
        torch.compiler.reset()
        compiled = torch.compile(model.eval(), backend="eager")
        torch.testing.assert_close(logits(compiled, batch), expected)
    moved = theirs.to("meta")
    leaves = [leaf for leaf in moved.modules() if isinstance(leaf, LowBitMatrix)]
    assert leaves and all(leaf._decoded is None for leaf in leaves)


@pytest.mark.parametrize("way", ["vector", "data", "copy, data", "copy, state"])
def test_latents_that_others_write_over_a_loaded_adapter_count(way: str, tmp_path: Path) -> None:
    """`vector_to_parameters` and moving averages write to `.data`, or average everything that a state has."""
    _published(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path), is_trainable=True)
    averaged = copy.deepcopy(model).requires_grad_(False) if way.startswith("copy") else model
    generator = torch.Generator().manual_seed(0)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    target = {key: p + torch.randn(p.shape, generator=generator) * 0.3 for key, p in trained.items()}
    with torch.no_grad():
        if way == "vector":
            torch.nn.utils.vector_to_parameters(
                torch.cat([value.flatten() for value in target.values()]), trained.values()
            )
        elif way == "copy, state":
            for key, parameter in trained.items():
                parameter.copy_(target[key])
            logits(model, inputs("llama"))  # takes note
            for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
        else:
            for key in trained:
                data = averaged.get_parameter(key).data
                data.copy_(target[key]) if way == "data" else data.lerp_(target[key], 0.1)
    plain = get_peft_model(tiny("llama"), BinaryLoraConfig(r=3, init_weights=False, dropout=0.0)).eval()
    with torch.no_grad():
        for key in trained:
            plain.get_parameter(key).copy_(averaged.get_parameter(key))
    torch.testing.assert_close(logits(averaged.eval(), inputs("llama")), logits(plain, inputs("llama")))


@pytest.mark.capability("conversion to LoRA", "binary_low_rank")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_export_to_lora(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(name), BinaryLoraConfig(r=4, scale=3.0, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "binary_" in key:
                parameter.normal_(std=0.2)
    expected = logits(model.eval(), inputs(name))
    peft_ext.save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    assert lora.peft_config["default"].peft_type.value == "LORA"
    assert torch.allclose(logits(lora, inputs(name)), expected, atol=1e-5)


def test_hooks_go_with_the_last_adapter() -> None:
    model = get_peft_model(tiny("vit"), BinaryAdapterConfig(r=2))
    base = model.unload()
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in base.modules())


@pytest.mark.parametrize("base_first", [True, False])
def test_the_input_is_read_where_other_adapters_are(base_first: bool) -> None:
    """LoRA on the module whose input a parallel adapter reads, put on before it or after."""
    configs = [
        ("lora", LoraConfig(target_modules=["fc1"], init_lora_weights=False)),
        ("ours", BinaryAdapterConfig(r=2)),
    ]
    configs[1][1].before_norm = False
    model = tiny("vit")
    for adapter, config in configs if base_first else configs[::-1]:
        with warns_only("Already found a `peft_config` attribute"):
            model.add_adapter(config, adapter)
    model.set_adapter(["lora", "ours"])
    batch = inputs("vit")
    both = logits(model.eval(), batch)
    model.set_adapter("lora")
    assert not torch.allclose(logits(model, batch), both, atol=1e-7)


@pytest.mark.parametrize("config", [BinaryLoraConfig, BinaryAdapterConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"bits": 0}, "`bits` must be 1 to 8, or 32 for weights that are not quantised, got 0"),
        ({"bits": 16}, "`bits` must be 1 to 8, or 32"),
        ({"bits": True}, "`bits` must be 1 to 8, or 32"),
        ({"scale": float("inf")}, "`scale` must be a finite number"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
    ],
)
def test_bad_fields(config: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "beside"}, "`site` must be 'parallel' or 'sequential', got 'beside'"),
        ({"activation": "elu"}, "`activation` must be one of 'relu', 'gelu', 'silu', 'tanh', got 'elu'"),
        ({"before_norm": 1.5}, "`before_norm` must be None, True or False"),
        ({"before_norm": True, "site": "sequential"}, "`before_norm` says what a parallel adapter reads"),
    ],
)
def test_bad_fields_of_adapters(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryAdapterConfig(**fields)


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names no norm in front of 'model\.layers\.0\.mlp\.down_proj'"):
        get_peft_model(tiny("llama"), BinaryAdapterConfig(before_norm=True))
    with pytest.raises(ValueError, match="does not know models of type None"):
        get_peft_model(tiny("mlp"), BinaryLoraConfig())
    for config in (BinaryLoraConfig(target_modules=["norm"]), BinaryAdapterConfig(target_modules=["norm"])):
        with pytest.raises(TypeError, match="this is a LayerNorm"):
            get_peft_model(tiny("mlp"), config)


def test_bad_files(tmp_path: Path) -> None:
    get_peft_model(tiny("mlp"), Lora()).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    good = load_file(file)
    key = next(key for key in good if key.endswith("fc1.binary_low_rank_up.codes"))
    stats = key.replace("codes", "stats")
    for change, message in (
        ({key: good[key][:-1].clone()}, r"size mismatch for fc1\.binary_low_rank_up"),
        ({key: None}, r"fc1\.binary_low_rank_up\.codes is missing"),
        ({stats: torch.tensor([0.0, -1.0])}, "which cannot be negative"),
        ({stats: torch.tensor([0.0, torch.nan])}, "values that are not finite"),
        ({key: good[key].float()}, "is of type torch.float32, which cannot be"),
    ):
        save_file({k: t for k, t in {**good, **change}.items() if t is not None}, file)
        with pytest.raises((ValueError, RuntimeError), match=message):
            PeftModel.from_pretrained(tiny("mlp"), str(tmp_path))


def test_a_leaf_says_what_it_is() -> None:
    assert repr(LowBitMatrix(3, 5, 2)) == "LowBitMatrix(3 x 5, 2 bit)"


@pytest.mark.capability("4-bit base", "binary_low_rank")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base_of_low_rank_updates() -> None:
    check_training_and_merging_in_4_bit(BinaryLoraConfig(r=4), "binary_low_rank")


@pytest.mark.capability("4-bit base", "binary_adapter")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base_of_bottlenecks() -> None:
    model, batch = get_peft_model(quantised_llama(), BinaryAdapterConfig(r=4)), inputs("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "binary_adapter" in key:
                parameter.normal_(std=0.3)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval(), batch)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, batch), expected, atol=1e-2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("config", [BinaryLoraConfig(r=2), BinaryAdapterConfig(r=2)])
def test_a_matrix_without_a_gradient_in_the_first_steps(kind: Any, config: Any) -> None:
    """As of an adapter that is trained after another, or of a layer that sampling or LayerDrop leaves out."""
    model = get_peft_model(tiny("llama"), config)
    model.add_adapter("later", copy.deepcopy(config))
    model.base_model.set_adapter(["default", "later"])
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        model.set_adapter("default" if step < 3 else "later")
        before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        loss(model.train(), inputs("llama")).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)


def test_layer_sampling_of_low_bit_matrices() -> None:
    model = get_peft_model(tiny("llama"), BinaryLoraConfig(r=2)).train()
    peft_ext.layer_sampling(model, blocks=1, every=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(6):
        loss(model, inputs("llama")).backward()
        optimizer.step()
        optimizer.zero_grad()
