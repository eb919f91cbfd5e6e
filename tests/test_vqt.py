"""VQT against a straightforward implementation of its equation, and what it promises about cost, saving and company."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import inputs, tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import peft_ext
from peft_ext import FrozenPassCache, PASTAConfig, SSFConfig, VPTConfig, VQTConfig, attention_maps, select_features
from peft_ext.reading.cache import sample_keys
from peft_ext.training.toys import saved_bytes
from peft_ext.tuners.vqt.layer import VQTLayer, layer_of


IMAGES = ["vit", "deit", "dinov2", "dinov2_with_registers", "beit", "clip_image", "siglip_image"]
TEXTS = ["bert", "roberta", "distilbert", "xlm-roberta"]
ALL = [*IMAGES, "ast", *TEXTS]
AUTO = dict.fromkeys(IMAGES, tf.AutoModelForImageClassification)
AUTO |= {"ast": tf.AutoModelForAudioClassification}
AUTO |= dict.fromkeys(TEXTS, tf.AutoModelForSequenceClassification)

# what PEFT says to every second adapter that comes in through transformers
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def vqt(name: str, dtype: torch.dtype = torch.float32, overrides: dict[str, Any] | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = tiny(name, **overrides or {}).to(dtype)
    return get_peft_model(model, VQTConfig(**{"num_queries": 3, "dropout": 0.0, **fields}))


def batch_of(name: str, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    found = inputs(name, batch, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stock(name: str, batch: dict[str, torch.Tensor], **overrides: Any) -> torch.Tensor:
    """The logits of the base model, frozen: kernels differ with what requires gradients."""
    return tiny(name, **overrides).requires_grad_(False)(**batch).logits


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


# A straightforward implementation: queries before the tokens, keys and values from the tokens alone

WHERE = {  # the blocks, the attention in a block, the names in it (query, key, value, output)
    "vit": ("vit.layers", "attention", "q_proj k_proj v_proj o_proj"),
    "deit": ("deit.layers", "attention", "q_proj k_proj v_proj o_proj"),
    "dinov2": ("dinov2.encoder.layer", "attention", "q_proj k_proj v_proj o_proj"),
    "dinov2_with_registers": ("dinov2_with_registers.encoder.layer", "attention", "q_proj k_proj v_proj o_proj"),
    "beit": ("beit.layers", "attention", "q_proj k_proj v_proj o_proj"),
    "clip_image": ("vision_model.encoder.layers", "self_attn", "q_proj k_proj v_proj out_proj"),
    "siglip_image": ("vision_model.encoder.layers", "self_attn", "q_proj k_proj v_proj out_proj"),
    "ast": ("audio_spectrogram_transformer.layers", "attention", "q_proj k_proj v_proj o_proj"),
    "bert": ("bert.encoder.layer", "attention.self", "query key value"),
    "roberta": ("roberta.encoder.layer", "attention.self", "query key value"),
    "distilbert": ("distilbert.transformer.layer", "attention", "q_lin k_lin v_lin out_lin"),
    "xlm-roberta": ("roberta.encoder.layer", "attention.self", "query key value"),
}
HEADS = 2


def class_token(name: str, output: Any) -> torch.Tensor:
    """What the stock head reads, from the output of the backbone."""
    states = output.last_hidden_state
    if name in ("dinov2", "dinov2_with_registers"):
        return torch.cat([states[:, 0], states[:, 1 if name == "dinov2" else 5 :].mean(1)], 1)
    if name in ("beit", "ast", "bert"):
        return output.pooler_output
    if name == "clip_image":
        return states[:, 1:].mean(1)
    return states.mean(1) if name == "siglip_image" else states[:, 0]


def reference(
    name: str, model: nn.Module, queries: torch.Tensor, head: torch.Tensor, bias: torch.Tensor, batch: dict[str, Any]
) -> torch.Tensor:
    """Logits of VQT on the plain `model`; queries `(L, T, D)`, head `(C, F)`."""
    where, attention_name, projections = WHERE[name]
    blocks: Any = model.get_submodule(where)
    count, outputs = queries.shape[1], {}

    def attention_of(module: nn.Module) -> Callable[..., Any]:
        q, k, v, *out = [module.get_submodule(part) for part in projections.split()]

        def forward(hidden_states: torch.Tensor, attention_mask: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
            def split(states: torch.Tensor) -> torch.Tensor:
                return states.view(len(states), states.shape[1], HEADS, -1).transpose(1, 2)

            query, key, value = split(q(hidden_states)), split(k(hidden_states[:, count:])), hidden_states[:, count:]
            value = split(v(value))
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
            if attention_mask is not None:
                mask = attention_mask
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
                scores = scores + torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], 2)
            states = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            return out[0](states) if out else states, None

        return forward

    def put_before(index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = args[0]
            return (torch.cat([queries[index].expand(len(hidden), -1, -1), hidden], 1), *args[1:]), kwargs

        return hook

    def take_away(index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs[index] = output[:, :count]
            return output[:, count:]

        return hook

    for index, block in enumerate(blocks):
        attention = block.get_submodule(attention_name)
        attention.forward = attention_of(attention)
        block.register_forward_pre_hook(put_before(index), with_kwargs=True)
        block.register_forward_hook(take_away(index))
    backbone = model.get_submodule(where.split(".")[0])
    output = backbone(**{key: value for key, value in batch.items() if key != "labels"})
    parts = [class_token(name, output), *(outputs[index].flatten(1) for index in range(len(blocks)))]
    features = torch.cat([part / part.norm(dim=-1, keepdim=True) for part in parts], 1)
    return features @ head.T + bias


@pytest.mark.capability("gradient checkpointing", "vqt")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_straightforward_implementation(name: str, checkpointing: bool) -> None:
    model, batch = vqt(name, torch.float64), batch_of(name, torch.float64)
    layer = layer_of(model)
    queries, head = layer.vqt_queries["default"], layer.vqt_head["default"]
    own = [p.detach().clone().requires_grad_() for p in (queries.weight, head.weight, head.bias)]
    plain = tiny(name).double().requires_grad_(False)
    expected = reference(name, plain, *own, batch)
    expected_loss = F.cross_entropy(expected, batch["labels"])
    expected_grads = torch.autograd.grad(expected_loss, own)

    model.train()
    if checkpointing:
        with _quiet():
            model.base_model.model.gradient_checkpointing_enable()
    output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss, expected_loss, rtol=0, atol=1e-6)
    for parameter, grad in zip((queries.weight, head.weight, head.bias), expected_grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-6)
        assert grad.abs().max() > 1e-3


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers 5.23 warns that the method Trainer itself calls has got another name."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(name: str, side: str) -> None:
    model, batch = vqt(name, torch.float64), batch_of(name, torch.float64)
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    padded = slice(0, 2) if side == "left" else slice(5, 7)
    mask[:, padded] = 0
    maps = attention_maps(model, input_ids=ids, attention_mask=mask)
    for weights in maps.values():
        assert weights[..., padded].abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    before = {k: v.clone() for k, v in _outputs(model, input_ids=ids, attention_mask=mask).items()}
    ids[:, padded] = 5
    after = _outputs(model, input_ids=ids, attention_mask=mask)
    for layer, output in before.items():
        torch.testing.assert_close(output, after[layer], rtol=0, atol=1e-9)


def _outputs(model: nn.Module, **batch: Any) -> dict[int, torch.Tensor]:
    """Z_l `(B, T, D)` of each layer."""
    layer, found = layer_of(model), {}
    features = layer._features
    layer._features = lambda adapter, token, outputs: (found.update(enumerate(outputs)), features(adapter, token, outputs))[1]  # fmt: skip
    try:
        model(**batch)
    finally:
        del layer._features
    return found


@pytest.mark.parametrize("name", ALL)
def test_queries_of_a_layer_do_not_influence_another(name: str) -> None:
    model, batch = vqt(name), batch_of(name)
    queries = layer_of(model).vqt_queries["default"].weight
    outputs = _outputs(model, **batch)
    for index, output in outputs.items():
        (grad,) = torch.autograd.grad(output.sin().sum(), queries, retain_graph=True)
        for other in outputs:
            assert (grad[other].abs().max() > 0) == (other == index)


@pytest.mark.capability("switching off", "vqt")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_base_model_is_untouched(name: str, attention: str) -> None:
    batch = batch_of(name)
    expected = stock(name, batch, attn_implementation=attention)
    model = vqt(name, overrides={"attn_implementation": attention})
    seen: list[torch.Tensor] = []
    head = model.base_model.model.classifier
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    changed = model(**batch).logits
    handle.remove()
    assert torch.equal(seen[0], expected)  # what the stock head would have said with the adapter active
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    before = {key: value.clone() for key, value in tiny(name).state_dict().items()}
    plain = model.unload()
    assert torch.equal(plain(**batch).logits, expected)
    assert list(plain.state_dict()) == list(before)
    assert not hasattr(plain, "vqt") and not plain._forward_hooks and not plain._forward_pre_hooks


@pytest.mark.parametrize("name", ALL)
def test_attention_implementations_agree(name: str) -> None:
    batch = batch_of(name)
    eager = vqt(name, overrides={"attn_implementation": "eager"})(**batch).logits
    sdpa = vqt(name, overrides={"attn_implementation": "sdpa"})(**batch).logits
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-5)


def test_masks_of_every_attention_implementation() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    from peft_ext.reading import query_mask

    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = padding.bool()[:, None, None]
    square = expected.expand(2, 1, 4, 4)
    block = create_block_mask(lambda b, h, q, k: padding[b, k] > 0, 2, None, 4, 4, device="cpu", _compile=False)
    for mask in (padding, square, block):  # flash, sdpa, flex
        assert torch.equal(query_mask(mask, 4, torch.device("cpu")), expected)
    assert query_mask(None, 4, torch.device("cpu")) is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "clip_image"])
def test_recorded_hidden_states_are_the_tokens(name: str, checkpointing: bool) -> None:
    batch = batch_of(name)
    kept = {"output_hidden_states": True, "output_attentions": True}
    plain = tiny(name, attn_implementation="eager").requires_grad_(False)(**batch, **kept)
    model = vqt(name, overrides={"attn_implementation": "eager"})
    if checkpointing:
        with _quiet():
            model.base_model.model.gradient_checkpointing_enable()
    expected = model(**batch)
    output = model(**batch, **kept)
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    for key in ("hidden_states", "attentions"):
        assert len(output[key]) == len(plain[key])
        assert all(torch.equal(a, b) for a, b in zip(output[key], plain[key], strict=True))


# No backward through the backbone


@pytest.fixture(scope="module")
def lora_bytes() -> int:
    lora = get_peft_model(_six_layers(), LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"]))
    return saved_bytes(lora.train(), _images())


def _six_layers() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, **dropout, num_labels=10))


def _images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(0, 10, (8,))}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("queries", "checkpointing", "bound"),
    [(1, False, 0.13), (10, False, 0.16), (20, False, 0.19), (1, True, 0.04), (10, True, 0.04), (20, True, 0.04)],
)
def test_bytes_saved_for_backward(
    lora_bytes: int, queries: int, checkpointing: bool, bound: float, dropout: float
) -> None:
    model = get_peft_model(_six_layers(), VQTConfig(num_queries=queries, dropout=dropout)).train()
    if checkpointing:
        with _quiet():
            model.base_model.model.gradient_checkpointing_enable()
    ratio = saved_bytes(model, _images()) / lora_bytes
    print(f"{queries} queries, dropout {dropout}, checkpointing {checkpointing}: {ratio:.4f} of LoRA's bytes")
    assert ratio <= bound


def test_the_backbone_builds_no_graph_and_stays_in_eval_mode() -> None:
    model, batch = vqt("vit", overrides={"hidden_dropout_prob": 0.5}), batch_of("vit")
    model = model.train()
    model.base_model.model.enable_input_require_grads()  # as Trainer does for gradient checkpointing
    seen: list[torch.Tensor] = []
    model.base_model.model.vit.register_forward_hook(lambda m, a, output: seen.append(output.last_hidden_state))
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.logits, second.logits)
    assert not seen[0].requires_grad
    assert not any(module.training for module in model.base_model.model.vit.modules())
    assert torch.is_grad_enabled()


def test_dropout_of_the_queries_only_in_training() -> None:
    model, batch = vqt("vit", dropout=0.5), batch_of("vit")
    model.train()
    assert not torch.allclose(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_checkpointing_repeats_the_dropout_of_the_queries() -> None:
    model, batch = vqt("vit", torch.float64, dropout=0.5), batch_of("vit", torch.float64)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            with _quiet():
                model.base_model.model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_dropout_of_the_embeddings(name: str, checkpointing: bool) -> None:
    """Loss and gradients are those on a backbone whose embeddings were dropped by hand, with the same elements."""
    batch, fields = batch_of(name, torch.float64), {"embedding_dropout": 0.25}
    model, plain = vqt(name, torch.float64, **fields), vqt(name, torch.float64)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=0, atol=0)  # none outside of training
    model.train()
    if checkpointing:
        with _quiet():
            model.base_model.model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    found = model(**batch).loss
    found.backward()

    seen: list[float] = []

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        torch.manual_seed(3)
        kept = (torch.rand(states.shape) >= 0.25).double()
        seen.append(kept.mean().item())
        return (states * kept / 0.75, *output[1:]) if isinstance(output, tuple) else states * kept / 0.75

    layer_of(plain).backbone.get_submodule("embeddings").register_forward_hook(drop)
    expected = plain.train()(**batch).loss
    expected.backward()
    assert len(seen) == 1 and 0.6 < seen[0] < 0.9
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], grad, rtol=0, atol=1e-10) for key, grad in theirs.items())


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    model, batch = vqt("vit"), batch_of("vit")
    expected = model(**batch).logits
    base = model.base_model.model

    class Stop(BaseException):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    handle = base.vit.layernorm.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(**batch)
    assert torch.is_grad_enabled()
    handle.remove()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, stock("vit", batch))
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(ValueError, match="size"):
        model(pixel_values=torch.randn(1, 3, 8, 8))
    assert torch.equal(model(**batch).logits, expected)


# Options


@pytest.mark.parametrize(("pooling", "width"), [("concatenate", 16 + 2 * 48), ("mean", 48), ("weighted", 48)])
def test_pooling(pooling: str, width: int) -> None:
    model, batch = vqt("vit", pooling=pooling), batch_of("vit")
    layer = layer_of(model)
    assert layer.vqt_head["default"].weight.shape == (3, width)
    token, outputs = torch.randn(2, 16), [torch.randn(2, 3, 16), torch.randn(2, 3, 16)]
    features = layer._features("default", token, outputs)
    pool = {"concatenate": lambda z: z.flatten(1), "mean": lambda z: z.mean(1), "weighted": lambda z: z.sum(1)}
    parts = [token, *(pool[pooling](z) for z in outputs)]
    torch.testing.assert_close(features, torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1))
    model(**batch).loss.backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (pooling == "weighted") == any("vqt_pool" in name for name in gradients(model))


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("vit", hidden_size=64), VQTConfig(num_queries=50))
    layer = layer_of(model)
    queries, head = layer.vqt_queries["default"].weight, layer.vqt_head["default"]
    limit = math.sqrt(6 / (3 * 8 * 8 + 64))
    assert queries.abs().max() <= limit
    assert abs(queries.std().item() - limit / math.sqrt(3)) < 0.01 * limit
    assert abs(head.weight.std().item() - math.sqrt(2 / 3)) < 0.01
    assert torch.equal(head.bias, torch.full_like(head.bias, -math.log(99)))


@pytest.mark.capability("`layers_to_transform`", "vqt")
@pytest.mark.parametrize(("layers", "count"), [(0, 1), ([1], 1), (None, 2)])
def test_layers_to_transform(layers: Any, count: int) -> None:
    model = vqt("vit", layers_to_transform=layers)
    assert layer_of(model).vqt_queries["default"].weight.shape == (count, 3, 16)
    model(**batch_of("vit")).loss.backward()
    with pytest.raises(ValueError, match=r"layer 5.*layers 0 to 1"):
        vqt("vit", layers_to_transform=[5])


def _train(model: nn.Module, batch: dict[str, Any], steps: int = 5, rate: float = 0.1) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def test_group_lasso_is_added_to_the_loss() -> None:
    model, batch = vqt("vit", group_lasso=0.5), batch_of("vit")
    head = layer_of(model).vqt_head["default"]
    plain = model.eval()(**batch).loss
    expected = plain + 0.5 * head.weight.square().sum(0).sqrt().sum()
    torch.testing.assert_close(model.train()(**batch).loss, expected)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, plain)
    with pytest.raises(ValueError, match="labels"):
        model(pixel_values=batch["pixel_values"])


def test_feature_selection(tmp_path: Path) -> None:
    model, batch = vqt("vit"), batch_of("vit", batch=8)
    layer = layer_of(model)
    norms: list[torch.Tensor] = []

    def train(model: nn.Module) -> None:
        head = layer.vqt_head["default"]
        assert layer.configs["default"].group_lasso == (0 if norms else 0.01)
        _train(model, batch)
        norms.append(head.weight.detach().norm(dim=0))

    kept = select_features(model, train, fraction=0.25, penalty=0.01)
    head = layer.vqt_head["default"]
    count = round(0.25 * (16 + 2 * 48))
    assert len(norms) == 2 and sum(kept.values()) == count == model.peft_config["default"].num_selected_features
    assert list(kept) == ["class_token", "layer_0", "layer_1"]
    assert set(head.columns.tolist()) == set(norms[0].topk(count).indices.tolist())
    assert head.weight.shape == (3, count)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("vit"), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    assert torch.equal(layer_of(again).vqt_head["default"].columns, head.columns)
    auto = _auto("vit", tmp_path, tiny("vit"))
    assert torch.equal(auto.eval()(**batch).logits, expected)
    with pytest.raises(ValueError, match="already"):
        select_features(model, train)


def test_feature_selection_with_bad_input() -> None:
    model, batch = vqt("vit"), batch_of("vit")
    for fields in ({"fraction": 0.0}, {"fraction": 1.5}, {"penalty": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            select_features(model, lambda model: None, **fields)
    with pytest.raises(ValueError, match="labels"):
        select_features(model, lambda model: model.eval()(**batch))
    with pytest.raises(ValueError, match="no VQT adapter"):
        select_features(tiny("vit"), lambda model: None)
    fresh = vqt("vit", num_selected_features=4)
    with pytest.raises(ValueError, match="select_features"):
        fresh(**batch)


# Saving, loading, several adapters


def _auto(name: str, directory: Path, base: Any) -> Any:
    """Through transformers' own loader: the base model is saved beside and named in the adapter's config."""
    where = directory / "base"
    base.save_pretrained(where)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(where)}))
    return AUTO[name].from_pretrained(directory)


@pytest.mark.capability("save and load", "vqt")
@pytest.mark.parametrize("name", ALL)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, batch = vqt(name, pooling="weighted"), batch_of(name)
    _train(model, batch)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert not any(p.requires_grad for p in again.parameters())
    # the weights lie elsewhere in memory there, and the kernels' last bits depend on that
    found = logits(_auto(name, tmp_path, tiny(name)).eval(), batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    trainable = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True)
    trainable(**batch).loss.backward()
    assert len(gradients(trainable)) == 4


def test_what_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = vqt("vit", id2label={0: "ant", 1: "bee"})
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    leaf = "base_model.model.vqt."
    assert keys == {leaf + "vqt_queries.weight", leaf + "vqt_head.weight", leaf + "vqt_head.bias"}
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "ant", 1: "bee"} and config.modules_to_save is None


def test_two_adapters_with_different_heads(tmp_path: Path) -> None:
    model, batch = vqt("vit"), batch_of("vit")
    base = model.base_model.model
    names = {index: f"kind {index}" for index in range(7)}
    model.add_adapter("other", VQTConfig(num_queries=1, pooling="mean", dropout=0.0, id2label=names))
    first = model(**batch).logits
    assert first.shape == (2, 3) and base.config.id2label[0] == "LABEL_0"
    model.set_adapter("other")
    second = model(**batch)
    assert second.logits.shape == (2, 7)
    assert base.config.id2label == names and base.config.label2id["kind 6"] == 6 and base.num_labels == 7
    torch.testing.assert_close(second.loss, F.cross_entropy(second.logits, batch["labels"]))
    with model.disable_adapter():
        assert model(**batch).logits.shape == (2, 3) and base.num_labels == 3
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first) and base.config.num_labels == 3

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("vit"), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(again(**batch).logits, first)
    again.set_adapter("other")
    assert torch.equal(again(**batch).logits, second.logits) and again.config.id2label == names

    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(model(**batch).logits, second.logits)
    model.delete_adapter("other")
    assert torch.equal(base(**batch).logits, stock("vit", batch)) and base.num_labels == 3
    assert not any("vqt_" in key for key in model.state_dict())


def test_each_head_has_a_problem_type_of_its_own() -> None:
    model = get_peft_model(tiny("bert"), VQTConfig(num_queries=1, id2label={0: "score"}))
    batch = batch_of("bert")
    model.add_adapter("classes", VQTConfig(num_queries=1))
    model(**{**batch, "labels": torch.randn(2)}).loss.backward()
    assert model.config.problem_type == "regression"
    model.set_adapter("classes")
    model(**batch).loss.backward()
    assert model.config.problem_type == "single_label_classification"
    model.set_adapter("default")
    assert model.config.problem_type == "regression"
    model(**{**batch, "labels": torch.randn(2)}).loss.backward()


@pytest.mark.capability("several active adapters", "vqt", refused=True)
def test_two_adapters_cannot_be_active_together() -> None:
    model = vqt("vit")
    model.add_adapter("other", VQTConfig())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"head of its own.*set_adapter"):
        model(**batch_of("vit"))


@pytest.mark.parametrize("name", TEXTS)
def test_sequence_classification_task(name: str, tmp_path: Path) -> None:
    model, batch = vqt(name, task_type="SEQ_CLS"), batch_of(name)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all("vqt_" in key for key in trained)
    _train(model, batch)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    tiny(name).save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["modules_to_save"] is None
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    assert torch.equal(logits(peft_ext.load(tmp_path).eval(), batch), expected)
    model.add_adapter("other", VQTConfig(num_queries=1, task_type="SEQ_CLS"))
    model.set_adapter("other")
    model(**batch)


def test_copy_and_pickle() -> None:
    model, batch = vqt("vit"), batch_of("vit")
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(model).vqt_queries["default"].weight.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(**batch).logits, expected)
    head = copy.deepcopy(twin.base_model.model.classifier)  # what PEFT does for `modules_to_save`
    assert not head._forward_hooks


@pytest.mark.capability("transformers' `add_adapter`", "vqt")
def test_transformers_adapter_methods(tmp_path: Path) -> None:
    model, batch = tiny("vit"), batch_of("vit")
    expected = stock("vit", batch)
    model.add_adapter(VQTConfig(num_queries=2, dropout=0.0), "vqt")
    own = model(**batch).logits
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(model(**batch).logits, expected)
    model.enable_adapters()
    assert torch.equal(model(**batch).logits, own)
    model.delete_adapter("vqt")
    assert torch.equal(model.requires_grad_(False)(**batch).logits, expected)
    again = tiny("vit")
    again.load_adapter(tmp_path, "again")
    assert torch.equal(again.eval()(**batch).logits, own)


class Samples(torch.utils.data.Dataset):
    def __init__(self, name: str, count: int = 8) -> None:
        self.rows = batch_of(name, batch=count)

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def _arguments(directory: Path, **fields: Any) -> TrainingArguments:
    common = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
    }
    common |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 0}
    return TrainingArguments(output_dir=str(directory), **{**common, **fields})


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_trainer(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model, samples = vqt(name), Samples(name)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "vqt_" not in key}
    before = model(**samples.rows).loss.item()
    trainer = Trainer(
        model,
        _arguments(tmp_path, gradient_checkpointing=checkpointing, save_strategy="steps", save_steps=3),
        train_dataset=samples,
    )
    trainer.train()
    model.eval()
    after = model(**samples.rows)
    assert after.loss.item() < before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "checkpoint-6")
    assert torch.equal(again(**samples.rows).logits, after.logits)

    resumed = vqt(name)
    Trainer(resumed, _arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=samples).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    torch.testing.assert_close(resumed.eval()(**samples.rows).logits, after.logits)


# On top of other adapters


@pytest.mark.parametrize("vqt_first", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_pasta_changes_the_tokens_and_not_the_queries(name: str, vqt_first: bool) -> None:
    """PASTA knows special tokens by their place, where queries have none."""
    batch = batch_of(name)
    readers = VQTConfig(num_queries=3, pooling="mean", dropout=0.0, init_weights=False)
    where = {"special_tokens": [int(batch["input_ids"][0, 0])], "by_token": True} if "input_ids" in batch else {}
    special = PASTAConfig(init_weights=False, dropout=0.0, **where)
    first, second = (("vqt", readers), ("pasta", special))[:: 1 if vqt_first else -1]
    model = peft_ext.PeftMixedModel(tiny(name), first[1], adapter_name=first[0])
    model.add_adapter(*second)
    model.set_adapter(["vqt"])
    model.eval()
    alone = logits(model, batch)
    model.set_adapter(["pasta", "vqt"])
    both = logits(model, batch)
    assert (both - alone).abs().max() > 1e-3
    with torch.no_grad():
        for key, rows in model.named_parameters():
            if "vqt_queries" in key:
                rows.copy_(rows.flip(-2))
    torch.testing.assert_close(logits(model, batch), both)  # a mean over queries does not know their order


@pytest.mark.parametrize("vqt_first", [False, True])
def test_prompts_that_queries_would_not_see_are_refused(vqt_first: bool) -> None:
    batch = batch_of("vit")
    first, second = (("vqt", VQTConfig()), ("vpt", VPTConfig(num_tokens=2)))[:: 1 if vqt_first else -1]
    model = peft_ext.PeftMixedModel(tiny("vit"), first[1], adapter_name=first[0])
    model.add_adapter(*second)
    model.set_adapter(["vpt", "vqt"])
    with pytest.raises(ValueError, match="VQT cannot read a model on which VPT acts"):
        model(**batch)
    for name in ("vqt", "vpt"):
        model.set_adapter([name])
        assert logits(model, batch).isfinite().all()


@pytest.mark.parametrize("kind", ["lora", "ssf"])
@pytest.mark.parametrize("vqt_first", [False, True])
def test_joint_training_reaches_the_other_adapter(kind: str, vqt_first: bool) -> None:
    batch = batch_of("vit", torch.float64)
    other: Any = LoraConfig(**vars_of_lora()) if kind == "lora" else SSFConfig(layers_to_transform=[0, 1], target_modules=["k_proj", "v_proj"])  # fmt: skip
    configs = {kind: other, "vqt": VQTConfig(num_queries=2, dropout=0.0)}
    order = ["vqt", kind] if vqt_first else [kind, "vqt"]
    torch.manual_seed(0)
    with _ignoring_frozen_head():
        model = peft_ext.PeftMixedModel(tiny("vit").double(), configs[order[0]], adapter_name=order[0])
        model.add_adapter(order[1], configs[order[1]])
    model.double().set_adapter(order)
    model.train()
    model(**batch).loss.backward()
    grads = gradients(model)
    inner = {key: grad for key, grad in grads.items() if f"{kind}_" in key}
    assert inner and all(grad.abs().max() > 0 for grad in inner.values())
    assert any("vqt_queries" in key for key in grads)
    # against finite differences: keys and values of the last layer reach the loss only through the queries
    key = next(key for key in inner if ".layers.1." in key and "k_proj" in key)
    parameter = dict(model.named_parameters())[key]
    at = inner[key].abs().flatten().argmax()
    with torch.no_grad():
        losses = []
        for step in (1e-5, -2e-5):
            parameter.view(-1)[at] += step
            losses.append(model(**batch).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, inner[key].flatten()[at], rtol=1e-4, atol=1e-8)


def vars_of_lora() -> dict[str, Any]:
    return {"target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False, "r": 2}


@contextmanager
def _ignoring_frozen_head() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The head 'classifier' looks freshly")
        yield


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_joint_training_with_gradient_checkpointing(use_reentrant: bool) -> None:
    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny("vit").double()
        model.add_adapter(LoraConfig(**vars_of_lora()), "lora")
        model.add_adapter(VQTConfig(num_queries=2, dropout=0.0), "vqt")
        model.double().set_adapter(["lora", "vqt"])
        if checkpointing:
            with _quiet():
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
        model.train()
        model(**batch_of("vit", torch.float64)).loss.backward()
        return gradients(model)

    expected = run(False)
    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            run(True)
        return
    found = run(True)
    assert set(found) == set(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-10)


def _trained(kind: str, directory: Path, batch: dict[str, Any], **fields: Any) -> torch.Tensor:
    """Trains and saves an adapter; returns its logits."""
    torch.manual_seed(0)
    config = SSFConfig(**fields) if kind == "ssf" else LoraConfig(**vars_of_lora(), **fields)
    with _ignoring_frozen_head():
        model = get_peft_model(tiny("vit"), config)
    _train(model, batch)
    model.save_pretrained(directory)
    return logits(model, batch)


@pytest.mark.capability("beside LoRA in one model", "vqt")
@pytest.mark.parametrize("kind", ["lora", "ssf"])
def test_on_top_of_a_trained_adapter(kind: str, tmp_path: Path) -> None:
    batch = batch_of("vit")
    alone = _trained(kind, tmp_path / kind, batch, modules_to_save=["classifier"])

    model = peft_ext.PeftMixedModel.from_pretrained(tiny("vit"), tmp_path / kind, adapter_name=kind)
    model.add_adapter("vqt", VQTConfig(num_queries=2, dropout=0.0))
    model.set_adapter([kind, "vqt"])
    model.set_requires_grad(kind, False)
    assert all("vqt_" in name for name, p in model.named_parameters() if p.requires_grad)
    seen: list[bool] = []
    handle = model.base_model.model.vit.register_forward_hook(
        lambda m, a, output: seen.append(output.last_hidden_state.requires_grad)
    )
    _train(model, batch)
    handle.remove()
    assert seen and not any(seen)  # the adapter is part of the frozen pass
    both = logits(model, batch)
    model.set_adapter([kind])
    torch.testing.assert_close(logits(model, batch), alone)

    model.save_pretrained(tmp_path / "both")  # as two adapters, each usable without the other
    again = peft_ext.PeftMixedModel.from_pretrained(tiny("vit"), tmp_path / "both" / "vqt", adapter_name="vqt")
    again.load_adapter(str(tmp_path / "both" / kind), kind)
    again.set_adapter([kind, "vqt"])
    torch.testing.assert_close(logits(again.eval(), batch), both)
    only = PeftModel.from_pretrained(tiny("vit"), tmp_path / "both" / kind)
    torch.testing.assert_close(logits(only, batch), alone)
    only = PeftModel.from_pretrained(tiny("vit"), tmp_path / "both" / "vqt")
    assert logits(only, batch).shape == alone.shape


@pytest.mark.parametrize("kind", ["lora", "ssf"])
@pytest.mark.parametrize("vqt_first", [False, True])
def test_beside_another_adapter_through_transformers(kind: str, vqt_first: bool, tmp_path: Path) -> None:
    batch = batch_of("vit")
    alone = _trained(kind, tmp_path / kind, batch)
    model = tiny("vit")
    model.load_adapter(tmp_path / kind, kind)  # frozen
    model.add_adapter(VQTConfig(num_queries=2, dropout=0.0), "vqt")
    model.set_adapter([kind, "vqt"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vqt_" in name)
    _train(model, batch)
    both = logits(model, batch)
    for name in (kind, "vqt"):
        model.set_adapter([name])
        model.save_pretrained(tmp_path / "both" / name)
    model.set_adapter([kind])
    torch.testing.assert_close(logits(model, batch), alone)
    again = tiny("vit")
    for name in ("vqt", kind) if vqt_first else (kind, "vqt"):
        again.load_adapter(tmp_path / "both" / name, name)
    again.set_adapter([kind, "vqt"])
    torch.testing.assert_close(logits(again.eval(), batch), both)


def test_options_that_a_mixed_model_does_not_save_with(tmp_path: Path) -> None:
    with _ignoring_frozen_head():
        model = peft_ext.PeftMixedModel(tiny("vit"), LoraConfig(**vars_of_lora()), adapter_name="lora")
        model.add_adapter("ssf", SSFConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="there are"):
        model.save_pretrained(tmp_path, selected_adapters=["none"])
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_all_linear_of_another_method_leaves_the_head_alone() -> None:
    model = vqt("vit")
    base = model.base_model.model
    base.peft_config = model.peft_config
    from peft import inject_adapter_in_model

    with pytest.warns(UserWarning, match="peft"):
        inject_adapter_in_model(LoraConfig(target_modules="all-linear"), base, "lora")
    assert not any("vqt.vqt_" in key and "lora" in key for key in base.state_dict())


# The cache


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2_with_registers", "bert", "roberta", "distilbert", "ast"])
def test_cache_gives_the_same_loss_and_gradients(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, samples = vqt(name), Samples(name)
    for module in layer_of(model).backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    loader = DataLoader(samples, 3)
    cache = FrozenPassCache.write(model, loader, tmp_path / "cache")
    assert "MiB a sample" in capsys.readouterr().out and len(cache) == 8
    batch = {key: value[[5, 1, 2]] for key, value in samples.rows.items()}
    model.train()
    expected = model(**batch)
    expected.loss.backward()
    grads = gradients(model)
    model.zero_grad()
    blocks = layer_of(model).blocks("default")
    runs: list[int] = []
    for block in blocks.values():
        block.register_forward_pre_hook(lambda m, args: runs.append(args[0].shape[1]))
    with FrozenPassCache(tmp_path / "cache").use(model):
        output = model.train()(**batch)  # as Trainer does: the backbone is not to be in training mode nonetheless
        output.loss.backward()
    assert runs == [3] * len(blocks)  # on the queries alone
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[key])


def test_cache_is_said_in_advance_and_counts_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, samples = vqt("vit"), Samples("vit")
    FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "full")
    said = capsys.readouterr().out
    per_sample = (2 * 2 * 5 * 16 + 16) * 4
    assert f"{per_sample / 2**20:.3f} MiB a sample" in said and "for 8 samples" in said
    FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "half", dtype=torch.float16)
    with FrozenPassCache(tmp_path / "half").use(model):
        half = model(**samples.rows).logits
    torch.testing.assert_close(half, model(**samples.rows).logits, rtol=0, atol=5e-3)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_on_a_cache(tmp_path: Path) -> None:
    found = []
    for cached in (False, True):
        model, samples = vqt("vit"), Samples("vit")
        trainer = Trainer(model, _arguments(tmp_path), train_dataset=samples)
        if cached:
            cache = FrozenPassCache.write(model, trainer.get_train_dataloader(), tmp_path / "cache")
            with cache.use(model):
                trainer.train()
        else:
            trainer.train()
        found.append(model.eval()(**samples.rows).logits)
    torch.testing.assert_close(*found)


def test_a_cache_holds_no_dropout_of_the_embeddings(tmp_path: Path) -> None:
    model, batch = vqt("vit", embedding_dropout=0.1), batch_of("vit")
    cache = FrozenPassCache.write(model, [batch], tmp_path)
    with cache.use(model):
        model.eval()(**batch)
        with pytest.raises(ValueError, match="`embedding_dropout` draws another frozen pass at each step"):
            model.train()(**batch)


def test_cache_refuses(tmp_path: Path) -> None:
    model, samples = vqt("vit"), Samples("vit")
    cache = FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "cache")
    changed = {**samples.rows, "pixel_values": samples.rows["pixel_values"] + 0.1}
    with cache.use(model):
        with pytest.raises(ValueError, match="augmentation"):
            model.train()(**changed)
        other = model.eval()(**changed).logits  # evaluation on other samples runs the backbone
    torch.testing.assert_close(other, model(**changed).logits)
    with pytest.raises(ValueError, match="already"):
        FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "cache")
    with pytest.raises(ValueError, match="no frozen pass"):
        FrozenPassCache(tmp_path)
    with pytest.raises(ValueError, match="empty"):
        FrozenPassCache.write(model, [], tmp_path / "empty")

    with torch.no_grad():
        next(model.base_model.model.vit.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="another backbone"), cache.use(model):
        pass
    fresh = vqt("vit")
    with cache.use(fresh), pytest.raises(ValueError, match="has changed"):
        with torch.no_grad():
            next(fresh.base_model.model.vit.parameters()).add_(0.1)
        fresh(**samples.rows)
    joint = tiny("vit")
    joint.add_adapter(LoraConfig(**vars_of_lora()), "lora")
    joint.add_adapter(VQTConfig(), "vqt")
    joint.set_adapter(["lora", "vqt"])
    with pytest.raises(ValueError, match="being trained"):
        FrozenPassCache.write(joint, DataLoader(samples, 4), tmp_path / "joint")
    with pytest.raises(ValueError, match=r"left.*float16"):
        FrozenPassCache.write(fresh, DataLoader(samples, 4), tmp_path / "big", num_samples=10**12)


@pytest.mark.parametrize("field", ["lora_alpha", "use_rslora"])
def test_cache_knows_what_frozen_adapters_are_besides_tensors(field: str, tmp_path: Path) -> None:
    def made(**fields: Any) -> Any:
        torch.manual_seed(0)
        model = peft_ext.PeftMixedModel(tiny("vit"), LoraConfig(**{**vars_of_lora(), **fields}), adapter_name="lora")
        model.add_adapter("vqt", VQTConfig(num_queries=2, dropout=0.0))
        model.set_adapter(["lora", "vqt"])
        model.set_requires_grad("lora", False)
        return model.eval()

    batch = batch_of("vit")
    cache = FrozenPassCache.write(made(), [batch], tmp_path)
    with cache.use(made()):
        pass
    with pytest.raises(ValueError, match="another backbone"), cache.use(made(**{field: 64})):
        pass


def test_cache_is_read_for_its_own_layers_alone(tmp_path: Path) -> None:
    model, batch = vqt("vit", layers_to_transform=[0]), batch_of("vit")
    model.add_adapter("same", VQTConfig(num_queries=1, layers_to_transform=0))
    model.add_adapter("other", VQTConfig(num_queries=2, layers_to_transform=[1]))
    model.set_adapter("same")
    expected = logits(model, batch)
    model.set_adapter("default")
    with FrozenPassCache.write(model, [batch], tmp_path).use(model):
        model.set_adapter("same")
        torch.testing.assert_close(logits(model, batch), expected)
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"of the layers \[0\]; the adapter 'other' reads \[1\]"):
            model(**batch)


def test_cache_stays_in_use_when_the_model_moves(tmp_path: Path) -> None:
    model, batch = vqt("vit"), batch_of("vit")
    with FrozenPassCache.write(model, [batch], tmp_path).use(model):
        expected = logits(model, batch)
        model._apply(torch.clone)  # what a move to another device does
        torch.testing.assert_close(logits(model, batch), expected)
        with pytest.raises(ValueError, match="has changed"):
            model.double()(**batch)


# Precision


@pytest.mark.capability("fp16 and bf16 base", "vqt")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    model, batch = vqt("vit", dtype), batch_of("vit")
    layer = layer_of(model)
    assert layer.vqt_queries["default"].weight.dtype == torch.float32
    batch = {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    model.train()
    output = model(**batch)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    full = vqt("vit")(**batch_of("vit")).logits
    torch.testing.assert_close(output.logits.float(), full, rtol=0, atol=0.15)


@pytest.mark.capability("fp16 and bf16 autocast", "vqt")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(checkpointing: bool) -> None:
    model, batch = vqt("vit"), batch_of("vit")
    expected = model(**batch).logits
    if checkpointing:
        with _quiet():
            model.base_model.model.gradient_checkpointing_enable()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits.float(), expected, rtol=0, atol=0.15)
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": 0}, "num_queries"),
        ({"num_queries": -1}, "num_queries"),
        ({"pooling": "max"}, "pooling"),
        ({"dropout": 1.0}, "dropout"),
        ({"embedding_dropout": 1.0}, "`embedding_dropout` must be at least 0 and below 1"),
        ({"group_lasso": -1.0}, "group_lasso"),
        ({"init_weights": "zeros"}, "init_weights"),
        ({"num_selected_features": 0}, "num_selected_features"),
        ({"id2label": {1: "a"}}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"modules_to_save": ["classifier"]}, "vqt_head"),
        ({"exclude_modules": ["layers.0"]}, "layers_to_transform"),
        ({"layers_pattern": "layers", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"task_type": "CAUSAL_LM"}, "only classifies"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQTConfig(**fields)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="num_queries"):
        VQTConfig(num_queries=1.5)
    with pytest.raises(TypeError, match="num_queries"):
        VQTConfig(num_queries=None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("swin"), "shifted windows"),
        (lambda: tiny("convnext"), "no tokens"),
        (lambda: tiny("llama"), "generates"),
        (lambda: tiny("t5"), "generates"),
        (lambda: tiny("deberta-v2"), "depend on their positions"),
        (lambda: tiny("vit").vit, "classification head of a ViTForImageClassification.*is a ViTModel"),
        (lambda: tf.ViTForImageClassification(tf.ViTConfig(**SMALL, num_labels=0)), "num_labels"),
        (lambda: tf.BertForTokenClassification(tf.BertConfig(**SMALL, vocab_size=9)), "BertForSequenceClassification"),
        (lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**SMALL)), "DeiTForImageClassification"),
        (lambda: tiny("bert", is_decoder=True), "is_decoder"),
    ],
)
def test_models_that_vqt_cannot_read(model: Callable[[], nn.Module], message: str) -> None:
    built = model()
    before = list(built.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(built, VQTConfig())
    assert list(built.state_dict()) == before and not built._forward_pre_hooks


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_targets_are_not_for_the_user() -> None:
    with pytest.raises(ValueError, match=r"adapts no module.*'vit'"):
        vqt("vit", target_modules=["q_proj"])


@pytest.mark.capability("merge", "vqt", refused=True)
def test_merging_says_why_not() -> None:
    model = vqt("vit")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Cannot merge.*save_pretrained"):
            merge()
    model(**batch_of("vit"))


@pytest.mark.capability("several adapters in one batch", "vqt", refused=True)
def test_mixed_batches_are_refused() -> None:
    model = vqt("vit")
    with pytest.raises(ValueError, match="`adapter_names`: each adapter has a head"):
        model(**batch_of("vit"), adapter_names=["default", "default"])


def test_a_head_for_other_features_is_refused(tmp_path: Path) -> None:
    vqt("vit").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"vqt_queries"):
        PeftModel.from_pretrained(tiny("vit", hidden_size=24), tmp_path)
    layer: VQTLayer = layer_of(vqt("vit"))
    with pytest.raises(ValueError, match=r"112 features and got 20"):
        layer.vqt_head["default"](torch.randn(2, 20))


# Figures


def test_figures(tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from peft_ext.plots import plot
    from peft_ext.tuners.vqt.about import layer_shares, token_grid

    model, batch = vqt("vit"), batch_of("vit")
    head = layer_of(model).vqt_head["default"].weight
    with torch.no_grad():
        head.zero_()
        head[:, 16 + 48 :] = 1.0  # reads the second layer alone
        head[:, :16] = 1.0
    shares = layer_shares(model)
    assert shares == pytest.approx({"class_token": 0.25, "layer_0": 0.0, "layer_1": 0.75})
    plot(model).savefig(tmp_path / "layers.png")
    plot(model, query=1, pixel_values=batch["pixel_values"]).savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000
    maps = attention_maps(model, pixel_values=batch["pixel_values"])
    assert {index: tuple(weights.shape) for index, weights in maps.items()} == {0: (2, 2, 3, 5), 1: (2, 2, 3, 5)}
    assert torch.equal(token_grid(torch.arange(5.0)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(ValueError, match="square grid"):
        token_grid(torch.arange(35.0))


@pytest.mark.parametrize("name", ALL)
def test_attention_maps_are_those_of_the_forward(name: str) -> None:
    model, batch = vqt(name), batch_of(name)
    layer = layer_of(model)
    maps = attention_maps(model, **{key: value for key, value in batch.items() if key != "labels"})
    found, _, _ = layer.frozen_pass("default", {key: value for key, value in batch.items() if key != "labels"})
    outputs = _outputs(model, **batch)
    from peft_ext.tuners.vqt.frozen import run_block

    for index, block in layer.blocks("default").items():
        values, weights = found[index].values, maps[index]

        def by_the_map(
            family: Any, attention: nn.Module, frozen: Any, hidden_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, None]:
            heads = values.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)  # noqa: B023
            output = (weights @ heads).transpose(1, 2).flatten(2)  # noqa: B023
            return output if family.names.out is None else getattr(attention, family.names.out)(output), None

        rows = layer.vqt_queries["default"].weight[index].expand(len(values), -1, -1)
        z = run_block(layer.family, block, found[index], rows, by_the_map)
        torch.testing.assert_close(z, outputs[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded_first", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_masks_in_a_cache_are_of_each_sample(padded_first: bool, attention: str, tmp_path: Path) -> None:
    """Transformers leaves the mask of a batch out where nothing is padded."""
    samples = Samples("bert")
    samples.rows["attention_mask"][:] = 1
    padded = slice(0, 4) if padded_first else slice(4, 8)
    samples.rows["attention_mask"][padded, 4:] = 0
    model = vqt("bert")
    model.base_model.model.set_attn_implementation(attention)
    cache = FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "cache")
    for chosen in ([0, 1], [5, 6], [1, 6, 2]):
        batch = {key: value[chosen] for key, value in samples.rows.items()}
        expected = model(**batch).logits
        with cache.use(model):
            torch.testing.assert_close(model(**batch).logits, expected)


def test_the_key_of_a_sample_is_its_own() -> None:
    ids = torch.arange(12).view(3, 4)
    positions = torch.arange(4).view(1, 4)
    keys = sample_keys((), {"position_ids": positions, "input_ids": ids})
    assert len(set(keys)) == 3
    turned = sample_keys((), {"position_ids": positions, "input_ids": ids.flip(0)})
    alone = sample_keys((), {"position_ids": positions, "input_ids": ids[1:2]})
    assert turned == keys[::-1] and alone == keys[1:2]
    assert sample_keys((), {"position_ids": positions + 1, "input_ids": ids})[0] != keys[0]
    with pytest.raises(ValueError, match="2 rows for 3 samples"):
        sample_keys((), {"other": ids[:2], "input_ids": ids})


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    model, samples = vqt("vit"), Samples("vit")
    FrozenPassCache.write(model, DataLoader(samples, 4), tmp_path / "cache")
    generator = random.Random(0)
    for name in ("frozen_pass.arrow", "frozen_pass.json"):
        file = tmp_path / "cache" / name
        whole = file.read_bytes()
        for _ in range(20):
            place = generator.randrange(len(whole))
            file.write_bytes(
                whole[:place] + bytes([whole[place] ^ (1 << generator.randrange(8))]) + whole[place + 1 :]
            )
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                if name.endswith("json") and json.loads(file.read_text()) == json.loads(whole):
                    continue  # white space
            with pytest.raises(ValueError, match="write it again"):
                FrozenPassCache(tmp_path / "cache")
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="write it again"):
            FrozenPassCache(tmp_path / "cache")
        file.write_bytes(whole)
    assert len(FrozenPassCache(tmp_path / "cache")) == 8
