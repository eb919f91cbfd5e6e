"""The fields of SSF, and where it acts by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core import ExtConfig


_VIT = [
    *("patch_embeddings.projection", "layernorm"),  # before and after the blocks
    *("layernorm_before", "q_proj", "k_proj", "v_proj", "o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2"),
]
_SIGLIP_TEXT = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "final_layer_norm"),
]
_SIGLIP_VISION = [*_SIGLIP_TEXT[:-1], "patch_embedding", "post_layernorm"]
_SIGLIP = [*_SIGLIP_VISION, "final_layer_norm"]
_CLIP_VISION = [*_SIGLIP_VISION, "pre_layrnorm"]
_BERT_BLOCK = [
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "embeddings.LayerNorm",
    "output.LayerNorm",
]
_BERT = ["attention.self.query", "attention.self.key", "attention.self.value", *_BERT_BLOCK]
_LLAMA_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
_LLAMA = [*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), *_LLAMA_NORMS]
_GEMMA2 = [*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
_GEMMA3 = [*_GEMMA2, "q_norm", "k_norm"]
_OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"]
_BART = [*_OPT, "encoder_attn_layer_norm", "layernorm_embedding"]
_CONVNEXT = [
    *("embeddings.patch_embeddings", "layernorm", "downsampling_layer.0", "downsampling_layer.1"),
    *("dwconv", "pwconv1", "pwconv2"),
]
_DINOV2 = [
    *(site for site in _VIT if site not in ("layernorm_before", "layernorm_after")),
    *("norm1", "norm2", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),  # the gated ones are the giant model's
]

# The published sites: every operation of the backbone, norms and the patch convolution included, but no embedding
# table and no head.
DEFAULT_SITES: dict[str, list[str]] = {
    "audio-spectrogram-transformer": _VIT,
    "bart": _BART,
    "beit": _VIT,
    "bert": _BERT,
    "clip": [*_CLIP_VISION, "final_layer_norm"],
    "clip_text_model": _SIGLIP_TEXT,
    "clip_vision_model": _CLIP_VISION,
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "deberta-v2": [*_BERT_BLOCK, "query_proj", "key_proj", "value_proj"],
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "distilbert": [
        *("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        *("sa_layer_norm", "output_layer_norm", "embeddings.LayerNorm"),
    ],
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt2": ["c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"],
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", *_LLAMA_NORMS],
    "qwen2": _LLAMA,
    "qwen3": [*_LLAMA, "q_norm", "k_norm"],
    "roberta": _BERT,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP_TEXT,
    "siglip_vision_model": _SIGLIP_VISION,
    "swin": [*_VIT, "embeddings.norm", "downsample.norm"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "layer_norm", "final_layer_norm"],
    "vit": _VIT,
    "whisper": [*_OPT, "encoder_attn_layer_norm", "conv1", "conv2", "layer_norm"],
    "xlm-roberta": _BERT,
}
DEFAULT_EXCLUSIONS = {
    "CLIPForImageClassification": r".*post_layernorm",  # of the class token, while the head reads the patches
    "audio-spectrogram-transformer": r"classifier\..*",
    "beit": r"(beit\.)?layernorm",  # an Identity in models that pool, which have the norm in their pooler
    "gemma3": r".*vision_tower.*",
    "siglip": r".*\.head\..*",  # the pooling head, which classification and captioning do not use
    "siglip_vision_model": r"(.*\.)?head\..*",
}


@dataclass
class SSFConfig(ExtConfig):
    """Configuration of SSF; see also the common fields of [`ExtConfig`].

    Args:
        shift: Where beta is trained. `None`: wherever a merged model can carry it, that is, on modules with a bias
            and on those to which the architecture gives one by a config flag (`attention_bias`, `mlp_bias`), which
            is set on merging. `False`: nowhere. `True`: everywhere, also where the result cannot be merged.
        init_weights: `True` starts at gamma ~ N(1, 0.02) and beta ~ N(0, 0.02), as published; `"identity"` at exactly
            gamma = 1 and beta = 0, so that training starts from the base model's own output; `False` further away, for
            tests.
        recover: Recover the features before the scale from those after it, instead of keeping them for the backward.
            `False` needs more memory; it is for second derivatives.

    Raises:
        ValueError: A field has a value that SSF cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "SSF"
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ("identity",)

    shift: bool | None = field(
        default=None, metadata={"help": "Train a shift: everywhere, nowhere, or (None) where a merged model has it."}
    )
    recover: bool = field(default=True, metadata={"help": "Recover features in the backward instead of keeping them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift not in (None, True, False):
            raise ValueError(f"`shift` must be None, True or False, got {self.shift!r}.")
        if self.recover not in (True, False):
            raise ValueError(f"`recover` must be True or False, got {self.recover!r}.")
