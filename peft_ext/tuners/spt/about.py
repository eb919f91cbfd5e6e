"""What there is to say about SPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    About,
    Adapter,
    BadInput,
    Column,
    Figures,
    HeatMap,
    LowRank,
    Picture,
    Reading,
    Row,
    Site,
    Sparse,
    Writer,
    is_trained,
    layer_and_type,
    lora_scale,
)
from ...sparse_files import read_deltas
from .convert import write_structures
from .layer import SPTLayer
from .model import amounts
from .parameters import number_of, parameter_of


class SPTAbout(About):
    """How the tensors are read, what the figures show, and what an adapter can be made of."""

    columns = (Column("gets", "gets"),)

    def place(self, module: str, leaf: str) -> tuple[str, str]:
        """`delta_<key>.weight` is on the parameter `key` of the module."""
        first, _, rest = leaf.partition(".")
        kind, _, key = first.partition("_")
        return (f"{module}.{key}", f"{kind}.{rest}") if key else (module, leaf)

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """What the module or parameter gets of the budget, and its updates."""
        kinds = adapter.config.get("kinds") or {}
        if matrices := _matrices(adapter, site):
            return _read_parameter(adapter, site, matrices)
        got = {key: kinds.get(f"{site.module}.{key}") for key in ("weight", "bias")}
        names = {key: kind for key, kind in got.items() if kind is not None}
        if not names:
            raise BadInput(
                f"{ADAPTER_WEIGHTS} of {adapter.source} has {site.module!r}, of which {ADAPTER_CONFIG} says nothing: "
                "restore the two that were saved together."
            )
        _, updates = read_deltas(adapter, site)
        low_rank = None
        if names.get("weight") == "lora":
            r = len(site.leaves["down.weight"])
            scale = lora_scale(adapter.config, adapter.config.get("r", r), adapter.config.get("lora_alpha"))
            low_rank = site.low_rank(("down.weight",), ("up.weight",), scale)
        for key, kind in names.items():
            if kind == "whole":  # then the code is of no use, every index is in it
                leaf = site.leaves["delta.weight" if key == "weight" else "bias.weight"]
                updates[key] = Sparse(leaf.double(), torch.arange(len(leaf)))
        if low_rank is not None:
            updates["weight"] = low_rank
        said = {key: f"{kind} {_amount(site, key, kind)}".strip() for key, kind in names.items()}
        return {"gets": ", ".join(text if key == "weight" else f"bias: {text}" for key, text in said.items())}, updates

    def figures(self, adapter: Adapter, rows: Sequence[Row]) -> Figures:
        """How many tensors and parameters each kind of update has."""
        kinds = adapter.config.get("kinds") or {}
        allocation: dict[str, Row] = {}
        for site in adapter.sites.values():
            for leaf, tensor in site.leaves.items():
                if not is_trained(tensor):
                    continue
                key = f"{site.module}.{'bias' if leaf == 'bias.weight' else 'weight'}"
                # of a parameter the matrices that this leaf is for, else the one tensor
                is_sparse = leaf == "delta.weight"
                names = [n for n in _matrices(adapter, site) if (kinds[n] == "sparse") == is_sparse] or [key]
                entry = allocation.setdefault(kinds.get(names[0], "unknown"), {"tensors": set(), "parameters": 0})
                entry["tensors"].update(names)
                entry["parameters"] += tensor.numel()
        return {kind: {**entry, "tensors": len(entry["tensors"])} for kind, entry in allocation.items()}

    def pictures_of_rows(self, rows: Sequence[Row]) -> list[Picture]:
        """Where the budget went."""
        return [HeatMap({(row["layer"], row["type"]): row["parameters"] for row in rows}, "trained parameters")]

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """Where the budget went: trained parameters by layer and module.

        Raises:
            ValueError: The model has no such SPT adapter.
        """
        trained: dict[tuple[int, str], float] = {}
        for name, module in model.named_modules():
            if isinstance(module, SPTLayer) and adapter_name in module.present([adapter_name]):
                leaves = [
                    getattr(module, key)[adapter_name]
                    for key in module.adapter_layer_names
                    if adapter_name in getattr(module, key)
                ]
                trained[layer_and_type(name)] = float(sum(p.numel() for leaf in leaves for p in leaf.parameters()))
        if not trained:
            raise ValueError(f"There is no SPT adapter named {adapter_name!r} on this model.")
        return [HeatMap(trained, "trained parameters")]

    def exports(self) -> Mapping[str, Writer]:
        """An adapter that is nothing but low-rank is written as PEFT's LoRA."""
        return {"lora": write_structures}


def _matrices(adapter: Adapter, site: Site) -> list[str]:
    """The matrices of the parameter that the site is, those with an update, in order; none if it is a module."""
    kinds, module = adapter.config.get("kinds") or {}, site.module
    names = [name for name in kinds if name.startswith(module) and parameter_of(name) == module]
    return sorted(names, key=number_of)


def _read_parameter(adapter: Adapter, site: Site, matrices: list[str]) -> Reading:
    kinds, counts, ranks = (adapter.config.get(key) or {} for key in ("kinds", "counts", "ranks"))
    _, updates = read_deltas(adapter, site)
    structured = [name for name in matrices if name in ranks]
    for index, name in enumerate(structured if "lora" in kinds.values() else ()):
        down, up = (site.leaves[f"{leaf}.weight"][index].double() for leaf in ("down", "up"))
        updates[name] = LowRank(down, up, lora_scale(adapter.config, len(down), adapter.config.get("lora_alpha")))
    return {"gets": amounts(matrices, kinds, counts, ranks)}, updates


def _amount(site: Site, key: str, kind: str) -> str:
    if kind == "whole":
        return ""
    if kind == "sparse":
        return f"{len(site.leaves['delta.weight' if key == 'weight' else 'bias.weight']):,}"
    return str(len(site.leaves["down.weight"]))


ABOUT = SPTAbout(
    name="SPT",
    idea="spends a budget of trainable parameters where a few batches say that the loss depends on the weights: "
    "single weights, whole vectors, or low-rank updates.",
    paper="https://arxiv.org/abs/2303.08566",
    bibtex=r"""@inproceedings{he2023sensitivity,
  title = {Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning},
  author = {He, Haoyu and Cai, Jianfei and Zhang, Jing and Tao, Dacheng and Zhuang, Bohan},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023},
  url = {https://arxiv.org/abs/2303.08566}
}""",
    merges=True,
    limits=("With `structured='adapter'` it cannot be merged.",),
    headline=("budget", "structured", "r"),
    page="docs/spt.md",
    offsets=r"(delta|bias|down|up)\.weight",
    unplanned="whether a matrix gets a structure or single weights depends on the data and on how large it is",
)
