"""What there is to say about SNELL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from ...core import (
    About,
    Adapter,
    Column,
    HeatMap,
    Picture,
    Reading,
    Site,
    Sparse,
    Writer,
    layer_and_type,
    method_of,
    tuner_of,
)
from ...lora_files import write_adapter
from ...sparse import encode
from .kernel import update_of
from .layer import SNELLLinear


def write_sparse(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> PeftConfig:
    """Writes the adapter as a sparse one, of fixed indices and the same function.

    Raises:
        ValueError: There is no such adapter, or it has no zeros.
    """
    config: Any = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter named {adapter_name!r}; there are {sorted(model.peft_config)}.")
    tuner: Any = tuner_of(config)
    sparse: Any = method_of("SPARSE_FT")
    tensors, counts = {}, {}
    for name, update in tuner.as_sparse(model, adapter_name).items():
        flat = update.flatten().cpu()
        indices = flat.nonzero().squeeze(1)
        leaf = f"base_model.model.{name}.{sparse.prefix}delta"
        tensors[f"{leaf}.weight"], tensors[f"{leaf}.index"] = flat[indices], encode(indices, len(flat))
        counts[name] = len(indices)
    made = sparse.config(selection="given", target_modules=list(counts), num_weights_per_module=counts)
    return write_adapter(model, path, adapter_name, made, tensors)


class SNELLAbout(About):
    """How the tensors are read, what the figure shows, and what an adapter can be made of."""

    columns = (
        Column("rank", "rank"),
        Column("tuned", "not zero", "{:,}", adds_up=True),
        Column("size", "", adds_up=True),
        Column("density", "density", "{:.2g}", ratio=("tuned", "size")),
    )

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """How much of the update is not zero, and the update."""
        outputs, inputs = (site.leaves[f"{side}.weight"].double() for side in ("outputs", "inputs"))
        size = outputs.shape[1] * inputs.shape[1]
        kept = site.leaves.get("outputs.kept")
        sparsity = float(adapter.config.get("sparsity") or 0.0) if kept is None else 1 - int(kept) / size
        update = update_of(outputs, inputs, sparsity, adapter.config["gate"]).flatten()
        indices = update.nonzero().squeeze(1)
        figures = {"rank": 2 * outputs.shape[2], "tuned": len(indices), "size": size}
        return figures, {"weight": Sparse(update[indices], indices)}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By layer and module: the norm of the update, and, where zeros are allocated, the share that is none.

        Raises:
            ValueError: The model has no such SNELL adapter.
        """
        layers = {
            layer_and_type(name): module
            for name, module in model.named_modules()
            if isinstance(module, SNELLLinear) and module.present([adapter_name])
        }
        if not layers:
            raise ValueError(f"There is no SNELL adapter named {adapter_name!r} on this model.")
        norms = {place: float(torch.linalg.norm(layer.update(adapter_name))) for place, layer in layers.items()}
        shares = {place: 1 - layer.sparsity(adapter_name) for place, layer in layers.items()}
        figures: list[Picture] = [HeatMap(norms, "norm of the update")]
        return figures if len(set(shares.values())) == 1 else [*figures, HeatMap(shares, "share that is not zero")]

    def exports(self) -> Mapping[str, Writer]:
        """An adapter of sparse fine-tuning, with the entries that are not zero."""
        return {"sparse": write_sparse}


ABOUT = SNELLAbout(
    name="SNELL",
    idea="makes a sparse update of full rank from the distances of trained points, one for each row and column of a "
    "weight.",
    paper="https://arxiv.org/abs/2411.01800",
    bibtex=r"""@inproceedings{shen2024expanding,
  title = {Expanding Sparse Tuning for Low Memory Usage},
  author = {Shen, Shufan and Sun, Junshu and Ji, Xiangyang and Huang, Qingming and Wang, Shuhui},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2411.01800}
}""",
    merges=True,
    headline=("r", "sparsity", "gate"),
    page="docs/snell.md",
    instead={"lora": "its update has full rank: `--to sparse` writes a sparse adapter, `--to merged` a model"},
)
