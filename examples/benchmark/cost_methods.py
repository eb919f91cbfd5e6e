"""The methods of `cost.py` by the names of its tables: what each puts on a model, and what they are measured against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_ext import BinaryLoraConfig, MaskLoraConfig, PASTAConfig, SSFConfig
from peft_ext.architectures import describe


sys.path.insert(0, str(Path(__file__).resolve().parent))
from configs import Setting
from methods import CONFIGS, COST_NAMES, PROMPTS, REGISTERED
from workloads import Stack, Workload, special_ends


FROZEN, LORA = "frozen backbone", "LoRA r=8"  # what the ratios refer to


def head_name(model: nn.Module) -> str | None:
    """The classification head, which every method trains; `None` for a model without one."""
    return next((name for name in ("classifier", "score") if hasattr(model, name)), None)


def freeze_all_but_head(model: nn.Module) -> nn.Module:
    head = head_name(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head is not None and head in name.split("."))
    return model


def linear_probe(model: nn.Module) -> nn.Module:
    if head_name(model) is None:
        raise ValueError("the model has no head to train")
    return freeze_all_but_head(model)


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


INSERTED = 50  # prompts of the next


def prompts_as_rows(model: nn.Module) -> nn.Module:
    """VPT-deep as published: prompts stand behind the tokens of every block, with queries and a feed-forward part too.

    `VPTConfig` gives the same outputs without computing those; this row is what it is measured against.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "patch_size"):
        raise ValueError("it is for vision transformers here, which have no attention mask that would have to grow")

    def insert(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat([args[0], block.prompt_rows.expand(len(args[0]), -1, -1)], 1), *args[1:])

    def drop(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-INSERTED], *output[1:])
        return output[:, :-INSERTED]

    freeze_all_but_head(model)
    for described in describe(model).blocks:
        block = model.get_submodule(described.name)
        rows = nn.Parameter(torch.empty(INSERTED, config.hidden_size, device=next(block.parameters()).device))
        block.register_parameter("prompt_rows", nn.init.uniform_(rows, -0.1, 0.1))
        block.register_forward_pre_hook(insert)
        block.register_forward_hook(drop)
    return model


REFERENCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    FROZEN: freeze_all_but_head,
    "linear probe": linear_probe,
    "full fine-tuning": full,
    f"VPT, {INSERTED} prompts as rows": prompts_as_rows,
}


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def _ia3_targets(model: nn.Module) -> dict[str, Any]:
    """Keys, values and the second layer of the MLP, as published, where PEFT does not know them itself."""
    if isinstance(model, Stack):
        return {"target_modules": "all-linear", "feedforward_modules": []}
    if any(name.endswith("mlp.fc2") for name, _ in model.named_modules()):
        return {"target_modules": ["k_proj", "v_proj", "mlp.fc2"], "feedforward_modules": ["mlp.fc2"]}
    return {}


def _compared(name: str) -> Callable[[nn.Module, dict[str, Any]], PeftConfig]:
    """As the comparison of `compare.py` has it, at the size of LoRA r=8 where it can choose."""

    def config(model: nn.Module, common: dict[str, Any]) -> PeftConfig:
        if common["task_type"] is None:
            raise ValueError("it is for transformers models here, not for a stack of layers")
        return CONFIGS[name](Setting(model, str(common["task_type"]), share=1.0, steps=1_000_000, seed=0))

    return config


def _ssf_targets(model: nn.Module) -> dict[str, Any]:
    return {"target_modules": "all-linear"} if isinstance(model, Stack) else {}


def _pasta(model: nn.Module, common: dict[str, Any]) -> PeftConfig:
    """With the special tokens that the random inputs have, where they are texts."""
    is_text = isinstance(model, PreTrainedModel) and not hasattr(model.config, "image_size")
    text = {"special_tokens": list(special_ends(model.config))} if is_text else {}
    return PASTAConfig(**text, **common)


COMPARED = (  # configured as in the comparison, for models of transformers only
    *(
        "dora",
        "adalora",
        "super-tuning",
        "spiel-ag",
        "s2ft",
        "spt-random",
        "vqt",
        "unipt",
        "lora-xs",
        "sct",
        "sct-mlp",
        "snell",
    ),
    *PROMPTS,
    *REGISTERED,
)
# `common` holds the task type; registered methods that have no line here come with their defaults
ADAPTERS: dict[str, Callable[[nn.Module, dict[str, Any]], PeftConfig]] = {
    LORA: lambda model, common: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **common),
    "IA3": lambda model, common: IA3Config(**_ia3_targets(model), **common),
    "SHiRA r=8": lambda model, common: ShiraConfig(r=8, target_modules="all-linear", random_seed=0, **common),
    "LN-tuning": lambda model, common: LNTuningConfig(target_modules=_norms(model), **common),
    "SSF": lambda model, common: SSFConfig(**_ssf_targets(model), **common),
    "SSF, recover=False": lambda model, common: SSFConfig(recover=False, **_ssf_targets(model), **common),
    "Bi-LoRA r=8": lambda model, common: BinaryLoraConfig(r=8, target_modules="all-linear", **common),
    # in the phase in which it costs most: the masks are drawn and learn
    "mask-pruning LoRA r=8": lambda model, common: MaskLoraConfig(
        target_sparsity=0.25, total_steps=1_000_000, warmup_ratio=0.0, **common
    ),
    **{COST_NAMES[name]: _compared(name) for name in COMPARED},
    COST_NAMES["pasta"]: _pasta,
}
METHODS = (*REFERENCES, *ADAPTERS)


def adapt(model: nn.Module, method: str, workload: Workload) -> nn.Module:
    """Puts `method` on `model`.

    Raises:
        ValueError: It does not apply to this model.
    """
    if method in REFERENCES:
        return REFERENCES[method](model)
    return get_peft_model(model, ADAPTERS[method](model, workload.common))  # type: ignore[arg-type]
