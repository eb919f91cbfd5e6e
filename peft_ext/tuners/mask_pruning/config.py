"""The configuration of mask-pruning LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...core import CalibratedConfig
from ...groups import KINDS
from ...sparse import check_spread


DEFAULT_SPARSITY = 0.25
COSTS = ("parameters", "flops", "latency")
TEACHERS = ("frozen", "self")


@dataclass
class MaskLoraConfig(CalibratedConfig):
    """Configuration of mask-pruning LoRA; see also the common fields of [`ExtConfig`].

    Training has three phases: LoRA alone, masks that are learnt along with it, and masks that are decided while LoRA
    goes on. `target_modules` are those of LoRA (`None`: all Linear modules of the backbone, and GPT-2's Conv1D); what
    is pruned follows from the architecture.

    Args:
        r: Rank of LoRA.
        lora_alpha: The low-rank product is scaled by `lora_alpha / r`.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        lora_dropout: Of LoRA's input.
        prune: What is masked: `"ffn"`, the channels of feed-forward blocks; `"heads"`, attention heads (key-value heads
            with all their queries). `None`: those of them that the architecture has.
        groups: Which channels hang together, for an architecture that is not known: a list of entries like
            `{"kind": "ffn", "rows": ["mlp.fc1"], "columns": "mlp.fc2"}`; see `peft_ext.groups.Rule`.
        target_sparsity: Share of the prunable weights (or of what `cost` says) that is removed, in (0, 1); the masks
            that are decided remove it. `None`: as much as `penalty` makes them, or 0.25 without a `penalty`.
        cost: What a unit counts for: its `"parameters"`, its `"flops"` on sequences of `sequence_length` tokens, or
            the `"latency"` that it adds there, measured on the device that the model is on.
        sequence_length: Tokens (or patches) of a sample, for the last two.
        batch_size: Samples, for `cost="latency"`.
        penalty: lambda, the weight of the expected share of what is kept in the objective, without `target_sparsity`.
        total_steps: Optimizer steps of the training; `MaskLoraCallback` takes it from the Trainer.
        warmup_ratio: Share of the steps with LoRA alone.
        fix_ratio: Share of the steps after which the masks are decided.
        ramp_ratio: Share of the steps between the two in which the sparsity rises to `target_sparsity`.
        initial_temperature: Of the sigmoid, when the masks begin to learn.
        final_temperature: When they are decided.
        mask_lr_ratio: How many times faster than LoRA the logits learn (with Adam; its square with SGD).
        init_logits: `"constant"`: all begin at `initial_logit`; `"sensitivity"`: in the order that
            `peft_ext.calibrate(model, config, dataloader)` finds.
        spread: Of `init_logits="sensitivity"`: 0 is the order of the scores; above 0 it is drawn, each place with
            chances in proportion to score^(1 / spread) among those that are left.
        initial_logit: Logit of a unit at the beginning; it is kept with the probability sigmoid(logit).
        uniform: Remove as much from every layer, so that a stock model class can load what is left.
        round_to: Keep multiples of so many feed-forward channels.
        distillation: Weight of the divergence from the output of a teacher without masks in the loss; 0 leaves it out.
        distillation_teacher: `"frozen"`: the dense model without the adapter; `"self"`: the model as it is, with LoRA
            and its heads, but without masks. `None`: `"self"` if the adapter trains a fresh head, which makes the
            frozen model's output meaningless, else `"frozen"`.
        distillation_temperature: Of both distributions in that divergence.
        seed: Of the masks' noise, and of what is drawn.
        unit_costs: Seconds of a unit of each group, for `cost="latency"`; measured if it is left out.
        lora_modules: Modules with LoRA, where these are fewer than those with masks; filled in by itself.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    METHOD: ClassVar[str] = "MASK_PRUNING"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = (
        "lora_dropout",
        "penalty",
        "warmup_ratio",
        "distillation",
        "distillation_teacher",
        "distillation_temperature",
        "spread",
        "seed",
    )
    SIZES: ClassVar[tuple[str, ...]] = ("r",)

    r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of LoRA, times r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA's input."})
    prune: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(KINDS)}; None: what there is."})
    groups: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Which channels hang together, for unknown architectures."}
    )
    target_sparsity: float | None = field(default=None, metadata={"help": "Share of the prunable weights to remove."})
    cost: str = field(default="parameters", metadata={"help": f"What is counted: {', '.join(COSTS)}."})
    sequence_length: int | None = field(default=None, metadata={"help": "Tokens of a sample, for other costs."})
    batch_size: int | None = field(default=None, metadata={"help": "Samples, for cost='latency'."})
    penalty: float | None = field(default=None, metadata={"help": "Weight of what is kept in the objective."})
    total_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the training."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps with LoRA alone."})
    fix_ratio: float = field(default=0.7, metadata={"help": "Share of the steps after which masks are decided."})
    ramp_ratio: float = field(default=0.5, metadata={"help": "Part of the mask phase in which sparsity rises."})
    initial_temperature: float = field(default=1.0, metadata={"help": "Of the sigmoid, at first."})
    final_temperature: float = field(default=0.3, metadata={"help": "Of the sigmoid, at last."})
    mask_lr_ratio: float = field(default=50.0, metadata={"help": "Learning rate of the logits over LoRA's."})
    init_logits: str = field(default="constant", metadata={"help": "'constant' or 'sensitivity'."})
    spread: float = field(default=0.0, metadata={"help": "Of calibrated logits: how far their order is drawn."})
    initial_logit: float = field(default=3.0, metadata={"help": "Logit of a unit at the beginning."})
    uniform: bool = field(default=False, metadata={"help": "Remove as much from every layer."})
    round_to: int = field(default=1, metadata={"help": "Keep multiples of so many channels."})
    distillation: float = field(default=0.0, metadata={"help": "Weight of the divergence from a model without masks."})
    distillation_teacher: str | None = field(default=None, metadata={"help": f"Which: {', '.join(TEACHERS)}."})
    distillation_temperature: float = field(default=2.0, metadata={"help": "Of that divergence."})
    seed: int = field(default=0, metadata={"help": "Of the masks' noise, and of what is drawn."})
    unit_costs: dict[str, float] | None = field(default=None, metadata={"help": "Measured, for cost='latency'."})
    lora_modules: list[str] | None = field(default=None, metadata={"help": "Modules with LoRA; leave empty."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"`r` must be a positive integer, got {self.r!r}.")
        if isinstance(self.prune, str):
            self.prune = [self.prune]
        if self.prune is not None and (not self.prune or set(self.prune) - set(KINDS)):
            raise ValueError(f"`prune` must name some of {', '.join(KINDS)}, got {self.prune!r}.")
        if self.target_sparsity is not None:
            if not 0 < self.target_sparsity < 1:
                raise ValueError(f"`target_sparsity` must be between 0 and 1, got {self.target_sparsity!r}.")
            if self.penalty is not None:
                raise ValueError("Give either `target_sparsity`, which is met whatever it takes, or `penalty`.")
        elif self.penalty is None:
            self.target_sparsity = DEFAULT_SPARSITY
        elif not self.penalty > 0:
            raise ValueError(f"`penalty` must be positive, got {self.penalty!r}.")
        if self.cost not in COSTS:
            raise ValueError(f"`cost` must be one of {', '.join(COSTS)}, got {self.cost!r}.")
        if (self.cost == "parameters") != (self.sequence_length is None):
            raise ValueError("`sequence_length` goes with `cost='flops'` or `cost='latency'`: give both or neither.")
        if (self.cost == "latency") != (self.batch_size is not None):
            raise ValueError("`batch_size` goes with `cost='latency'`: give both or neither.")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"`total_steps` must be positive, got {self.total_steps!r}.")
        if not 0 <= self.warmup_ratio < self.fix_ratio <= 1:
            raise ValueError(
                f"`warmup_ratio` and `fix_ratio` must be in this order between 0 and 1, got {self.warmup_ratio!r} and "
                f"{self.fix_ratio!r}."
            )
        if self.init_logits not in ("constant", "sensitivity"):
            raise ValueError(f"`init_logits` must be 'constant' or 'sensitivity', got {self.init_logits!r}.")
        check_spread(self.spread)
        if self.spread and self.init_logits != "sensitivity":
            raise ValueError("`spread` has no effect without `init_logits='sensitivity'`: set that, or leave it out.")
        if not (isinstance(self.round_to, int) and self.round_to > 0):
            raise ValueError(f"`round_to` must be a positive integer, got {self.round_to!r}.")
        for name in ("lora_dropout", "ramp_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)!r}.")
        for name in ("initial_temperature", "final_temperature", "mask_lr_ratio", "distillation_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}.")
        if self.distillation < 0:
            raise ValueError(f"`distillation` must not be negative, got {self.distillation!r}.")
        if self.distillation_teacher not in (None, *TEACHERS):
            raise ValueError(
                f"`distillation_teacher` must be one of {', '.join(TEACHERS)} or None, got {self.distillation_teacher!r}."
            )

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not finite logits of units."""
        for name, logits in sorted(support.items()):
            if logits.ndim != 1 or not logits.is_floating_point() or not logits.isfinite().all():
                raise ValueError(f"The calibration in {where} is damaged: {name!r} has no vector of finite logits.")

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the training: `total_steps`, or else what a callback has from its Trainer."""
        return self.trainer_steps if self.total_steps is None else self.total_steps

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
