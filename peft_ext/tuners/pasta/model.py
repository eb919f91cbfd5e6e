"""PASTA on a whole model: its blocks, and which tokens are special there."""

from __future__ import annotations

import inspect
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ...architectures import architecture_of, describe
from ...core import ExtLayer, ExtModel, empty_like_of
from .config import PASTAConfig
from .layer import CHILD, PASTALayer
from .rows import LeadingRows, SpecialTokens


ID_NAMES = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")


class PASTAModel(ExtModel):
    """Puts vectors before the blocks of a model; used through `get_peft_model(model, PASTAConfig(...))`."""

    prefix = "pasta_"
    tuner_layer_cls = PASTALayer
    stands_beside = True

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], model: nn.Module) -> Any:
        """The one target is the list of blocks; fills in which tokens are special, and how many vectors a layer has.

        Raises:
            ValueError: The model has no blocks, or no special tokens, that PASTA can use; or the config names others.
        """
        stack, count = stack_of(model)
        if config.target_modules not in (None, {stack}):
            raise ValueError(
                f"`target_modules` is {config.target_modules!r}, but PASTA adapts whole blocks, those of {stack!r}. "
                "Leave it out, and use `layers_to_transform` to choose layers."
            )
        config.target_modules = {stack}
        chosen_layers(config, count)
        fill_in(config, owner_of(model, stack))
        return config

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        blocks: Any = target
        owner = owner_of(tuner.model, name)
        rows = next((module.rows for module in tuner.model.modules() if isinstance(module, PASTALayer)), None)
        rows = rows or (SpecialTokens(owner) if reads_tokens(owner) else LeadingRows())
        for index in chosen_layers(config, len(blocks)):
            block = blocks[index].get_base_layer() if isinstance(blocks[index], BaseTunerLayer) else blocks[index]
            layer: Any = getattr(block, CHILD, None)
            is_new = layer is None
            if is_new:
                layer = PASTALayer(block, rows)
                layer.like = empty_like_of(block)
                layer.activate_only(adapter_name)
            layer.update_layer(adapter_name, config, width=owner.config.hidden_size)
            if is_new:
                block.add_module(CHILD, layer)
            if adapter_name not in tuner.active_adapters:
                layer.pasta_vectors[adapter_name].requires_grad_(False)  # not trained until it is activated
        return None


def stack_of(model: nn.Module) -> tuple[str, int]:
    """The name of the list of blocks that PASTA can adapt, and their number.

    Raises:
        ValueError: There are none, or not one list of them; the message gives the reason.
    """
    description = describe(model)
    kind = description.model_type
    architecture = description.architecture
    reason = None
    if architecture is None or not description.blocks:
        reason = "the table of architectures knows no blocks of it; use BERT, RoBERTa, ViT, Llama or their relatives."
    elif architecture.is_convolutional or architecture.has_windows:
        reason = "no token stands for the whole input in each of its layers. Use ViT, DeiT or DINOv2."
    elif architecture.shares_layers:
        reason = "it runs one block several times, while each layer has vectors of its own."
    elif len(description.stacks) > 1:
        reason = f"it has several lists of blocks ({', '.join(description.stacks)}); adapt one part of it alone."
    if reason is not None:
        raise ValueError(f"PASTA does not support models of type {kind!r}: {reason}")
    return description.blocks[0].stack, len(description.blocks)


def chosen_layers(config: PASTAConfig, count: int) -> list[int]:
    """The indices of the layers that get vectors.

    Raises:
        ValueError: `layers_to_transform` names one that is not there.
    """
    chosen = config.layers_to_transform
    indices = list(range(count)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"`layers_to_transform` names layer {index}; the model has layers 0 to {count - 1}.")
    return indices


def owner_of(model: nn.Module, name: str) -> Any:
    """The innermost model of transformers around the module of this name: the one that gets the inputs."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"PASTA needs a model of transformers, this is a {type(model).__name__}.")


def reads_tokens(owner: nn.Module) -> bool:
    """Whether the model is called with `input_ids`."""
    return "input_ids" in inspect.signature(type(owner).forward).parameters


def fill_in(config: PASTAConfig, owner: Any) -> None:
    """Writes into the config what its fields leave open, for the model that gets the inputs.

    Raises:
        ValueError: A field does not fit the model, or it has no special tokens that are known.
    """
    if not reads_tokens(owner):
        _fill_in_rows(config, owner)
        return
    architecture = architecture_of(owner.config.model_type)
    generates = architecture is not None and architecture.generates
    if config.by_token is None:
        config.by_token = generates
    if generates and not config.by_token:
        raise ValueError(
            f"`by_token=False` counts the special tokens of a sample, and a {type(owner).__name__} generates: it sees "
            "one token at a time. Leave `by_token` out."
        )
    if config.special_tokens is None:
        config.special_tokens = _ids_of(owner.config)
    unknown = [token for token in config.special_tokens if token >= owner.config.vocab_size]
    if unknown:
        raise ValueError(
            f"`special_tokens` holds {unknown}, and the model has {owner.config.vocab_size} tokens: call "
            "`model.resize_token_embeddings(len(tokenizer))` first, or take the tokenizer of this model."
        )
    count = len(config.special_tokens) if config.by_token else 2
    if config.by_token and config.num_vectors not in (None, count):
        raise ValueError(
            f"`num_vectors` is {config.num_vectors}, but by token there is one vector for each of the {count} "
            "`special_tokens`: leave it out."
        )
    config.num_vectors = config.num_vectors or count


def _ids_of(model_config: Any) -> list[int]:
    found: list[int] = []
    for name in ID_NAMES:
        value = getattr(model_config, name, None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not found:
        raise ValueError(
            f"The config of this {model_config.model_type} model names no special tokens. Say which there are: "
            "`PASTAConfig(special_tokens=[tokenizer.cls_token_id, tokenizer.sep_token_id])`."
        )
    return list(dict.fromkeys(found))


def _fill_in_rows(config: PASTAConfig, owner: Any) -> None:
    """Of a model without tokens: its class token and what else stands before the patches."""
    for name in ("special_tokens", "by_token"):
        if getattr(config, name) is not None:
            raise ValueError(f"`{name}` has no use for a {type(owner).__name__}, which reads no tokens: leave it out.")
    architecture = architecture_of(owner.config.model_type)
    rows = architecture.leading_rows if architecture is not None else 0
    if rows:
        rows += getattr(owner.config, "num_register_tokens", 0)
    if not rows:
        raise ValueError(
            f"PASTA does not support the {type(owner).__name__}: it has no class token. Use VQT, or ViT, DeiT, DINOv2 "
            "or CLIP."
        )
    if config.num_vectors not in (None, rows):
        raise ValueError(
            f"`num_vectors` is {config.num_vectors}, but there are {rows} rows before the patches: leave it out."
        )
    config.num_vectors = rows
