"""Where, in each architecture, the blocks, their attention and the head are: all that VQT knows about a family.

A block is run on query rows by calling the block itself, so what it does besides attention (norms before or after,
layer scale, the feed-forward part) need not be described here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Attention:
    """Names inside an attention module: its projections, and the attributes with a head's size and the scale."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str | None = "o_proj"  # None: the block itself applies the output projection
    head_size: str = "head_dim"
    scale: str = "scaling"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        model: The class (or a base class of it) that classifies.
        backbone: The submodule that is run frozen.
        blocks: The module list with the transformer blocks, inside the backbone.
        attention: The attention module, inside a block.
        names: The names inside that.
        head: The module that gives the logits; its output is replaced by that of `vqt_head`.
        class_token: The module whose input is the feature of the class token, if that is not the head: what lies in
            between belongs to the stock head. Where the input is a whole sequence, its first token is meant.
        class_tokens: How many features of the model's width that input holds.
    """

    model: str
    backbone: str
    blocks: str
    attention: str
    names: Attention
    head: str = "classifier"
    class_token: str | None = None
    class_tokens: int = 1


_VIT = Attention()
_CLIP = Attention(out="out_proj", scale="scale")
_BERT = Attention("query", "key", "value", None, "attention_head_size")
_DISTILBERT = Attention("q_lin", "k_lin", "v_lin", "out_lin", "attention_head_size")
_VISION_TOWER = ("vision_model", "encoder.layers", "self_attn", _CLIP)

FAMILIES: dict[str, Family] = {
    "audio-spectrogram-transformer": Family(
        "ASTForAudioClassification", "audio_spectrogram_transformer", "layers", "attention", _VIT
    ),
    "beit": Family("BeitForImageClassification", "beit", "layers", "attention", _VIT),
    "bert": Family(
        "BertForSequenceClassification", "bert", "encoder.layer", "attention.self", _BERT, class_token="dropout"
    ),
    "clip": Family("CLIPForImageClassification", *_VISION_TOWER),
    "deit": Family("DeiTForImageClassification", "deit", "layers", "attention", _VIT),
    "dinov2": Family("Dinov2ForImageClassification", "dinov2", "encoder.layer", "attention", _VIT, class_tokens=2),
    "dinov2_with_registers": Family(
        *("Dinov2WithRegistersForImageClassification", "dinov2_with_registers", "encoder.layer", "attention", _VIT),
        class_tokens=2,
    ),
    "distilbert": Family(
        *("DistilBertForSequenceClassification", "distilbert", "transformer.layer", "attention", _DISTILBERT),
        class_token="pre_classifier",
    ),
    "roberta": Family("RobertaForSequenceClassification", "roberta", "encoder.layer", "attention.self", _BERT),
    "siglip": Family("SiglipForImageClassification", *_VISION_TOWER),
    "vit": Family("ViTForImageClassification", "vit", "layers", "attention", _VIT),
    "xlm-roberta": Family("XLMRobertaForSequenceClassification", "roberta", "encoder.layer", "attention.self", _BERT),
}
HEAD_NAMES = {name for family in FAMILIES.values() for name in (family.head, family.class_token) if name} | {"score"}

_CONVOLUTIONAL = "it is convolutional: there are no tokens whose keys and values queries could read."
_CAUSAL = "it generates: a query would have to read all positions, and nothing would feed the next token."
REFUSED: dict[str, str] = {
    "swin": "it attends inside shifted windows that merge from stage to stage, so no layer has one set of keys and "
    "values for a query to read. Use ViT, DeiT, BEiT or DINOv2, or another method on Swin.",
    **dict.fromkeys(["convnext", "convnextv2", "resnet", "efficientnet", "mobilenet_v2"], _CONVOLUTIONAL),
    **dict.fromkeys(["gpt2", "llama", "mistral", "opt", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3"], _CAUSAL),
    **dict.fromkeys(["bart", "t5", "whisper"], _CAUSAL),
}
REFUSED["swinv2"] = REFUSED["swin"]


def family_of(model_type: str | None) -> Family:
    """The family of a `config.model_type`.

    Raises:
        ValueError: VQT does not know it; the message gives the reason where there is one.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ValueError(f"VQT does not support models of type {model_type!r}: {REFUSED[model_type]}")
    raise ValueError(
        f"VQT does not know models of type {model_type!r}; it knows the classifiers of {', '.join(sorted(FAMILIES))}."
    )


def check_model(family: Family, model: nn.Module) -> None:
    """Raises `ValueError` if `model` is of the right architecture but not a classifier that VQT can read."""
    name = type(model).__name__
    if family.model not in {cls.__name__ for cls in type(model).__mro__}:
        raise ValueError(
            f"VQT replaces the classification head of a {family.model}, but the model is a {name}, which has none "
            f"that VQT knows. Load it with `transformers.{family.model}.from_pretrained`."
        )
    config: Any = model.config
    has_no_head = isinstance(model.get_submodule(family.head), nn.Identity)
    if has_no_head:
        raise ValueError(f"The {name} has no classification head (`num_labels` is 0); load it with `num_labels=...`.")
    if getattr(config, "is_decoder", False):
        raise ValueError(f"The {name} has `is_decoder=True`; VQT reads encoders, so load it with `is_decoder=False`.")
