"""Where prompts start, if not at random: at the class tokens of the frozen model, or at another adapter's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftConfig, PeftType
from peft.utils import load_peft_weights
from torch import nn

from .config import CLASS_TOKENS, VPTConfig
from .layer import VPTLayer
from .leaves import Elsewhere, Rows


def check_start(config: VPTConfig, blocks: Sequence[str]) -> None:
    """Raises `ValueError` if what a new adapter is to start from is not there, or is of another form.

    Args:
        config: The config.
        blocks: The blocks whose class tokens a start needs.
    """
    if config.init_weights != CLASS_TOKENS:
        return
    if config.support is None:
        raise ValueError(
            f"`init_weights={CLASS_TOKENS!r}` needs the class tokens of the data, and the config has none yet:\n"
            "    config = peft_ext.calibrate(model, config, dataloader)\n"
            "    model = get_peft_model(model, config)"
        )
    if set(config.support) != set(blocks) or any(len(rows) != config.num_tokens for rows in config.support.values()):
        raise ValueError(
            "The config was calibrated for another model, other layers or another `num_tokens`: it has "
            f"{len(next(iter(config.support.values()), ()))} prompts for {', '.join(sorted(config.support)[:2])}, ... "
            "Calibrate a new config."
        )


def start(model: nn.Module, config: VPTConfig, adapter_name: str) -> None:
    """Fills in the prompts of a new adapter, if `init_weights` says with what; they are forgotten then.

    So a copy of the adapter needs neither the data nor the other adapter's files.
    """
    if config.init_weights == CLASS_TOKENS and config.support is not None:
        _start_at_class_tokens(config.support, model, adapter_name)
    elif not isinstance(config.init_weights, str) or config.inference_mode or config.awaits_weights:
        return
    else:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, VPTLayer)}
        start_from(config, layers, adapter_name)
    config.init_weights, config.support = True, None


@torch.no_grad()
def _start_at_class_tokens(support: dict[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    for name, layer in model.named_modules():
        if not (isinstance(layer, VPTLayer) and adapter_name in layer.vpt_prompts):
            continue
        leaf = layer.vpt_prompts[adapter_name]
        if isinstance(leaf, Rows) and not leaf.weight.is_meta:
            # one entry only: that of the last block, for prompts that all layers share
            rows = next(iter(support.values())) if len(support) == 1 else support[name.rpartition(".")[0]]
            leaf.weight.copy_(rows)


def rows_of_adapter(config: VPTConfig) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that `init_weights` names, by their keys.

    Raises:
        ValueError: It is no VPT adapter, or its prompts are too few or made in another way.
    """
    source = str(config.init_weights)
    theirs = PeftConfig.from_pretrained(source)
    if theirs.peft_type != PeftType(config.METHOD):
        raise ValueError(
            f"`init_weights` names {source!r}, an adapter of the method {theirs.peft_type.value}, not VPT."
        )
    for name in ("deep", "share_layers", "project_dim", "kv_tokens", "share_kv"):
        if getattr(theirs, name) != getattr(config, name):
            raise ValueError(
                f"`init_weights` names {source!r}, whose `{name}` is {getattr(theirs, name)!r}; this config says "
                f"{getattr(config, name)!r}. They must be the same."
            )
    if theirs.num_tokens < config.num_tokens:
        raise ValueError(
            f"`init_weights` names {source!r}, which has {theirs.num_tokens} prompts, fewer than `num_tokens`, "
            f"{config.num_tokens}: groups of them are averaged, so it must have as many or more."
        )
    return {key: value for key, value in load_peft_weights(source, device="cpu").items() if ".vpt_" in key}


@torch.no_grad()
def start_from(config: VPTConfig, layers: Mapping[str, VPTLayer], adapter_name: str) -> None:
    """Fills in the leaves of an adapter, in these layers, from the adapter that `init_weights` names.

    Raises:
        ValueError: That is no VPT adapter, or it does not fit.
    """
    by_site = {key.removeprefix("base_model.model."): value for key, value in rows_of_adapter(config).items()}
    for name, layer in layers.items():
        for container in layer.adapter_layer_names:
            leaves = getattr(layer, container)
            if adapter_name not in leaves or isinstance(leaves[adapter_name], Elsewhere):
                continue
            for part, parameter in leaves[adapter_name].named_parameters():
                value = by_site.get(f"{name}.{container}.{part}")
                if value is not None and isinstance(leaves[adapter_name], Rows) and container == "vpt_prompts":
                    value = torch.stack([group.mean(0) for group in value.tensor_split(config.num_tokens)])
                if value is None or value.shape != parameter.shape:
                    found = "has none" if value is None else f"has the shape {tuple(value.shape)}"
                    raise ValueError(
                        f"`init_weights` names {config.init_weights!r}, which {found} for {name!r}; this model needs "
                        f"{tuple(parameter.shape)}."
                    )
                if not parameter.is_meta:
                    parameter.copy_(value)
