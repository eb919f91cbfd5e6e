r"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell, Ponti, Korhonen, Vulic 2022, arXiv:2110.07560), on the Trainer.

Phase one trains the target weights densely from theta_0 to theta_1; the k indices of largest |theta_1 - theta_0| over
all targets together are the support; everything is put back to theta_0, and phase two trains the support alone, here
as sparse values, which for optimizers that treat each weight by itself is the same as masking dense gradients. With n
rounds each round begins where the last one has ended, and adds the k/n indices outside the support that are then
farthest from theta_0.

**Where this differs from the published code, and why.** The k largest are exactly k (a threshold takes ties too), also
where n does not divide k. The target modules' weights are trained, and the biases where asked for, not norms and
embeddings unless they are targeted. No weight decay acts on the sparse values, as in the published runs. The L1 term
does what the paper says (in the published code its gradient cancels): coefficient times sum |theta - theta_0|, divided
by the number of all parameters of the model, is part of the loss, once per optimizer step.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_utils import get_last_checkpoint

from ...core import HALF, count_parameters, matched_targets, require_model
from ...core.schedule import listen_to_steps
from .budget import asked_for
from .config import SparseFTConfig, require_selection
from .deltas import best_of_all, deltas
from .model import SparseFTModel


class _PullToStart:
    """Adds the gradient of the L1 term to that of one parameter, in the first backward of every optimizer step.

    So it is there when gradients are clipped, as if the term were part of the loss.
    """

    def __init__(self, weight: nn.Parameter, start: torch.Tensor | None, coefficient: float, scaler: Any) -> None:
        self.weight, self.start, self.coefficient, self.scaler = weight, start, coefficient, scaler
        self._is_due = True
        self._last: weakref.ref[torch.Tensor] | None = None  # the gradient that it was added to
        self._handle = weight.register_post_accumulate_grad_hook(self._add)
        listen_to_steps(self)

    def _add(self, weight: torch.Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        if not self._is_due and self._last is not None and self._last() is gradient:
            return  # a further micro-batch of the same step
        moved = weight.detach() if self.start is None else weight.detach() - self.start.to(weight.device)
        pull = moved.sign() * self.coefficient
        gradient += pull if self.scaler is None else pull * self.scaler.get_scale()
        self._is_due, self._last = False, weakref.ref(gradient)

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Nothing to do."""

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """The next backward belongs to another step."""
        self._is_due = True

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def remove(self) -> None:
        """Lets go of the parameter."""
        self._handle.remove()


@dataclass
class _Trainings:
    """Makes and runs the Trainers of all phases; an interrupted phase goes on from its last checkpoint."""

    make_trainer: Callable[[nn.Module], Any]
    dense_learning_rate: float | None
    l1: float  # divided by the number of parameters
    l1_on_head: bool
    resume: bool

    def trainer(self, model: nn.Module, phase: str) -> Any:
        """The user's Trainer, with a directory of its own for each phase."""
        trainer = self.make_trainer(model)
        _refuse_sharded(trainer)
        args = copy.copy(trainer.args)
        args.output_dir = os.path.join(args.output_dir, phase)
        if phase.startswith("dense") and self.dense_learning_rate is not None:
            if trainer.optimizer is not None:
                raise ValueError(
                    "`dense_learning_rate` has no effect on a Trainer that was given its optimizer: set the rate there."
                )
            args.learning_rate = self.dense_learning_rate
        trainer.args = args
        return trainer

    def run(self, model: nn.Module, trainer: Any, starts: dict[str, torch.Tensor | None], on_head: set[str]) -> None:
        """Trains, with the L1 term on the parameters of `starts`, by name; `None` is a start at zero."""
        parameters = dict(model.named_parameters())
        pulled = {name: start for name, start in starts.items() if self.l1_on_head or name not in on_head}
        scaler = getattr(trainer.accelerator, "scaler", None)
        pulls = [_PullToStart(parameters[name], start, self.l1, scaler) for name, start in pulled.items() if self.l1]
        folder = trainer.args.output_dir
        checkpoint = get_last_checkpoint(folder) if self.resume and os.path.isdir(folder) else None
        try:
            trainer.train(resume_from_checkpoint=checkpoint) if checkpoint is not None else trainer.train()
        finally:
            for pull in pulls:
                pull.remove()

    def result(self, trainer: Any) -> dict[str, torch.Tensor] | None:
        """What `keep` has written for the phase, if a training is taken up again."""
        path = Path(trainer.args.output_dir) / RESULT
        return load_file(path) if self.resume and path.exists() else None

    def keep(self, trainer: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Writes the result of a phase that is over, unless the Trainer saves nothing either."""
        if trainer.args.save_strategy != "no" and trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{RESULT}.part")
            os.replace(folder / f"{RESULT}.part", folder / RESULT)


RESULT = "lt_sft.safetensors"


def _refuse_sharded(trainer: Any) -> None:
    """Raises `ValueError` if the trainer will shard the weights that are compared with their start and put back."""
    if not hasattr(trainer, "accelerator"):
        raise TypeError(f"`make_trainer` must return a Trainer, it returned {type(trainer).__name__}.")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    stage = 0 if plugin is None else plugin.zero_stage
    holder = f"DeepSpeed ZeRO-{stage}" if stage >= 2 else None
    if trainer.is_fsdp_enabled:
        holder = "FSDP"
    if holder is not None:
        raise ValueError(
            f"LT-SFT compares the weights after its dense phase with those before it, and puts them back, and {holder} "
            "leaves each process a part of them. Use one process, DistributedDataParallel or ZeRO-1, or a selection "
            "without a dense phase: under FSDP2 all of them, under DeepSpeed a fixed one such as 'random'."
        )


def lt_sft(
    model: nn.Module,
    config: SparseFTConfig,
    make_trainer: Callable[[nn.Module], Any],
    *,
    train_biases: bool = False,
    l1: float = 0.0,
    l1_on_head: bool = True,
    n_iterations: int = 1,
    dense_learning_rate: float | None = None,
    resume: bool = False,
) -> PeftModel:
    """Runs the phases of LT-SFT and returns the base model, as it was, with the trained sparse adapter on it.

    ```py
    config = SparseFTConfig(selection="lt-sft", density=0.01, task_type="SEQ_CLS")
    make_trainer = lambda model: Trainer(model=model, args=args, train_dataset=data)
    model = peft_ext.lt_sft(model, config, make_trainer, dense_learning_rate=5e-5)
    ```

    Args:
        model: The plain model.
        config: With `selection="lt-sft"` and a budget, which is not split beforehand: it goes to whatever moved most.
        make_trainer: Makes a Trainer, any subclass, for the model that it is given; called once per phase, so that
            each has an optimizer and a learning-rate schedule of its own. Give the phases different arguments by
            telling a `PeftModel` (a sparse phase) from a plain one. Each phase writes into a folder of its own,
            `dense-1`, `sparse-1` and so on, in the Trainer's `output_dir`.
        train_biases: Also let the biases of the target modules compete for the budget.
        l1: Coefficient of the L1 term, in all phases.
        l1_on_head: Whether the term also pulls what is trained whole, such as a head, to its start, as published.
        n_iterations: Rounds of a dense and a sparse phase, each of which adds its part of the budget.
        dense_learning_rate: Learning rate of the dense phases, which want a tenth of the sparse ones' and less; `None`
            leaves that of the Trainer.
        resume: Go on where a call with the same arguments and Trainers was interrupted: phases that are over are read
            from their folders, the others start from their last checkpoint, if there is one.

    Raises:
        ValueError: The config is not for LT-SFT, or the target weights are frozen, quantised or in half precision.
        TypeError: The model has an adapter already.
    """
    config, dense = _checked(model, config, n_iterations, train_biases)
    total = count_parameters(model)
    budget = _checked_budget(config, total, dense, n_iterations)
    trainings = _Trainings(make_trainer, dense_learning_rate, l1 / total, l1_on_head, resume)
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    first = {name: parameter.detach().to("cpu", copy=True) for name, parameter in dense.items()}
    support: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for number in range(1, n_iterations + 1):
        start = {key: tensor.detach().to("cpu", copy=True) for key, tensor in model.state_dict().items()}
        share = budget * number // n_iterations - budget * (number - 1) // n_iterations
        new = _dense_phase(trainings, model, config, dense, first, support, share, f"dense-{number}")
        wider = {
            name: torch.cat([support.get(name, _NONE), new.get(name, _NONE)]).sort().values
            for name in dict.fromkeys([*support, *new])
        }
        _rewind(model, start)
        with torch.no_grad():
            for name, parameter in dense.items():
                parameter.copy_(first[name])
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[key])
        sparse = get_peft_model(model, copy.deepcopy(config).use_support(wider))  # type: ignore[arg-type]
        assert isinstance(sparse, PeftModel)
        _set_known(sparse, support, values)
        support = wider
        is_last = number == n_iterations
        _sparse_phase(trainings, sparse, f"sparse-{number}", is_last)
        if not is_last:
            values = {name: leaf.weight.detach().cpu().clone() for name, leaf in deltas(sparse, "default")}
            model = sparse.merge_and_unload()
            vars(model).pop("peft_config", None)
    return sparse


_NONE = torch.zeros(0, dtype=torch.long)


def _dense_phase(
    trainings: _Trainings,
    model: nn.Module,
    config: SparseFTConfig,
    dense: dict[str, nn.Parameter],
    first: dict[str, torch.Tensor],
    support: dict[str, torch.Tensor],
    number: int,
    phase: str,
) -> dict[str, torch.Tensor]:
    """Trains all target weights, and returns the indices outside the support that are then farthest from `first`."""
    heads = _modules_to_save(config)
    chosen = {id(parameter) for parameter in dense.values()}
    on_head = {key for key, p in model.named_parameters() if id(p) not in chosen and _is_inside(key, heads)}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen or key in on_head)
    trainer = trainings.trainer(model, phase)
    if (found := trainings.result(trainer)) is not None:
        return found
    starts: dict[str, torch.Tensor | None] = {}
    by_id = {id(parameter): first[name] for name, parameter in dense.items()}
    for key, parameter in model.named_parameters():
        if id(parameter) in chosen:
            starts[key] = by_id[id(parameter)]
        elif key in on_head:
            starts[key] = parameter.detach().clone()
    trainings.run(model, trainer, starts, on_head)
    moved = {name: (p.detach().cpu().float() - first[name].float()).abs().flatten() for name, p in dense.items()}
    for name, places in support.items():
        moved[name][places] = -1.0  # tuned already
    found = best_of_all(moved, number)
    trainings.keep(trainer, found)
    return found


def _sparse_phase(trainings: _Trainings, sparse: PeftModel, phase: str, is_last: bool) -> None:
    trainer = trainings.trainer(sparse, phase)
    trained = {key: parameter for key, parameter in sparse.named_parameters() if parameter.requires_grad}
    found = None if is_last else trainings.result(trainer)
    if found is not None:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(found[key])
        return
    own = {id(leaf.weight) for _, leaf in deltas(sparse, "default")}
    on_head = {key for key, parameter in trained.items() if id(parameter) not in own}
    starts = {key: p.detach().clone() if key in on_head else None for key, p in trained.items()}
    trainings.run(sparse, trainer, starts, on_head)
    if not is_last:
        trainings.keep(trainer, {key: parameter.detach().cpu() for key, parameter in trained.items()})


@torch.no_grad()
def _set_known(sparse: PeftModel, support: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """The values that earlier rounds have found; the others are zero."""
    for name, leaf in deltas(sparse, "default"):
        if name in values:
            known = torch.searchsorted(leaf.indices().cpu().long(), support[name])
            leaf.weight[known.to(leaf.weight.device)] = values[name].to(leaf.weight)


def _checked(
    model: nn.Module, config: SparseFTConfig, n_iterations: int, train_biases: bool
) -> tuple[SparseFTConfig, dict[str, nn.Parameter]]:
    """A config of our own, and the parameters of the dense phases."""
    require_model(model)
    require_selection(config, "lt_sft", "lt-sft")
    if config.support is not None:
        raise ValueError("The config has a support already: call `get_peft_model` with it, or make a new config.")
    if isinstance(model, PeftModel):
        raise TypeError("`lt_sft` puts the adapter on the model itself: give it the plain model.")
    if not isinstance(n_iterations, int) or n_iterations < 1:
        raise ValueError(f"`n_iterations` must be a positive integer, got {n_iterations!r}.")
    config = copy.deepcopy(config)
    config.num_weights_per_module = None
    return config, _dense_targets(model, config, train_biases)


def _checked_budget(config: SparseFTConfig, total: int, dense: dict[str, nn.Parameter], n_iterations: int) -> int:
    budget, _ = asked_for(config, total)
    available = sum(parameter.numel() for parameter in dense.values())
    if not 0 < budget <= available:
        raise ValueError(
            f"The budget of {budget} weights does not fit the {available} weights of the target modules: change "
            "`density` or `num_tunable_weights`, or `target_modules`."
        )
    if budget < n_iterations:
        raise ValueError(f"`n_iterations={n_iterations}` is more than the {budget} weights that are to be tuned.")
    return budget


@torch.no_grad()
def _rewind(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for key, tensor in start.items():
        state[key].copy_(tensor)


def _modules_to_save(config: SparseFTConfig) -> set[str]:
    names = set(config.modules_to_save or ())
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        names |= {"classifier", "score"}
    elif config.task_type == "QUESTION_ANS":
        names |= {"qa_outputs"}
    return names


def _is_inside(parameter: str, modules: set[str]) -> bool:
    """Whether a parameter is in one of the modules to save, which PEFT finds by the end of their names."""
    owner = parameter.rpartition(".")[0]
    while owner:
        if any(owner.endswith(name) for name in modules):
            return True
        owner = owner.rpartition(".")[0]
    return False


def _dense_targets(model: nn.Module, config: SparseFTConfig, train_biases: bool) -> dict[str, nn.Parameter]:
    """The parameters that phase one trains, by the names that supports have."""
    model_config: Any = getattr(model, "config", None)
    SparseFTModel.default_targets(config, model_config.to_dict() if model_config is not None else {}, model)
    dense: dict[str, nn.Parameter] = {}
    for name, module in matched_targets(config, model):
        SparseFTModel.layer_class(module)
        for key in ("weight", "bias") if train_biases else ("weight",):
            parameter = getattr(module, key, None)
            if parameter is None:
                continue
            if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"LT-SFT trains all target weights in its dense phase, and {name!r} is quantised. Load the base "
                    "model without quantisation, or use a selection that needs no dense phase, such as 'spiel-ag'."
                )
            if not parameter.requires_grad:
                raise ValueError(
                    f"LT-SFT trains all target weights in its dense phase, and {name!r} is frozen. Call "
                    "`model.requires_grad_(True)` first, or use a selection that needs no dense phase, such as "
                    "'spiel-ag'."
                )
            if parameter.dtype in HALF:
                raise ValueError(
                    f"LT-SFT looks how far its dense phase moves each target weight, and {name!r} is in "
                    f"{parameter.dtype}, where small updates are lost. Load the base model with "
                    "`dtype=torch.float32`; the trained adapter goes on a half-precision base, too."
                )
            dense[name if key == "weight" else f"{name}.bias"] = parameter
    if not dense:
        raise ValueError(f"No module matches `target_modules={config.target_modules!r}`.")
    return dense
