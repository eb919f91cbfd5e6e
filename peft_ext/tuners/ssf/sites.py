"""What kinds of operations SSF adapts, and how scale and shift are written into their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ...core import linear_out_features
from ...core.sharding import call_with


@dataclass(frozen=True)
class Site:
    """What kind of operation is adapted, and how scale and shift are written into its parameters.

    Args:
        channels: C, the number of output channels.
        dim: The channel dimension of the output.
        weight_dim: The channel dimension of the weight.
        groups: Of a transposed convolution, whose weight `(in, C / groups, ...)` holds the channels of each group.
        weight_offset: The affine weight acts as `weight + weight_offset` (Gemma's RMSNorm: 1).
        is_norm: The operation is linear in its `weight` (and `bias`) per channel.
        bias_key: The parameter that takes the shift; `None` if the operation has no place for one.
        rms_eps: Of an RMSNorm, what it adds to the mean square.
    """

    channels: int
    dim: int
    weight_dim: int
    groups: int = 1
    weight_offset: float = 0.0
    is_norm: bool = False
    bias_key: str | None = "bias"
    rms_eps: float | None = None

    def scale_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`weight` with each output channel multiplied by its entry of `scale` `(C,)`."""
        if self.groups > 1:
            shape = [self.groups, -1, self.channels // self.groups, *weight.shape[2:]]
            factors = scale.view(self.groups, 1, -1, *[1] * (weight.ndim - 2))
            return (weight.reshape(shape) * factors).reshape(weight.shape)
        return along(scale, self.weight_dim, weight.ndim) * (weight + self.weight_offset) - self.weight_offset


def along(vector: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    """A view of `vector` `(C,)` that broadcasts along `dim` of tensors with `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return vector.view(shape)


def site_of(module: Any) -> Site:
    """How SSF adapts `module`.

    Raises:
        TypeError: It cannot.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError("it belongs to an nn.MultiheadAttention, which reads its weight and never calls it.")
    if (features := linear_out_features(module)) is not None:
        return Site(features, dim=-1, weight_dim=1 if isinstance(module, Conv1D) else 0)
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        return Site(
            module.out_channels,
            dim=-len(module.kernel_size) - 1,
            weight_dim=1 if transposed else 0,
            groups=module.groups if transposed else 1,
        )
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return Site(module.embedding_dim, dim=-1, weight_dim=1, bias_key="weight")
    if isinstance(module, nn.LayerNorm):
        first = getattr(module, "data_format", None) == "channels_first"  # ConvNeXt's norm of images
        return Site(module.normalized_shape[-1], dim=-3 if first else -1, weight_dim=-1, is_norm=True)
    if isinstance(module, (nn.GroupNorm, _BatchNorm)):
        channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        return Site(channels, dim=1, weight_dim=0, is_norm=True)
    offset = rms_norm_offset(module)
    if offset is not None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Site(
            module.weight.numel(), -1, weight_dim=0, weight_offset=offset, is_norm=True, bias_key=None, rms_eps=eps
        )
    if is_affine_norm(module):
        bias_key = "bias" if hasattr(module, "bias") else None
        return Site(module.weight.numel(), -1, weight_dim=0, is_norm=True, bias_key=bias_key)
    raise TypeError(
        f"SSF does not support modules of type {type(module).__name__}; it adapts Linear, Conv1D, convolutions, "
        "Embedding (without max_norm), LayerNorm, GroupNorm, BatchNorm and RMSNorm."
    )


def is_operation(module: nn.Module) -> bool:
    """Whether SSF adapts the module by default: what it can adapt and merge, but no embedding table."""
    if isinstance(module, nn.Embedding) or parametrize.is_parametrized(module):
        return False
    try:
        site_of(module)
    except TypeError:
        return False
    return True


def rms_norm_offset(module: nn.Module) -> float | None:
    """The o in `y = (weight + o) * x / rms(x)` if `module` computes that for some o, else `None`.

    There is an RMSNorm class per architecture, so the module is asked instead of its name.
    """
    weight: Any = getattr(module, "weight", None)
    if not _has_vectors(module, ["weight"]):
        return None
    x = torch.linspace(-1, 1, weight.numel(), device="cpu").unsqueeze(0) + 0.5
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    try:
        with torch.no_grad(), torch.device("cpu"):
            at_zero = call_with(module, {"weight": torch.zeros_like(x[0])}, (x,), {})
            at_two = call_with(module, {"weight": torch.full_like(x[0], 2.0)}, (x,), {})
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # takes something else than one tensor of features
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * expected, atol=1e-3) and torch.allclose(
            at_two, (offset + 2) * expected, atol=1e-3
        ):
            return offset
    return None


def is_affine_norm(module: nn.Module) -> bool:
    """Whether `module` computes `weight * n(x) + bias` or `weight * n(x)` for some normalised features n(x).

    DeBERTa and Cohere, for example, have a LayerNorm of their own; like an RMSNorm, it is asked by calling it.
    """
    if not type(module).__name__.endswith("Norm"):
        return False
    names = [name for name, _ in module.named_parameters()]
    if names not in (["weight"], ["weight", "bias"]) or not _has_vectors(module, names):
        return False
    width = module.weight.numel()  # type: ignore[union-attr,operator]
    x = torch.linspace(-1, 1, width, device="cpu").square().unsqueeze(0) + 0.5
    weight, bias = torch.linspace(1, 2, width, device="cpu"), torch.linspace(0, 1, width, device="cpu")
    try:
        with torch.no_grad(), torch.device("cpu"):
            zero, one = torch.zeros(width), torch.ones(width)
            with_bias = {"bias": bias} if "bias" in names else {}
            normalised = call_with(module, {"weight": one, **dict.fromkeys(with_bias, zero)}, (x,), {})
            found = call_with(module, {"weight": weight, **with_bias}, (x,), {})
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # takes something else than one tensor of features
    expected = weight * normalised + (bias if with_bias else 0)
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-4)


def _has_vectors(module: nn.Module, names: list[str]) -> bool:
    """Whether these are all the parameters of a module without children, vectors of one length."""
    if next(module.children(), None) is not None:  # first, since a block may hold the parameters of many adapters
        return False
    parameters = dict(module.named_parameters())
    sizes = {parameter.shape for parameter in parameters.values()}
    return list(parameters) == names and len(sizes) == 1 and len(next(iter(sizes))) == 1
