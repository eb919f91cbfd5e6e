"""What `cost.py` and its like run: a model in a published shape, or any on the Hub, and a batch of random inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    Dinov2Config,
    LlamaConfig,
    ViTConfig,
)


MIB = 2**20


class Stack(nn.Sequential):
    """Linear layers in a row; its loss is the mean square of what comes out."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=super().forward(x).square().mean())


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch.

    Args:
        name: How the results are called.
        build: Makes the model; called under the seed.
        kind: `image`, `text` or `causal` for transformers models, `stack` for a [`Stack`].
        batch: Samples.
        length: Tokens of a text; for a stack its width.
        image_size: Height and width of an image.
        about: For the table's caption.
    """

    name: str
    build: Callable[[], nn.Module]
    kind: str
    batch: int
    length: int = 0
    image_size: int = 0
    about: str = ""

    @property
    def size(self) -> str:
        """The batch in words."""
        if self.kind == "image":
            return f"{self.batch} images of {self.image_size} x {self.image_size}"
        return f"{self.batch} x {self.length} {'features' if self.kind == 'stack' else 'tokens'}"

    @property
    def common(self) -> dict[str, Any]:
        """What every adapter's config is given."""
        return {"task_type": {"image": "SEQ_CLS", "text": "SEQ_CLS", "causal": "CAUSAL_LM"}.get(self.kind)}

    def inputs(self, config: Any) -> dict[str, torch.Tensor]:
        """A random batch with labels."""
        if self.kind == "stack":
            return {"x": torch.randn(self.batch, self.length)}
        if self.kind == "image":
            pixels = torch.randn(self.batch, config.num_channels, self.image_size, self.image_size)
            return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (self.batch,))}
        # the small ids are special; a classifier finds the end of a text by its padding
        tokens = torch.randint(min(1000, config.vocab_size // 2), config.vocab_size, (self.batch, self.length))
        tokens[:, 0], tokens[:, -1] = special_ends(config)
        labels = tokens.clone() if self.kind == "causal" else torch.randint(config.num_labels, (self.batch,))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def special_ends(config: Any) -> tuple[int, int]:
    """The ids of the tokens that begin and end a text; 1 and 2 where the model's config does not name them."""
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    begin, end = (ids[0] if isinstance(ids, list) else ids for ids in named)
    return 1 if begin is None else begin, 2 if end is None else end


NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _vit_6x384() -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    }
    return AutoModelForImageClassification.from_config(ViTConfig(**shape, num_labels=10, **NO_DROPOUT))


def _vit_tiny() -> nn.Module:
    """In the shape of the small pretrained one that the comparison adapts."""
    shape: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 32,
        "patch_size": 8,
    }
    return AutoModelForImageClassification.from_config(ViTConfig(**shape, num_labels=10, **NO_DROPOUT))


def _dinov2_small() -> nn.Module:
    shape: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = Dinov2Config(**shape, image_size=518, patch_size=14, num_labels=10, **NO_DROPOUT)
    return AutoModelForImageClassification.from_config(config)


def _vit_b16() -> nn.Module:
    return AutoModelForImageClassification.from_config(ViTConfig(num_labels=100, **NO_DROPOUT))


def _smollm2() -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config)


def _minilm() -> nn.Module:
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return AutoModelForSequenceClassification.from_config(BertConfig(**shape, num_labels=2, **NO_DROPOUT))


def _bert_base() -> nn.Module:
    return AutoModelForSequenceClassification.from_config(BertConfig(num_labels=2, **NO_DROPOUT))


def _llama_1b() -> nn.Module:
    """In the shape of Llama-3.2-1B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


PRESETS = {
    workload.name: workload
    for workload in (
        Workload(
            "vit-6x384", _vit_6x384, "image", 8, image_size=224, about="ViT, 6 layers of width 384, 16-px patches"
        ),
        Workload("vit-b16", _vit_b16, "image", 4, image_size=224, about="ViT-B/16"),
        Workload("dinov2-small", _dinov2_small, "image", 8, image_size=98, about="DINOv2-S/14, 49 patches"),
        Workload("smollm2-135m", _smollm2, "causal", 4, length=128, about="Llama in the shape of SmolLM2-135M"),
        Workload("vit-tiny", _vit_tiny, "image", 16, image_size=32, about="ViT, 6 layers of width 192, 8-px patches"),
        Workload("minilm", _minilm, "text", 32, length=64, about="BERT, 6 layers of width 384, as MiniLM-L6"),
        Workload("bert-base", _bert_base, "text", 8, length=128, about="BERT-base"),
        Workload("llama-1b", _llama_1b, "causal", 1, length=256, about="Llama in the shape of Llama-3.2-1B, bf16"),
        Workload("linear-8x1024", lambda: Stack(8, 1024), "stack", 64, length=1024, about="8 x Linear(1024, 1024)"),
    )
}


def hub_workload(name: str, kind: str | None, batch: int, length: int, image_size: int | None) -> Workload:
    """Any model on the Hub or on disk, with its weights; its kind is read off its config unless given."""
    config: Any = AutoConfig.from_pretrained(name)
    if kind is None:
        causal = any(architecture.endswith("CausalLM") for architecture in config.architectures or ())
        kind = "causal" if causal else "image" if hasattr(config, "image_size") else "text"
    auto: Any = {
        "causal": AutoModelForCausalLM,
        "image": AutoModelForImageClassification,
        "text": AutoModelForSequenceClassification,
    }[kind]
    if image_size is None:
        image_size = getattr(config, "image_size", 224)
    label = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return Workload(
        label, lambda: auto.from_pretrained(name, dtype=torch.float32), kind, batch, length, int(image_size), name
    )
