r"""The masks: how they are drawn, driven and decided.

A unit c with the logit a_c is kept with the probability sigmoid(a_c). In training its mask is drawn anew in each step,

    s = sigmoid((a + g) / tau)     with g logistic noise and tau the temperature
    h = 1[a + g > 0]               P(h = 1) = sigmoid(a), whatever tau is
    m = h + s - stopgrad(s)        h in the forward, the gradient of s in the backward

and in evaluation it is 1[a > 0]. The expected share that is removed, sum_c cost_c sigmoid(-a_c) / sum_c cost_c, needs
no sampling. With a penalty, its gradient is added to that of the logits. With a target, all logits are shifted
together after each step by the one number that makes the expected share the target of that step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ...core import ExactLeaf
from ...core.schedule import exempt_from_weight_decay, listen_to_steps
from ...core.sharding import held_by, part_like, put, refusal, whole
from ...groups import Group
from .config import MaskLoraConfig


UNDECIDED = -1


class MaskGate(ExactLeaf):
    """The mask of one group: `weight` `(units,)`, the logits divided by `rate`.

    An optimizer of Adam's kind moves the logits `rate` times as fast as other parameters. No optimizer decays them.
    The buffer `kept` `(units,)` says which units were decided to stay, and `progress` how many steps were made; both
    are saved, so that a training resumes from the adapter alone. `kept` is fp32, since an average of integers would be
    truncated to another decision, which nobody could tell from a real one.
    """

    former_dtypes: ClassVar[dict[str, torch.dtype]] = {"kept": torch.int8}  # in files of version 0.1
    is_open = False  # nothing is masked: for a teacher without masks

    def __init__(self, group: Group, rate: float, logits: torch.Tensor) -> None:
        super().__init__()
        self.group, self.rate = group, rate
        self.weight = nn.Parameter(logits / rate)
        self.register_buffer("kept", torch.full((group.units,), float(UNDECIDED)))
        self.register_buffer("progress", torch.zeros(1, dtype=torch.int64))
        self.kept: torch.Tensor
        self.progress: torch.Tensor
        self.schedule: MaskSchedule | None = None
        self.index = 0  # among the gates of the schedule
        self._is_fixed: bool | None = None  # not looked up yet
        self._seen: tuple[torch.Tensor, int] | None = None  # `kept` and its version then
        exempt_from_weight_decay(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        exempt_from_weight_decay(self)
        if self.schedule is not None:
            listen_to_steps(self)

    def drive(self, schedule: MaskSchedule, index: int) -> None:
        """Lets a schedule drive the gate, which tells it of the optimizer steps that move the logits."""
        self.schedule, self.index = schedule, index
        listen_to_steps(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_fixed = None
        if self.schedule is not None:
            self.schedule.forget()

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the masks of a file are none."""
        found = set(tensors["kept"].unique().tolist())
        if not (found <= {0, 1} or found == {UNDECIDED}):
            raise ValueError(f"`kept` must be {UNDECIDED} everywhere, or 0 and 1, got {sorted(found)[:5]}")
        if int(tensors["progress"]) < 0:
            raise ValueError(f"`progress` is a number of steps, got {int(tensors['progress'])}")

    @property
    def is_fixed(self) -> bool:
        """Whether it is decided which units stay; a `ValueError` if `kept` says what no decision can be."""
        if self.kept.is_meta:
            return False
        if self._is_fixed is None or not (torch.compiler.is_compiling() or self._is_current()):
            self._is_fixed = self._look()
        return self._is_fixed

    def train(self, mode: bool = True) -> MaskGate:
        """Also looks whether the masks are decided: writing to `kept.data` leaves no trace at the tensor."""
        super().train(mode)
        self._is_fixed = None
        _ = self.is_fixed
        return self

    def _is_replaced(self) -> bool:
        """Whether `kept` is another tensor than the one looked at, as transformers' loader makes it."""
        return self._seen is None or self._seen[0] is not self.kept

    def _is_current(self) -> bool:
        """Whether `kept` is what it was when it was looked at: a copy of a model is often written to in place."""
        return self._seen is not None and not self._is_replaced() and self._seen[1] == self.kept._version

    def _look(self) -> bool:
        found = set(self.kept.tolist())
        if found <= {0, 1} or found == {UNDECIDED}:
            self._seen = None if self.kept.is_inference() else (self.kept, self.kept._version)
            return UNDECIDED not in found
        raise ValueError(
            f"The mask of {self.group.name!r} holds {min(found - {0, 1, UNDECIDED}, default=UNDECIDED):.4g}, where a "
            "decision is 0 or 1: it was averaged (EMA, SWA) or damaged. Average the parameters and copy the buffers: "
            "`torch.optim.swa_utils.AveragedModel(model, ...)` with `use_buffers=False`, its default."
        )

    def logits(self) -> torch.Tensor:
        """`(units,)` in fp32, detached; gathered where each process holds a part of them."""
        return whole(self.weight).float() * self.rate

    @torch.no_grad()
    def fix(self, kept: torch.Tensor) -> None:
        """Decides which units stay, `kept` `(units,)` of booleans."""
        self.kept.copy_(kept)
        self._is_fixed = None

    def hard(self) -> torch.Tensor:
        """The mask of evaluation, `(units,)` of zeros and ones in fp32; NaN where the logits are and count."""
        return self._decided(self.logits())

    def _decided(self, logits: torch.Tensor) -> torch.Tensor:
        """What is decided, or the logits rounded; which of both is seen in `kept` itself, however it was written."""
        _ = self.is_fixed  # refuses what can be no decision
        rounded = torch.where(logits.isnan(), logits, (logits > 0).float())  # a gradient of zero, and NaN stays
        return torch.where(self.kept == UNDECIDED, rounded, self.kept.float())

    def forward(self) -> torch.Tensor | None:
        """The mask `(units,)`, in fp32; `None` where nothing is masked."""
        if self.is_open:
            return None
        if self.training:
            return self._training_mask()
        return self._decided(self.weight.float() * self.rate)  # while a leaf runs, its weight is whole

    @torch.compiler.disable  # noise and temperature are others in each step, and would have all compiled again
    def _training_mask(self) -> torch.Tensor | None:
        schedule = self.schedule
        if schedule is not None and torch.is_grad_enabled():
            schedule.note_use()
        # what is known is enough here: distributed training writes buffers in every forward, the same as they were
        is_fixed = self.is_fixed if self._is_fixed is None or self._is_replaced() else self._is_fixed
        if is_fixed or schedule is None or not schedule.is_learning:
            mask = self.kept.float() if is_fixed else None
            if torch.distributed.is_initialized() and self.weight.requires_grad:
                # distributed training wants a gradient, if only of zero, for every parameter in every step
                mask = (torch.ones_like(self.weight) if mask is None else mask) + 0 * self.weight.float()
            return mask
        noisy = self.weight.float() * self.rate + schedule.noise_of(self)
        soft = torch.sigmoid(noisy / schedule.temperature)
        return (noisy > 0).float() + soft - soft.detach()

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Adds the gradient of the penalty; raises `ValueError` if the masks cannot learn."""
        if self.schedule is not None:
            self._refuse_flattened(optimizer)
            self.schedule.before_step(self, optimizer, closure)

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts."""
        if self.schedule is not None:
            self.schedule.after_step(self, taken)

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Of no concern, unless that optimizer holds the logits in a flattened copy."""
        if self.schedule is not None:
            self._refuse_flattened(optimizer)

    def _refuse_flattened(self, optimizer: Optimizer) -> None:
        if (holder := held_by(self, optimizer)) is not None:
            raise refusal("Mask-pruning LoRA", holder, "LoRA without masks")

    def extra_repr(self) -> str:
        return f"{self.group.units} units, {self.group.kind}"


class MaskSchedule:
    """Drives all gates of one adapter as the optimizer makes steps.

    The gates may be spread over several optimizers. A step is then a round in which each of them makes one.
    """

    def __init__(self, config: MaskLoraConfig, gates: Sequence[MaskGate]) -> None:
        self.config, self.gates = config, list(gates)
        self.costs = [cost_of(gate.group, config) for gate in gates]
        self.total_cost = float(sum(c * gate.group.units for c, gate in zip(self.costs, gates, strict=True)))
        self.was_used = False  # in a training forward
        self._step: int | None = None
        self._noise: tuple[int, list[torch.Tensor]] | None = None
        self._owned = set(range(len(self.gates)))  # those that some optimizer has, as far as is known
        self._stepped: dict[int, bool] = {}  # in this round; whether the step was taken
        self._finite: torch.Tensor | None = None  # whether all logits were, after the last round
        for index, gate in enumerate(gates):
            gate.drive(self, index)

    def note_use(self) -> None:
        """The masks are used in a training forward.

        Raises:
            ValueError: The config asks for calibrated logits and was read from a file without, and no weights came.
        """
        config = self.config
        if config.init_logits == "sensitivity" and config.support is None and config.awaits_weights:
            raise ValueError(
                "This MaskLoraConfig has `init_logits='sensitivity'`, and its file holds no calibration: call "
                "`config = peft_ext.calibrate(model, config, dataloader)` before `get_peft_model`, or load a trained "
                "adapter with `PeftModel.from_pretrained`."
            )
        self.was_used = True

    def forget(self) -> None:
        """Other tensors were loaded into the gates."""
        self._step = self._noise = self._finite = None
        self._stepped = {}

    # Where training stands

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        if self._step is None:
            self._step = int(self.gates[0].progress)
        return self._step

    @property
    def bounds(self) -> tuple[int, int]:
        """The steps after which masks begin to learn, and are decided; a `ValueError` if `total_steps` is missing."""
        total = self.config.steps
        if total is None:
            raise ValueError(
                "MaskLoraConfig.total_steps is not set, so it is not known when the masks are to be decided. Set it to "
                "the number of optimizer steps of the training, or pass `callbacks=[peft_ext.MaskLoraCallback()]` to "
                "the Trainer."
            )
        begin = int(self.config.warmup_ratio * total)
        return begin, max(begin + 1, round(self.config.fix_ratio * total))

    @property
    def is_learning(self) -> bool:
        """Whether the masks are drawn at random now."""
        return self.config.steps is not None and self.bounds[0] <= self.step < self.bounds[1]

    def _passed(self) -> float:
        """How much of the mask phase has passed, between 0 and 1."""
        begin, end = self.bounds
        return min(max((self.step - begin) / (end - begin), 0.0), 1.0)

    @property
    def temperature(self) -> float:
        """tau now."""
        first, last = self.config.initial_temperature, self.config.final_temperature
        return first + (last - first) * self._passed()

    @property
    def target(self) -> float:
        """The share that is to be removed now, in expectation."""
        assert self.config.target_sparsity is not None
        ramp = self.config.ramp_ratio
        return self.config.target_sparsity * (min(self._passed() / ramp, 1.0) if ramp else 1.0)

    def noise_of(self, gate: MaskGate) -> torch.Tensor:
        """Logistic noise `(units,)`: a function of seed and step, so that recomputations and processes agree."""
        if self._noise is None or self._noise[0] != self.step:
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.step)
            sizes = [other.group.units for other in self.gates]
            uniform = torch.rand(sum(sizes), generator=generator).clamp_(1e-6, 1 - 1e-6)
            noise = torch.logit(uniform).to(gate.weight.device)
            self._noise = (self.step, list(noise.split(sizes)))
        return self._noise[1][gate.index].to(gate.weight.device)

    # Events

    def before_step(self, gate: MaskGate, optimizer: Optimizer, closure: bool) -> None:
        """Adds the gradient of the penalty; raises `ValueError` if the masks cannot learn."""
        if gate.index in self._stepped:  # the gates that made no step in this round are in no optimizer
            self._owned = set(self._stepped)
            self._end_round()
        if gate.is_fixed or not self.bounds[0] <= self.step < self.bounds[1]:
            # a gradient of zero (distributed training, `set_to_none=False`) would count in the optimizer's averages
            gate.weight.grad = None
            return
        if not any(other.training for other in self.gates):
            raise ValueError(
                "The model is in eval mode, in which masks are not drawn, so they cannot learn: call `model.train()`."
            )
        self._check_finite()
        if self.step == self.bounds[0]:  # `torch.distributed.checkpoint` may have made a state without a step
            optimizer.state.pop(gate.weight, None)
        if self.config.penalty is None:
            return
        if closure:
            raise ValueError(
                f"{type(optimizer).__name__}.step was given a closure, which computes the gradients anew, so that the "
                "penalty cannot be added to them. Use `target_sparsity`, or an optimizer without a closure."
            )
        share = self.costs[gate.index] / self.total_cost
        gradient = penalty_gradient(gate.logits(), share, self.config.penalty) * gate.rate
        scale = getattr(optimizer, "grad_scale", None)  # under a GradScaler the gradients of a fused optimizer have it
        if scale is not None:
            gradient = gradient * scale
        if gate.weight.grad is None:
            gate.weight.grad = torch.zeros_like(gate.weight)
        gate.weight.grad += part_like(gradient, gate.weight.grad)

    def after_step(self, gate: MaskGate, taken: bool) -> None:
        """Notes the step; the last one of a round counts, holds the target, and decides when the time has come."""
        self._stepped[gate.index] = taken
        self._owned.add(gate.index)
        if len(self._stepped) == len(self._owned):
            self._end_round()

    @torch.no_grad()
    def _end_round(self) -> None:
        taken = any(self._stepped.values())
        self._stepped = {}
        if not taken:
            return
        self._step = self.step + 1
        for gate in self.gates:
            gate.progress.fill_(self._step)
        if self.gates[0].is_fixed:
            return
        begin, end = self.bounds
        if self._step < begin:
            return
        if self.config.target_sparsity is not None and self.target > 0:
            self._hold(self.target)
        device = self.gates[0].weight.device
        self._finite = torch.stack([whole(gate.weight).sum().to(device) for gate in self.gates]).isfinite().all()
        if self._step >= end:
            self.decide()

    def _check_finite(self) -> None:
        """A round later, when a GPU knows the answer, so that it is not waited for."""
        if self._finite is not None and not bool(self._finite):
            raise ValueError(
                f"The logits of the masks are not finite since step {self.step}: the loss or a gradient was not, so "
                "nothing can be decided from them. Go on from a checkpoint before that step, with a smaller learning "
                "rate, or skip steps whose loss is not finite."
            )
        self._finite = None

    def _hold(self, target: float) -> None:
        """Shifts all logits together so that the expected share removed is `target`."""
        device = self.gates[0].weight.device
        logits = torch.cat([gate.logits().to(device) for gate in self.gates])
        costs = torch.cat(
            [torch.full((g.group.units,), float(c)) for g, c in zip(self.gates, self.costs, strict=True)]
        )
        shift = shift_to(logits, costs.to(device), target)
        for gate in self.gates:
            weight = whole(gate.weight)
            put(gate.weight, weight + (shift / gate.rate).to(weight))

    def decide(self) -> None:
        """Fixes the masks of all gates; a `ValueError` if their logits are not finite."""
        logits = [gate.logits().cpu() for gate in self.gates]
        self._finite = torch.tensor(all(bool(values.isfinite().all()) for values in logits))
        self._check_finite()
        kept = choose(logits, [g.group for g in self.gates], self.config)
        for gate, units in zip(self.gates, kept, strict=True):
            gate.fix(units)


def cost_of(group: Group, config: MaskLoraConfig) -> float:
    """What a unit of a group counts for."""
    if config.cost == "parameters":
        return float(group.parameters)
    if config.cost == "latency":
        assert config.unit_costs is not None
        return config.unit_costs[group.name]
    length = config.sequence_length
    assert length is not None
    # two operations for each weight and token; scores and their product with the values for each pair of tokens
    return 2.0 * length * group.parameters + (4.0 * length * length * group.width if group.kind == "heads" else 0.0)


def penalty_gradient(logits: torch.Tensor, cost: float, penalty: float) -> torch.Tensor:
    """d/da of `penalty * cost * sigmoid(a)`, with `cost` a unit's share of all costs."""
    keep = torch.sigmoid(logits)
    return penalty * cost * keep * (1 - keep)


def shift_to(logits: torch.Tensor, costs: torch.Tensor, target: float) -> torch.Tensor:
    """The number which, added to all logits, makes sum cost sigmoid(-a) / sum cost equal to `target`."""
    weights = costs / costs.sum()
    bound = torch.logit(torch.tensor(1 - target, device=logits.device)).abs() + 1
    low, high = -logits.max() - bound, -logits.min() + bound
    for _ in range(60):  # bisection: what is removed falls with the shift
        middle = (low + high) / 2
        removes_more = (weights * torch.sigmoid(-logits - middle)).sum() > target
        low, high = torch.where(removes_more, middle, low), torch.where(removes_more, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class _Step:
    """Units that can only be removed together, those of the smallest logits first."""

    logit: float
    cost: float
    units: tuple[tuple[int, torch.Tensor], ...]  # gate and its units


def _steps(logits: Sequence[torch.Tensor], groups: Sequence[Group], config: MaskLoraConfig) -> list[_Step]:
    """All that can be removed, in the order in which it is."""
    chains: dict[Any, list[list[tuple[int, torch.Tensor]]]] = {}
    for index, (values, group) in enumerate(zip(logits, groups, strict=True)):
        size = config.round_to if group.kind == "ffn" else 1
        order = values.argsort()
        first = group.units % size
        chunks = [order[:first]] if first else []
        chunks += order[first:].split(size)
        chain = chains.setdefault((group.kind, group.tower) if config.uniform else index, [[] for _ in chunks])
        if len(chain) != len(chunks):
            raise ValueError(
                f"`uniform=True` needs layers of one size; {group.name!r} has {group.units} units, the others differ."
            )
        for step, units in zip(chain, chunks, strict=True):
            step.append((index, units))
    steps = []
    for chain in chains.values():
        for together in chain:
            values = torch.cat([logits[index][units] for index, units in together])
            cost = sum(cost_of(groups[index], config) * len(units) for index, units in together)
            steps.append(_Step(float(values.mean()), cost, tuple(together)))
    return sorted(steps, key=lambda step: step.logit)


def choose(logits: Sequence[torch.Tensor], groups: Sequence[Group], config: MaskLoraConfig) -> list[torch.Tensor]:
    """Which units stay, booleans `(units,)` for each group: those of the largest logits within the target.

    Without a target those of a positive logit.
    """
    kept = [torch.ones(group.units, dtype=torch.bool) for group in groups]
    total = sum(cost_of(group, config) * group.units for group in groups)
    steps = _steps(logits, groups, config)
    removed = 0.0
    room = 0.0
    if config.target_sparsity is not None and steps:
        room = config.target_sparsity * total + min(step.cost for step in steps) / 2
    for step in steps:
        if config.target_sparsity is None:
            if step.logit > 0:
                break
        elif removed + step.cost > room:
            continue  # too much; a later one may be smaller
        removed += step.cost
        for index, units in step.units:
            kept[index][units] = False
    return kept


def check_reachable(groups: Mapping[str, Group], config: MaskLoraConfig) -> None:
    """Raises `ValueError` if no choice of units comes within 1 % of `target_sparsity`."""
    if config.target_sparsity is None:
        return
    found = list(groups.values())
    total = sum(cost_of(group, config) * group.units for group in found)
    kept = choose([torch.zeros(group.units) for group in found], found, config)
    removed = sum(cost_of(group, config) * float((~units).sum()) for group, units in zip(found, kept, strict=True))
    if abs(removed / total - config.target_sparsity) > 0.01:
        smallest = min(step.cost for step in _steps([torch.zeros(g.units) for g in found], found, config))
        raise ValueError(
            f"`target_sparsity={config.target_sparsity}` cannot be reached within 1 %: the smallest step of these "
            f"{len(found)} groups removes {smallest / total:.1%} of the prunable {config.cost}, and the nearest share "
            f"is {removed / total:.1%}. Take another target, a smaller `round_to`, `uniform=False` or more in `prune`."
        )
