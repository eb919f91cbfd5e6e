"""The products of SSF as autograd functions that keep for the backward no more than a frozen model does."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# A gamma below this (times max(1, |beta|)) is not divided by: the error of the recovered h is about the rounding
# error of y over gamma.
MIN_DIVISOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


# Channels whose recovered h would be off by more than this share of its size keep their own h.
MAX_ERROR = 0.02
SAMPLED_ROWS = 256  # by which that error is estimated
TINY = 1e-30  # instead of a zero that would be divided by
LOOK_EVERY = 32  # forwards, after which a GPU is asked again which channels cannot be recovered
MARGIN = 2.0  # channels that are this near to being lost are kept until then
PENDING = 16  # as many modules keep their features besides their outputs in the first step, see `OutputWatch`


class OutputWatch:
    """What is known of a module's output: whether it is changed in place, and which channels cannot be recovered.

    `changed` is `None` until the first backward tells. Until then the features are kept beside the output, but only
    while the next `PENDING` modules run: a model that changes an output in place does so soon after.

    Which channels are lost is known only when the device has worked it out, and a GPU that is waited for stands idle.
    So it is asked once in `LOOK_EVERY` forwards, and the channels that are then within a factor of `MARGIN` of being
    lost are kept until the next time. One that is lost before that does not learn meanwhile, and is told of.
    """

    def __init__(self) -> None:
        self.changed: bool | None = None
        self._adapters: tuple[str, ...] = ()
        self._left = 0  # forwards until the next look
        self._exact: torch.Tensor | None = None
        self._lost: torch.Tensor | None = None

    def of(self, adapters: Sequence[str]) -> OutputWatch:
        """This one, which looks anew if the adapters are others than before."""
        if tuple(adapters) != self._adapters:
            self._adapters, self._left, self._lost = tuple(adapters), 0, None
        return self

    def channels(self, output: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """The indices of the channels whose features are to be kept until the next look.

        Warns:
            UserWarning: Channels were lost since the last look.
        """
        # what gradient checkpointing computes again in the backward must keep what it kept the first time
        is_due = self._left <= 0 and torch._C._current_graph_task_id() == -1
        if self._exact is None or is_due or self._exact.device != output.device:
            if self._lost is not None and (lost := int(self._lost.sum())):
                warnings.warn(
                    f"The scales of {lost} channels of a module that SSF adapts came so near zero within {LOOK_EVERY} "
                    "steps that they cannot be divided by: until now these did not learn. Try a smaller learning "
                    "rate, or `SSFConfig(recover=False)`, which keeps the features of all channels.",
                    stacklevel=2,
                )
            self._lost, self._left = None, LOOK_EVERY
            self._exact = (_difficulty(output, scale, shift) * MARGIN > 1).nonzero().squeeze(1)
        self._left -= 1
        return self._exact

    def note(self, lost: torch.Tensor) -> None:
        """Takes note of lost channels, as booleans `(C,)`, that were not kept."""
        self._lost = lost if self._lost is None else self._lost.to(lost.device) | lost


class _Features:
    """The features behind one output that may yet be changed in place, and whether it was."""

    def __init__(self, output: torch.Tensor, features: torch.Tensor | None) -> None:
        self.features = features
        self._counter = output.detach()  # has the version counter of the output, and of all views of it,
        self._counter.data = output.new_empty(0)  # but not its memory
        self._version = self._counter._version

    def is_output_changed(self) -> bool:
        return self._counter._version != self._version


_pending: deque[weakref.ref[_Features]] = deque()


def _watch(watch: OutputWatch, output: torch.Tensor, features: torch.Tensor) -> _Features:
    """Takes note of the version of `output`, and in the first step of the `features` behind it."""
    if watch.changed is not None:
        return _Features(output, None)
    kept = _Features(output, features)
    _pending.append(weakref.ref(kept))
    while len(_pending) > PENDING:
        oldest = _pending.popleft()()
        if oldest is not None and not oldest.is_output_changed():
            oldest.features = None
    return kept


def _features_if_changed(watch: OutputWatch | None, kept: _Features | None) -> torch.Tensor | None:
    """The features if the output behind them was changed in place, which the module takes note of; else `None`.

    Raises:
        RuntimeError: It was changed, for the first time or late, and the features were not kept.
    """
    if watch is None or kept is None:
        return None
    if not kept.is_output_changed():
        watch.changed = bool(watch.changed)
        return None
    watch.changed = True
    if kept.features is None:
        raise RuntimeError(
            "The model changed the output of a module that SSF adapts in place, which it did not do in the first step "
            "or not at once, and SSF recovers gradients from that output. Run this step again: from now on the module "
            "keeps its features instead; or set `SSFConfig(recover=False)`, with which all modules do."
        )
    return kept.features


def _difficulty(output: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """How far each channel `(C,)` is from being recovered from `output` `(N, C)`; above 1 it cannot be.

    The scale is too near zero to be divided by, or the output is mostly shift, whose rounding hides the features:
    recovered, they are off by about eps |y| / |gamma|.
    """
    limit = MIN_DIVISOR[output.dtype] * (1.0 if shift is None else shift.abs().clamp(min=1))
    found = limit / scale.abs()
    if shift is not None and len(output):
        sample = output[:: -(-len(output) // SAMPLED_ROWS)].to(torch.promote_types(output.dtype, torch.float32))
        rounding = torch.linalg.vector_norm(sample, dim=0) * (torch.finfo(output.dtype).eps / MAX_ERROR)
        found = torch.maximum(found, rounding / torch.linalg.vector_norm(sample - shift, dim=0).clamp(min=TINY))
    return found


def _channels_to_keep(
    output: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, watch: OutputWatch | None
) -> torch.Tensor:
    """Indices of the channels whose features cannot be recovered from `output` `(N, C)`."""
    if watch is None or not watches_sparingly(output):
        return (_difficulty(output, scale, shift) > 1).nonzero().squeeze(1)
    return watch.channels(output, scale, shift)


def watches_sparingly(output: torch.Tensor) -> bool:
    """Whether the channels that cannot be recovered are not looked for in each forward, see `OutputWatch`."""
    return output.device.type != "cpu"


def _vector_gradients(
    grad: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    kept_is_input: bool,
    exact: torch.Tensor,
    exact_features: torch.Tensor | None,
    watch: OutputWatch | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of scale and shift, `(C,)` each, from `grad` and `kept`, both `(N, C)`.

    `kept` holds the features before the scale if `kept_is_input`, else those after it; then `exact_features`
    `(N, k)` holds the features before the scale of the channels `exact` `(k,)`, if there are any.
    """
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    smallest = MIN_DIVISOR[kept.dtype]
    if grad.dtype == torch.float16:  # in which the products below could overflow
        kept = kept.float()
        exact_features = None if exact_features is None else exact_features.float()
    grad_shift = grad.sum(0, dtype=accumulate)
    grad_scale = (grad * kept).sum(0, dtype=accumulate)
    if kept_is_input:
        return grad_scale, grad_shift
    if shift is not None:
        grad_scale = grad_scale - shift * grad_shift
    divisor = scale if exact_features is None else scale.index_fill(0, exact, torch.inf)
    grad_scale = grad_scale / divisor
    if watch is not None and watches_sparingly(grad):
        lost = divisor.abs() < smallest
        watch.note(lost)
        grad_scale = grad_scale.masked_fill(lost, 0.0)
    if exact_features is not None:
        own = (grad[:, exact] * exact_features).sum(0, dtype=accumulate)
        grad_scale = grad_scale.index_copy(0, exact, own.to(grad_scale.dtype))
    return grad_scale, grad_shift


def scale_and_shift(features: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """`scale * features + shift` along the last dimension, in the dtype of the features `(..., C)`."""
    output = features * scale if shift is None else torch.addcmul(shift, features, scale)
    return output.to(features.dtype)


class ScaleShift(torch.autograd.Function):
    """`scale * features + shift` along the last dimension, which keeps its output and not its input for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor | None,
        watch: OutputWatch | None = None,
    ) -> torch.Tensor:
        """features `(..., C)`, scale and shift `(C,)`; returns `(..., C)` in the dtype of the features."""
        output = scale_and_shift(features, scale, shift)
        exact = _channels_to_keep(output.reshape(-1, scale.numel()), scale, shift, watch)
        # by `data`, for a change in place of what is returned is noticed by the watch
        exact_features = features[..., exact].reshape(-1, exact.numel()) if exact.numel() else None
        ctx.save_for_backward(output.data, scale, shift, exact, exact_features)
        ctx.watch = watch
        ctx.kept = None if watch is None else _watch(watch, output, features)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, scale, shift, exact, exact_features = ctx.saved_tensors
        features = _features_if_changed(ctx.watch, ctx.kept)
        channels = scale.numel()
        grad_features = grad_scale = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_features = (grad * scale).to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_scale, grad_shift = _vector_gradients(
                grad.reshape(-1, channels),
                (output if features is None else features).reshape(-1, channels),
                scale,
                shift,
                features is not None,
                exact,
                exact_features,
                ctx.watch,
            )
        return grad_features, grad_scale, grad_shift if shift is not None else None, None


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
        watch: OutputWatch | None = None,
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
            kept = exact = exact_features = None
            ctx.watch, ctx.kept = watch, None
            if keep_input:
                kept = x
            elif any(ctx.needs_input_grad[3:5]):
                kept = output.data  # see `ScaleShift`
                exact = _channels_to_keep(output, scale, shift, watch)
                if exact.numel():
                    part = None if bias is None else bias[exact].to(ctx.dtype)
                    exact_features = F.linear(x.to(ctx.dtype), weight[exact].to(ctx.dtype), part)
                ctx.kept = None if watch is None else _watch(watch, output, x)
        ctx.save_for_backward(kept, weight, bias, scale, shift, exact, exact_features)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight, bias, scale, shift, exact, exact_features = ctx.saved_tensors
        x = kept if ctx.keep_input else _features_if_changed(ctx.watch, ctx.kept)
        grad_x = grad_scale = grad_shift = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ (scale.unsqueeze(1) * weight).to(grad.dtype)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                if x is not None:
                    part = None if bias is None else bias.to(ctx.dtype)
                    kept = F.linear(x.to(ctx.dtype), weight.to(ctx.dtype), part)
                grad_scale, grad_shift = _vector_gradients(
                    grad, kept, scale, shift, x is not None, exact, exact_features, ctx.watch
                )
        return grad_x, None, None, grad_scale, grad_shift if shift is not None else None, None, None


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
