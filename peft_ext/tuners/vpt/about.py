"""What there is to say about VPT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core import (
    About,
    Adapter,
    Bars,
    Column,
    HeatMap,
    Picture,
    Reading,
    Site,
    Update,
    Vector,
    layer_and_type,
    require_model,
)
from .layer import VPTLayer


LEAVES = ("prompts.weight", "keys.weight", "values.weight", "project.weight", "project.bias")


class VPTAbout(About):
    """How the tensors are read, and what the figures show."""

    columns = (
        Column("prompts", "prompts", adds_up=True),
        Column("kv_rows", "kv rows", adds_up=True),
        Column("length", "mean length", "{:.3f}"),
    )

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The number of prompts and of key-value rows, and the mean norm of a prompt."""
        figures: dict[str, Any] = {}
        prompts, keys = site.leaves.get("prompts.weight"), site.leaves.get("keys.weight")
        if prompts is not None:
            figures |= {"prompts": prompts.shape[0], "length": prompts.double().norm(dim=1).mean().item()}
        if keys is not None:
            figures["kv_rows"] = keys.shape[1]
        updates: dict[str, Update] = {
            name: Vector(site.leaves[name].double().flatten()) for name in LEAVES if name in site.leaves
        }
        return figures, updates

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The mean norm of a layer's prompts; with `pixel_values`, how much of the attention each layer gives them.

        Args:
            model: The model with the VPT adapter.
            adapter_name: The adapter.
            inputs: Keyword arguments of the model's `forward`.

        Raises:
            ValueError: The model has no such VPT adapter.
        """
        layers = _numbered(model, lambda layer: adapter_name in layer.configs)
        if not layers:
            raise ValueError(f"There is no VPT adapter named {adapter_name!r} on this model.")
        if inputs:
            shares = attention_to_prompts(model, **inputs)
            values = {
                (layer, f"head {head}"): value.item()
                for layer, of_heads in shares.items()
                for head, value in enumerate(of_heads)
            }
            return [HeatMap(values, "share of the attention that goes to prompts")]
        lengths = {
            str(index): layer.vpt_prompts[adapter_name]().detach().float().norm(dim=-1).mean()
            for index, layer in layers.items()
        }
        return [Bars({k: v.item() for k, v in lengths.items()}, xlabel="layer", ylabel="mean norm of its prompts")]


def attention_to_prompts(model: nn.Module, **inputs: Any) -> dict[int, torch.Tensor]:
    """By layer, the share `(heads,)` of the attention that the tokens give to prompts and key-value rows.

    Args:
        model: The model with an active VPT adapter.
        inputs: Keyword arguments of the model's `forward`, for example `pixel_values=...`.

    Raises:
        ValueError: There is none.
    """
    layers = _numbered(model, VPTLayer.acts)
    if not layers:
        raise ValueError("The model has no active VPT adapter: add one, or activate it with `set_adapter`.")
    with torch.no_grad(), _recording(layers):
        model(**inputs)
        found = {index: torch.cat(layer.recorded or []) for index, layer in layers.items()}
    return {index: shares.double().mean(0) for index, shares in found.items()}


def _numbered(model: nn.Module, chosen: Callable[[VPTLayer], bool]) -> dict[int, VPTLayer]:
    """The layers of VPT by the number of their block; in their order, where blocks of several stages share numbers."""
    require_model(model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, VPTLayer) and chosen(m)}
    numbers = [layer_and_type(name)[0] for name in found]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(found)))
    return dict(zip(numbers, found.values(), strict=True))


@contextmanager
def _recording(layers: dict[int, VPTLayer]) -> Iterator[None]:
    """Inside, the layers' attentions compute their weights, and keep how much of them goes to prompts."""
    try:
        for layer in layers.values():
            layer.recorded = []
        yield
    finally:
        for layer in layers.values():
            layer.recorded = None


ABOUT = VPTAbout(
    name="VPT",
    idea="trains prompts that stand beside the tokens of every layer, which see them as further keys and values; the "
    "weights stay as they are.",
    paper="https://arxiv.org/abs/2203.12119",
    bibtex=r"""@inproceedings{jia2022visual,
  title = {Visual Prompt Tuning},
  author = {Jia, Menglin and Tang, Luming and Chen, Bor-Chun and Cardie, Claire and Belongie, Serge and
            Hariharan, Bharath and Lim, Ser-Nam},
  booktitle = {European Conference on Computer Vision},
  year = {2022},
  url = {https://arxiv.org/abs/2203.12119}
}""",
    merges=False,
    limits=("Prompts are further tokens, which no weight can hold, so it cannot be merged.",),
    headline=("num_tokens", "deep", "kv_tokens", "project_dim"),
    page="docs/vpt.md",
    instead={"lora": "it changes no weight: load it as an adapter, with `peft_ext.load`"},
)
