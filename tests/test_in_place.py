"""Models that change the output of an adapted module in place: every method trains there, with its default settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

import peft_ext


SHAPES = {"2-D": (7, 6), "3-D": (2, 5, 6), "4-D": (2, 3, 4, 6)}
FIELDS: dict[str, Any] = {"vocab_size": 24, "pad_token_id": 0, "num_labels": 3}
BLOCKS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Scaled(nn.Module):
    """Multiplies its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(-0.5)


class Shifted(nn.Module):
    """Adds to its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x


class Net(nn.Module):
    """Two Linears with one operation after each."""

    def __init__(self, change: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)
        self.change1, self.change2 = change(), change()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change2(self.fc2(self.change1(self.fc1(x))))


def adapt(method: str, base: nn.Module, batch: Any, **fields: Any) -> Any:
    """The model with an adapter of the method, whose start is no identity."""
    fields = {"init_weights": False, **fields}
    if method == "SSF":
        config: Any = peft_ext.SSFConfig(**fields)
    elif method == "sparse":
        config = peft_ext.SparseFTConfig(num_tunable_weights=60, selection="random", **fields)
    elif method == "masks":
        groups = [{"kind": "ffn", "rows": ["fc1"], "columns": "fc2"}]
        config = peft_ext.MaskLoraConfig(r=2, groups=groups, prune=["ffn"], total_steps=10, **fields)
    else:
        config = peft_ext.SPTConfig(budget=60, r=2, dropout=0.0, drop_path=0.0, structured=method, **fields)
        config = peft_ext.calibrate(base, config, [batch], loss_fn=loss_of, progress=False)
    return get_peft_model(base, config)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss if isinstance(batch, dict) else model(batch).square().sum()


def check_gradients(model: nn.Module, batch: Any, step: float = 1e-6, tolerance: float = 1e-4) -> None:
    """Along one random direction, twice, since a first step may find out what the second one knows."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    at = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * step)
        with torch.no_grad():
            at.append(float(loss_of(model, batch)))
    wanted = (at[0] - at[1]) / (2 * step)
    for _ in range(2):
        gradients = torch.autograd.grad(loss_of(model, batch), leaves, allow_unused=True)
        along = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None))
        assert abs(along - wanted) < tolerance * max(1.0, abs(wanted)), (along, wanted)


@pytest.mark.parametrize("method", ["SSF", "sparse", "lora", "adapter", "masks"])
@pytest.mark.parametrize("change", [lambda: nn.ReLU(inplace=True), Scaled, Shifted], ids=["relu", "scale", "add"])
def test_operations_in_place(change: Callable[[], nn.Module], method: str) -> None:
    for seed, shape in enumerate(SHAPES.values()):
        torch.manual_seed(seed)
        x = torch.randn(shape).double()
        model = adapt(method, Net(change).double(), x, target_modules=["fc1", "fc2"]).double()
        check_gradients(model, x)


@pytest.mark.parametrize("method", ["SSF", "sparse"])
@pytest.mark.parametrize("change", [lambda: nn.ReLU(inplace=True), Scaled, Shifted], ids=["relu", "scale", "add"])
def test_images_in_place(change: Callable[[], nn.Module], method: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), change(), nn.Conv2d(4, 4, 2, groups=2), change()).double()
    x = torch.randn(2, 3, 6, 6).double()
    check_gradients(adapt(method, base, x, target_modules=["0", "2"]).double(), x)


TARGETS = {
    "deberta": ["in_proj", "pos_proj", "pos_q_proj", "dense"],
    "longformer": ["query", "key", "value", "attention.output.dense"],
    "swinv2": ["query", "key", "value", "attention.output.dense"],
    "led": ["query", "key", "value", "fc1", "fc2"],
    "ctrl": ["Wq", "Wk", "Wv", "multi_head_attention.dense"],
}


def ids(batch: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(1, 24, (batch, length), generator=torch.Generator().manual_seed(0))


def real_model(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model whose own code changes the output of a Linear in place, and a batch."""
    torch.manual_seed(0)
    batch = {"input_ids": ids(), "labels": torch.tensor([0, 2])}
    if name == "deberta":
        config: Any = tf.DebertaConfig(**FIELDS, **BLOCKS, relative_attention=True, pos_att_type=["c2p", "p2c"])
        model: nn.Module = tf.DebertaForSequenceClassification(config)
    elif name == "longformer":
        config = tf.LongformerConfig(**FIELDS, **BLOCKS, attention_window=4, max_position_embeddings=32)
        model = tf.LongformerForSequenceClassification(config)
    elif name == "led":
        widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "attention_window": 4}
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
        heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        model = tf.LEDForConditionalGeneration(tf.LEDConfig(**FIELDS, **widths, **sizes, **heads))
        batch["labels"] = ids(length=6)
    elif name == "ctrl":
        model = tf.CTRLForSequenceClassification(tf.CTRLConfig(**FIELDS, n_embd=16, dff=24, n_layer=2, n_head=2))
    else:
        config = tf.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
        model, batch = tf.Swinv2ForImageClassification(config), {"labels": torch.tensor([0, 1])}
        batch["pixel_values"] = torch.randn(2, 3, 16, 16).double()
    return model.double().eval(), batch


@pytest.mark.parametrize("method", ["SSF", "sparse", "lora"])
@pytest.mark.parametrize("name", ["deberta", "longformer", "swinv2", "led", "ctrl"])
def test_real_models(name: str, method: str) -> None:
    base, batch = real_model(name)
    task = {"task_type": "SEQ_2_SEQ_LM"} if name == "led" else {"modules_to_save": ["classifier"]}
    model = adapt(method, base, batch, target_modules=TARGETS[name], **task).double()
    check_gradients(model, batch, step=1e-4, tolerance=1e-2)  # some of them compute in fp32
