"""Tiny random models of every architecture that the tests know, and a batch for each.

`tiny("llama")` gives a model in eval mode and `inputs("llama")` a batch for it, labels included. All dropout is zero,
and all parameters are random and of ordinary size (fresh biases are zero and fresh matrices so small that a wrong
merge would hide below the tolerances).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


CLASSES = 3
VOCABULARY = 40
_TEXT = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_VISION = {**_BLOCKS, "image_size": 16, "patch_size": 8, "num_labels": CLASSES}
_DECODER = {**_TEXT, **_BLOCKS, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
_DECODER["tie_word_embeddings"] = False
_SEQ2SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_SEQ2SEQ |= {**_TEXT, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
_TOWERS: dict[str, Any] = {
    "text_config": {**_TEXT, **_BLOCKS, "max_position_embeddings": 16},
    "vision_config": _VISION,
    "num_labels": CLASSES,
}


class MLP(nn.Module):
    """Linear, norm, Linear without bias, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, 6)`; returns `(B, CLASSES)`."""
        return self.head(self.fc2(torch.relu(self.norm(self.fc1(x)))))


class SmoothMLP(MLP):
    """The same without a kink, at which rounding decides about gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, 6)`; returns `(B, CLASSES)`."""
        return self.head(self.fc2(torch.tanh(self.norm(self.fc1(x)))))


class ConvNet(nn.Module):
    """Plain, grouped and transposed convolutions with batch and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False)
        self.gn = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, 3, H, W)`; returns `(B, CLASSES)`."""
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.gn(self.conv2(x)))
        return self.head(self.up(x).mean((-1, -2)))


class EmbeddingNet(nn.Module):
    """Embedding with a padding index and GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.conv1d = Conv1D(16, 8)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, T)` token ids; returns `(B, CLASSES)`."""
        return self.head(torch.tanh(self.conv1d(self.emb(x))).mean(1))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "smooth_mlp": SmoothMLP,
    "conv2d": ConvNet,
    "conv1d_embedding": EmbeddingNet,
}
PLAIN_TARGETS = {
    "mlp": ["fc1", "norm", "fc2"],
    "conv2d": ["conv1", "bn", "conv2", "gn", "up"],
    "conv1d_embedding": ["emb", "conv1d"],
}

# name: (class, config)
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "ast": (
        tf.ASTForAudioClassification,
        tf.ASTConfig,
        {**_VISION, "patch_size": 4, "num_mel_bins": 8, "max_length": 8, "frequency_stride": 4, "time_stride": 4},
    ),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, {**_SEQ2SEQ, "scale_embedding": True}),
    "beit": (tf.BeitForImageClassification, tf.BeitConfig, {**_VISION, "use_relative_position_bias": True}),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, {**_TEXT, **_BLOCKS}),
    "clip": (tf.CLIPModel, tf.CLIPConfig, _TOWERS),
    "clip_image": (tf.CLIPForImageClassification, tf.CLIPConfig, _TOWERS),
    "convnext": (
        tf.ConvNextForImageClassification,
        tf.ConvNextConfig,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": CLASSES},
    ),
    "deberta-v2": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config,
        {**_TEXT, **_BLOCKS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
        | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "position_buckets": 4},
    ),
    "deit": (tf.DeiTForImageClassification, tf.DeiTConfig, _VISION),
    "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config, {**_VISION, "mlp_ratio": 2}),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig,
        {**_TEXT, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    ),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, _DECODER),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, _DECODER),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {**_TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32},
    ),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _DECODER),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, _DECODER),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {**_TEXT, **_BLOCKS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    ),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, _DECODER),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, _DECODER),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, _DECODER),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, {**_TEXT, **_BLOCKS}),
    "siglip": (tf.SiglipModel, tf.SiglipConfig, _TOWERS),
    "siglip_image": (tf.SiglipForImageClassification, tf.SiglipConfig, _TOWERS),
    "swin": (
        tf.SwinForImageClassification,
        tf.SwinConfig,
        {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 4}
        | {"num_labels": CLASSES},
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {**_TEXT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "tie_word_embeddings": False},
    ),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, _VISION),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig,
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}
# more classes, which only the test of the default sites builds
MORE_ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "clip_text": (tf.CLIPTextModel, tf.CLIPTextConfig, _TOWERS["text_config"]),
    "clip_vision": (tf.CLIPVisionModel, tf.CLIPVisionConfig, _VISION),
    "convnextv2": (tf.ConvNextV2ForImageClassification, tf.ConvNextV2Config, ARCHITECTURES["convnext"][2]),
    "dinov2_with_registers": (
        tf.Dinov2WithRegistersForImageClassification,
        tf.Dinov2WithRegistersConfig,
        {**_VISION, "mlp_ratio": 2},
    ),
    "gemma3_vision": (
        tf.Gemma3ForConditionalGeneration,
        tf.Gemma3Config,
        {"text_config": {**_DECODER}, "vision_config": {**_VISION, "vision_use_head": False}, "mm_tokens_per_image": 4}
        | {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5},
    ),
    "siglip_text": (tf.SiglipTextModel, tf.SiglipTextConfig, _TOWERS["text_config"]),
    "siglip_vision": (tf.SiglipVisionModel, tf.SiglipVisionConfig, {**_VISION, "vision_use_head": False}),
    "xlm-roberta": (tf.XLMRobertaForSequenceClassification, tf.XLMRobertaConfig, {**_TEXT, **_BLOCKS}),
}
_IMAGE_CLASSIFIERS: tuple[str, ...] = ("beit", "clip_image", "convnext", "convnextv2", "deit", "dinov2")
_IMAGE_CLASSIFIERS += ("dinov2_with_registers", "siglip_image", "swin", "vit")
_TEXT_CLASSIFIERS = ("bert", "deberta-v2", "distilbert", "roberta", "xlm-roberta")


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    for key, value in list(vars(config).items()):
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif isinstance(value, PreTrainedConfig):
            _without_dropout(value)
    return config


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives all parameters random values of ordinary size, and running statistics of batch norms too."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)


def tiny(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model in eval mode; `overrides` are config fields of a transformers architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in PLAIN:
            model = PLAIN[name]()
        else:
            model_cls, config_cls, fields = (ARCHITECTURES | MORE_ARCHITECTURES)[name]
            model = model_cls(_without_dropout(config_cls(**{**fields, **overrides})))
        randomize(model)
    return model.eval()


def inputs(name: str, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model's `forward`, labels included where that computes a loss."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    classes = torch.randint(0, CLASSES, (batch,), generator=generator)
    if name == "mlp":
        return {"x": floats(6)}
    if name == "conv2d":
        return {"x": floats(3, 9, 9)}
    if name == "conv1d_embedding":
        return {"x": tokens(7)}
    if name in _IMAGE_CLASSIFIERS:
        return {"pixel_values": floats(3, 16, 16), "labels": classes}
    if name == "ast":
        return {"input_values": floats(8, 8), "labels": classes}
    if name in _TEXT_CLASSIFIERS:
        mask = torch.ones(batch, 7, dtype=torch.long)
        mask[-1, 5:] = 0
        return {"input_ids": tokens(7), "attention_mask": mask, "labels": classes}
    if name in ("clip", "siglip"):
        return {"input_ids": tokens(7), "pixel_values": floats(3, 16, 16), "return_loss": torch.tensor(True)}
    if name in ("clip_vision", "siglip_vision"):
        return {"pixel_values": floats(3, 16, 16)}
    if name in ("clip_text", "siglip_text"):
        return {"input_ids": tokens(7)}
    if name == "whisper":
        return {"input_features": floats(8, 16), "labels": tokens(5)}
    ids = tokens(7)
    return {"input_ids": ids, "labels": tokens(5) if name in ("bart", "t5") else ids}


def logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The one output tensor that the tests compare."""
    output = model(**batch)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.logits_per_image


def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own loss, or a smooth one of its logits if it has none."""
    output = model(**batch)
    if isinstance(output, torch.Tensor):
        return output.sin().sum()
    if output.get("loss") is not None:
        return output.loss
    return output.get("pooler_output", output.last_hidden_state).sin().sum()
