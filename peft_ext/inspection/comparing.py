"""Two adapters side by side."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..core import Adapter, Row, Sparse, Update, about_of, overlap_of
from ..packed_files import weights_file
from .reading import read_adapter


def compare(first: str, second: str) -> dict[str, Any]:
    """Two adapters side by side.

    Raises:
        BadInput: One of them is none.
    """
    ours, theirs = read_adapter(first), read_adapter(second)
    keys = dict.fromkeys([*ours.config, *theirs.config])
    return {
        "first": _short(ours),
        "second": _short(theirs),
        "config": {
            key: [ours.config.get(key), theirs.config.get(key)]
            for key in keys
            if ours.config.get(key) != theirs.config.get(key)
        },
        "sites": {
            "common": [name for name in ours.sites if name in theirs.sites],
            "only_first": [name for name in ours.sites if name not in theirs.sites],
            "only_second": [name for name in theirs.sites if name not in ours.sites],
        },
        **_relations(ours, theirs),
    }


def _short(adapter: Adapter) -> dict[str, Any]:
    return {
        "source": adapter.source,
        "method": adapter.method,
        "sites": len(adapter.sites),
        "parameters": sum(tensor.numel() for tensor in adapter.trained()),
        "file_bytes": weights_file(adapter.directory).stat().st_size,
    }


def _relations(ours: Adapter, theirs: Adapter) -> dict[str, Any]:
    """Overlap of supports, and cosine of updates, where the files tell them."""
    updates = [
        {site.module: about_of(adapter.method).reading(adapter, site)[1] for site in adapter.sites.values()}
        for adapter in (ours, theirs)
    ]
    return {"overlap": _overlap(*updates), "cosine": _cosine(*updates) if ours.method == theirs.method else None}


Updates = dict[str, dict[str, Update]]


def _overlap(ours: Updates, theirs: Updates) -> dict[str, Row] | None:
    supports = [
        {
            module if key == "weight" else f"{module}.{key}": (update.indices, update.values)
            for module, parts in updates.items()
            for key, update in parts.items()
            if isinstance(update, Sparse) and update.indices is not None
        }
        for updates in (ours, theirs)
    ]
    if not all(supports):
        return None
    return {
        module: {**dataclasses.asdict(found), "jaccard": found.jaccard}
        for module, found in overlap_of(*supports).items()  # type: ignore[arg-type]
    }


def _cosine(ours: Updates, theirs: Updates) -> dict[str, Any] | None:
    """By module and over all; a module that only one adapter changes counts as unchanged by the other."""
    products: dict[str, float | None] = {}
    for module in ours.keys() & theirs.keys():
        first, second = ours[module], theirs[module]
        parts = [first[key].dot(second[key]) for key in first.keys() & second.keys()]
        products[module] = None if None in parts else sum(part for part in parts if part is not None)
    norms = [
        {module: math.hypot(*(update.norm() for update in parts.values())) for module, parts in updates.items()}
        for updates in (ours, theirs)
    ]
    if not any(norms[0].values()) or not any(norms[1].values()):
        return None
    modules = {
        module: None if products[module] is None else _ratio(products[module], norms[0][module] * norms[1][module])
        for module in ours
        if module in products
    }
    known = [product for product in products.values() if product is not None]
    length = math.hypot(*norms[0].values()) * math.hypot(*norms[1].values())
    return {"all": _ratio(sum(known), length) if len(known) == len(products) else None, "modules": modules}


def _ratio(product: float | None, length: float) -> float | None:
    return product / length if product is not None and length else None
