"""The products of SSF as autograd functions that keep for the backward no more than a frozen model does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# A gamma below this (times max(1, |beta|)) is not divided by: the error of the recovered h is about the rounding
# error of y over gamma.
MIN_DIVISOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _saved_tensors(ctx: Any) -> Any:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "The model changed the output of a module that SSF adapts in place, but SSF recovers gradients from that "
            "output. Use `SSFConfig(recover=False)`, which keeps the features before the scale instead."
        ) from error


def _near_zero(scale: torch.Tensor, shift: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Indices of the channels whose scale is too small to divide features of `dtype` by it."""
    limit = MIN_DIVISOR[dtype] * (1.0 if shift is None else shift.abs().clamp(min=1))
    return (scale.abs() < limit).nonzero().squeeze(1)


def _vector_gradients(
    grad: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    kept_is_input: bool,
    near_zero: torch.Tensor,
    features_near_zero: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of scale and shift, `(C,)` each, from `grad` and `kept`, both `(N, C)`.

    `kept` holds the features before the scale if `kept_is_input`, else those after it; then `features_near_zero`
    `(N, k)` holds the features before the scale of the channels `near_zero` `(k,)`.
    """
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if grad.dtype == torch.float16:  # in which the products below could overflow
        kept, features_near_zero = kept.float(), features_near_zero.float()
    grad_shift = grad.sum(0, dtype=accumulate)
    grad_scale = (grad * kept).sum(0, dtype=accumulate)
    if not kept_is_input:
        if shift is not None:
            grad_scale = grad_scale - shift * grad_shift
        divisor = scale.index_fill(0, near_zero, 1.0)
        grad_scale = grad_scale / divisor
        if near_zero.numel():
            exact = (grad[:, near_zero] * features_near_zero).sum(0, dtype=accumulate)
            grad_scale = grad_scale.index_copy(0, near_zero, exact.to(grad_scale.dtype))
    return grad_scale, grad_shift


def scale_and_shift(features: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """`scale * features + shift` along the last dimension, in the dtype of the features `(..., C)`."""
    output = features * scale if shift is None else torch.addcmul(shift, features, scale)
    return output.to(features.dtype)


class ScaleShift(torch.autograd.Function):
    """`scale * features + shift` along the last dimension, which keeps its output and not its input for the backward."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """features `(..., C)`, scale and shift `(C,)`; returns `(..., C)` in the dtype of the features."""
        output = scale_and_shift(features, scale, shift)
        near_zero = _near_zero(scale, shift, features.dtype)
        ctx.save_for_backward(output, scale, shift, near_zero, features[..., near_zero])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, scale, shift, near_zero, features = _saved_tensors(ctx)
        channels = scale.numel()
        grad_features = grad_scale = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_features = (grad * scale).to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_scale, grad_shift = _vector_gradients(
                grad.reshape(-1, channels),
                output.reshape(-1, channels),
                scale,
                shift,
                False,
                near_zero,
                features.reshape(-1, near_zero.numel()) if near_zero.numel() else features,
            )
        return grad_features, grad_scale, grad_shift if shift is not None else None


class ScaledRMSNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x^2) + eps)`, which keeps `x` and one number a row; the modules of transformers keep more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x `(..., C)`, weight `(C,)`; returns `(..., C)`."""
        inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return x * inverse_rms * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        product = grad * normed
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.reshape(-1, weight.numel()).sum(0)
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad.device.type, enabled=False):
                along_x = (product @ weight).unsqueeze(-1) / weight.numel()
            grad_x = inverse_rms * (grad * weight - normed * along_x)
        return grad_x, grad_weight, None


class ScaledLinear(torch.autograd.Function):
    """`scale * (x W^T + b) + shift` as one product with the scaled weight; the weight itself is frozen.

    Keeps the output, or its input if that is kept by the attention before it anyway, and nothing of the weight's size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        shift: torch.Tensor | None,
        keep_input: bool,
    ) -> torch.Tensor:
        """x `(N, in)`, weight `(out, in)`, bias, scale and shift `(out,)`; returns `(N, out)`."""
        device = x.device.type
        is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves alone
        ctx.dtype = torch.get_autocast_dtype(device) if is_cast else x.dtype
        ctx.keep_input = keep_input
        with torch.autocast(device, enabled=False):
            scaled_bias = (
                shift if bias is None else bias * scale if shift is None else torch.addcmul(shift, bias, scale)
            )
            output = F.linear(
                x.to(ctx.dtype),
                (scale.unsqueeze(1) * weight).to(ctx.dtype),
                None if scaled_bias is None else scaled_bias.to(ctx.dtype),
            )
            kept = near_zero = features = None
            if keep_input:
                kept = x
            elif any(ctx.needs_input_grad[3:5]):
                kept = output
                near_zero = _near_zero(scale, shift, ctx.dtype)
                part = None if bias is None else bias[near_zero].to(ctx.dtype)
                features = F.linear(x.to(ctx.dtype), weight[near_zero].to(ctx.dtype), part)
        ctx.save_for_backward(kept, weight, bias, scale, shift, near_zero, features)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight, bias, scale, shift, near_zero, features = _saved_tensors(ctx)
        grad_x = grad_scale = grad_shift = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ (scale.unsqueeze(1) * weight).to(grad.dtype)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                if ctx.keep_input:
                    kept = F.linear(
                        kept.to(ctx.dtype), weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
                    )
                    features = kept
                    near_zero = scale.new_empty(0, dtype=torch.long)
                grad_scale, grad_shift = _vector_gradients(
                    grad, kept, scale, shift, ctx.keep_input, near_zero, features
                )
        return grad_x, None, None, grad_scale, grad_shift if shift is not None else None, None


def kept_by_attention(x: torch.Tensor) -> bool:
    """Whether `x` is a view of what a fused attention kernel keeps for its own backward."""
    node = x.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith("ScaledDotProduct") and "Math" not in name:
            return True
        if not name.startswith(("View", "Transpose", "UnsafeView", "ReshapeAlias", "Alias", "Permute")):
            return False
        node = node.next_functions[0][0]
    return False
