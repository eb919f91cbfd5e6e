r"""SSF: scale and shift of features (Lian, Zhou, Feng, Wang 2022, arXiv:2210.08823).

After an operation with C output channels, two trained vectors act on each channel c (the paper's section 3.2):

    y_c = gamma_c * h_c + beta_c        h = op(x)

They start at gamma ~ N(1, 0.02) and beta ~ N(0, 0.02), and are merged into the operation for inference:

    W' = diag(gamma) W,    b' = gamma * b + beta

**Backward without keeping h.** The gradient of gamma needs h, which nothing else keeps, while y is kept anyway where
a non-linearity or an attention follows. So y is kept and h = (y - beta) / gamma recovered from it:

    d gamma = sum(dy * h) = (sum(dy * y) - beta * sum(dy)) / gamma,    d beta = sum(dy)

Channels whose gamma is too near zero to divide by keep their own h. On a Linear the two vectors are folded into the
weight for the forward, so that no pass over the features is added; on a norm they are folded into its affine
parameters, whose own backward gives both gradients from what a frozen norm keeps as well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base import AdapterVector, ExtConfig, ExtLayer, ExtModel, linear_out_features


INIT_STD = 0.02  # of gamma and beta, as published

# config flags with which a transformers class gives a bias to modules that have none by default
BIAS_FLAGS = ("attention_bias", "mlp_bias")

# A gamma below this (times max(1, |beta|)) is not divided by: the error of the recovered h is about the rounding
# error of y over gamma.
MIN_DIVISOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
            gamma = 1 and beta = 0, so that training starts from the base model's own output.
        recover: Recover the features before the scale from those after it, instead of keeping them for the backward.
            `False` needs more memory; it is for models that change a module's output in place.

    Raises:
        ValueError: `init_weights` is neither `True` nor `"identity"`.
    """

    METHOD: ClassVar[str] = "SSF"

    shift: bool | None = field(
        default=None, metadata={"help": "Train a shift: everywhere, nowhere, or (None) where a merged model has it."}
    )
    recover: bool = field(default=True, metadata={"help": "Recover features in the backward instead of keeping them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is not True and self.init_weights != "identity":
            raise ValueError(f"`init_weights` must be True or 'identity' for SSF, got {self.init_weights!r}.")
        if self.shift not in (None, True, False):
            raise ValueError(f"`shift` must be None, True or False, got {self.shift!r}.")
        if self.recover not in (True, False):
            raise ValueError(f"`recover` must be True or False, got {self.recover!r}.")


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
        return Site(features, dim=-1, weight_dim=0)
    if isinstance(module, Conv1D):
        return Site(module.nf, dim=-1, weight_dim=1)
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
    raise TypeError(
        f"SSF does not support modules of type {type(module).__name__}; it adapts Linear, Conv1D, convolutions, "
        "Embedding (without max_norm), LayerNorm, GroupNorm, BatchNorm and RMSNorm."
    )


def rms_norm_offset(module: nn.Module) -> float | None:
    """The o in `y = (weight + o) * x / rms(x)` if `module` computes that for some o, else `None`.

    There is an RMSNorm class per architecture, so the module is asked instead of its name.
    """
    weight: Any = getattr(module, "weight", None)
    is_candidate = (
        isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and not any(True for _ in module.children())
    )
    if not is_candidate:
        return None
    x = torch.linspace(-1, 1, weight.numel(), device="cpu").unsqueeze(0) + 0.5
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    try:
        with torch.no_grad(), torch.device("cpu"):
            at_zero = functional_call(module, {"weight": torch.zeros_like(x[0])}, (x,))
            at_two = functional_call(module, {"weight": torch.full_like(x[0], 2.0)}, (x,))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # takes something else than one tensor of features
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * expected, atol=1e-3) and torch.allclose(
            at_two, (offset + 2) * expected, atol=1e-3
        ):
            return offset
    return None


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


def _kept_by_attention(x: torch.Tensor) -> bool:
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


class SSFLayer(ExtLayer):
    """Any supported module with `y = gamma * h + beta` on its output; `ssf_scale` holds gamma - 1, `ssf_shift` beta."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    supports_mixed_batches = True
    ssf_scale: nn.ModuleDict
    ssf_shift: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.site = site_of(self.get_base_layer())
        self.recover: dict[str, bool] = {}
        self.obstacle: dict[str, str | None] = {}

    def update_layer(self, adapter_name: str, config: SSFConfig, *, shift: bool, obstacle: str | None = None) -> None:
        """Creates gamma and, if `shift`, beta of one adapter, `(C,)` each; `obstacle` says why it cannot be merged."""
        self.ssf_scale[adapter_name] = AdapterVector(self.site.channels, offset=1.0)
        if shift:
            self.ssf_shift[adapter_name] = AdapterVector(self.site.channels)
        self.recover[adapter_name] = config.recover
        self.obstacle[adapter_name] = obstacle
        if config.init_weights is True:
            for leaves in (self.ssf_scale, self.ssf_shift):
                if adapter_name in leaves:
                    nn.init.normal_(leaves[adapter_name].get_parameter("weight"), std=INIT_STD)
        self.finish_update(adapter_name, config)

    def vectors(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gamma and beta `(C,)` of the adapters one after the other: gamma2 * (gamma1 * h + beta1) + beta2."""
        scale, shift = None, None
        for name in adapters:
            gamma = self.ssf_scale[name]()
            beta = self.ssf_shift[name]() if name in self.ssf_shift else None
            scale = gamma if scale is None else scale * gamma
            shift = beta if shift is None else gamma * shift if beta is None else torch.addcmul(beta, shift, gamma)
        assert scale is not None
        return scale, shift

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        scale, shift = self.vectors(adapters)
        if self.site.is_norm and self._can_fold(scale):
            return self._folded_norm(scale, shift, *args, **kwargs)
        features = self.base_layer(*args, **kwargs)
        return self._scale_features(features, scale, shift, recover=all(self.recover[name] for name in adapters))

    def _can_fold(self, scale: torch.Tensor) -> bool:
        """Whether the base layer can be called with scaled parameters: its own class, frozen, of the same precision."""
        base = self.base_layer
        weight = getattr(base, "weight", None)
        return (
            self.quantization_backend is None
            and not isinstance(base, ExtLayer)
            and isinstance(weight, nn.Parameter)
            and not weight.requires_grad
            and weight.dtype == scale.dtype
            and not (base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook"))
        )

    def _folded_norm(self, scale: torch.Tensor, shift: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.base_layer
        affine = {"weight": self.site.scale_weight(base.weight, scale)}
        bias = getattr(base, "bias", None)
        if bias is not None:
            affine["bias"] = bias * scale if shift is None else torch.addcmul(shift, bias, scale)
            shift = None
        is_plain = self.site.rms_eps is not None and len(args) == 1 and not kwargs and args[0].dtype == scale.dtype
        if not is_plain or torch.compiler.is_compiling():
            output = functional_call(base, affine, args, kwargs)
        else:
            output = ScaledRMSNorm.apply(args[0], affine["weight"] + self.site.weight_offset, self.site.rms_eps)
        return output if shift is None else (output + along(shift, self.site.dim, output.ndim)).to(output.dtype)

    def _scale_features(
        self, features: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, recover: bool
    ) -> torch.Tensor:
        """`scale * features + shift` along the channel dimension, in the dtype of the features."""
        dim = self.site.dim
        needs_gradient = torch.is_grad_enabled() and scale.requires_grad
        keeps_features = not (recover and needs_gradient) or torch.compiler.is_compiling()  # the compiler chooses
        apply = scale_and_shift if keeps_features else ScaleShift.apply
        return apply(features.movedim(dim, -1), scale, shift).movedim(-1, dim)

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        features = self.base_layer(*args, **kwargs)
        if len(features) % len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"names where a {type(self.get_base_layer()).__name__} sees {len(features)} rows. If the batch has as "
                "many samples as names, the model calls the module on something that is not per sample (DeBERTa's "
                "shared projections on its position embeddings): run the samples of each adapter as a batch."
            )
        # window attention folds the windows of a sample, one after the other, into the batch dimension
        repeats = len(features) // len(adapter_names)
        one, zero = self._identity(features)
        scales, shifts = [], []
        for name in adapter_names:
            scale, shift = self.vectors([name]) if self.present([name]) else (one, None)
            scales += [scale] * repeats
            shifts += [zero if shift is None else shift] * repeats
        shape = [len(features)] + [1] * (features.ndim - 1)
        shape[self.site.dim] = self.site.channels
        return (features * torch.stack(scales).view(shape) + torch.stack(shifts).view(shape)).to(features.dtype)

    def _identity(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(features.dtype, torch.float32)
        one = torch.ones(self.site.channels, device=features.device, dtype=dtype)
        return one, torch.zeros_like(one)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        if self.obstacle[adapter_name] is not None:
            raise ValueError(
                f"Cannot merge adapter {adapter_name!r}: {self.obstacle[adapter_name]} Keep the adapter unmerged."
            )
        base, site = self.get_base_layer(), self.site
        scale, shift = self.vectors([adapter_name])
        if getattr(base, "weight", None) is None:  # a norm without affine parameters gets them
            weight = scale.new_ones(getattr(base, "normalized_shape", (site.channels,)))
        else:
            weight = self.get_base_weight().to(scale.dtype)
        merged = {"weight": site.scale_weight(weight, scale)}
        bias = getattr(base, "bias", None)
        if bias is not None:
            merged["bias"] = bias.data.to(scale.dtype) * scale
        if shift is None:
            return merged
        if site.bias_key == "weight":  # an embedding; some multiply their rows by a constant
            embed_scale = self._get_embed_scale()
            merged["weight"] = merged["weight"] + (shift if embed_scale is None else shift / embed_scale)
        else:
            merged["bias"] = merged["bias"] + shift if bias is not None else shift
        if "bias" in merged and isinstance(base, nn.LayerNorm):
            merged["bias"] = merged["bias"].expand(base.normalized_shape).clone()
        return merged


class SSFLinear(SSFLayer):
    """SSF on `nn.Linear` and GPT-2's `Conv1D`: the scale is folded into the weight for the forward."""

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.base_layer
        scale, shift = self.vectors(adapters)
        is_plain = type(base) in (nn.Linear, Conv1D) and len(args) == 1 and not kwargs and self._can_fold(scale)
        recover = all(self.recover[name] for name in adapters)
        trains_bias = is_plain and base.bias is not None and base.bias.requires_grad
        # scaling the weight costs a pass over it, scaling the features one over them: for few rows the latter is less
        pays = is_plain and args[0].numel() > args[0].shape[-1] ** 2
        if not (pays and recover) or trains_bias or torch.compiler.is_compiling():
            return super().adapted_forward(adapters, *args, **kwargs)
        (x,) = args
        weight = base.weight if self.site.weight_dim == 0 else base.weight.T
        keep_input = _kept_by_attention(x) or not torch.is_grad_enabled()  # in which case nothing is kept at all
        output = ScaledLinear.apply(x.reshape(-1, x.shape[-1]), weight, base.bias, scale, shift, keep_input)
        return output.view(*x.shape[:-1], self.site.channels)


class SSFModel(ExtModel):
    """Puts scale and shift on the targets of a model; used through `get_peft_model(model, SSFConfig(...))`."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer
    target_module_mapping = DEFAULT_SITES
    default_exclusions = DEFAULT_EXCLUSIONS

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """`SSFLinear` for dense layers, `SSFLayer` for the rest; `TypeError` for what SSF cannot adapt."""
        site_of(base_layer)
        is_linear = isinstance(base_layer, Conv1D) or linear_out_features(base_layer) is not None
        return SSFLinear if is_linear else SSFLayer

    @classmethod
    def layer_kwargs(cls, tuner: Any, name: str, base_layer: nn.Module, config: SSFConfig) -> dict[str, Any]:
        """Whether this site gets a shift, and what, if anything, stands in the way of merging it."""
        flags = tuner.__dict__.setdefault("_ssf_bias_flags", None)
        if flags is None:
            flags = tuner.__dict__["_ssf_bias_flags"] = bias_flags(tuner.model)
        bias_key = site_of(base_layer).bias_key
        carries = bias_key == "weight" or getattr(base_layer, "bias", None) is not None
        carries = carries or (bias_key == "bias" and name in flags)
        shift = carries if config.shift is None else config.shift
        return {"shift": shift, "obstacle": cls._obstacle(tuner.model, name, base_layer, shift and not carries)}

    @staticmethod
    def _obstacle(model: nn.Module, name: str, base_layer: nn.Module, shift_is_lost: bool) -> str | None:
        kind = type(base_layer).__name__
        remedy = "Train with `shift=None`, which shifts only where a merged model can carry it, or:"
        if shift_is_lost and site_of(base_layer).bias_key is None:
            return f"it shifts {name!r}, and a {kind} has no place for a shift. {remedy}"
        if not isinstance(model, PreTrainedModel):
            return None  # whoever writes the class can load what merging adds
        if shift_is_lost:
            return (
                f"it shifts {name!r}, a {kind} without bias, and {type(model).__name__} has no config flag that "
                f"gives it one, so loading the merged model would drop the shift without an error. {remedy}"
            )
        if getattr(base_layer, "weight", True) is None:
            return (
                f"{name!r} is a {kind} without affine parameters, so loading the merged model would drop the scale "
                "without an error."
            )
        return None

    @classmethod
    def finish_merge(cls, model: nn.Module) -> None:
        """Sets the config flags of the biases that the merge has added, so that the stock class loads them."""
        set_bias_flags(model)


def _configs(config: Any) -> list[PreTrainedConfig]:
    return [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]


def bias_flags(model: nn.Module) -> dict[str, str]:
    """Which config flag, now off, would give which module a bias: `{"model.layers.0.self_attn.q_proj": "attention_bias"}`.

    The architecture itself is asked: its class is built without memory, once as it is and once with each flag.
    """
    if not isinstance(model, PreTrainedModel):
        return {}

    def biased(flag: str | None) -> set[str]:
        config = copy.deepcopy(model.config)
        for part in _configs(config):
            if flag is not None and getattr(part, flag, None) is False:
                setattr(part, flag, True)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            twin = type(model)(config)
        return {name for name, module in twin.named_modules() if getattr(module, "bias", None) is not None}

    off = [flag for flag in BIAS_FLAGS if any(getattr(part, flag, None) is False for part in _configs(model.config))]
    if not off:
        return {}
    without = biased(None)
    return {name: flag for flag in off for name in biased(flag) - without}


def set_bias_flags(model: nn.Module) -> None:
    """Turns on the config flags of modules that have got a bias; the others under the same flag get a zero bias."""
    flags = bias_flags(model)
    governed = {name: model.get_submodule(name) for name in flags}
    needed = {flags[name] for name, module in governed.items() if module.bias is not None}
    for flag in needed:
        for part in _configs(model.config):
            if getattr(part, flag, None) is False:
                setattr(part, flag, True)
    for name, module in governed.items():
        if flags[name] in needed and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
