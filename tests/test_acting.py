"""Adapters that could not act: modules that nobody calls, layers that take no part, batch norms, fast paths."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import peft_ext
from peft_ext import MaskLoraConfig, SparseFTConfig, SSFConfig
from peft_ext.core import ExtLayer
from peft_ext.core.uncalled import uncalled_modules
from peft_ext.tuners.sparse_ft.model import SparseFTModel


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 40, "num_key_value_heads": 1, "pad_token_id": 0}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
SPEECH = {**SIZES, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
# class, config, last parts of the names of the modules that are not called
UNCALLED: dict[str, tuple[Any, Any, set[str]]] = {
    "bamba": (
        tf.BambaForCausalLM,
        lambda: tf.BambaConfig(**TEXT, **STATE_SPACE, attn_layer_indices=[1]),
        {"mamba.conv1d", "mamba.norm", "mamba.out_proj"},
    ),
    "bert": (tf.BertModel, lambda: tf.BertConfig(**SIZES, vocab_size=40), set()),
    "bloom": (tf.BloomModel, lambda: tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2), set()),
    "falcon_h1": (
        tf.FalconH1ForCausalLM,
        lambda: tf.FalconH1Config(**TEXT, **STATE_SPACE, mamba_d_ssm=32),
        {"mamba.conv1d", "mamba.out_proj"},
    ),
    "jamba": (
        tf.JambaForCausalLM,
        lambda: tf.JambaConfig(**TEXT, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
        {"mamba.conv1d", "mamba.dt_proj"},
    ),
    "mamba": (
        tf.MambaForCausalLM,
        lambda: tf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2),
        {"mixer.conv1d", "mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"},
    ),
    "qwen3_next": (
        tf.Qwen3NextForCausalLM,
        lambda: tf.Qwen3NextConfig(
            **TEXT,
            head_dim=8,
            num_experts=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        {"linear_attn.conv1d"},
    ),
    "recurrent_gemma": (
        tf.RecurrentGemmaForCausalLM,
        lambda: tf.RecurrentGemmaConfig(**TEXT, lru_width=16),
        {"temporal_block.conv_1d"},
    ),
    "t5": (
        tf.T5Model,
        lambda: tf.T5Config(vocab_size=40, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2),
        {"shared"},
    ),
    "llama4": (
        tf.Llama4ForCausalLM,
        lambda: tf.Llama4TextConfig(**TEXT, head_dim=8, intermediate_size_mlp=24, num_local_experts=2),
        {"feed_forward.router"},
    ),
    "phimoe": (tf.PhimoeForCausalLM, lambda: tf.PhimoeConfig(**TEXT, num_local_experts=2), {"mlp.router"}),
    "bart": (
        tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16
        ),
        {"model.shared"},
    ),
    "wavlm": (
        tf.WavLMForXVector,
        lambda: tf.WavLMConfig(**SPEECH),
        {f"attention.{name}_proj" for name in ("q", "k", "v", "out")} | {f"{i}.kernel" for i in range(5)},
    ),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_modules_that_are_not_called(name: str) -> None:
    model_class, make_config, expected = UNCALLED[name]
    with torch.device("meta"):
        model = model_class(make_config())
    found = uncalled_modules(model)
    assert {".".join(key.split(".")[-2:]) for key in found} == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of experts
        for config in (SparseFTConfig(target_modules="all-linear", density=0.1), SparseFTConfig(density=0.1)):
            targets = SparseFTModel.resolved_targets(config, model)
            assert targets and not set(targets) & set(found)
    for key in sorted(found)[:2]:
        with pytest.raises(TypeError, match=r"would not act: .* weight"):
            get_peft_model(model, SSFConfig(target_modules=[key]))
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_pooling_head_of_siglip() -> None:
    with torch.device("meta"):
        model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8))
    with pytest.raises(TypeError, match=r"head.attention.out_proj.*MultiheadAttention.*exclude_modules"):
        get_peft_model(copy.deepcopy(model), SparseFTConfig(target_modules=["out_proj"], density=0.1))
    sparse = get_peft_model(copy.deepcopy(model), SparseFTConfig(density=0.1)).get_base_model()
    adapted = {name for name, module in sparse.named_modules() if hasattr(module, "base_layer")}
    assert any(name.endswith("self_attn.out_proj") for name in adapted)
    assert not any("head.attention" in name for name in adapted)


class TwoBranches(nn.Module):
    """One branch is not used, one has no influence on the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.ignored = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, 4)`; returns `(B, 4)`."""
        self.ignored(x)
        return self.used(x)


ALL_BRANCHES = ["used", "unused", "ignored"]


def trained(config: Any) -> PeftModel:
    model = get_peft_model(TwoBranches(), config)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return model


CONFIGS = [
    SSFConfig(target_modules=ALL_BRANCHES),
    SparseFTConfig(target_modules=ALL_BRANCHES, density=0.5, selection="random"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["ssf", "sparse"])
@pytest.mark.parametrize("how", ["save", "merge", "unload"])
def test_layers_that_took_no_part(config: Any, how: str, tmp_path: Path) -> None:
    model = trained(copy.deepcopy(config))
    message = r"of its 3 modules, 1 were never run \(unused\), and 1 were run, but .* \(ignored\)"
    act = {"save": lambda: model.save_pretrained(tmp_path), "merge": model.merge_adapter}.get(
        how, model.merge_and_unload
    )
    with pytest.warns(UserWarning, match=message):
        act()
    if how == "save":
        model.save_pretrained(tmp_path)  # says it once: a warning is an error here
        PeftModel.from_pretrained(TwoBranches(), tmp_path).merge_and_unload()


def test_no_word_about_adapters_that_were_not_trained(tmp_path: Path) -> None:
    model = get_peft_model(TwoBranches(), copy.deepcopy(CONFIGS[0]))
    model(torch.randn(3, 4))  # with gradients, but without a backward
    model.save_pretrained(tmp_path)
    model.add_adapter("other", copy.deepcopy(CONFIGS[0]))
    model.merge_and_unload()


def test_the_record_goes_with_the_adapter(tmp_path: Path) -> None:
    model = trained(copy.deepcopy(CONFIGS[0]))
    model.add_adapter("second", copy.deepcopy(CONFIGS[0]))
    model.set_adapter("second")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)


def resnet() -> Any:
    fields = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    torch.manual_seed(0)
    model = tf.ResNetForImageClassification(tf.ResNetConfig(**fields))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("how", ["peft", "transformers"])
@pytest.mark.parametrize(
    "config",
    [
        SSFConfig(target_modules=["convolution", "normalization"], recover=False, modules_to_save=["classifier"]),
        SparseFTConfig(
            target_modules=["convolution"], density=0.2, selection="random", modules_to_save=["classifier"]
        ),
    ],
    ids=["ssf", "sparse"],
)
def test_batch_norms_keep_their_statistics(config: Any, how: str, tmp_path: Path) -> None:
    """A reloaded ResNet equals the trained one, since training leaves the running statistics as they are."""
    config, base = copy.deepcopy(config), resnet()
    if how == "transformers":
        config.modules_to_save = None
        base.add_adapter(config)
        model, folder = base, tmp_path
    else:
        model, folder = get_peft_model(base, config), tmp_path
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num_b" in key}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    assert len(before) > 6 and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.eval().save_pretrained(folder)
    reloaded = resnet()
    if how == "transformers":
        reloaded.load_adapter(str(folder))
    else:
        reloaded = PeftModel.from_pretrained(reloaded, folder)
    with torch.no_grad():
        trained_logits = model(pixel_values=pixels).logits
        assert_close(reloaded.eval()(pixel_values=pixels).logits, trained_logits)
        assert (resnet().eval()(pixel_values=pixels).logits - trained_logits).abs().max() > 0.01


def test_batch_norms_train_again_without_the_adapter() -> None:
    model = get_peft_model(
        resnet(), SSFConfig(target_modules=["convolution"], modules_to_save=["classifier"])
    ).unload()
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_mean" in key}
    model.train()(pixel_values=torch.randn(4, 3, 32, 32))
    assert not any(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["linear1"], ["linear2", "norm1"]])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_takes_no_fast_path(targets: list[str], padded: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    keep = ~mask
    model = get_peft_model(copy.deepcopy(encoder), SSFConfig(target_modules=targets)).eval()
    expected = model(x, src_key_padding_mask=mask).detach()  # with gradients there is no fast path
    with torch.no_grad():
        assert_close(model(x, src_key_padding_mask=mask)[keep], expected[keep])
        assert (encoder(x, src_key_padding_mask=mask)[keep] - expected[keep]).abs().max() > 1e-3
        merged = model.merge_and_unload()
        assert merged.use_nested_tensor and not merged.layers[0]._forward_pre_hooks
        assert_close(merged(x, src_key_padding_mask=mask)[keep], expected[keep])


def test_lora_of_peft_on_the_same_model_keeps_the_record_quiet(tmp_path: Path) -> None:
    """Layers of other methods are none of our business."""
    model = peft_ext.PeftMixedModel(tiny("llama"), SSFConfig(target_modules=["q_proj"]))
    model.add_adapter("lora", LoraConfig(target_modules=["v_proj"]))
    model.set_adapter(["default", "lora"])
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    model.save_pretrained(tmp_path)


def test_parameters_that_peft_has_cast_are_watched_too(tmp_path: Path) -> None:
    """On a base in half precision PEFT makes new parameters; saving must not say that they learnt nothing."""
    model = get_peft_model(tiny("llama").to(torch.bfloat16), MaskLoraConfig(r=2, total_steps=4)).train()
    tokens = torch.arange(3, 11)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, ExtLayer)]
    assert layers and all(layer.learnt == {"default"} for layer in layers)
    model.save_pretrained(tmp_path)  # a warning is an error here


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_of_a_head_with_a_bias(tied: bool) -> None:
    """PEFT leaves the bias of a tied output embedding out, so that the base model itself would be another one."""
    config = tf.BertConfig(**SIZES, vocab_size=40, tie_word_embeddings=tied)
    model = tf.BertForMaskedLM(config).eval()
    nn.init.normal_(model.cls.predictions.decoder.bias)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        expected = model(ids).logits
    adapter = SSFConfig(init_weights="identity", trainable_token_indices=[5])
    if tied:
        with pytest.raises(ValueError, match="bias of a tied output embedding"):
            get_peft_model(model, adapter)
        return
    with torch.no_grad():
        torch.testing.assert_close(get_peft_model(model, adapter).eval()(ids).logits, expected)
