"""What there is to say about UniPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core import ADAPTER_WEIGHTS, About, Adapter, BadInput, Bars, Column, Picture, Row, Site, is_trained
from ...reading import reader_of
from .layer import UniPTLayer
from .model import layer_confidence


class UniPTAbout(About):
    """How the tensors are read, and what the figures show."""

    columns = (Column("channels", "channels"),)

    def rows(self, adapter: Adapter) -> list[Row]:
        """UniPT adapts no module: a row is a layer whose states are read, what they have in common, or the head."""
        site = next(iter(adapter.sites.values()))
        chosen = adapter.config.get("layers_to_transform")
        try:
            states, channels, _ = site.leaves["down.weight"].shape
            indices = (
                range(states - 1) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(set(chosen))
            )
            if len(indices) != states - 1:
                raise ValueError(f"it reads {states - 1} layers, its config names {len(indices)}")
            rows = [_layer_row(site, place, index, channels) for place, index in enumerate(indices)]
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise BadInput(
                f"{ADAPTER_WEIGHTS} of {adapter.source} does not fit a UniPT adapter ({error}): restore the file that "
                "was saved."
            ) from None
        own = {name: leaf for name, leaf in site.leaves.items() if is_trained(leaf)}
        head = sum(leaf.numel() for name, leaf in own.items() if name.startswith("head."))
        rest = sum(leaf.numel() for leaf in own.values()) - head - sum(row["parameters"] for row in rows)
        rows.append({"module": "side network", "layer": -1, "type": "side network", "parameters": rest})
        shapes = {"head.weight": list(site.leaves["head.weight"].shape)}
        return [*rows, {"module": "head", "layer": -1, "type": "head", "parameters": head, "shapes": shapes}]

    def pictures_of_rows(self, rows: Sequence[Row]) -> list[Picture]:
        """The norm of each layer's projection into the side network."""
        return [_norms({row["layer"]: row["norm"] for row in rows if "norm" in row})]

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """The same of a model; or, with inputs of its `forward`, how much each layer counts, as a mean over the batch.

        Raises:
            ValueError: There is no such adapter.
        """
        if inputs:
            found = layer_confidence(model, adapter_name, **inputs)
            means = {str(index): values.float().mean().item() for index, values in found.items()}
            return [Bars(means, xlabel="layer", ylabel="confidence")]
        layer, adapter = reader_of(model, adapter_name, UniPTLayer.method)
        weights = layer.unipt_down[adapter].weight.detach()
        indices = list(layer.blocks(adapter))
        return [_norms({index: weights[place].norm().item() for place, index in enumerate(indices)})]


def _layer_row(site: Site, place: int, index: int, channels: int) -> Row:
    """The row of a layer whose states are read."""
    own = {name: leaf[place] for name, leaf in site.leaves.items() if name.startswith(("down.", "norm."))}
    return {
        "module": f"layer {index}",
        "layer": index,
        "type": "states",
        "parameters": sum(leaf.numel() for leaf in own.values()),
        "channels": channels,
        "norm": own["down.weight"].double().norm().item(),
        "shapes": {name: list(leaf.shape) for name, leaf in sorted(own.items())},
    }


def _norms(norms: dict[int, float]) -> Bars:
    return Bars(
        {str(index): norm for index, norm in norms.items()},
        xlabel="states that enter layer",
        ylabel="norm of their projection",
    )


ABOUT = UniPTAbout(
    name="UniPT",
    idea="reads the hidden states of every layer of the frozen model with a small side network, whose output takes the "
    "place of the last one, and trains a linear head on that.",
    paper="https://arxiv.org/abs/2308.14316",
    bibtex=r"""@inproceedings{diao2024unipt,
  title = {UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory},
  author = {Diao, Haiwen and Wan, Bo and Zhang, Ying and Jia, Xu and Lu, Huchuan and Chen, Long},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024},
  url = {https://arxiv.org/abs/2308.14316}
}""",
    merges=False,
    limits=("It classifies only, with a head of its own, and cannot be merged into the weights.",),
    headline=("reduction_factor", "identity", "residual"),
    page="docs/unipt.md",
    instead={
        "binarized": "its head would be rounded, too",
        "lora": "it is a network beside the model and changes no weight: load it with `peft_ext.load`",
    },
)
