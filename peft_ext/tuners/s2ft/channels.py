"""Which channels of a module can be chosen, and in what units: single channels, or those of a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...architectures import BlockAttention, describe
from ...core import linear_features, unadapted_modules


KINDS = ("down", "up", "o", "v")  # what the paper trains; of all other modules, input channels


@dataclass(frozen=True)
class Channels:
    """The channels of one module, in units that are chosen as one.

    Unit u has the channels from `start + u * stride` to `start + u * stride + width`.

    Attributes:
        side: `"inputs"`, columns of the weight `(outputs, inputs)`, or `"outputs"`, its rows.
        inputs, outputs: Features of the module.
        units: How many units there are.
        width: Channels of a unit.
    """

    side: str
    inputs: int
    outputs: int
    units: int
    width: int = 1
    start: int = 0
    stride: int = 1

    @property
    def size(self) -> int:
        """All channels on that side, also those that belong to no unit."""
        return self.inputs if self.side == "inputs" else self.outputs

    def indices(self, units: torch.Tensor) -> torch.Tensor:
        """The sorted channels of these units, `(len(units) * width,)`, int32."""
        starts = self.start + units.sort().values * self.stride
        return (starts[:, None] + torch.arange(self.width)).flatten().int()

    def by_unit(self, squares: torch.Tensor) -> torch.Tensor:
        """Squares by channel `(size,)`, summed by unit `(units,)`."""
        return squares[self.indices(torch.arange(self.units)).long()].view(self.units, self.width).sum(1)


class Layout:
    """Where the channels of a model are, by the table of architectures."""

    def __init__(self, model: nn.Module) -> None:
        self.description = describe(model)
        self.modules = dict(unadapted_modules(model))
        blocks = self.description.blocks
        self.ffn = {part.up: part for block in blocks for part in block.ffn}
        self.attention = {name: a for block in blocks for a in block.attention for name in (a.o, a.v)}

    def kind(self, name: str) -> str:
        """The one of `KINDS` that a module is, else the last part of its name."""
        roles = self.description.role_of(name)
        return next((kind for kind in KINDS if kind in roles), name.rpartition(".")[2])

    def channels(self, name: str, kind: str) -> Channels:
        """The channels of a linear module that are chosen if it is taken for its role `kind`.

        Raises:
            ValueError: The heads do not divide the channels, or it is not known which channels are the values.
        """
        inputs, outputs = self._features(name)
        if kind in ("o", "v"):
            return self._heads(self.attention[name], kind, inputs, outputs)
        if kind == "up":
            part = self.ffn[name]
            # one module for gate and up makes the gate's channels first
            units = outputs // 2 if part.gate == part.up else outputs
            return Channels("outputs", inputs, outputs, units, start=outputs - units)
        return Channels("inputs", inputs, outputs, inputs)

    def _features(self, name: str) -> tuple[int, int]:
        features = linear_features(self.modules[name])
        assert features is not None
        return features

    def _heads(self, attention: BlockAttention, kind: str, inputs: int, outputs: int) -> Channels:
        """Rows of v, or columns of o, of a key-value head: the heads of grouped queries that share it go together."""
        width = getattr(self.modules[attention.module], attention.names.head_size, 0)
        columns, rows = self._features(attention.o)[0], self._features(attention.v)[1]
        is_fused = attention.q == attention.v
        keys = (rows - columns) // 2 if is_fused else rows
        if not width or keys < width or keys % width or columns % keys:
            raise ValueError(
                f"{attention.v!r} makes {keys} channels of values and {attention.o!r} reads {columns}, which are no "
                f"whole heads of {width or 'a known width'}: leave 'o' and 'v' out of `ratios`."
            )
        units = keys // width
        if kind == "o":
            return Channels("inputs", inputs, outputs, units, columns // units, stride=columns // units)
        if not is_fused:
            return Channels("outputs", inputs, outputs, units, width, stride=width)
        if attention.names.order == "blocks":
            return Channels("outputs", inputs, outputs, units, width, columns + keys, width)
        if attention.names.order == "heads" and keys == columns:
            return Channels("outputs", inputs, outputs, units, width, 2 * width, 3 * width)
        raise ValueError(
            f"{attention.v!r} makes queries, keys and values in an order of its own, so it is not known which of its "
            "channels are values: leave 'v' out of `ratios`."
        )
