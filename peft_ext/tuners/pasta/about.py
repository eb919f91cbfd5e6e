"""What there is to say about PASTA."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core import About, Adapter, Column, HeatMap, Picture, Reading, Site, Vector, layer_and_type
from .layer import PASTALayer


class PASTAAbout(About):
    """How the tensors are read, and what the figure shows."""

    columns = (Column("vectors", "vectors", adds_up=True), Column("largest", "largest norm", "{:.4f}"))

    def read(self, adapter: Adapter, site: Site) -> Reading:
        """The vectors of a layer: how many, and the norm of the largest."""
        vectors = site.leaves["vectors.weight"].double()
        figures = {"vectors": len(vectors), "largest": vectors.norm(dim=1).max().item()}
        return figures, {"vectors": Vector(vectors.flatten())}

    def pictures(self, model: nn.Module, adapter_name: str, **inputs: Any) -> list[Picture]:
        """By layer and vector: its norm.

        Raises:
            ValueError: The model has no such PASTA adapter.
        """
        norms: dict[tuple[int, str], float] = {}
        for name, module in model.named_modules():
            if isinstance(module, PASTALayer) and adapter_name in module.pasta_vectors:
                weight = module.pasta_vectors[adapter_name].get_parameter("weight").detach().float()
                for place, norm in enumerate(weight.norm(dim=1).tolist()):
                    norms[layer_and_type(name)[0], f"vector {place}"] = norm
        if not norms:
            raise ValueError(f"There is no PASTA adapter named {adapter_name!r} on this model.")
        return [HeatMap(norms, "norm of the vector")]


ABOUT = PASTAAbout(
    name="PASTA",
    idea="adds a trained vector to each special token (CLS, SEP, or the class token of an image) before every layer "
    "of the frozen model.",
    paper="https://arxiv.org/abs/2210.04382",
    bibtex=r"""@article{yang2022parameter,
  title = {Parameter-Efficient Tuning with Special Token Adaptation},
  author = {Yang, Xiaocong and Huang, James Y. and Zhou, Wenxuan and Chen, Muhao},
  journal = {arXiv preprint arXiv:2210.04382},
  year = {2022},
  url = {https://arxiv.org/abs/2210.04382}
}""",
    merges=False,
    limits=("It cannot be merged: no weight of the model can tell special tokens from others.",),
    headline=("num_vectors", "by_token", "special_tokens"),
    page="docs/pasta.md",
    instead={"lora": "it changes no weight: load it as an adapter, with `peft_ext.load`"},
)
