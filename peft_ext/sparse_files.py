"""Reading sparse deltas from a file alone, without the sizes of the weights that they are for."""

from __future__ import annotations

import torch

from .core import ADAPTER_WEIGHTS, Adapter, BadInput, Column, Figures, Reading, Site, Sparse, Update
from .sparse import decode_alone


COLUMNS = (
    Column("tuned", "tuned", "{:,}", adds_up=True),
    Column("size", "", adds_up=True),
    Column("density", "density", "{:.2g}", ratio=("tuned", "size")),
)


def read_deltas(adapter: Adapter, site: Site) -> Reading:
    """What the leaves `delta` (of the weight) and `bias` of a site say: tuned weights, size, and the updates.

    The size is `None` where the code of the indices leaves it open.

    Raises:
        BadInput: The indices are damaged.
    """
    figures: Figures = {"tuned": 0, "size": 0}
    updates: dict[str, Update] = {}
    for leaf, tensor in (("delta", "weight"), ("bias", "bias")):
        values = site.leaves.get(f"{leaf}.weight")
        if values is None:
            continue
        code = site.leaves.get(f"{leaf}.index", torch.zeros(0, dtype=torch.uint8))
        ways = decode_alone(code, len(values))
        if len(values) and not ways:
            raise BadInput(
                f"{ADAPTER_WEIGHTS} of {adapter.source} is damaged: the index of {site.module!r} does not name "
                f"{len(values)} indices. Restore the file that was saved."
            )
        smallest, largest = min((way[1] for way in ways), default=0), max((way[2] for way in ways), default=0)
        # the code tells the size of the weight about as exactly as there are indices in it
        is_known = largest <= 1.5 * smallest and figures["size"] is not None
        figures["tuned"] += len(values)
        figures["size"] = figures["size"] + (smallest + largest) // 2 if is_known else None
        updates[tensor] = Sparse(values.double(), ways[0][0].long() if len(ways) == 1 else None)
    return figures, updates
