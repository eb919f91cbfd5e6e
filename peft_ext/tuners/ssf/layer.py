"""A module with scale and shift on its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import AdapterVector, ExtLayer, is_hooked, needs_plain_operations
from ...core.sharding import call_with
from . import functional
from .config import SSFConfig
from .functional import OutputWatch, ScaledLinear, ScaledRMSNorm, ScaleShift, scale_and_shift
from .sites import along, site_of


INIT_STD = 0.02  # of gamma and beta, as published


class SSFLayer(ExtLayer):
    """Any supported module with `y = gamma * h + beta` on its output; `ssf_scale` holds gamma - 1, `ssf_shift` beta."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    other_param_names: tuple[str, ...] = ("recover", "obstacle")
    supports_mixed_batches = True
    ssf_scale: nn.ModuleDict
    ssf_shift: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.site = site_of(self.get_base_layer())
        self.recover: dict[str, bool] = {}
        self.obstacle: dict[str, str | None] = {}
        self.watch = OutputWatch()

    def update_layer(self, adapter_name: str, config: SSFConfig, *, shift: bool, obstacle: str | None = None) -> None:
        """Creates gamma and, if `shift`, beta of one adapter, `(C,)` each; `obstacle` says why it cannot be merged."""
        self.ssf_scale[adapter_name] = AdapterVector(self.site.channels, offset=1.0)
        if shift:
            self.ssf_shift[adapter_name] = AdapterVector(self.site.channels)
        self.recover[adapter_name] = config.recover
        self.obstacle[adapter_name] = obstacle
        if config.init_weights != "identity":
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
        recover = all(self.recover[name] for name in adapters) and not needs_plain_operations()
        if recover:
            self.watch.of(adapters)
        if self.site.is_norm and self._can_fold(scale):
            return self._folded_norm(scale, shift, recover, *args, **kwargs)
        return self._scale_features(self._features(*args, **kwargs), scale, shift, recover)

    def _features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        features = self.base_layer(*args, **kwargs)
        if not isinstance(features, torch.Tensor):
            raise TypeError(
                f"The adapted {type(self.get_base_layer()).__name__} returns a {type(features).__name__}, and SSF scales "
                "one tensor: list the module in `exclude_modules`."
            )
        return features

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
            and not is_hooked(base)
        )

    def _folded_norm(
        self, scale: torch.Tensor, shift: torch.Tensor | None, recover: bool, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        base: Any = self.base_layer
        affine = {"weight": self.site.scale_weight(base.weight, scale)}
        bias = getattr(base, "bias", None)
        if bias is not None:
            affine["bias"] = bias * scale if shift is None else torch.addcmul(shift, bias, scale)
            shift = None
        is_plain = self.site.rms_eps is not None and len(args) == 1 and not kwargs and args[0].dtype == scale.dtype
        if not (is_plain and recover):
            output = call_with(base, affine, args, kwargs)
        else:
            output = ScaledRMSNorm.apply(args[0], affine["weight"] + self.site.weight_offset, self.site.rms_eps)
        return output if shift is None else (output + along(shift, self.site.dim, output.ndim)).to(output.dtype)

    def _scale_features(
        self, features: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, recover: bool
    ) -> torch.Tensor:
        """`scale * features + shift` along the channel dimension, in the dtype of the features."""
        dim = self.site.dim
        needs_gradient = torch.is_grad_enabled() and scale.requires_grad
        features = features.movedim(dim, -1)
        if recover and needs_gradient and not self.watch.changed:
            return ScaleShift.apply(features, scale, shift, self.watch).movedim(-1, dim)
        return scale_and_shift(features, scale, shift).movedim(-1, dim)

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        features = self._features(*args, **kwargs)
        one, zero = self._identity(features)
        scales, shifts = [], []
        vectors = {name: self.vectors([name]) if self.present([name]) else (one, None) for name in adapter_names}
        for name in self.names_of_rows(adapter_names, len(features)):
            scale, shift = vectors[name]
            scales.append(scale)
            shifts.append(zero if shift is None else shift)
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
        if getattr(base, "weight", None) is None and self.quantization_backend is None:
            # a norm without affine parameters gets them
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
            embed_scale = self.row_scale()
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
        if not (pays and recover) or trains_bias or needs_plain_operations():
            return super().adapted_forward(adapters, *args, **kwargs)
        (x,) = args
        weight = base.weight if self.site.weight_dim == 0 else base.weight.T
        keep_input = (
            self.watch.changed or functional.kept_by_attention(x) or not torch.is_grad_enabled()
        )  # in the last case nothing is kept at all
        output = ScaledLinear.apply(
            x.reshape(-1, x.shape[-1]), weight, base.bias, scale, shift, bool(keep_input), self.watch.of(adapters)
        )
        return output.view(*x.shape[:-1], self.site.channels)
