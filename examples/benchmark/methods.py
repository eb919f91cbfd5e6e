"""The methods of the comparison by name: the config of each, how the docs call it, and how it is put on a model.

`OF_THEIR_OWN_SIZE` are the methods that cannot choose how many weights they train; the others meet the budget of
`configs.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
)
from torch import nn
from transformers import TrainerCallback

from peft_ext import (
    LoraSBConfig,
    MaskLoraConfig,
    S2FTConfig,
    SCTConfig,
    SNELLConfig,
    SparseFTConfig,
    SPTConfig,
    SSFConfig,
    UniPTConfig,
    VPTConfig,
    VQTConfig,
)
from peft_ext.core import about_of, methods


sys.path.insert(0, str(Path(__file__).resolve().parent))
import configs
from configs import Reallocate, SetMasks, Setting


PROBE, FULL, LORA = "probe", "full", "lora"


WRITTEN_OUT = (
    SSFConfig,
    S2FTConfig,
    UniPTConfig,
    VPTConfig,
    VQTConfig,
    SparseFTConfig,
    SPTConfig,
    MaskLoraConfig,
    LoraSBConfig,
    SCTConfig,
    SNELLConfig,
)  # those with a budget, below


def _default(setting: Setting, config: type[PeftConfig]) -> PeftConfig:
    """A method of which nothing is said here: its default config, calibrated if it looks at data first."""
    made = config(task_type=setting.task_type)
    if setting.batches is not None:
        with suppress(TypeError):  # which says that the method looks at no data
            return configs.calibrated(setting, made)
    return made


REGISTERED = {
    name.lower(): partial(_default, config=method.config)
    for name, method in methods().items()
    if method.config not in WRITTEN_OUT
}
CONFIGS: dict[str, Callable[[Setting], PeftConfig]] = {
    **REGISTERED,  # an entry of their own below gives them a budget
    LORA: lambda setting: LoraConfig(**setting.ranked()),
    "dora": lambda setting: LoraConfig(use_dora=True, **setting.ranked()),
    "adalora": configs.adalora,
    "ia3": configs.ia3,
    "ln": configs.ln,
    "shira": configs.shira,
    "super-tuning": configs.supertuning,
    "ssf": lambda setting: SSFConfig(task_type=setting.task_type),
    "vqt": configs.vqt,
    "unipt": configs.unipt,
    "unipt-states": partial(configs.unipt, identity="states"),
    "bi-lora": partial(configs.binary_lora, bits=1),
    "bi-adaptformer": partial(configs.binary_adapter, bits=1),
    "adapter": partial(configs.binary_adapter, bits=32),
    "pasta": configs.pasta,
    "vpt": partial(configs.vpt, num_tokens=10),
    "vpt-50": partial(configs.vpt, num_tokens=50),
    "vpt-class-tokens": configs.vpt_class_tokens,
    "vpt-shallow": partial(configs.vpt, num_tokens=50, deep=False),
    "e2vpt": partial(configs.vpt, num_tokens=5, kv_tokens=5),
    **{
        name: partial(configs.sparse, selection=name)
        for name in ("spiel-ag", "spiel-ma", "lt-sft", "random", "smallest")
    },
    # not replacing the whole support at first
    "spiel-ag-cosine": partial(configs.sparse, selection="spiel-ag", reselection_policy="cosine"),
    "spiel-ag-100": partial(
        configs.sparse, selection="spiel-ag", reselection_steps=100
    ),  # instead of 20, as published
    "spiel-ag-drawn": partial(configs.sparse, selection="spiel-ag", spread=1.0),  # candidates in proportion to |g|
    "sensitivity": lambda setting: configs.calibrated(setting, configs.sparse(setting, "sensitivity")),
    "sensitivity-drawn": lambda setting: configs.calibrated(
        setting, configs.sparse(setting, "sensitivity", spread=2.0)
    ),
    "s2ft": configs.s2ft,
    "s2ft-activation": partial(configs.s2ft, selection="activation"),
    "s2ft-everywhere": partial(configs.s2ft, kinds=("v", "o", "up", "down")),  # instead of the second layers alone
    "spt": configs.spt,
    "spt-drawn": partial(configs.spt, spread=2.0),  # in proportion to |g|, as scores are squares
    "spt-random": partial(configs.spt, at_random=True),
    "lora-sb": configs.lora_sb,
    "lora-xs": partial(configs.lora_sb, start="weights"),
    "snell": configs.snell,
    "snell-weight": partial(configs.snell, gate="weight"),
    "snella": partial(configs.snell, sparsity=0.8, allocation="adaptive"),
    "sct": partial(configs.sct, site="attn"),
    "sct-mlp": partial(configs.sct, site="mlp"),
    "fused_low_rank": configs.fused,
    "wegeft": partial(configs.wegeft, share="target"),
    "wegeft-apart": partial(configs.wegeft, share="none"),
    **{
        f"{how}-{percent}": partial(configs.pruning, how=how, sparsity=percent / 100)
        for percent in (20, 25, 50)
        for how in ("mask", "magnitude", "random")
    },
    "mask-25-distilled": partial(configs.distilled_pruning, sparsity=0.25),
}
METHODS = (PROBE, FULL, *CONFIGS)
COST_NAMES = {  # as `cost.py` calls them
    **{name: about_of(name.upper()).name for name in REGISTERED},
    PROBE: "linear probe",
    FULL: "full fine-tuning",
    LORA: "LoRA r=8",
    "dora": "DoRA r=8",
    "adalora": "AdaLoRA",
    "ia3": "IA3",
    "ln": "LN-tuning",
    "shira": "SHiRA r=8",
    "super-tuning": "Super-Tuning",
    "ssf": "SSF",
    "vqt": "VQT, 4 queries",
    "unipt": "UniPT",
    "pasta": "PASTA",
    "vpt": "VPT, 10 prompts",
    "vpt-50": "VPT, 50 prompts",
    "vpt-shallow": "VPT-shallow, 50 prompts",
    "e2vpt": "E2VPT, 5 prompts, 5 rows",
    "spiel-ag": "SpIEL-AG",
    "s2ft": "S2FT",
    "spt-random": "SPT, at random",
    "wegeft": "WeGeFT",
    "lora-xs": "LoRA-XS",
    "bi-lora": "Bi-LoRA r=8",
    "snell": "SNELL",
    "sct": "SCT",
    "sct-mlp": "SCT on the feed-forward part",
    "mask-25": "mask-pruning LoRA r=8",
}
TITLES = COST_NAMES | {  # as the docs call them; what is not here is called by its key
    "lora": "LoRA",
    "dora": "DoRA",
    "shira": "SHiRA",
    "vqt": "VQT",
    "vpt-class-tokens": "VPT, from class tokens",
    "bi-lora": "Bi-LoRA, 1 bit",
    "bi-adaptformer": "Bi-AdaptFormer, 1 bit",
    "adapter": "bottleneck adapter",
    "unipt-states": "UniPT, states",
    "spiel-ma": "SpIEL-MA",
    "spiel-ag-cosine": "SpIEL-AG, cosine policy",
    "spiel-ag-100": "SpIEL-AG, every 100 steps",
    "lt-sft": "LT-SFT",
    "random": "sparse, at random",
    "smallest": "sparse, smallest weights",
    "spiel-ag-drawn": "SpIEL-AG, drawn",
    "sensitivity": "sparse, by sensitivity",
    "sensitivity-drawn": "sparse, drawn by sensitivity",
    "spt-drawn": "SPT, drawn",
    "s2ft-activation": "S2FT, small activations",
    "s2ft-everywhere": "S2FT, all kinds of module",
    "spt": "SPT",
    "lora-sb": "LoRA-SB",
    "snell-weight": "SNELL, gate of the code",
    "snella": "SNELL, adaptive",
    "wegeft-apart": "WeGeFT, maps not shared",
    "mask-25-distilled": "mask-pruning LoRA, 25 %, calibrated and distilled",
    **{f"mask-{percent}": f"mask-pruning LoRA, {percent} %" for percent in (20, 25, 50)},
    **{f"magnitude-{percent}": f"LoRA, {percent} % cut by magnitude" for percent in (20, 25, 50)},
    **{f"random-{percent}": f"LoRA, {percent} % cut at random" for percent in (20, 25, 50)},
}


def title(method: str) -> str:
    """How the docs call it."""
    return TITLES.get(method, method)


BUILT_IN = (PROBE, FULL, LORA, "dora", "adalora", "ia3", "ln", "shira", "super-tuning")  # PEFT's, and none
PROMPTS = ("vpt", "vpt-50", "vpt-shallow", "e2vpt")
OF_THEIR_OWN_SIZE = {
    PROBE,
    FULL,
    "ia3",
    "ln",
    "ssf",
    "vqt",
    *PROMPTS,
    "vpt-class-tokens",
    "pasta",
    "fused_low_rank",
} | {name for name, make in REGISTERED.items() if CONFIGS[name] is make}


def is_experiment(method: str) -> bool:
    """Whether it is a folder of PEFT's method comparison: an `adapter_config.json` and perhaps more."""
    return (Path(method) / "adapter_config.json").exists()


def adapt(method: str, setting: Setting) -> tuple[nn.Module, PeftConfig | None]:
    """The model with `method` on it, ready to be trained, and the config if there is one.

    With LT-SFT the model comes back as it is, since `peft_ext.lt_sft` adapts it.
    """
    model: Any = setting.model
    if method == FULL:
        return model.requires_grad_(True), None
    if method == PROBE:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool({"classifier", "score"} & set(name.split("."))))
        return model, None
    config = PeftConfig.from_pretrained(method) if is_experiment(method) else CONFIGS[method](setting)
    if method == "lt-sft":
        return model, config
    return get_peft_model(model, config), config


def callbacks(method: str, setting: Setting) -> list[TrainerCallback]:
    """What the `Trainer` needs for it."""
    how, _, percent = method.rpartition("-")
    if how in ("magnitude", "random") and percent.isdecimal():
        return [SetMasks(how, setting.steps, setting.seed)]
    return [Reallocate()] if method == "adalora" else []
