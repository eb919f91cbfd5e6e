"""Where, in each architecture, the blocks, their attention and the head are: all that a reader knows about a family.

It is read from the table of architectures. A block is run on query rows by calling the block itself, so what it does
besides attention (norms before or after, layer scale, the feed-forward part) need not be described here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..architectures import ARCHITECTURES, Architecture, architecture_of
from ..architectures import Attention as Names


@dataclass(frozen=True)
class Attention:
    """Names inside an attention module: its projections, and the attributes with a head's size and the scale."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str | None = "o_proj"  # None: the block itself applies the output projection
    head_size: str = "head_dim"
    scale: str = "scaling"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        model: The class (or a base class of it) that classifies.
        backbone: The submodule that is run frozen.
        blocks: The module list with the transformer blocks, inside the backbone.
        attention: The attention module, inside a block.
        names: The names inside that.
        head: The module that gives the logits; its output is replaced by that of the reader's own head.
        class_token: The module whose input is the feature of the class token, if that is not the head: what lies in
            between belongs to the stock head. Where the input is a whole sequence, its first token is meant.
        class_tokens: How many features of the model's width that input holds.
    """

    model: str
    backbone: str
    blocks: str
    attention: str
    names: Attention
    head: str = "classifier"
    class_token: str | None = None
    class_tokens: int = 1


def _names(names: Names) -> Attention:
    inside = f"{names.module}."
    q, k, v = (part.removeprefix(inside) for part in (names.q, names.k, names.v))
    out = names.o.removeprefix(inside) if names.o.startswith(inside) else None
    return Attention(q, k, v, out, names.head_size, names.scale)


def _families(architecture: Architecture) -> Iterator[Family]:
    """The families of an entry of the table: with today's names first, then with those of older versions."""
    classifier = architecture.classifier
    if classifier is None:
        return
    for attention in architecture.attention:
        for blocks in classifier.blocks:
            yield Family(
                *(classifier.model, classifier.backbone, blocks, attention.module, _names(attention)),
                *(classifier.head, classifier.class_token, classifier.class_tokens),
            )


def _reason(architecture: Architecture) -> str | None:
    """Why no reader can be had on an architecture, if it cannot."""
    if architecture.is_convolutional:
        return "it is convolutional: there are no tokens to read."
    if architecture.has_windows:
        return (
            "it attends inside shifted windows that merge from stage to stage, so that its layers have different "
            "tokens, and none has one set of keys and values. Use ViT, DeiT, BEiT or DINOv2, or another method on Swin."
        )
    if architecture.generates:
        return "it generates: all positions would have to be read, and nothing would feed the next token."
    return None


def _no_queries(architecture: Architecture) -> str | None:
    """Why learnt queries cannot read an architecture that has no entry for its classifier, if they cannot."""
    if architecture.shares_layers:
        return "it runs one block several times, while each layer has queries of its own."
    if architecture.position != "absolute":
        return "its queries and keys depend on their positions, and a learnt query has none."
    return None


FAMILIES: dict[str, Family] = {
    name: family
    for name, architecture in ARCHITECTURES.items()
    if _reason(architecture) is None
    for family in [next(_families(architecture), None)]
    if family is not None
}
HEAD_NAMES = {name for family in FAMILIES.values() for name in (family.head, family.class_token) if name} | {"score"}


def family_of(
    method: str, model_type: str | None, model: nn.Module | None = None, with_queries: bool = False
) -> Family:
    """The family of a `config.model_type`; with a model, under the names that its version of transformers gives it.

    Args:
        method: The name of the reader, for messages.
        model_type: What the model's config says.
        model: The model, if there is one already.
        with_queries: Whether it reads with learnt queries, which some architectures have no place for.

    Raises:
        ValueError: `method` does not know it; the message gives the reason where there is one.
    """
    architecture = architecture_of(model_type)
    if model_type in FAMILIES:
        assert architecture is not None
        candidates = [FAMILIES[model_type], *_families(architecture)]
        return next((family for family in candidates if model is not None and _fits(family, model)), candidates[0])
    reason = None
    if architecture is not None:
        reason = _reason(architecture) or (_no_queries(architecture) if with_queries else None)
    if reason is not None:
        raise ValueError(f"{method} does not support models of type {model_type!r}: {reason}")
    raise ValueError(
        f"{method} does not know models of type {model_type!r}; it knows the classifiers of {', '.join(sorted(FAMILIES))}."
    )


def _fits(family: Family, model: nn.Module) -> bool:
    try:
        block: Any = model.get_submodule(f"{family.backbone}.{family.blocks}.0")
        block.get_submodule(family.attention).get_submodule(family.names.q)
    except AttributeError:
        return False
    return True


def check_model(method: str, family: Family, model: nn.Module) -> None:
    """Raises `ValueError` if `model` is of the right architecture but not a classifier that `method` can read."""
    name = type(model).__name__
    if family.model not in {cls.__name__ for cls in type(model).__mro__}:
        raise ValueError(
            f"{method} replaces the classification head of a {family.model}, but the model is a {name}, which has none "
            f"that {method} knows. Load it with `transformers.{family.model}.from_pretrained`."
        )
    config: Any = model.config
    has_no_head = isinstance(model.get_submodule(family.head), nn.Identity)
    if has_no_head:
        raise ValueError(f"The {name} has no classification head (`num_labels` is 0); load it with `num_labels=...`.")
    if getattr(config, "is_decoder", False):
        raise ValueError(f"The {name} has `is_decoder=True`; {method} reads encoders: use `is_decoder=False`.")
