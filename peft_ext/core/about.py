"""The description of a method: what cards, inspection, the command line, figures and the docs say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from .files import STUMBLES, Adapter, BadInput, Column, Figures, Reading, Row, Site
from .names import layer_and_type
from .pictures import HeatMap, Picture


# writes an adapter of a `PeftModel`, in another form, into a directory: `(model, path, adapter_name)`
Writer = Callable[..., Any]


@dataclass(frozen=True)
class About:
    """What there is to say about a method, whatever it was trained on. Every field but the name may be left out.

    A method whose tensors mean more than their number and shape makes a subclass and overrides `read`, or `rows` where
    it adapts no modules. Nothing here may load a model, and no method may change what it gets.

    Args:
        name: The method's name in running text.
        idea: The rest of a sentence that begins with the name.
        paper: The address of the paper.
        bibtex: How to cite it.
        merges: Whether `merge_and_unload` works.
        limits: What the method cannot do; one sentence each. The first says why it does not merge, if it does not.
        headline: The fields of the config that say most about an adapter.
        page: The address of the method's page: under `docs/` for ours.
        instead: What to do where `peft-ext export` refuses, by form: the rest of a sentence.
        offsets: A regular expression of the trained leaves, by their names behind the prefix (`down.weight`), that may be
            thinned out and rounded (`peft_ext.export.compress`, `binarize`), since zero changes little or nothing
            there. Empty: it is not known.
        unplanned: Why the memory of a training cannot be told from small models of the architecture; empty where it can.
    """

    name: str
    idea: str = ""
    paper: str = ""
    bibtex: str = ""
    merges: bool = True
    limits: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    page: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)
    offsets: str = ""
    unplanned: str = ""

    columns: ClassVar[tuple[Column, ...]] = ()
    """The columns of the keys that `read` and `rows` put into a row, in order."""
    state: ClassVar[tuple[str, ...]] = ()
    """The leaves that hold decisions or counts, and no parameters, although they are floating point."""
    labels: ClassVar[Mapping[str, str]] = {}
    """How the keys of `figures` are written, where they are not written as they are."""

    # Files

    def place(self, module: str, leaf: str) -> tuple[str, str]:
        """Where a saved tensor belongs, given its module and the rest of its name behind the method's prefix.

        Called once for each tensor before `read`; for methods that put several sites on one module.
        """
        return module, leaf

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """What the tensors of one site say: figures for its row, and the updates by the tensor of the base.

        Raises:
            BadInput: They cannot be what the method saved. Whatever else goes wrong is reported as such too.
        """
        return {}, {}

    def rows(self, adapter: Adapter) -> list[Row]:
        """A row for each site: its layer and type, parameters, shapes, what `read` tells, and the norm of its updates.

        Raises:
            BadInput: See `read`.
        """
        rows = []
        for site in adapter.sites.values():
            figures, updates = self.reading(adapter, site)
            layer, kind = layer_and_type(site.module)
            row: Row = {"module": site.module, "layer": layer, "type": kind or site.module}
            row["parameters"] = sum(leaf.numel() for leaf in site.trained().values())
            row |= figures
            if updates:
                row["norm"] = math.hypot(*(update.norm() for update in updates.values()))
            row["shapes"] = {name: list(leaf.shape) for name, leaf in sorted(site.trained().items())}
            rows.append(row)
        return sorted(rows, key=lambda row: (row["layer"] < 0, row["layer"], row["module"]))  # in no layer: last

    def reading(self, adapter: Adapter, site: Site) -> Reading:
        """`read`, with whatever it stumbles over said as a `BadInput`."""
        try:
            return self.read(adapter, site)
        except BadInput:
            raise
        except STUMBLES as error:
            raise adapter.misfit(f"{site.module!r}: {type(error).__name__} {error}") from error

    def figures(self, adapter: Adapter, rows: Sequence[Row]) -> Figures:
        """What the method tells of the whole adapter, besides sums over its rows."""
        return {}

    def pictures_of_rows(self, rows: Sequence[Row]) -> list[Picture]:
        """What `peft-ext inspect --figure` draws; nothing if the rows have no norms."""
        values = {(row["layer"], row["type"]): row["norm"] for row in rows if "norm" in row}
        return [HeatMap(values, "norm of the update")] if values else []

    # Models

    def merges_with(self, config: Mapping[str, Any]) -> bool:
        """Whether adapters with these fields of their config can be merged, for methods of which only some can."""
        return self.merges

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """What `plots.plot` draws of an adapter on a model; `inputs` are what the caller gave besides.

        Raises:
            ValueError: The model has no such adapter.
        """
        raise ValueError(
            f"{self.name} has no figure of its own: try `peft-ext inspect --figure` on the saved adapter."
        )

    def exports(self) -> Mapping[str, Writer]:
        """What `peft-ext export` can make of an adapter besides a merged model, by the name of the form.

        A writer takes the `PeftModel`, an output directory and the adapter's name, "default" if it is not given, and
        raises a ValueError where it cannot. The form `"lora"` is what `peft_ext.save_as_lora` writes.
        """
        return {}
