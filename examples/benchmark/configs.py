"""What each method of the comparison puts on a model, at a given number of trained weights, and what it needs beside.

The budget is counted in multiples of what LoRA r=8 has on all Linear modules of the backbone. The classification head is
trained with each and does not count. What the methods are called stands in `methods.py`.
"""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerCallback

import peft_ext
from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    LoraFusionConfig,
    LoraSBConfig,
    MaskLoraConfig,
    PASTAConfig,
    S2FTConfig,
    SCTConfig,
    SNELLConfig,
    SparseFTConfig,
    SPTConfig,
    UniPTConfig,
    VPTConfig,
    VQTConfig,
    WeGeFTConfig,
    fix_masks,
)
from peft_ext.architectures import describe
from peft_ext.batches import batches
from peft_ext.channel_norms import ChannelNorms
from peft_ext.core import features_of, tuner_of
from peft_ext.tuners.mask_pruning import MaskLoraLayer


HEADS = {"classifier", "score", "lm_head", "pooler"}
FIX_RATIO = 0.5  # of the steps, after which the masks of mask pruning are decided


def rank_one(module: nn.Linear | nn.Conv2d) -> int:
    """The weights of LoRA with rank 1."""
    weight = module.weight
    return weight[0].numel() + len(weight)


@dataclass(frozen=True)
class Setting:
    """What a method's config depends on.

    Args:
        model: The pretrained model.
        task_type: PEFT's.
        share: The budget in multiples of LoRA r=8's.
        steps: Of the whole training.
        seed: Of what is chosen at random.
        batches: Of the training data, for those that look at data first.
    """

    model: nn.Module
    task_type: str
    share: float
    steps: int
    seed: int
    batches: DataLoader[Any] | None = None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The Linear modules of the backbone."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not HEADS & set(name.split("."))
        }

    @property
    def targets(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """What is adapted: the Linear modules; in a network without any the convolutions that mix channels."""
        if self.linears:
            return dict(self.linears)
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1
        }

    @property
    def budget(self) -> int:
        """Trained weights."""
        return int(self.share * 8 * sum(map(rank_one, self.targets.values())))

    @property
    def common(self) -> dict[str, Any]:
        return {"task_type": self.task_type, "target_modules": list(self.targets)}

    def ranked(self) -> dict[str, Any]:
        """Rank and targets of a low-rank method: all of `targets`; below rank 1 on those, the queries and values.

        Raises:
            ValueError: The budget is below that, too.
        """
        rank = round(8 * self.share)
        if 8 * self.share >= 1:
            return {"r": rank, "lora_alpha": 2 * rank, **self.common}
        ends = ("query", "value", "q_proj", "v_proj")
        fewer = {name: linear for name, linear in self.linears.items() if name.endswith(ends)}
        rank = self.budget // max(1, sum(map(rank_one, fewer.values())))
        if rank < 1:
            raise ValueError(f"a budget of {self.budget} weights is below rank 1 on the queries and values")
        return {"r": rank, "lora_alpha": 2 * rank, "task_type": self.task_type, "target_modules": list(fewer)}


# PEFT's own


def adalora(setting: Setting) -> PeftConfig:
    options = setting.ranked()
    rank = options.pop("r")
    early, late = setting.steps // 10, setting.steps // 3
    return AdaLoraConfig(
        target_r=rank,
        init_r=round(1.5 * rank),
        total_step=setting.steps,
        tinit=early,
        tfinal=late,
        deltaT=5,
        **options,
    )


def ia3(setting: Setting) -> PeftConfig:
    """Keys, values and the second layer of the MLP, as published."""
    keys_and_values = ("key", "value", "k_proj", "v_proj")
    second = ("output.dense", "down_proj", "mlp.fc2")
    feedforward = [
        name for name in setting.linears if name.endswith(second) and not name.endswith("attention.output.dense")
    ]
    targets = [name for name in setting.linears if name.endswith(keys_and_values)] + feedforward
    return IA3Config(task_type=setting.task_type, target_modules=targets, feedforward_modules=feedforward)


def ln(setting: Setting) -> PeftConfig:
    norms = [name for name, module in setting.model.named_modules() if type(module).__name__.endswith("Norm")]
    return LNTuningConfig(task_type=setting.task_type, target_modules=norms)


def shira(setting: Setting) -> PeftConfig:
    options = setting.ranked()
    del options["lora_alpha"]
    return ShiraConfig(random_seed=setting.seed, **options)


def supertuning(setting: Setting) -> PeftConfig:
    targeted = sum(module.weight.numel() for module in setting.targets.values())
    return SupertuningConfig(sparsity=1 - setting.budget / targeted, **setting.common)


# This package's


def sparse(setting: Setting, selection: str, **options: Any) -> PeftConfig:
    return SparseFTConfig(
        selection=selection,
        **options,
        num_tunable_weights=setting.budget,
        total_steps=setting.steps if selection.startswith("spiel") else None,
        seed=setting.seed,
        **setting.common,
    )


def calibrated(setting: Setting, config: PeftConfig) -> PeftConfig:
    return peft_ext.calibrate(setting.model, config, setting.batches, num_batches=16, progress=False)


def spt(setting: Setting, at_random: bool = False, spread: float = 0.0) -> PeftConfig:
    """Without dropout, as LoRA here: only where the parameters are differs."""
    plain: dict[str, Any] = {"r": 8, "lora_alpha": 16, "dropout": 0.0, "drop_path": 0.0}
    config = SPTConfig(task_type=setting.task_type, budget=setting.budget, spread=spread, seed=setting.seed, **plain)
    if at_random:  # the same budget, the same kinds of module, but spent without having looked
        return peft_ext.calibrate(setting.model, config, kind="random", progress=False)
    return calibrated(setting, config)


def s2ft(setting: Setting, kinds: tuple[str, ...] = ("down",), **options: Any) -> PeftConfig:
    """The second layers of the feed-forward blocks, as published; the first, too, where these have too few weights."""
    for taken in (kinds, (*kinds, "up")):
        names = describe(setting.model).modules(taken)
        share = setting.budget / sum(setting.linears[name].weight.numel() for name in names)
        if share <= 1:
            break
    else:
        raise ValueError(f"a budget of {setting.budget} weights is more than the feed-forward blocks have")
    config = S2FTConfig(ratios=dict.fromkeys(taken, share), seed=setting.seed, task_type=setting.task_type, **options)
    return calibrated(setting, config) if options else config


def vqt(setting: Setting) -> PeftConfig:
    return VQTConfig(task_type=setting.task_type if hasattr(setting.model, "bert") else None, num_queries=4)


def unipt(setting: Setting, identity: str = "attention") -> PeftConfig:
    """A side network as wide as the budget allows.

    Raises:
        ValueError: The budget is below a side network of one channel.
    """
    config: Any = setting.model.config
    width, states = config.hidden_size, config.num_hidden_layers + 1
    sizes = {}
    for factor in (factor for factor in range(1, width + 1) if width % factor == 0):
        channels = width // factor
        sizes[factor] = states * channels * (width + 1) + channels + (channels + 1) * width
        if identity == "attention":  # its norms, and a projection with one more
            sizes[factor] += 2 * states * channels + channels * (channels + 3)
    factor = next((factor for factor, size in sizes.items() if size <= setting.budget), None)
    if factor is None:
        raise ValueError(f"a budget of {setting.budget} weights is below a side network of one channel")
    task_type = setting.task_type if hasattr(setting.model, "bert") else None
    return UniPTConfig(task_type=task_type, identity=identity, reduction_factor=factor)


def wegeft(setting: Setting, share: str) -> PeftConfig:
    """On all Linears; maps that all layers share have a higher rank at the same size.

    Raises:
        ValueError: The budget is below rank 1.
    """
    widths = [(re.sub(r"\d+", "", name), linear.in_features) for name, linear in setting.linears.items()]
    rank = setting.budget // (2 * sum(width for _, width in (set(widths) if share == "target" else widths)))
    if rank < 1:
        raise ValueError(f"a budget of {setting.budget} weights is below rank 1 on all Linear modules")
    return WeGeFTConfig(r=rank, share=share, **setting.common)


def pasta(setting: Setting) -> PeftConfig:
    """With the special tokens of the tokenizer where there is text; those of language models are in their config."""
    if not hasattr(setting.model, "bert"):
        return PASTAConfig(task_type=setting.task_type)
    special = [1, 2]  # of a model that was made here, and has no tokenizer
    if setting.model.name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(setting.model.name_or_path)
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    return PASTAConfig(task_type=setting.task_type, special_tokens=special)


def lora_sb(setting: Setting, start: bool | str = True) -> PeftConfig:
    """The side of the matrices is what the budget allows, or the narrowest Linear."""
    narrowest = min(min(linear.in_features, linear.out_features) for linear in setting.linears.values())
    side = min(int((setting.budget / len(setting.linears)) ** 0.5), narrowest)
    config = LoraSBConfig(r=max(1, side), init_weights=start, **setting.common)
    return calibrated(setting, config) if start is True else config


def sct(setting: Setting, site: str) -> PeftConfig:
    """As many channels as the budget has room for, at random where there is no data to look at."""
    tuner = tuner_of(SCTConfig(site=site))
    sites = tuner.channel_sites(SCTConfig(site=site), setting.model)
    modules = [setting.model.get_submodule(place.module) for place in sites.values()]
    widths = [features_of(m)[place.side == "outputs"] for m, place in zip(modules, sites.values(), strict=True)]
    channels = min(int((setting.budget / len(sites)) ** 0.5), *widths)
    config = SCTConfig(site=site, num_channels=max(1, channels), task_type=setting.task_type)
    if setting.batches is not None:
        return calibrated(setting, config)
    chance, generator = ChannelNorms(), torch.Generator().manual_seed(setting.seed)
    chance.sums = {
        name: {0: torch.rand(width, generator=generator)} for name, width in zip(sites, widths, strict=True)
    }
    tuner.take_scores(config, setting.model, chance)
    return config


def snell(setting: Setting, **options: Any) -> PeftConfig:
    """LoRA's rank, rounded to an even number, since half of it is for each of two distances."""
    ranked = setting.ranked()
    del ranked["lora_alpha"]
    ranked["r"] = max(2, 2 * (ranked["r"] // 2))
    if "allocation" in options:
        options = {**options, "total_steps": setting.steps}
    return SNELLConfig(**options, **ranked)


LORAS = tempfile.TemporaryDirectory(prefix="peft_ext_loras_")  # they are read when the model is adapted
GIVEN = 4


def fused(setting: Setting) -> PeftConfig:
    """Of four LoRAs, each trained on a fourth of the training batches, with a head that is left out of it.

    Without data, for what a step costs, of LoRAs that are as they start.
    """
    paths = []
    for part in range(GIVEN):
        torch.manual_seed(setting.seed + part)
        model = get_peft_model(copy.deepcopy(setting.model), LoraConfig(**setting.ranked()))
        if setting.batches is not None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            for number, batch in enumerate(batches(setting.batches, len(setting.batches), model)):
                if number % GIVEN == part:
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        path = Path(tempfile.mkdtemp(dir=LORAS.name))
        tensors = get_peft_model_state_dict(model)
        model.peft_config["default"].save_pretrained(str(path))
        save_file(
            {key: t.contiguous() for key, t in tensors.items() if ".lora_" in key}, path / "adapter_model.safetensors"
        )
        paths.append(str(path))
    return LoraFusionConfig(adapters=paths, task_type=setting.task_type)


def vpt(setting: Setting, **options: Any) -> PeftConfig:
    return VPTConfig(task_type=setting.task_type, **options)


def vpt_class_tokens(setting: Setting) -> PeftConfig:
    """A prompt for each class, which starts at its mean class token."""
    config: Any = setting.model.config
    return calibrated(setting, vpt(setting, num_tokens=config.num_labels, init_weights="class-tokens"))


def pruning(setting: Setting, how: str, sparsity: float, **options: Any) -> PeftConfig:
    # the controls train LoRA alone until `SetMasks` decides
    phases: dict[str, Any] = (
        {"fix_ratio": FIX_RATIO} if how == "mask" else {"warmup_ratio": FIX_RATIO, "fix_ratio": 1.0}
    )
    return MaskLoraConfig(
        target_sparsity=sparsity, total_steps=setting.steps, seed=setting.seed, **phases, **options, **setting.ranked()
    )


def distilled_pruning(setting: Setting, sparsity: float) -> PeftConfig:
    """With the logits in the order of the scores, and the model without masks as a teacher."""
    config = pruning(setting, "mask", sparsity, init_logits="sensitivity", distillation=1.0)
    return calibrated(setting, config)


class SetMasks(TrainerCallback):
    """The controls of mask pruning: decides the masks by the weights' magnitude, or at random, while LoRA trains.

    At random from the first step on; by magnitude when learnt masks would be decided too, by the weights with LoRA in
    them: the mean square of a unit's columns, as a multiple of the group's mean.
    """

    def __init__(self, how: str, steps: int, seed: int) -> None:
        self.how, self.seed = how, seed
        self.when = 1 if how == "random" else round(FIX_RATIO * steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.when:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for module in kwargs["model"].modules():
            if isinstance(module, MaskLoraLayer) and "default" in module.mask_pruning_gate:
                gate: Any = module.mask_pruning_gate["default"]
                units, width = gate.group.units, gate.group.width
                if self.how == "random":
                    values = torch.rand(units, generator=generator)
                else:
                    weight = module.merged_tensors("default")["weight"].detach()
                    values = weight.square().mean(0).view(units, width).mean(1)
                    values = values / values.mean()
                gate.weight.data = values / gate.rate
        fix_masks(kwargs["model"])


class Reallocate(TrainerCallback):
    """What AdaLoRA needs after each step, while the gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def binary_lora(setting: Setting, bits: int) -> PeftConfig:
    """LoRA's rank and scale, so that trained weights are those of LoRA."""
    options = setting.ranked()
    return BinaryLoraConfig(bits=bits, scale=options.pop("lora_alpha") / options["r"], **options)


def binary_adapter(setting: Setting, bits: int) -> PeftConfig:
    """As wide a bottleneck as the budget has room for, beside the feed-forward part of each block."""
    parts = [part for block in describe(setting.model).blocks for part in block.ffn]
    ends = [
        setting.linears[part.gate or part.up].in_features + setting.linears[part.down].out_features for part in parts
    ]
    width = setting.budget // max(1, sum(ends))
    if width < 1:
        raise ValueError(f"a budget of {setting.budget} weights is below a bottleneck of width 1")
    return BinaryAdapterConfig(r=width, bits=bits, task_type=setting.task_type)
