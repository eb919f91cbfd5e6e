"""The files of an adapter, as a method's description reads them: sites, rows of tables, columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .updates import LowRank, Update


# what reading numbers of a damaged file may end in
STUMBLES = (KeyError, IndexError, RuntimeError, AttributeError, TypeError, ValueError, ArithmeticError)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Row = dict[str, Any]  # of a table: `module`, `layer`, `type`, `parameters`, and what the method tells
Figures = dict[str, Any]
Reading = tuple[Figures, dict[str, Update]]  # of a site: figures by key, and updates by the tensor of the base


class BadInput(ValueError):
    """What was given cannot be used; the message says what was found and what would work."""


@dataclass(frozen=True)
class Column:
    """A column of the tables that `peft-ext inspect` prints.

    Args:
        key: The key in the rows.
        heading: What stands above; empty: the column is not shown, and only there for sums and ratios.
        form: How a value is written, as for `str.format`.
        adds_up: Whether the sum over several rows means something.
        ratio: Two other keys; the value is the quotient of theirs, in rows and in sums alike.
        within: A key; the sum means something only over rows that agree on it.
    """

    key: str
    heading: str
    form: str = "{}"
    adds_up: bool = False
    ratio: tuple[str, str] | None = None
    within: str | None = None


@dataclass
class Site:
    """A module with what the adapter puts on it: tensors by their name behind the method's prefix."""

    module: str
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    state: tuple[str, ...] = ()  # the leaves that hold no parameters although they are floating point

    def trained(self) -> dict[str, torch.Tensor]:
        """The leaves that hold parameters."""
        return {name: leaf for name, leaf in self.leaves.items() if is_trained(leaf) and name not in self.state}

    def matrix(self, *names: str) -> torch.Tensor | None:
        """The first of the leaves that is there, as `(rows, columns)` in fp64; convolutions are flattened."""
        tensor = next((self.leaves[name] for name in names if name in self.leaves), None)
        return None if tensor is None else tensor.double().flatten(1)

    def low_rank(self, down: Sequence[str], up: Sequence[str], scale: float) -> LowRank | None:
        """The update of the first leaves that are there of each kind, `None` if one is lacking or they do not fit."""
        first, second = self.matrix(*down), self.matrix(*up)
        if first is None or second is None or len(first) != second.shape[1]:
            return None
        return LowRank(first, second, scale)


@dataclass
class Adapter:
    """The files of one adapter."""

    source: str
    directory: Path
    config: dict[str, Any]
    sites: dict[str, Site]
    others: dict[str, torch.Tensor]  # what is saved as it is: heads, embeddings of tokens

    @property
    def method(self) -> str:
        """`peft_type`."""
        return self.config["peft_type"]

    @property
    def base_class(self) -> str | None:
        """The class of the model that it was trained on, if that is written down."""
        mapping = self.config.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the file."""
        return [*(leaf for site in self.sites.values() for leaf in site.leaves.values()), *self.others.values()]

    def trained(self) -> list[torch.Tensor]:
        """The tensors of the file that hold parameters."""
        sites = [leaf for site in self.sites.values() for leaf in site.trained().values()]
        return [*sites, *(tensor for tensor in self.others.values() if is_trained(tensor))]

    def misfit(self, reason: str) -> BadInput:
        """The error for tensors that do not fit the config, to be raised."""
        return BadInput(
            f"{ADAPTER_WEIGHTS} of {self.source} does not fit its {ADAPTER_CONFIG} ({reason}): restore the two that "
            "were saved together."
        )


def is_trained(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor holds parameters; the others are indices, masks that are decided, counts of steps."""
    return tensor.is_floating_point()


def spread(values: torch.Tensor) -> float:
    """The standard deviation of all values."""
    return values.double().std(correction=0).item()
