"""Figures. Needs matplotlib (`pip install "peft-ext[plots]"`)."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from .tuners.sparse_ft.model import deltas


def sparse_support(model: nn.Module, adapter_name: str = "default") -> Any:
    """A figure of a sparse adapter: where its delta lives, layer by layer, and how its support turned over.

    Left: the norm of the delta by layer (rows) and kind of module (columns). Right: the fraction of the support that
    each reselection replaced; empty for a fixed support, or after loading.

    Raises:
        ValueError: The model has no such sparse adapter.
    """
    from matplotlib.figure import Figure

    leaves = dict(deltas(model, adapter_name))
    if not leaves:
        raise ValueError(f"There is no sparse adapter named {adapter_name!r} on this model.")
    norms: dict[tuple[int, str], float] = {}
    turnover: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for name, leaf in leaves.items():
        layer = re.search(r"\.(\d+)\.", name)
        number = int(layer.group(1)) if layer else -1
        kind = name.split(f".{number}.", 1)[-1]
        norms[number, kind] = float(leaf.weight.detach().norm())
        for step, moved in leaf.tracker.reselections if leaf.tracker is not None else ():
            turnover[step][0] += moved
            turnover[step][1] += leaf.weight.numel()
    layers = sorted({layer for layer, _ in norms})
    kinds = list(dict.fromkeys(kind for _, kind in norms))
    figure = Figure(figsize=(10, 4), layout="constrained")
    where, when = figure.subplots(1, 2)
    grid = [[norms.get((layer, kind), 0.0) for kind in kinds] for layer in layers]
    image = where.imshow(grid, aspect="auto", cmap="viridis")
    where.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    where.set_yticks(range(len(layers)), [str(layer) if layer >= 0 else "-" for layer in layers])
    where.set(ylabel="layer", title="norm of the delta")
    figure.colorbar(image, ax=where)
    steps = sorted(turnover)
    when.plot(steps, [turnover[step][0] / turnover[step][1] for step in steps], marker="o")
    when.set(xlabel="optimizer step", ylabel="fraction replaced", title="turnover of the support")
    when.set_ylim(bottom=0)
    return figure
