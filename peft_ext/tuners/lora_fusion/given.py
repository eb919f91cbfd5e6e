"""The LoRAs that are given to be fused: read from the model, a directory or the Hub, and checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftConfig, PeftType, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn

from ...core import linear_features, scale_at, unadapted_modules
from ...lora_start import BESIDE_THE_BASE


PREFIX = "base_model.model."
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class GivenLora:
    """One LoRA: A `(r, in)`, B `(out, r)` and the factor of their product, by the full name of the module."""

    name: str
    base: str | None
    pairs: dict[str, Pair]
    scales: dict[str, float]

    def rank(self, module: str) -> int:
        """0 if it leaves the module out."""
        return len(self.pairs[module][0]) if module in self.pairs else 0


@dataclass
class Given:
    """All of them."""

    loras: list[GivenLora]

    @property
    def modules(self) -> set[str]:
        """What at least one of them adapts."""
        return {module for lora in self.loras for module in lora.pairs}

    def ranks(self, module: str) -> list[int]:
        """The rank of each in a module."""
        return [lora.rank(module) for lora in self.loras]

    def stacked(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All A below each other `(R, in)`, all B beside each other `(out, R)`, and the scales `(n,)`, in fp32 at least."""
        there = [lora.pairs[module] for lora in self.loras if module in lora.pairs]
        dtype = torch.float64 if any(pair[0].dtype == torch.float64 for pair in there) else torch.float32
        down, up = (torch.cat([pair[i].to(dtype) for pair in there], dim=i) for i in (0, 1))
        scales = [lora.scales.get(module, 0.0) for lora in self.loras]
        return down, up, torch.tensor(scales, dtype=dtype)


def read_all(names: list[str], model: nn.Module) -> Given:
    """Reads and checks the LoRAs for a model.

    Raises:
        TypeError: One of them is no LoRA, or one of another kind than fusion takes.
        ValueError: One is not there, or they are of different bases, or adapt modules that the model does not have.
    """
    if not names:
        raise ValueError(
            "`adapters` is empty: name the LoRAs to be fused, such as `LoraFusionConfig(adapters=['lora-a', 'lora-b'])`."
        )
    loras = [read(name, model) for name in names]
    refuse_different_bases(loras)
    base, own = next((lora.base for lora in loras if lora.base), None), getattr(model, "name_or_path", None)
    if base and own and base != own:
        warnings.warn(
            f"The LoRAs were trained on {base!r}, and the model is {own!r}. If these are not two names of the same weights, "
            "their updates mean nothing here.",
            UserWarning,
            stacklevel=2,
        )
    there = {name for name, _ in unadapted_modules(model)}
    for lora in loras:
        if unknown := sorted(lora.pairs.keys() - there):
            raise ValueError(
                f"The LoRA {lora.name!r} adapts {unknown[0]!r}, which this {type(model).__name__} does not have. Fuse "
                "LoRAs that were trained on a model of this class."
            )
    return Given(loras)


def refuse_other_sizes(given: Given, modules: Mapping[str, nn.Module]) -> None:
    """`ValueError` if factors do not fit the modules that are adapted."""
    for lora in given.loras:
        for name in lora.pairs.keys() & modules.keys():
            down, up = lora.pairs[name]
            inputs, outputs = linear_features(modules[name]) or (0, 0)
            if down.shape[1] != inputs or up.shape[0] != outputs or down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"The LoRA {lora.name!r} does not fit this model: its A and B of {name!r} are {tuple(down.shape)} and "
                    f"{tuple(up.shape)}, and the module has {inputs} inputs and {outputs} outputs. Fuse LoRAs of this "
                    "very base."
                )


def refuse_different_bases(loras: list[GivenLora]) -> None:
    """`ValueError` if the configs name several bases."""
    bases = {lora.base: lora.name for lora in loras if lora.base}
    if len(bases) > 1:
        listed = ", ".join(f"{name!r} of {base!r}" for base, name in bases.items())
        raise ValueError(
            f"The LoRAs are of different bases: {listed}. Only LoRAs of one base can be fused; if these are two names "
            "of the same model, write one of them as `base_model_name_or_path` into each adapter_config.json."
        )


def refuse_unequal_shapes(given: Given, modules: list[str]) -> None:
    """`ValueError` if the LoRAs differ in rank, or in the modules that they adapt."""
    for module in modules:
        ranks = given.ranks(module)
        if len(set(ranks)) > 1:
            first = given.loras[0].name
            other, rank = next((l.name, r) for l, r in zip(given.loras, ranks, strict=True) if r != ranks[0])
            raise ValueError(
                f"`mode='factors'` adds up factors of equal shapes, and at {module!r} the LoRA {first!r} has rank "
                f"{ranks[0]}, and {other!r} rank {rank} (0: it leaves the module out). Use `mode='deltas'`."
            )


def read(name: str, model: nn.Module) -> GivenLora:
    """One LoRA: an adapter on the model, if it has one of that name, else a directory or a repository on the Hub."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = any(name in layer.lora_A or name in layer.lora_embedding_A for _, layer in layers)
    if found:
        config: Any = getattr(model, "peft_config", {}).get(name)
        tensors = dict(tensors_of(layers, name))
    else:
        try:
            config = PeftConfig.from_pretrained(name)
            tensors = {key.removeprefix(PREFIX): value for key, value in load_peft_weights(name, device="cpu").items()}
        except SafetensorError as error:
            raise ValueError(f"The weights of the LoRA {name!r} cannot be read: {error}") from error
        except (ValueError, KeyError, OSError, HfHubHTTPError) as error:
            if Path(name).is_dir():
                raise ValueError(f"The LoRA {name!r} cannot be read: {type(error).__name__} {error}") from error
            raise ValueError(
                f"`adapters` names {name!r}, which is no LoRA on this model, no directory, and was not found on the Hub "
                f"({type(error).__name__})."
            ) from error
    if found and not isinstance(config, LoraConfig):
        raise ValueError(
            f"`adapters` names {name!r}, a LoRA on this model, and the new adapter has the same name: give it another, "
            f'`get_peft_model(model, config, adapter_name="fusion")`.'
        )
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        method = getattr(getattr(config, "peft_type", None), "value", None)
        raise TypeError(
            f"`adapters` names {name!r}, an adapter of the method {method}: fusion takes LoRAs. "
            "`peft_ext.save_as_lora` writes adapters of several methods as LoRA."
        )
    refuse_other_kinds(name, config, tensors)
    return pairs_of(name, config, tensors)


def tensors_of(layers: list[tuple[str, Any]], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What an adapter on the model has on its LoRA layers, by the keys of a file."""
    for path, layer in layers:
        path = re.sub(r"\.base_layer(?=\.|$)", "", path)
        for key, tensor in layer.state_dict().items():
            container, _, rest = key.partition(".")
            if container in layer.adapter_layer_names and f"{rest}.".startswith(f"{name}."):
                end = rest.removeprefix(name)
                yield f"{path}.{container}{end}", tensor.detach().cpu().clone()


def refuse_other_kinds(name: str, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """`TypeError` if a LoRA is more than s B A on its modules."""
    variants = [part.name for part in fields(config) if part.metadata.get("is_lora_variant")]
    found = [
        field for field in (*variants, "use_qalora", "lora_bias", "layer_replication") if getattr(config, field, None)
    ]
    found += [f"bias={config.bias!r}"] if config.bias != "none" else []
    start = config.init_lora_weights
    is_moved = (start.lower() if isinstance(start, str) else start) not in BESIDE_THE_BASE
    found += ["target_parameters"] if config.target_parameters else []
    if found:
        raise TypeError(
            f"The LoRA {name!r} has {', '.join(found)}: its update is more than the product B A of each module, and "
            "could be fused only in part. Give plain LoRAs; rslora, rank_pattern and alpha_pattern are plain."
        )
    if is_moved:
        raise TypeError(
            f"The LoRA {name!r} was started with {start!r}, which takes a part out of the base's weights, so that it does "
            "not fit the base as it is. Save it with `path_initial_model_for_weight_conversion`, as PEFT describes."
        )
    odd = sorted(key for key in tensors if re.search(r"\.lora_", key) and not re.search(r"\.lora_[AB]\.weight$", key))
    if odd:
        raise TypeError(f"The LoRA {name!r} has {odd[0]!r}; fusion takes LoRAs on Linear modules (and Conv1D) alone.")


def pairs_of(name: str, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> GivenLora:
    """The factors; a warning about what a LoRA has besides."""
    pairs: dict[str, Pair] = {}
    for key, down in tensors.items():
        module = key.removesuffix(".lora_A.weight")
        up = tensors.get(f"{module}.lora_B.weight")
        if module == key:
            continue
        if up is None or not (down.ndim == up.ndim == 2 and down.isfinite().all() and up.isfinite().all()):
            raise ValueError(
                f"The LoRA {name!r} has no A and B of {module!r} that are matrices of finite values: fusion takes LoRAs on "
                "Linear modules, and files that are whole."
            )
        pairs[module] = (down, up)
    if not pairs:
        raise ValueError(f"The LoRA {name!r} has no factors: restore the files that were saved.")
    besides = sorted(key for key in tensors if ".lora_" not in key)
    if besides:
        warnings.warn(
            f"The LoRA {name!r} has trained more than its factors, such as {besides[0]!r}, which is not fused: train "
            "that anew beside the coefficients (`modules_to_save`, `trainable_token_indices`), or load it into the base.",
            UserWarning,
            stacklevel=2,
        )
    scales = {module: scale_at(vars(config), module, len(down)) for module, (down, _) in pairs.items()}
    if min(scales.values()) < 0:
        raise ValueError(f"The LoRA {name!r} has an alpha below zero; turn the sign of its B instead.")
    return GivenLora(name, config.base_model_name_or_path or None, pairs, scales)
