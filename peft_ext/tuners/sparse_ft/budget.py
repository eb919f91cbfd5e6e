"""How many weights of each module are tuned, and which ones where scores say it."""

from __future__ import annotations

import torch
from torch import nn

from ...core import count_parameters, is_quantised, stable_generator
from ...delta import layer_operation
from ...sparse import drawn_keys
from .config import GIVEN, GRADUAL, SPIEL, UNBUDGETED, WHERE_FROM, SparseFTConfig
from .deltas import best_of_all


MOVING = (*SPIEL, *GRADUAL)


def settle_budget(config: SparseFTConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Fills in `num_weights_per_module`, and the support where it follows from scores."""
    sizes: dict[str, int] = {}
    for name, base_layer in targets.items():
        op = layer_operation(base_layer)
        bias = getattr(base_layer, "bias", None)
        sizes[name] = base_layer.weight.numel() if op is None else op.n  # type: ignore[union-attr, operator]
        if isinstance(bias, torch.Tensor):
            sizes[f"{name}.bias"] = bias.numel()
        if op is None and config.selection in ("growing", *SPIEL):
            raise ValueError(
                f"Target module {name!r} is a norm, for whose weights selection={config.selection!r} does not gather "
                "gradients: leave it out of `target_modules`, or take a fixed support."
            )
        if config.selection in ("below", "growing", "nonzero") and is_quantised(base_layer):
            raise ValueError(
                f"`selection={config.selection!r}` goes by the base's weights, and {name!r} is quantised: load the "
                "base model without quantisation, or take another selection."
            )
    if config.num_weights_per_module is not None:
        _check_fit(config, sizes)
        return
    if config.scores is not None:
        config.support = _best_scores(config, model, targets, sizes)
        config.num_weights_per_module = {name: len(indices) for name, indices in config.support.items()}
        return
    if config.selection in GIVEN:
        raise ValueError(
            f"`selection={config.selection!r}` needs to be told which weights to tune; before `get_peft_model`:\n"
            f"    {WHERE_FROM[config.selection]}"
        )
    if config.selection in UNBUDGETED:
        config.num_weights_per_module = {name: _count(config, layer) for name, layer in targets.items()}
        if not any(config.num_weights_per_module.values()):
            config.num_weights_per_module = None
            raise ValueError(f"`selection={config.selection!r}` takes no weight at all of the target modules.")
        return
    total = sum(sizes[name] for name in targets)
    budget = budget_of(config, model, total)
    config.num_weights_per_module = proportional(budget, {name: sizes[name] for name in targets})
    empty = [name for name, count in config.num_weights_per_module.items() if count == 0]
    if empty:
        config.num_weights_per_module = None
        raise ValueError(
            f"The budget of {budget} weights leaves {empty[0]!r} (of {sizes[empty[0]]} weights) without any: raise "
            "`density` or `num_tunable_weights`, or leave the module out of `target_modules`."
        )


def budget_of(config: SparseFTConfig, model: nn.Module, total: int) -> int:
    budget, field = asked_for(config, count_parameters(model))
    if budget > total:
        raise ValueError(
            f"`{field}` asks for {budget} tuned weights, the target modules have {total}: lower it, or target more "
            "modules."
        )
    return budget


def asked_for(config: SparseFTConfig, parameters: int) -> tuple[int, str]:
    """How many weights of a model with so many parameters are to be tuned, and which field says so."""
    if config.num_tunable_weights is not None:
        return config.num_tunable_weights, "num_tunable_weights"
    if config.density is not None:
        return int(config.density * parameters), "density"
    raise ValueError(
        f"`selection={config.selection!r}` splits a budget by what it finds, and the config has none, only "
        "`num_weights_per_module`: set `density` or `num_tunable_weights` instead."
    )


def proportional(budget: int, sizes: dict[str, int]) -> dict[str, int]:
    """`budget` split in proportion to `sizes`, without losing any to rounding: the largest remainders round up."""
    total = sum(sizes.values())
    counts = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


def _count(config: SparseFTConfig, base_layer: nn.Module) -> int:
    """How many weights `selection="nonzero"` or `"below"` takes."""
    weight = base_layer.weight
    assert isinstance(weight, torch.Tensor)
    if config.selection == "nonzero":
        return int(weight.count_nonzero())
    assert config.threshold is not None
    return int((weight.float().abs() < config.threshold).sum())


def _check_fit(config: SparseFTConfig, sizes: dict[str, int]) -> None:
    assert config.num_weights_per_module is not None
    for name, count in config.num_weights_per_module.items():
        is_bias = name.endswith(".bias") and name.removesuffix(".bias") in sizes
        if count and is_bias and config.selection in MOVING and not config.inference_mode:
            raise ValueError(
                f"`num_weights_per_module` names {name!r}, and selection={config.selection!r} moves supports of weights "
                "only: leave biases out, or take a fixed selection such as 'random', 'largest' or 'smallest'."
            )
        if name not in sizes:
            raise ValueError(
                f"The support names {name!r}, which is not among the target modules"
                f"{'' if sizes else ', of which there are none'}. It was made for another model or other "
                "`target_modules`."
            )
        if count > sizes[name]:
            raise ValueError(f"The support has {count} weights of {name!r}, which has {sizes[name]}.")
        if config.support is not None and count and int(config.support[name][-1]) >= sizes[name]:
            raise ValueError(
                f"The support has place {int(config.support[name][-1])} of {name!r}, which has {sizes[name]} weights."
            )


def _best_scores(
    config: SparseFTConfig, model: nn.Module, targets: dict[str, nn.Module], sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    scores = config.scores
    assert scores is not None
    for name in targets:
        if name not in scores or scores[name].numel() != sizes[name]:
            got = "none" if name not in scores else f"{scores[name].numel()}"
            raise ValueError(f"`use_scores` needs {sizes[name]} scores for the target {name!r}, got {got}.")
    budget = budget_of(config, model, sum(sizes[name] for name in targets))
    flat = {name: scores[name].reshape(-1) for name in targets}
    if config.spread:
        flat = {
            name: drawn_keys(values, 1 / config.spread, stable_generator(config.seed, name))
            for name, values in flat.items()
        }
    return best_of_all(flat, budget)
