"""A linear module with several LoRAs on its output, and the coefficients that several modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...core import ExactLeaf, SharedLayer, SharedLeaf, keeping_precision
from .config import LoraFusionConfig


SHARED = "shared_coefficients"  # the child of the model that holds shared coefficients, by group
Stack = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Factors(nn.Module):
    """The frozen factors of n LoRAs on a module: `down` `(R, in)` and `up` `(out, R)`, R being the sum of their ranks,

    and the `scales` `(n,)` of their products. They stay in fp32 when a model is cast to half precision.
    """

    down: torch.Tensor
    up: torch.Tensor
    scales: torch.Tensor

    def __init__(self, stack: Stack, ranks: list[int], mode: str, is_placeholder: bool) -> None:
        super().__init__()
        for name, tensor in zip(("down", "up", "scales"), stack, strict=True):
            self.register_buffer(name, tensor)
        self.ranks, self.mode, self.is_placeholder = ranks, mode, is_placeholder

    def is_unloaded(self) -> bool:
        """Whether the factors are still to come, from a file or another adapter."""
        if self.is_placeholder and bool(self.scales.any()):  # looked at, since transformers loads past all load hooks
            self.is_placeholder = False
        return self.is_placeholder

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`ValueError` if the scales of a file are none that a LoRA has."""
        if bool((tensors["scales"] < 0).any()):
            raise ValueError(f"`scales` are below zero: {tensors['scales'].tolist()}")

    def _apply(self, fn: Any, recurse: bool = True) -> Factors:
        super()._apply(keeping_precision(fn), recurse)
        return self

    def forward(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The update, of coefficients `(n,)`, as B A: A `(r, in)` and B `(out, r)`; of all ranks together for deltas."""
        if self.is_unloaded():
            raise ValueError(
                "This LoRAFusion adapter has no factors yet: load its weights, or make a new one with "
                "`LoraFusionConfig(adapters=[...])`."
            )
        w = coefficients.to(self.down.dtype)
        if self.mode == "deltas":
            by_rank = (w * self.scales).split([1] * len(self.ranks))
            weights = torch.cat([one.expand(rank) for one, rank in zip(by_rank, self.ranks, strict=True)])
            return self.down, self.up * weights
        n = len(self.ranks)
        w = w * self.scales.sqrt()  # half of the scale on each side: equal ones, as published, are that of the product
        down = torch.einsum("n,nri->ri", w, self.down.unflatten(0, (n, -1)))
        return down, torch.einsum("n,onr->or", w, self.up.unflatten(1, (n, -1)))


class Coefficients(ExactLeaf):
    """One trained number for each LoRA, `weight` `(n,)`; calling it gives a copy, in fp32 at least."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        self._exact = self.weight.data

    def forward(self) -> torch.Tensor:
        """`(n,)`."""
        weight: torch.Tensor = self.weight
        return weight.float() if weight.element_size() < 4 else weight.clone()


class Magnitudes(Coefficients):
    """The trained lengths of the rows of the changed weight, `weight` `(out,)`."""


class LoraFusionLayer(SharedLayer):
    """Coefficients, by adapter. Of this class itself are shared ones, in the model's `shared_coefficients`."""

    adapter_layer_names: tuple[str, ...] = ("fused_low_rank_coefficients",)
    other_param_names: tuple[str, ...] = ()
    supports_mixed_batches = True
    fused_low_rank_coefficients: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: LoraFusionConfig, *, start: torch.Tensor, **kwargs: Any) -> None:
        """With coefficients that start at `start` `(n,)`."""
        self.fused_low_rank_coefficients[adapter_name] = Coefficients(start)
        self.finish_update(adapter_name, config)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Nothing: what shares coefficients is merged where it is."""
        return {}

    def leave(self, model: nn.Module) -> None:
        """Takes the shared coefficients off the model."""
        if hasattr(model, SHARED):
            delattr(model, SHARED)


class LoraFusionLinear(LoraFusionLayer):
    """A linear module with the factors of several LoRAs, and coefficients of its own or links to shared ones."""

    adapter_layer_names = ("fused_low_rank_factors", "fused_low_rank_coefficients", "fused_low_rank_magnitude")
    fused_low_rank_factors: nn.ModuleDict
    fused_low_rank_magnitude: nn.ModuleDict

    def update_layer(
        self,
        adapter_name: str,
        config: LoraFusionConfig,
        *,
        start: torch.Tensor,
        ranks: list[int],
        stack: Stack | None = None,
        owner: LoraFusionLayer | None = None,
    ) -> None:
        """With the factors `stack`, or room for them, and with `owner`, which has the adapter already, its coefficients."""
        placeholder = stack is None
        if stack is None:
            inputs, total = self.in_features, sum(ranks)
            stack = (
                torch.zeros(total, inputs),
                torch.zeros(self.out_features, total),
                torch.zeros(len(ranks)),
            )
        factors = Factors(stack, ranks, config.mode, placeholder)
        self.fused_low_rank_factors[adapter_name] = factors
        if config.magnitude:
            # so that magnitudes change nothing before they are trained
            if owner is not None:
                shared = SharedLeaf(owner.fused_low_rank_coefficients, adapter_name)().detach()
                start = start if shared.is_meta else shared.to(start)
            lengths = torch.zeros(self.out_features) if placeholder else self._lengths(*factors(start)).detach()
            self.fused_low_rank_magnitude[adapter_name] = Magnitudes(lengths)
        if owner is None:
            super().update_layer(adapter_name, config, start=start)
            return
        self.fused_low_rank_coefficients[adapter_name] = SharedLeaf(owner.fused_low_rank_coefficients, adapter_name)
        self.finish_update(adapter_name, config)

    def low_rank(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Delta W as B A, on the layer's device: A `(r, in)` and B `(out, r)`."""
        factors: Any = self.fused_low_rank_factors[adapter_name]
        coefficients: torch.Tensor = self.fused_low_rank_coefficients[adapter_name]()
        down, up = factors(coefficients.to(factors.down.device))
        return down, up

    def _lengths(self, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of the rows of W + B A, `(out,)`, in the dtype of the factors, without forming it.

        ||W + B A||^2 = ||W||^2 + 2 B (W A^T) + B (A A^T) B^T, by rows; W is that before any adapter was merged.
        """
        weight = self._as_matrix(self.unmerged_weight()).detach().to(down.device, down.dtype)
        crossed = (up * (2 * (weight @ down.T) + up @ (down @ down.T))).sum(dim=1)
        return (weight.square().sum(dim=1) + crossed).clamp(min=torch.finfo(down.dtype).tiny).sqrt()

    def gain(self, adapter_name: str, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
        """m / ||W + B A|| `(out,)`; `None` if magnitudes are not trained."""
        if adapter_name not in self.fused_low_rank_magnitude:
            return None
        return self.fused_low_rank_magnitude[adapter_name]().to(down.dtype) / self._lengths(down, up)

    def update(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the base's `output` `(..., out)` of x `(..., in)`."""
        down, up = self.low_rank(adapter_name)
        added = F.linear(F.linear(self._cast_input_dtype(x, down.dtype), down), up)
        gain = self.gain(adapter_name, down, up)
        if gain is not None:
            bias: torch.Tensor | None = getattr(self.get_base_layer(), "bias", None)
            plain = (output if bias is None else output - bias).to(added.dtype)
            added = added * gain + plain * (gain - 1)
        return added.to(output.dtype)

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x `(..., in)`; the updates of all adapters add up."""
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return output + sum(self.update(name, x, output) for name in adapters)

    def mixed_batch_forward(
        self, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x `(B, ..., in)`."""
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        result, names = output, self.names_of_rows(adapter_names, len(x))
        for name in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            own = output.index_select(0, rows)
            result = result.index_copy(0, rows, own + self.update(name, x.index_select(0, rows), own))
        return result

    def adds_alone(self, adapter_name: str) -> bool:
        """Without magnitudes, which scale all that comes from inside."""
        return adapter_name not in self.fused_low_rank_magnitude

    def check_inner_merge(self, adapter_names: list[str]) -> None:
        """Magnitudes are of the weight, which would get other rows.

        Raises:
            ValueError: There are magnitudes.
        """
        for name in self.present(self.active_adapters):
            if not self.adds_alone(name) and name not in self.merged_adapters:
                raise ValueError(
                    f"Cannot merge {adapter_names} inside of adapter {name!r}, whose magnitudes are those of the weight "
                    f"that it was trained on: deactivate {name!r}, or keep {adapter_names} as they are."
                )

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """W + Delta W, or the same with other lengths of the rows; these are of W before any adapter was merged.

        Raises:
            ValueError: There are magnitudes, and another adapter acts inside, whose update they would scale.
        """
        down, up = self.low_rank(adapter_name)
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, down.dtype)
        update = (up @ down).to(weight.device, dtype)
        gain = self.gain(adapter_name, down, up)
        if gain is not None:
            if inside := self.active_inside():
                raise ValueError(
                    f"Cannot merge adapter {adapter_name!r}, which has magnitudes, while {', '.join(inside)} acts on the "
                    "same module: its update is scaled too. Deactivate it, or fuse with `magnitude=False`."
                )
            gain = gain.to(weight.device, dtype)[:, None]
            update = gain * update + (gain - 1) * self._as_matrix(self.unmerged_weight()).to(weight.device, dtype)
        return {"weight": weight.to(dtype) + self._as_matrix(update)}

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out, in)`, of what the base keeps; and back. GPT-2's Conv1D keeps `(in, out)`."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight
