"""VPT against dense references in float64, and what is its own: shallow prompts, key-value rows, pruning, starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import inputs, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_ext
from peft_ext import VPTConfig, attention_to_prompts, prune_prompts
from peft_ext.architectures import describe
from peft_ext.tuners.vpt import VPTLayer
from peft_ext.tuners.vpt.leaves import segment_mask


IMAGES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_image", "siglip_image", "ast")
TEXTS = ("bert", "roberta", "distilbert")


def doubled(name: str) -> dict[str, Any]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}


def adapted(name: str, base: nn.Module | None = None, **fields: Any) -> Any:
    model = get_peft_model(base or tiny(name).double(), VPTConfig(**{"num_tokens": 3, **fields})).double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(p for key, p in model.named_parameters() if ".vpt_" in key):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def layers_of(model: nn.Module) -> list[VPTLayer]:
    return [module for module in model.modules() if isinstance(module, VPTLayer)]


class Inserted:
    """The reference: rows stand behind the hidden states of the stock blocks, as published.

    Args:
        model: The stock model.
        rows: By the block's number `(T, D)`; those of the first only, if they travel.
        travels: Whether what the blocks make of the rows goes on to the next.
    """

    def __init__(self, model: nn.Module, rows: dict[int, torch.Tensor], travels: bool = False) -> None:
        self.model, self.rows, self.travels = model, rows, travels
        self.state: torch.Tensor | None = None

    def __call__(self, **batch: Any) -> Any:
        blocks = [block for block in describe(self.model).blocks if "text_model" not in block.name]
        handles = []
        for index, block in enumerate(blocks):
            module = self.model.get_submodule(block.name)
            handles.append(module.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(index)))
        try:
            return self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Callable[..., Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0]
            rows = self.state if self.travels and index else self.rows.get(index)
            if rows is None:
                return args, kwargs
            rows = rows.expand(len(hidden), -1, -1)
            longer = [torch.cat([hidden, rows], 1)]
            for value in args[1:]:  # the padding mask: everybody sees the prompts
                if isinstance(value, torch.Tensor):
                    one = 0.0 if value.is_floating_point() else True
                    value = F.pad(value, (0, rows.shape[1]), value=one)
                    value = torch.cat([value, value[:, :, :1].expand(-1, -1, rows.shape[1], -1)], 2)
                longer.append(value)
            return tuple(longer), kwargs

        return enter

    def _leave(self, index: int) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            count = self.rows[0 if self.travels else index].shape[0] if (self.travels or index in self.rows) else 0
            tokens = states.shape[1] - count
            self.state = states[:, tokens:]
            states = states[:, :tokens]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return leave


def prompts_of(model: nn.Module, adapter: str = "default") -> dict[int, torch.Tensor]:
    return {index: layer.rows(adapter, 1)[0].detach() for index, layer in enumerate(layers_of(model))}


# The equations


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_prompts_are_those_that_stand_beside_the_tokens(name: str, deep: bool) -> None:
    """Further keys and values against rows that pass through the whole block, forward and gradients."""
    model, batch = adapted(name, deep=deep), doubled(name)
    stock = tiny(name).double()
    rows = prompts_of(model) if deep else {0: prompts_of(model)[0]}
    for value in rows.values():
        value.requires_grad_()
    expected = Inserted(stock, rows, travels=not deep)(**batch).logits
    output = model(**batch).logits
    assert not torch.allclose(expected, stock(**batch).logits, atol=1e-4)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    expected.sin().sum().backward()
    output.sin().sum().backward()
    layers = layers_of(model) if deep else layers_of(model)[:1]
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.vpt_prompts["default"].weight.grad, rows[index].grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("deep", [True, False])
def test_what_others_see_has_the_stock_lengths(name: str, deep: bool) -> None:
    base = tiny(name, attn_implementation="eager").double()
    model, batch = adapted(name, base, deep=deep, kv_tokens=2), doubled(name)
    stock = tiny(name, attn_implementation="eager").double()
    options = {"output_hidden_states": True, "output_attentions": True}
    expected, output = stock(**batch, **options), model(**batch, **options)
    for key in ("hidden_states", "attentions"):
        assert [value.shape for value in output[key]] == [value.shape for value in expected[key]]
    torch.testing.assert_close(output.hidden_states[0], expected.hidden_states[0])
    assert (output.attentions[0].sum(-1) < 1 - 1e-3).all()  # the rest went to the prompts
    shares = attention_to_prompts(model, **batch)
    for index, weights in enumerate(output.attentions):
        torch.testing.assert_close(shares[index], 1 - weights.sum(-1).mean((0, 2)), atol=1e-10, rtol=1e-10)
    backbone = getattr(model.get_base_model(), name)
    features = {key: value for key, value in batch.items() if key != "labels"}
    assert backbone(**features).last_hidden_state.shape == getattr(stock, name)(**features).last_hidden_state.shape


@pytest.mark.parametrize("name", ["beit", "swin", "modernbert", "vit_mae", "dinov3"])
def test_models_whose_attention_knows_positions_or_windows(name: str) -> None:
    """The attention itself against softmax over further keys, whose bias is zero; no rotation of a prompt's key."""
    base, batch = OTHERS[name]()
    model = adapted(name, base)
    checked = []

    def check(layer: VPTLayer, attention: Any, args: Any, output: Any) -> None:
        rows = layer.rows("default", 1)
        norm = layer.block.get_submodule(layer.norm)
        rows = norm(rows)
        if layer.is_fused:
            _, k, v = F.linear(rows, attention.Wqkv.weight, attention.Wqkv.bias).chunk(3, -1)
        else:
            k, v = attention.k_proj(rows), attention.v_proj(rows)
        keys, values = (part[0].view(3, -1, attention.head_dim).transpose(0, 1) for part in (k, v))
        q, key, value, mask, scaling = seen[attention]
        scores = torch.cat([q @ keys.mT, q @ key.mT], -1) * scaling
        if mask is not None:
            bias = torch.zeros_like(scores[:, :1])
            shown = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
            bias = torch.cat([torch.zeros(*scores.shape[:3], 3, dtype=scores.dtype), shown.expand_as(q @ key.mT)], -1)
            scores = scores + bias
        expected = scores.softmax(-1) @ torch.cat([values.expand(len(value), -1, -1, -1), value], 2)
        projection = attention.Wo if layer.is_fused else attention.o_proj
        expected = projection(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(output[0], expected, atol=1e-10, rtol=1e-10)
        checked.append(layer)

    seen: dict[Any, Any] = {}
    original = peft_ext.tuners.vpt.attention._stock

    def spying(attention: Any, implementation: str) -> Any:
        run = original(attention, implementation)

        def call(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
            tokens = slice(3, None)
            seen[module] = (q, k[:, :, tokens], v[:, :, tokens], None if mask is None else mask[..., tokens], scaling)
            return run(module, q, k, v, mask, scaling=scaling, **kwargs)

        return call

    for layer in layers_of(model):
        layer.attention.register_forward_hook(lambda m, a, o, layer=layer: check(layer, m, a, o))
    peft_ext.tuners.vpt.attention._stock = spying
    try:
        output = model(**batch)
    finally:
        peft_ext.tuners.vpt.attention._stock = original
    assert len(checked) == len(layers_of(model)) > 1
    stock = OTHERS[name]()[0](**batch)
    assert not torch.allclose(output[0], stock[0], atol=1e-4)


def _double(model: Any) -> Any:
    return model.double().eval()


def _modernbert() -> Any:
    torch.manual_seed(0)
    config = tf.ModernBertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    config.pad_token_id, config.local_attention = 0, 4
    return _double(tf.ModernBertModel(config)), {
        key: value for key, value in inputs("bert").items() if key != "labels"
    }


def _vit_mae() -> Any:
    torch.manual_seed(0)
    config = tf.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    config.mask_ratio = 0.0
    noise = torch.arange(4.0).expand(2, -1)
    return _double(tf.ViTMAEModel(config)), {"pixel_values": doubled("vit")["pixel_values"], "noise": noise}


def _dinov3() -> Any:
    torch.manual_seed(0)
    config = tf.DINOv3ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    return _double(tf.DINOv3ViTModel(config)), {"pixel_values": doubled("vit")["pixel_values"]}


OTHERS: dict[str, Callable[[], Any]] = {
    "beit": lambda: (tiny("beit").double(), doubled("beit")),
    "swin": lambda: (tiny("swin", depths=[2, 2]).double(), doubled("swin")),
    "modernbert": _modernbert,
    "vit_mae": _vit_mae,
    "dinov3": _dinov3,
}


def test_prompts_may_be_permuted_and_change_no_earlier_layer() -> None:
    model, batch = adapted("vit"), doubled("vit")
    before = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        weight = layers_of(model)[1].vpt_prompts["default"].weight
        weight.copy_(weight[[2, 0, 1]].clone())
    torch.testing.assert_close(model(**batch).logits, before.logits, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        weight.copy_(weight.roll(1, -1))
    after = model(**batch, output_hidden_states=True)
    assert torch.equal(after.hidden_states[0], before.hidden_states[0])
    torch.testing.assert_close(after.hidden_states[1], before.hidden_states[1], atol=1e-14, rtol=1e-14)
    assert not torch.allclose(after.logits, before.logits)


@pytest.mark.parametrize("share_kv", [True, False])
def test_key_value_rows(share_kv: bool) -> None:
    """Softmax over learnt rows too; a tensor that is keys and values at once gets both gradients."""
    model, batch = adapted("vit", kv_tokens=2, share_kv=share_kv, layers_to_transform=[0]), doubled("vit")
    layer = layers_of(model)[0]
    found = {}
    layer.attention.register_forward_hook(lambda m, args, output: found.update(hidden=args[0], output=output[0]))
    model(**batch).logits.sin().sum().backward()
    attention, keys = layer.attention, layer.vpt_keys["default"].weight
    k_rows = keys.detach().clone().requires_grad_()
    v_rows = (keys if share_kv else layer.vpt_values["default"].weight).detach().clone().requires_grad_()
    rows = layer.block.layernorm_before(layer.rows("default", 1)).expand(2, -1, -1)
    heads = lambda x: x.view(2, -1, 2, 8).transpose(1, 2)
    k, v = (
        torch.cat([heads(project(rows)), learnt.expand(2, -1, -1, -1), heads(project(found["hidden"]))], 2)
        for project, learnt in ((attention.k_proj, k_rows), (attention.v_proj, v_rows))
    )
    weights = (heads(attention.q_proj(found["hidden"])) @ k.mT * 8**-0.5).softmax(-1)
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found["output"], expected, atol=1e-12, rtol=1e-10)
    (upstream,) = torch.autograd.grad(
        Rest(model, layer)(expected.detach().requires_grad_(), batch), [Rest.leaf], retain_graph=False
    )
    expected.backward(upstream)
    assert k_rows.grad is not None and v_rows.grad is not None
    if share_kv:
        torch.testing.assert_close(keys.grad, k_rows.grad + v_rows.grad, atol=1e-10, rtol=1e-8)
    else:
        torch.testing.assert_close(keys.grad, k_rows.grad, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(layer.vpt_values["default"].weight.grad, v_rows.grad, atol=1e-10, rtol=1e-8)


class Rest:
    """The loss as a function of what the attention of a layer puts out."""

    leaf: torch.Tensor

    def __init__(self, model: Any, layer: VPTLayer) -> None:
        self.model, self.layer = model, layer

    def __call__(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        Rest.leaf = output
        handle = self.layer.attention.register_forward_hook(lambda module, args, old: (output, old[1]))
        try:
            return self.model(**batch).logits.sin().sum()
        finally:
            handle.remove()


def test_projected_and_shared_prompts() -> None:
    batch = doubled("vit")
    model = adapted("vit", project_dim=5)
    first, second = layers_of(model)
    project = first.vpt_project["default"]
    assert "default" not in second.vpt_project
    rows = {
        index: layer.vpt_prompts["default"].weight.detach() @ project.weight.detach().T + project.bias.detach()
        for index, layer in enumerate((first, second))
    }
    torch.testing.assert_close(
        model(**batch).logits, Inserted(tiny("vit").double(), rows)(**batch).logits, atol=1e-10, rtol=1e-10
    )
    shared = adapted("vit", share_layers=True, kv_tokens=2)
    names = [key for key, parameter in shared.named_parameters() if parameter.requires_grad]
    assert names == [
        "base_model.model.vit.layers.0.prompt_layer.vpt_prompts.default.weight",
        "base_model.model.vit.layers.0.prompt_layer.vpt_keys.default.weight",
    ]
    apart = adapted("vit", kv_tokens=2)
    with torch.no_grad():
        for layer in layers_of(apart):
            layer.vpt_prompts["default"].weight.copy_(layers_of(shared)[0].vpt_prompts["default"].weight)
            layer.vpt_keys["default"].weight.copy_(layers_of(shared)[0].vpt_keys["default"].weight)
    output = shared(**batch).logits
    torch.testing.assert_close(output, apart(**batch).logits, atol=1e-12, rtol=1e-12)
    output.sin().sum().backward()
    apart(**batch).logits.sin().sum().backward()
    for leaf in ("vpt_prompts", "vpt_keys"):
        both = sum(getattr(layer, leaf)["default"].weight.grad for layer in layers_of(apart))
        own = getattr(layers_of(shared)[0], leaf)["default"].weight.grad
        torch.testing.assert_close(own, both, atol=1e-10, rtol=1e-8)
    copied = copy.deepcopy(shared)
    torch.testing.assert_close(copied(**batch).logits, output)


def test_adapters_that_act_together_are_their_prompts_together() -> None:
    batch = doubled("vit")
    both = adapted("vit", num_tokens=2)
    both.add_adapter("second", VPTConfig(num_tokens=3))
    both.double().base_model.set_adapter(["default", "second"])
    one = adapted("vit", num_tokens=5)
    with torch.no_grad():
        for layer, target in zip(layers_of(both), layers_of(one), strict=True):
            rows = [layer.vpt_prompts[name].weight for name in ("default", "second")]
            target.vpt_prompts["default"].weight.copy_(torch.cat(rows))
    torch.testing.assert_close(both(**batch).logits, one(**batch).logits, atol=1e-12, rtol=1e-12)


def test_dropout_is_drawn_for_each_sample() -> None:
    model, batch = adapted("vit", prompt_dropout=0.5), doubled("vit")
    expected = model(**batch).logits
    rows = layers_of(model)[0].train().rows("default", 4)
    assert rows.shape == (4, 3, 16) and not torch.equal(rows[0], rows[1])
    whole = layers_of(model)[0].vpt_prompts["default"].weight
    assert ((rows == 0) | (rows == 2 * whole)).all()
    torch.testing.assert_close(model.eval()(**batch).logits, expected)


# Implementations of the attention, precision, checkpoints


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_eager_and_sdpa_agree(name: str, deep: bool) -> None:
    batch, outputs = doubled(name), []
    model = adapted(name, deep=deep, kv_tokens=2)
    for implementation in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        outputs.append(model(**batch).logits)
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-4)  # the eager one's softmax is in fp32


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(deep: bool, use_reentrant: bool) -> None:
    batch, gradients = doubled("vit"), []
    for checkpoints in (False, True):
        model = adapted("vit", deep=deep, kv_tokens=2).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("way", ["fused", "data", "in place"])
def test_prompts_act_as_they_are_in_eval_mode(way: str) -> None:
    """A fused optimizer, or writing to `data`, changes them and leaves no trace at the tensor."""
    model, batch = adapted("vit"), doubled("vit")
    prompts = [layer.vpt_prompts["default"].weight for layer in layers_of(model)]
    with torch.no_grad():
        first = model(**batch).logits
    if way == "fused":
        model(**batch).loss.backward()
        torch.optim.AdamW(prompts, lr=0.1, fused=True).step()
    with torch.no_grad():
        for prompt in prompts if way != "fused" else []:
            (prompt.data if way == "data" else prompt).copy_(prompt.roll(1, -1))
        changed = model(**batch).logits
        assert not torch.allclose(changed, first)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, changed)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, changed)


def test_lora_on_the_keys_acts_on_prompts_too() -> None:
    model, batch = adapted("vit").get_base_model(), doubled("vit")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), "lora")
    model.double().set_adapter(["default", "lora"])
    rows = {index: layer.vpt_prompts["default"].weight.detach() for index, layer in enumerate(layers_of(model))}
    with torch.no_grad():
        output = model.eval()(**batch).logits
        model.set_adapter("lora")
        torch.testing.assert_close(Inserted(model, rows)(**batch).logits, output, atol=1e-10, rtol=1e-10)
        model.set_adapter("default")
        assert not torch.allclose(model(**batch).logits, output)


# Published numbers


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"num_tokens": 10}, 92_160),
        ({"num_tokens": 50}, 460_800),
        ({"num_tokens": 50, "deep": False}, 38_400),
        ({"num_tokens": 5, "kv_tokens": 5}, 46_080 + 46_080),
    ],
)
def test_published_counts(fields: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        base = tf.ViTForImageClassification(tf.ViTConfig())
    base.classifier.bias = nn.Parameter(torch.ones(2))
    model = get_peft_model(base, VPTConfig(**fields), low_cpu_mem_usage=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_published_start() -> None:
    torch.manual_seed(0)
    base = tiny("vit", hidden_size=64)
    model = get_peft_model(base, VPTConfig(num_tokens=200, project_dim=32, kv_tokens=50))
    layer = layers_of(model)[0]
    prompts, keys = layer.vpt_prompts["default"].weight, layer.vpt_keys["default"].weight
    assert abs(prompts.abs().max().item() / (6 / (3 * 8 * 8 + 32)) ** 0.5 - 1) < 0.01
    assert abs(keys.abs().max().item() / (6 / (50 * 32)) ** 0.5 - 1) < 0.01
    project = layer.vpt_project["default"]
    assert abs(project.weight.std().item() / (2 / 64) ** 0.5 - 1) < 0.1


# A start from another adapter


@pytest.mark.parametrize("deep", [True, False])
def test_start_from_another_adapter(deep: bool, tmp_path: Path) -> None:
    source = adapted("vit", num_tokens=5, deep=deep, kv_tokens=2)
    source.save_pretrained(tmp_path)
    batch = doubled("vit")
    same = get_peft_model(
        tiny("vit").double(), VPTConfig(num_tokens=5, deep=deep, kv_tokens=2, init_weights=str(tmp_path))
    )
    torch.testing.assert_close(same.double().eval()(**batch).logits, source(**batch).logits)
    assert same.peft_config["default"].init_weights is True
    fewer = get_peft_model(
        tiny("vit").double(), VPTConfig(num_tokens=2, deep=deep, kv_tokens=2, init_weights=str(tmp_path))
    )
    old, new = (layers_of(model)[0].vpt_prompts["default"].weight for model in (source, fewer))
    expected = torch.stack([old[:3].mean(0), old[3:].mean(0)])
    torch.testing.assert_close(new.double(), expected, atol=1e-6, rtol=1e-6)
    for fields, match in (
        ({"num_tokens": 6}, "fewer than `num_tokens`"),
        ({"num_tokens": 5, "deep": not deep}, "whose `deep` is"),
        ({"num_tokens": 5, "kv_tokens": 0}, "whose `kv_tokens` is 2"),
    ):
        options = {"kv_tokens": 2, "deep": deep, **fields}
        with pytest.raises(ValueError, match=match):
            get_peft_model(tiny("vit"), VPTConfig(init_weights=str(tmp_path), **options))
    wider = tiny("vit", hidden_size=32)
    with pytest.raises(ValueError, match=r"has the shape .* this model needs"):
        get_peft_model(wider, VPTConfig(num_tokens=5, deep=deep, kv_tokens=2, init_weights=str(tmp_path)))
    assert not layers_of(wider) and all(parameter.requires_grad for parameter in wider.parameters())
    assert not any("forward" in vars(module) for module in wider.modules())
    lora = get_peft_model(tiny("vit"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="an adapter of the method LORA, not VPT"):
        get_peft_model(tiny("vit"), VPTConfig(init_weights=str(tmp_path / "lora")))


# A start at the class tokens of the frozen model


def class_tokens(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By block: the mean of the first token of each class, behind the block, one sample after the other."""
    found: dict[str, dict[int, list[torch.Tensor]]] = {}
    for row, label in enumerate(batch["labels"].tolist()):
        kept: dict[str, torch.Tensor] = {}
        hooks = [
            model.get_submodule(block.name).register_forward_hook(
                lambda _, args, output, name=block.name, kept=kept: kept.update({name: output[0, 0]})
            )
            for block in describe(model).blocks
            if "text_model" not in block.name
        ]
        with torch.no_grad():
            model(**{key: value[row : row + 1] for key, value in batch.items()})
        for hook in hooks:
            hook.remove()
        for name, token in kept.items():
            found.setdefault(name, {}).setdefault(label, []).append(token)
    return {
        name: torch.stack([torch.stack(tokens).mean(0) for _, tokens in sorted(by_class.items())])
        for name, by_class in found.items()
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit", {}),
        ("dinov2_with_registers", {"layers_to_transform": [1]}),
        ("clip_image", {"share_layers": True}),
        ("bert", {"deep": False, "kv_tokens": 1}),
    ],
)
def test_start_at_class_tokens(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    batch = inputs(name, batch=9)
    batch["labels"] = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1, 2])
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][3, 4:] = 0
    base = tiny(name)
    expected = class_tokens(base, batch)
    if fields.get("share_layers") or not fields.get("deep", True):
        expected = dict([list(expected.items())[-1]])
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 4), slice(4, 9))]
    config = VPTConfig(num_tokens=3, init_weights="class-tokens", **fields)
    with pytest.raises(ValueError, match=r"config = peft_ext.calibrate\(model, config, dataloader\)"):
        get_peft_model(base, config)
    assert peft_ext.calibrate(base, config, parts, progress=False) is config
    config.save_pretrained(str(tmp_path / "config"))
    read = VPTConfig.from_pretrained(str(tmp_path / "config"))
    for given in (config, read):
        model = get_peft_model(tiny(name), given)
        own = model.peft_config["default"]
        assert own.init_weights is True and own.support is None and given.init_weights == "class-tokens"
        rows = [layer.vpt_prompts["default"]().detach() for layer in layers_of(model)]
        places = fields.get("layers_to_transform", range(len(rows)))
        for place, found in zip(places, rows, strict=True):
            wanted = list(expected.values())[place if len(expected) > 1 else 0]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "calibration.safetensors").exists()
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_class_tokens_that_cannot_be_prompts() -> None:
    batch = inputs("vit", batch=4)
    batch["labels"] = torch.tensor([0, 1, 1, 0])

    def calibrated(name: str = "vit", data: dict[str, Any] = batch, **fields: Any) -> VPTConfig:
        config = VPTConfig(**{"num_tokens": 2, "init_weights": "class-tokens", **fields})
        return peft_ext.calibrate(tiny(name), config, [data], progress=False)

    with pytest.raises(ValueError, match=r"the batches hold 2, while `num_tokens` is 5: set `num_tokens=2`"):
        calibrated(num_tokens=5)
    with pytest.raises(ValueError, match="the batches hold 1"):
        calibrated(data={"pixel_values": batch["pixel_values"]})
    with pytest.raises(ValueError, match="has none"):
        calibrated("siglip_image")
    with pytest.raises(ValueError, match="leave `project_dim` out"):
        calibrated(project_dim=4)
    with pytest.raises(TypeError, match="looks at no data"):
        calibrated(init_weights=True)
    with pytest.raises(ValueError, match="another model, other layers"):
        get_peft_model(tiny("vit", num_hidden_layers=3), calibrated())


# Pruning


def test_pruned_rows_leave(tmp_path: Path) -> None:
    model = adapted("vit", num_tokens=4, kv_tokens=1)
    batches = [doubled("vit"), {key: value.flip(0) * 2 for key, value in doubled("vit").items()}]
    batches[1]["labels"] = batches[0]["labels"]
    factors = torch.ones(4, 16, dtype=torch.float64, requires_grad=True)
    rows = {i: layer.vpt_prompts["default"].weight.detach() * factors for i, layer in enumerate(layers_of(model))}
    stock = adapted("vit", num_tokens=4, kv_tokens=1)
    for layer in layers_of(stock):  # key-value rows alone
        layer.configs["default"].deep = False
    loss = sum(Inserted(stock.get_base_model(), rows)(**batch).loss for batch in batches) / 2
    (expected,) = torch.autograd.grad(loss, [factors])
    before = {i: layer.vpt_prompts["default"].weight.detach().clone() for i, layer in enumerate(layers_of(model))}
    report = prune_prompts(model, batches, tokens=0.5, segments=0.25, rewind=False)
    torch.testing.assert_close(report.segment_importance, expected.abs(), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(report.token_importance, expected.sum(1).abs(), atol=1e-10, rtol=1e-8)
    assert report.kept == sorted(expected.sum(1).abs().topk(2).indices.tolist())
    assert all(len(segments) == 4 for segments in report.segments)
    assert model.peft_config["default"].num_tokens == 2
    for index, layer in enumerate(layers_of(model)):
        weight = layer.vpt_prompts["default"].weight
        assert weight.shape == (2, 16) and torch.equal(weight, before[index][report.kept])
        shown = layer.rows("default", 1)[0]
        for row, segments in zip(shown, report.segments, strict=True):
            assert not row[segments].any() and int((row != 0).sum()) == 12
    output = model(**batches[0])
    output.loss.backward()
    assert not layers_of(model)[0].vpt_prompts["default"].weight.grad[0, report.segments[0]].any()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("vit").double(), tmp_path).double().eval()
    torch.testing.assert_close(loaded(**batches[0]).logits, output.logits, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="pruned already"):
        prune_prompts(model, batches)


def test_pruning_again_and_again_and_its_bounds() -> None:
    model = adapted("vit", num_tokens=5, share_layers=True)
    before = layers_of(model)[0].vpt_prompts["default"].weight.detach().clone()
    modes = [module.training for module in model.train().modules()]
    assert prune_prompts(model, [doubled("vit")], tokens=0.4).kept != []
    assert [module.training for module in model.modules()] == modes
    after = layers_of(model)[0].vpt_prompts["default"].weight
    assert after.shape == (3, 16) and after.requires_grad and after.grad is None
    assert not torch.isin(after, before).any()  # rewound
    prune_prompts(model, [doubled("vit")], tokens=0.99, segments=0.99)
    assert len(layers_of(model)[1].rows("default", 1)[0]) == 1
    assert [len(row) for row in model.peft_config["default"].pruned_segments] == [12]
    for options, match in (
        ({"tokens": 1.0}, "`tokens` must be at least 0 and below 1"),
        ({"segments": -0.1}, "`segments` must be"),
        ({"adapter_name": "other"}, "There is no VPT adapter 'other'"),
    ):
        with pytest.raises(ValueError, match=match):
            prune_prompts(model, [doubled("vit")], **options)
    with pytest.raises(ValueError, match="no batch"):
        prune_prompts(adapted("vit"), [])
    assert torch.equal(segment_mask([[1]], 32)[0].nonzero()[:2, 0], torch.tensor([0, 2]))


# Leaving, and bad input


@pytest.mark.parametrize("deep", [True, False])
def test_nothing_is_left_behind(deep: bool) -> None:
    base = tiny("vit")
    config = base.vit.layers[0].attention.config
    model = get_peft_model(base, VPTConfig(deep=deep))
    assert model.unload() is base
    attention = base.vit.layers[0].attention
    assert attention.config is config and "forward" not in vars(base.vit.layers[0])
    assert not any(isinstance(module, VPTLayer) for module in base.modules())


def test_blocks_of_a_tower_are_chosen() -> None:
    model = get_peft_model(tiny("clip"), VPTConfig())
    assert all("vision_model" in name for name in model.base_model.targeted_module_names)
    siglip = get_peft_model(tiny("siglip"), VPTConfig(target_modules=r"text_model\.encoder\.layers\.\d+"))
    assert len(siglip.base_model.targeted_module_names) == 2
    some = get_peft_model(tiny("vit"), VPTConfig(layers_to_transform=range(1, 2)))
    assert some.base_model.targeted_module_names == ["vit.layers.1"]
    excluded = get_peft_model(tiny("vit"), VPTConfig(exclude_modules=["vit.layers.0"]))
    assert excluded.base_model.targeted_module_names == ["vit.layers.1"]


def test_dense_prediction_on_a_plain_backbone() -> None:
    backbone = tf.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    backbone.out_features, backbone.reshape_hidden_states, backbone.apply_layernorm = ["stage2"] * 1, False, True
    config = tf.DepthAnythingConfig(
        backbone_config=backbone, neck_hidden_sizes=[8], reassemble_factors=[1], reassemble_hidden_size=16
    )
    config.fusion_hidden_size, config.head_hidden_size = 8, 8
    base = tf.DepthAnythingForDepthEstimation(config).eval()
    pixels = torch.randn(1, 3, 28, 28)
    expected = base(pixel_values=pixels).predicted_depth
    model = get_peft_model(base, VPTConfig(init_weights=False)).eval()
    output = model(pixel_values=pixels).predicted_depth
    assert output.shape == expected.shape and not torch.equal(output, expected)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("llama", {}, "PrefixTuningConfig"),
        ("t5", {}, "PrefixTuningConfig"),
        ("convnext", {}, "convolutional"),
        ("mlp", {}, "does not know models of type None"),
        ("deberta-v2", {}, "no blocks whose attention VPT knows"),
        ("clip_text", {}, "sees only those before it"),
        ("vit", {"layers_to_transform": [7]}, "the model has layers 0 to 1"),
        ("vit", {"target_modules": ["q_proj"]}, "which is no block"),
        ("vit", {"target_modules": r".*nothing"}, "names no module"),
        ("swin", {"deep": False}, "inside windows"),
        ("beit", {"deep": False}, "depend on their positions"),
        ("swin", {"share_layers": True}, "`share_layers` needs blocks of one width"),
        ("vit", {"deep": False, "exclude_modules": ["vit.layers.1"]}, "travel through all blocks"),
    ],
)
def test_refused_models(name: str, fields: dict[str, Any], match: str) -> None:
    model = tiny(name)
    keys = [key for key, _ in model.named_modules()]
    with pytest.raises((ValueError, TypeError), match=match):
        get_peft_model(model, VPTConfig(**fields))
    assert [key for key, _ in model.named_modules()] == keys


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"num_tokens": 0}, ValueError, "`num_tokens` must be at least 1"),
        ({"num_tokens": 2.0}, TypeError, "`num_tokens` must be an integer"),
        ({"kv_tokens": -1}, ValueError, "`kv_tokens`"),
        ({"project_dim": 0}, ValueError, "`project_dim`"),
        ({"prompt_dropout": 1.0}, ValueError, "`prompt_dropout`"),
        ({"deep": "yes"}, TypeError, "`deep` must be True or False"),
        ({"deep": False, "share_layers": True}, ValueError, "`share_layers` has no use"),
        ({"deep": False, "layers_to_transform": [0]}, ValueError, "`layers_to_transform` has no use"),
        ({"share_kv": False}, ValueError, "`share_kv=False` has no use"),
        ({"pruned_segments": [[1]]}, ValueError, "`pruned_segments` must be a list"),
        ({"layers_pattern": "layers", "layers_to_transform": [0]}, ValueError, "`layers_pattern` has no use"),
        ({"init_weights": 3}, ValueError, "an adapter's directory or name"),
        ({"init_weights": ""}, ValueError, "'class-tokens'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        VPTConfig(**fields)


def test_attentions_that_compute_by_themselves_are_refused() -> None:
    config = tf.Data2VecVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    with pytest.raises(TypeError, match="computes its product itself"):
        get_peft_model(tf.Data2VecVisionForImageClassification(config), VPTConfig())


def test_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="PrefixTuningConfig"):
        get_peft_model(tiny("bert", is_decoder=True), VPTConfig())


@pytest.mark.capability("merge", "vpt", refused=True)
def test_merging_is_refused() -> None:
    model = adapted("vit")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge adapter 'default': VPT adds tokens"):
            merge()


@pytest.mark.capability("torch.compile", "vpt")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's, where a graph breaks
@pytest.mark.parametrize("deep", [True, False])
def test_compiled(deep: bool) -> None:
    model, batch = adapted("vit", tiny("vit", num_hidden_layers=1).double(), deep=deep), doubled("vit")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(**batch).loss.backward()
    model(**batch).loss.backward()
    for ours, other in zip(layers_of(model), layers_of(compiled), strict=True):
        expected = ours.vpt_prompts["default"].weight.grad
        torch.testing.assert_close(other.vpt_prompts["default"].weight.grad, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.filterwarnings(
    "ignore:_compile flag on create_block_mask:DeprecationWarning"
)  # of torch about transformers
def test_flex_attention() -> None:
    """On images, which need no mask: that of a text is compiled, which a test that forbids warnings does not survive."""
    base = tiny("vit")
    model = get_peft_model(base, VPTConfig(num_tokens=3)).eval()
    found = []
    for attention in ("eager", "flex_attention"):
        base.set_attn_implementation(attention)
        with torch.no_grad():
            found.append(model(**inputs("vit")).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
