"""What there is to say about LoRAFusion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from ...core import (
    About,
    Adapter,
    Column,
    Figures,
    HeatMap,
    LowRank,
    Picture,
    Reading,
    Row,
    Site,
    Writer,
    layer_and_type,
    layers_by_name,
)
from ...lora_files import write_as_lora, write_lora
from .config import LoraFusionConfig
from .layer import SHARED, Factors, LoraFusionLinear
from .model import LoraFusionModel, lora_config


class LoraFusionAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (Column("rank", "rank"),)
    state = ("factors.down", "factors.up", "factors.scales")

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The rank, and the update where magnitudes do not make it one of full rank."""
        if "factors.down" not in site.leaves:
            return {}, {}
        config = LoraFusionConfig(**{key: adapter.config[key] for key in ("adapters", "mode", "share", "ranks")})
        config.other_ranks = adapter.config.get("other_ranks")
        coefficients = site.leaves.get("coefficients.weight")
        if coefficients is None:
            group = LoraFusionModel.group_of(site.module, nn.Identity(), config)
            coefficients = adapter.sites[f"{SHARED}.{group}"].leaves["coefficients.weight"]
        stack = tuple(site.leaves[f"factors.{part}"].double() for part in ("down", "up", "scales"))
        factors = Factors(stack, config.ranks_at(site.module), config.mode, is_placeholder=False)  # type: ignore[arg-type]
        down, up = factors(coefficients.double())
        figures: Figures = {"rank": len(down)}
        return figures, {} if "magnitude.weight" in site.leaves else {"weight": LowRank(down, up, 1.0)}

    def figures(self, adapter: Adapter, rows: Any) -> Figures:
        """The mean coefficient of each LoRA over the groups of modules."""
        config = LoraFusionConfig(adapters=adapter.config["adapters"])
        found = [s.leaves["coefficients.weight"] for s in adapter.sites.values() if "coefficients.weight" in s.leaves]
        means = torch.stack(found).double().mean(dim=0).tolist() if found else []
        return {f"mean coefficient of {label}": mean for label, mean in zip(config.labels, means, strict=True)}

    def rows(self, adapter: Adapter) -> list[Row]:
        """A row for each module, and one for the coefficients that a block shares, in its layer."""
        rows = super().rows(adapter)
        for row in rows:
            shared, _, group = row["module"].partition(f"{SHARED}.")
            if group and not shared:
                row["layer"], row["type"] = layer_and_type(f"{group.replace('-', '.')}.coefficients")
        return rows

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By block and LoRA: the coefficient; the mean over the modules of a block where they share none.

        Raises:
            ValueError: The model has no such LoRAFusion adapter.
        """
        found: dict[tuple[int, str], list[float]] = {}
        labels = None
        for name, layer in layers_by_name(model, LoraFusionLinear, adapter_name).items():
            labels = labels or model.peft_config[adapter_name].labels  # type: ignore[union-attr, index, operator]
            index, kind = layer_and_type(name)
            stack = (
                kind.partition(".")[0] + " " if kind.startswith(("decoder.", "text_model.", "vision_model.")) else ""
            )
            values = layer.fused_low_rank_coefficients[adapter_name]().tolist()
            for label, value in zip(labels, values, strict=True):
                found.setdefault((index, stack + label), []).append(value)
        if labels is None:
            raise ValueError(f"There is no LoRAFusion adapter named {adapter_name!r} on this model.")
        return [HeatMap({key: sum(v) / len(v) for key, v in found.items()}, "coefficient")]

    def exports(self) -> Mapping[str, Writer]:
        """LoRA; with magnitudes, one with `use_dora`."""
        return {"lora": write}


def write(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes the fused adapter as one LoRA with the same function, with magnitudes as DoRA.

    Raises:
        ValueError: There is no such adapter.
    """
    config: Any = model.peft_config.get(adapter_name)
    if config is None or not config.magnitude:
        return write_as_lora(model, path, adapter_name)
    layers = layers_by_name(model, LoraFusionLinear, adapter_name)
    updates, tensors = {}, {}
    for name, layer in layers.items():
        down, up = updates[name] = layer.low_rank(adapter_name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        tensors[f"base_model.model.{name}.lora_magnitude_vector.weight"] = layer.fused_low_rank_magnitude[
            adapter_name
        ].weight  # type: ignore[assignment]
    return write_lora(model, path, adapter_name, lora_config(layers, updates, use_dora=True), tensors)


ABOUT = LoraFusionAbout(
    name="LoRAFusion",
    idea="fuses several LoRAs of one base with a trained coefficient for each of them in each block.",
    paper="https://doi.org/10.1145/3716368.3735213",
    bibtex=r"""@inproceedings{guo2025lorafusion,
  title = {{LoRAFusion}: A Crossbar-aware Multi-task Adaption Framework via Efficient Fusion of Pretrained {LoRA} Modules},
  author = {Guo, Jingkai and Ali, Asmer and Yang, Li and Fan, Deliang},
  booktitle = {Great Lakes Symposium on VLSI},
  pages = {777--783},
  year = {2025},
  url = {https://doi.org/10.1145/3716368.3735213}
}""",
    merges=True,
    headline=("adapters", "mode", "magnitude", "share"),
    instead={"binarized": "its coefficients and magnitudes are few: `--to lora` writes one LoRA, which can be packed"},
    page="docs/lora_fusion.md",
)
