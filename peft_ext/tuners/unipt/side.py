"""The side network of UniPT; its equation stands in the package's docstring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...reading import recomputed


class SideLinear(nn.Module):
    """A linear map: `weight` `(out, in)`, `bias` `(out,)`. No `nn.Linear`, which other methods would adapt."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of `nn.Linear`, which is the published one."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `(..., in)`; returns `(..., out)`."""
        return F.linear(x.to(self.weight), self.weight, self.bias)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class SideLinears(SideLinear):
    """A linear map for each of several inputs: `weight` `(n, out, in)`, `bias` `(n, out)`."""

    bias: nn.Parameter

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(count, outputs))

    def forward(self, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # type: ignore[override]
        """xs: n inputs `(..., in)`; returns n outputs `(..., out)`."""
        maps = zip(self.weight.unbind(0), self.bias.unbind(0), xs, strict=True)
        return [F.linear(x.to(weight), weight, bias) for weight, bias, x in maps]


class SideNorms(nn.Module):
    """A layer norm for each of several inputs: `weight` and `bias` `(n, C)`."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, channels))
        self.bias = nn.Parameter(torch.empty(count, channels))

    def reset_parameters(self) -> None:
        """The identity, up to the normalisation."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """xs: n inputs `(..., C)`; returns n outputs of the same shapes."""
        norms = zip(self.weight.unbind(0), self.bias.unbind(0), xs, strict=True)
        return [F.layer_norm(x.to(weight), weight.shape, weight, bias) for weight, bias, x in norms]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


@dataclass
class SideNetwork:
    """Makes a new last hidden state from the states of a frozen pass.

    Args:
        down: From each of the states, the last one last, into the side network.
        norm: The norm of each of them; only of the variant `identity="attention"`, like the next two.
        proj, proj_norm: What what was read goes through.
        gate: Makes a layer's confidence. Without the published bias, which the softmax over the layers takes out.
        up: Back to the width of the states.
        residual: Whether the last state is added.
        first_row: Whether the first row stands for the whole input; else the mean over all tokens does.
    """

    down: nn.Module
    norm: nn.Module | None
    gate: nn.Module
    proj: nn.Module | None
    proj_norm: nn.Module | None
    up: nn.Module
    residual: bool
    first_row: bool

    def __call__(self, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """The new last state O `(B, N, D)`.

        Args:
            states: H_l of each layer that is read, and H_L last, each `(B, N, D)`.
            mask: Which tokens are no padding, `(B, N)` bool; `None`: all.
        """
        own = states[-1]
        anchor, targets = self._down(states)
        mask = None if mask is None else mask.to(anchor.device)
        confidence = self._confidence(anchor, targets, mask)  # (B, L)
        merged = anchor.new_zeros(())
        for place, target in enumerate(targets):
            merged = merged + recomputed(
                lambda a, t, c: self._merge(a, t, c, mask), anchor, target, confidence[:, place]
            )
        if self.proj is not None and self.proj_norm is not None:
            merged = anchor + self.proj_norm([self.proj(merged)])[0]
        made: torch.Tensor = self.up(torch.relu(merged)).to(own)
        return own + made if self.residual else made

    def confidence(self, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """c `(B, L)`: how much each of the layers counts."""
        anchor, targets = self._down(states)
        return self._confidence(anchor, targets, None if mask is None else mask.to(anchor.device))

    def _down(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """a and t_l, each `(B, N, d)`."""
        if self.norm is None:
            *targets, anchor = self.down([torch.relu(state) for state in states])
        else:
            *targets, anchor = self.norm(self.down(states))
        return anchor, targets

    def _confidence(
        self, anchor: torch.Tensor, targets: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        row = anchor[:, 0] if self.first_row and self.norm is None else _mean(anchor, mask)
        gates = [self.gate(row * _mean(target, mask)) for target in targets]
        return torch.softmax(torch.cat(gates, dim=-1), dim=-1)

    def _merge(
        self, anchor: torch.Tensor, target: torch.Tensor, confidence: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """c_l m_l `(B, N, d)`, from a and t_l `(B, N, d)` and c_l `(B,)`."""
        keys = target if mask is None else target * mask.unsqueeze(-1)
        weights = torch.relu(anchor @ keys.transpose(1, 2))
        # half precision has no 1e-8, and its sums may overflow
        total = weights.sum(-1, keepdim=True, dtype=torch.promote_types(weights.dtype, torch.float32))
        total = total.clamp(min=1e-6) if self.norm is None else total + 1e-8
        read = (weights / total).to(target.dtype) @ target
        own = target
        if self.norm is None:
            own = target[:, :1] if self.first_row else _mean(target, mask).unsqueeze(1)
        return confidence[:, None, None] * (read + own)


def _mean(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean `(B, d)` of the rows `(B, N, d)` that are no padding."""
    if mask is None:
        return rows.mean(1)
    kept = mask.unsqueeze(-1).to(rows.dtype)
    return (rows * kept).sum(1) / kept.sum(1).clamp(min=1)
