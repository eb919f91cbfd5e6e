r"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell, Ponti, Korhonen, Vulic 2022, arXiv:2110.07560), on the Trainer.

Phase one trains the target weights densely from theta_0 to theta_1; the k places of largest |theta_1 - theta_0| over
all targets together are the support; everything is put back to theta_0, and phase two trains the support alone, here
as sparse values, which for optimizers that treat each weight by itself is the same as masking dense gradients.

**Where this differs from the published code, and why.** The k largest are exactly k (a threshold takes ties too). The
target modules' weights are trained, and the biases where asked for, not norms and embeddings unless they are
targeted. No weight decay acts on the sparse values, as in the published runs. The L1 term does what the paper says
(in the published code its gradient cancels): coefficient times sum |theta - theta_0|, divided by the number of all
parameters of the model, is added to the loss, once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer

from ...core import count_parameters, matched_targets
from ...core.schedule import listen_to_steps
from .config import SparseFTConfig
from .deltas import best_of_all, deltas
from .model import SparseFTModel


class _PullToStart:
    """Adds the gradient of the L1 term to one parameter, at every optimizer step."""

    def __init__(self, weight: nn.Parameter, start: torch.Tensor | None, coefficient: float) -> None:
        self.weight, self.start, self.coefficient = weight, start, coefficient
        listen_to_steps(self)

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """The gradient is complete, and may still be scaled."""
        if self.weight.grad is not None and not closure:
            moved = self.weight.data if self.start is None else self.weight.data - self.start.to(self.weight.device)
            scale = getattr(optimizer, "grad_scale", None)
            pull = moved.sign() * self.coefficient
            self.weight.grad += pull if scale is None else pull * scale

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Nothing to do."""

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""


def lt_sft(
    model: nn.Module,
    config: SparseFTConfig,
    make_trainer: Callable[[nn.Module], Any],
    *,
    train_biases: bool = False,
    l1: float = 0.0,
) -> PeftModel:
    """Runs both phases of LT-SFT and returns the base model, as it was, with the trained sparse adapter on it.

    ```py
    config = SparseFTConfig(selection="lt-sft", density=0.01, task_type="SEQ_CLS")
    model = peft_ext.lt_sft(model, config, lambda model: Trainer(model=model, args=args, train_dataset=data))
    ```

    Args:
        model: The plain model.
        config: With `selection="lt-sft"` and a budget, which is not split beforehand: it goes to whatever moved most.
        make_trainer: Makes a Trainer, any subclass, for the model that it is given; called once per phase, so that
            each has an optimizer and a learning-rate schedule of its own. Give the phases different arguments by
            telling a `PeftModel` (phase two) from a plain one.
        train_biases: Also let the biases of the target modules compete for the budget.
        l1: Coefficient of the L1 term, in both phases.

    Raises:
        ValueError: The config is not for LT-SFT, or the target weights are frozen or quantised.
        TypeError: The model has an adapter already.
    """
    if config.selection != "lt-sft":
        raise ValueError(f"`lt_sft` needs a config with `selection='lt-sft'`, got {config.selection!r}.")
    if config.support is not None:
        raise ValueError("The config has a support already: call `get_peft_model` with it, or make a new config.")
    if isinstance(model, PeftModel):
        raise TypeError("`lt_sft` puts the adapter on the model itself: give it the plain model.")
    config.num_weights_per_module = None
    dense = _dense_targets(model, config, train_biases)
    total = count_parameters(model)
    budget = config.num_tunable_weights
    if budget is None:
        assert config.density is not None
        budget = int(config.density * total)
    available = sum(parameter.numel() for parameter in dense.values())
    if not 0 < budget <= available:
        raise ValueError(
            f"The budget of {budget} weights does not fit the {available} weights of the target modules: change "
            "`density` or `num_tunable_weights`, or `target_modules`."
        )

    start = {key: tensor.detach().to("cpu", copy=True) for key, tensor in model.state_dict().items()}
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    heads = tuple(f"{name}" for name in _modules_to_save(config))
    chosen = {id(parameter) for parameter in dense.values()}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen or bool(set(key.split(".")).intersection(heads)))
    first = {name: parameter.detach().to("cpu", copy=True) for name, parameter in dense.items()}
    pulls = [_PullToStart(p, first[name], l1 / total) for name, p in dense.items()] if l1 else []
    make_trainer(model).train()
    del pulls
    moved = {name: (p.detach().cpu().float() - first[name].float()).abs().flatten() for name, p in dense.items()}
    config.use_support(best_of_all(moved, budget))
    del moved, first

    _rewind(model, start)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[key])
    sparse = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(sparse, PeftModel)
    pulls = []
    if l1:
        pulls = [_PullToStart(leaf.weight, None, l1 / total) for _, leaf in deltas(sparse, "default")]
    make_trainer(sparse).train()
    del pulls
    return sparse


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
            dense[name if key == "weight" else f"{name}.bias"] = parameter
    if not dense:
        raise ValueError(f"No module matches `target_modules={config.target_modules!r}`.")
    return dense
