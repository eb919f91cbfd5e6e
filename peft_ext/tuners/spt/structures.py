"""What a matrix with many sensitive weights gets instead of a sparse delta.

A structure is a module that is made for a linear layer, says what it costs, and changes the layer's output; one that
can be merged also says what the layer's weight becomes. A new one is a class here and a line in `STRUCTURES`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Settings(Protocol):
    """The fields of the config that structures read."""

    dropout: float
    drop_path: float

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""


class Structure(nn.Module):
    """The base of all structures, for a layer of `inputs` and `outputs` features."""

    mergeable: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = False  # to be made, and in the forward

    def __init__(self, inputs: int, outputs: int, r: int, settings: Settings, weight: torch.Tensor) -> None:
        """`weight` `(outputs, inputs)` is the layer's; for those that start from it."""
        super().__init__()

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """The number of its parameters."""
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The changed output `(B, ..., outputs)` of a layer with this input, output, weight and bias."""
        raise NotImplementedError

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight `(outputs, inputs)` with the structure in it, in fp32 at least."""
        raise NotImplementedError


class LowRank(Structure):
    """LoRA: `scale * DropPath(B A Dropout(x))` is added; B starts at zero. A and B are `down` and `up`."""

    def __init__(self, inputs: int, outputs: int, r: int, settings: Settings, weight: torch.Tensor) -> None:
        super().__init__(inputs, outputs, r, settings, weight)
        self.down, self.up = nn.Linear(inputs, r, bias=False), nn.Linear(r, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale, self.dropout, self.drop_path = settings.scale, settings.dropout, settings.drop_path

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """r (inputs + outputs)."""
        return r * (inputs + outputs)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output."""
        x = F.dropout(x.to(self.down.weight.dtype), self.dropout, self.training)
        added = self.up(self.down(x)) * self.scale
        if self.training and self.drop_path:
            kept = added.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_path)
            added = added * kept / (1 - self.drop_path)
        return added

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return output + self.branch(x).to(output.dtype)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype) + self.scale * (self.up.weight.to(dtype) @ self.down.weight.to(dtype))


class Magnitude(nn.Module):
    """A vector of its own, so that it is a leaf with a `weight`."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class DecomposedLowRank(LowRank):
    """DoRA: the direction of each row of W + scale B A, and a magnitude of its own; its norm is not differentiated."""

    needs_weight = True

    def __init__(self, inputs: int, outputs: int, r: int, settings: Settings, weight: torch.Tensor) -> None:
        super().__init__(inputs, outputs, r, settings, weight)
        values = torch.ones(outputs, device="meta") if weight.is_meta else weight.detach().float().norm(dim=1)
        self.magnitude = Magnitude(values)

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """r (inputs + outputs) + outputs."""
        return r * (inputs + outputs) + outputs

    def _factor(self, weight: torch.Tensor) -> torch.Tensor:
        return self.magnitude.weight / LowRank.merged(self, weight).norm(dim=1).detach().to(
            self.magnitude.weight.dtype
        )

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert weight is not None
        product = output if bias is None else output - bias
        changed = self._factor(weight) * (product + self.branch(x).to(output.dtype))
        return (changed if bias is None else changed + bias).to(output.dtype)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        return self._factor(weight).unsqueeze(1) * super().merged(weight)


class Bottleneck(Structure):
    """An adapter behind the layer: `y + up(gelu(down(Dropout(y))))`, with biases; `up` starts at zero."""

    mergeable = False

    def __init__(self, inputs: int, outputs: int, r: int, settings: Settings, weight: torch.Tensor) -> None:
        super().__init__(inputs, outputs, r, settings, weight)
        self.down, self.up = nn.Linear(outputs, r), nn.Linear(r, outputs)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.dropout = settings.dropout

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """2 r outputs + r + outputs."""
        return 2 * r * outputs + r + outputs

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = F.dropout(output.to(self.down.weight.dtype), self.dropout, self.training)
        return output + self.up(F.gelu(self.down(y))).to(output.dtype)


STRUCTURES: dict[str, type[Structure]] = {"lora": LowRank, "dora": DecomposedLowRank, "adapter": Bottleneck}
