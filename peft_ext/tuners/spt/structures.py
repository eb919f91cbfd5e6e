"""What a matrix with many sensitive weights gets instead of a sparse delta.

A structure says what it costs, makes its modules for a linear layer, and changes the layer's output; one that can be
merged also says what the layer's weight becomes. The modules are leaves with a `weight`, kept by the layer under the
names of `LEAVES`. A new structure is a class here and a line in `STRUCTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...core.sharding import is_sharded, unwrapped


class Settings(Protocol):
    """The fields of the config that structures read."""

    dropout: float
    drop_path: float

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""


LEAVES = ("down", "up", "magnitude")
Leaves = Mapping[str, Any]


class Structure:
    """The base of all structures."""

    mergeable: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = False  # to be made, and in the forward

    def __init__(self, settings: Settings) -> None:
        self.scale, self.drop_path = settings.scale, settings.drop_path

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """The number of its parameters on a layer of so many input and output features."""
        raise NotImplementedError

    def make(self, inputs: int, outputs: int, r: int, weight: torch.Tensor | None) -> dict[str, nn.Module]:
        """Its leaves for a layer with this weight `(outputs, inputs)`, which is given if `needs_weight`."""
        raise NotImplementedError

    def apply(
        self,
        leaves: Leaves,
        x: torch.Tensor,
        output: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The changed output `(B, ..., outputs)` of a layer with this input, output, weight and bias."""
        raise NotImplementedError

    def make_stack(self, weights: torch.Tensor, r: int) -> dict[str, nn.Module]:
        """Its leaves for many weights `(K, outputs, inputs)` together: K of each, in one tensor."""
        outputs, inputs = weights.shape[1:]
        made = [self.make(inputs, outputs, r, weight) for weight in weights]
        return {name: Values(torch.stack([read(leaves[name]).detach() for leaves in made])) for name in made[0]}

    def merged(self, leaves: Leaves, weight: torch.Tensor) -> torch.Tensor:
        """The weight `(..., outputs, inputs)` with the structure in it, in fp32 at least."""
        raise NotImplementedError


class Values(nn.Module):
    """A tensor of its own, so that it is a leaf with a `weight`."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        """The tensor; read by calling, for FSDP gathers `weight` only while a leaf runs."""
        return self.weight.clone()


def read(leaf: Any) -> torch.Tensor:
    """The tensor of a leaf: a new one of `Values`, the weight `(out, in)` of a Linear without bias."""
    inner = unwrapped(leaf)
    if isinstance(inner, Values):
        values: torch.Tensor = leaf()
        return values
    weight = inner.weight
    is_here = isinstance(weight, nn.Parameter) and weight.shape == (inner.out_features, inner.in_features)
    if is_here and not is_sharded(weight):
        return weight
    # gathered only while the leaf runs: what it makes of the unit vectors are the columns
    unit = torch.eye(inner.in_features, dtype=weight.dtype, device=weight.device)
    columns: torch.Tensor = leaf(unit)
    return columns.T


class LowRank(Structure):
    """LoRA: `scale * DropPath(B A Dropout(x))` is added; B starts at zero. A and B are `down` and `up`."""

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """r (inputs + outputs)."""
        return r * (inputs + outputs)

    def make(self, inputs: int, outputs: int, r: int, weight: torch.Tensor | None) -> dict[str, nn.Module]:
        down, up = nn.Linear(inputs, r, bias=False), nn.Linear(r, outputs, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        return {"down": down, "up": up}

    def branch(self, leaves: Leaves, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output."""
        down, up = leaves["down"], leaves["up"]
        x = leaves["dropout"](x)
        added = up(down(x)) * self.scale
        if down.training and self.drop_path:
            kept = added.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_path)
            added = added * kept / (1 - self.drop_path)
        return added

    def apply(
        self,
        leaves: Leaves,
        x: torch.Tensor,
        output: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return output + self.branch(leaves, x).to(output.dtype)

    def merged(self, leaves: Leaves, weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype) + self.scale * (read(leaves["up"]).to(dtype) @ read(leaves["down"]).to(dtype))


class DecomposedLowRank(LowRank):
    """DoRA: the direction of each row of W + scale B A, and a magnitude of its own; its norm is not differentiated."""

    needs_weight = True

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """r (inputs + outputs) + outputs."""
        return r * (inputs + outputs) + outputs

    def make(self, inputs: int, outputs: int, r: int, weight: torch.Tensor | None) -> dict[str, nn.Module]:
        assert weight is not None
        values = torch.ones(outputs) if weight.is_meta else weight.detach().float().norm(dim=1)
        return {**super().make(inputs, outputs, r, weight), "magnitude": Values(values)}

    def _factor(self, leaves: Leaves, weight: torch.Tensor) -> torch.Tensor:
        magnitude = read(leaves["magnitude"])
        return magnitude / super().merged(leaves, weight).norm(dim=-1).detach().to(magnitude.dtype)

    def apply(
        self,
        leaves: Leaves,
        x: torch.Tensor,
        output: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        assert weight is not None
        product = output if bias is None else output - bias
        changed = self._factor(leaves, weight) * (product + self.branch(leaves, x).to(output.dtype))
        return (changed if bias is None else changed + bias).to(output.dtype)

    def merged(self, leaves: Leaves, weight: torch.Tensor) -> torch.Tensor:
        return self._factor(leaves, weight).unsqueeze(-1) * super().merged(leaves, weight)


class Bottleneck(Structure):
    """An adapter behind the layer: `y + up(gelu(down(Dropout(y))))`, with biases; `up` starts at zero."""

    mergeable = False

    @staticmethod
    def cost(inputs: int, outputs: int, r: int) -> int:
        """2 r outputs + r + outputs."""
        return 2 * r * outputs + r + outputs

    def make(self, inputs: int, outputs: int, r: int, weight: torch.Tensor | None) -> dict[str, nn.Module]:
        up = nn.Linear(r, outputs)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        return {"down": nn.Linear(outputs, r), "up": up}

    def apply(
        self,
        leaves: Leaves,
        x: torch.Tensor,
        output: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        down = leaves["down"]
        y = leaves["dropout"](output.to(down.weight.dtype))
        return output + leaves["up"](F.gelu(down(y))).to(output.dtype)


STRUCTURES: dict[str, type[Structure]] = {"lora": LowRank, "dora": DecomposedLowRank, "adapter": Bottleneck}
