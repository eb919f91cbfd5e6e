"""A tiny model of every type that the table of architectures knows, and inputs for it.

`tests/models.py` has fewer models, with which all methods are tested; these only show what is where.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SIZES, **_IDS, "max_position_embeddings": 64}
_DECODER = {**_TEXT, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3}
_GPT = {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}
_SPEECH: dict[str, Any] = {**_SIZES, "vocab_size": 40, "num_conv_pos_embeddings": 16, "num_feat_extract_layers": 2}
_SPEECH |= {"num_conv_pos_embedding_groups": 2, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
_SPEECH |= {"classifier_proj_size": 8, "layerdrop": 0.0}
_SEQ2SEQ = {**_IDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 1}
_SEQ2SEQ |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": False}
_WINDOWS = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2}
_WINDOWS |= {"window_size": 4, "num_labels": 3}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": 3}
_TOWERS = {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _IMAGE}

# model type: class, config fields; the config class follows from the type
ZOO: dict[str, tuple[str, dict[str, Any]]] = {}
for _type, _name in {
    "albert": "Albert",
    "bert": "Bert",
    "camembert": "Camembert",
    "data2vec-text": "Data2VecText",
    "deberta": "Deberta",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "layoutlm": "LayoutLM",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}.items():
    _fields = {
        "albert": {**_TEXT, "embedding_size": 8},
        "deberta": {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
        "deberta-v2": {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        "distilbert": {**_IDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        "electra": {**_TEXT, "embedding_size": 8},
        "modernbert": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    }.get(_type, _TEXT)
    ZOO[_type] = (f"{_name}ForSequenceClassification", _fields)
for _type, _name in {
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "gemma4_text": "Gemma4",
    "glm": "Glm",
    "glm4": "Glm4",
    "gpt_neox": "GPTNeoX",
    "gpt_oss": "GptOss",
    "granite": "Granite",
    "granitemoe": "GraniteMoe",
    "helium": "Helium",
    "llama": "Llama",
    "llama4_text": "Llama4",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "nemotron": "Nemotron",
    "nemotron_h": "NemotronH",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "olmoe": "Olmoe",
    "phi": "Phi",
    "phi3": "Phi3",
    "phimoe": "Phimoe",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}.items():
    _fields = {
        "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40, "global_head_dim": 8}
        | {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
        "gpt_oss": {**_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 24},
        "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    }.get(_type, {})
    if _type.endswith("moe"):
        _fields = {**_EXPERTS, "shared_expert_intermediate_size": 8}
    elif _type == "mixtral":
        _fields = _EXPERTS
    ZOO[_type] = (f"{_name}ForCausalLM", {**_DECODER, **_fields})
for _type, _name in {
    "bart": "Bart",
    "blenderbot": "Blenderbot",
    "m2m_100": "M2M100",
    "mbart": "MBart",
    "pegasus": "Pegasus",
    "mt5": "MT5",
    "t5": "T5",
    "umt5": "UMT5",
}.items():
    ZOO[_type] = (f"{_name}ForConditionalGeneration", _T5 if "t5" in _type else _SEQ2SEQ)
for _type, _name in {
    "data2vec-audio": "Data2VecAudio",
    "hubert": "Hubert",
    "wav2vec2": "Wav2Vec2",
    "wavlm": "WavLM",
}.items():
    ZOO[_type] = (f"{_name}ForSequenceClassification", _SPEECH)
for _type, _name in {
    "beit": "Beit",
    "data2vec-vision": "Data2VecVision",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "ijepa": "IJepa",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "vit": "ViT",
    "vit_msn": "ViTMSN",
    "swin": "Swin",
    "swinv2": "Swinv2",
    "convnext": "ConvNext",
    "convnextv2": "ConvNextV2",
    "efficientnet": "EfficientNet",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "regnet": "RegNet",
    "resnet": "ResNet",
}.items():
    _fields = _IMAGE
    if _type in ("beit", "data2vec-vision"):
        _fields = {**_IMAGE, "use_relative_position_bias": True}
    elif "dinov2" in _type:
        _fields = {**_IMAGE, "mlp_ratio": 2}
    elif "swin" in _type:
        _fields = _WINDOWS
    elif "convnext" in _type:
        _fields = _STAGES
    elif "mobilenet" in _type:
        _fields = {"depth_multiplier": 0.25, "num_labels": 3}
    elif _type == "efficientnet":
        _fields = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "num_labels": 3}
    elif _type in ("regnet", "resnet"):
        _fields = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3}
        _fields |= {"groups_width": 8} if _type == "regnet" else {}
    ZOO[_type] = (f"{_name}ForImageClassification", _fields)
ZOO |= {
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification",
        {**_IMAGE, "patch_size": 4, "num_mel_bins": 8, "max_length": 8, "frequency_stride": 4, "time_stride": 4},
    ),
    "bloom": ("BloomForCausalLM", {**_IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "clip": ("CLIPModel", _TOWERS),
    "codegen": ("CodeGenForCausalLM", {**_GPT, "rotary_dim": 2, "n_head": 4}),
    "dinov3_convnext": ("DINOv3ConvNextModel", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}),
    "dinov3_vit": ("DINOv3ViTModel", {**_IMAGE, "num_register_tokens": 2}),
    "falcon": ("FalconForCausalLM", {**_IDS, **_SIZES, "ffn_hidden_size": 24}),
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**_IDS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32},
    ),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "marian": ("MarianMTModel", _SEQ2SEQ),
    "mpt": ("MptForCausalLM", {**_IDS, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}),
    "opt": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "rwkv": (
        "RwkvForCausalLM",
        {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 24}
        | {"context_length": 32},
    ),
    "siglip": ("SiglipModel", _TOWERS),
    "siglip2": (
        "Siglip2Model",
        {"text_config": _TOWERS["text_config"], "vision_config": {**_SIZES, "num_patches": 4, "patch_size": 8}},
    ),
    "vit_mae": (
        "ViTMAEForPreTraining",
        {**_IMAGE, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        | {"decoder_intermediate_size": 24},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
}


def build(model_type: str, device: str = "cpu", **overrides: Any) -> PreTrainedModel:
    """A model in eval mode; on the device `"meta"`, it costs no memory and cannot be run."""
    class_name, fields = ZOO[model_type]
    model_class = getattr(tf, class_name)
    config = model_class.config_class(**{**fields, **overrides})
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch of two for `model`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (2, 7), generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    kind = model.config.model_type
    if kind in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": images[..., :16, :16]}
    if kind == "siglip2":
        shapes = torch.tensor([[2, 2], [2, 2]])
        patches = torch.randn(2, 4, 192, generator=generator)
        return {
            "input_ids": ids,
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long),
            "spatial_shapes": shapes,
        }
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": ids}
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": images[..., :size, :size] if size <= 32 else images}
    if model.main_input_name == "input_values":
        shape = (2, 8, 8) if kind.startswith("audio") else (2, 400)
        return {"input_values": torch.randn(shape, generator=generator)}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
