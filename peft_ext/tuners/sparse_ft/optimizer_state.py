"""Optimizers: which of their state belongs to single values, and what a grown value finds there."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ...core.schedule import steps_around


STATE = "sparse_ft_"  # what is kept in the optimizer's state, so that a checkpoint of a training has it
SPLIT = 4096  # indices are kept there as two floats, for optimizers cast their state to the parameters' type
PER_VALUE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),  # Adam, AdamW, RAdam, NAdam; transformers' Adafactor
    *("momentum_buffer", "square_avg", "grad_avg", "sum", "variance"),  # SGD, RMSprop, Adagrad, torch's Adafactor
    *("state1", "state2"),  # bitsandbytes' Adam
}
BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit state


def from_8_bit(state: dict[str, Any], key: str) -> torch.Tensor:
    """The state `state1` or `state2` of an 8-bit optimizer of bitsandbytes, in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
    return dequantize_blockwise(state[key], absmax=absmax, code=code, blocksize=BLOCK)


def to_8_bit(state: dict[str, Any], key: str, vector: torch.Tensor) -> None:
    """Writes it back; a survivor whose neighbours have changed may be rounded once more."""
    from bitsandbytes.functional import quantize_blockwise

    quantised, scales = quantize_blockwise(vector, code=state[f"qmap{key[-1]}"], blocksize=BLOCK)
    state[key].copy_(quantised)
    state[f"absmax{key[-1]}"].copy_(scales.absmax)


def movable_state(optimizer: Optimizer, state: dict[str, Any], weight: torch.Tensor) -> list[str]:
    """The keys of the optimizer's state that hold one number for every value.

    Raises:
        ValueError: It keeps something else, which cannot be moved along with the support.
    """
    keys = []
    for key, value in state.items():
        if key.startswith(STATE) or not isinstance(value, torch.Tensor) or value.ndim == 0:
            continue
        in_8_bit = "qmap1" in state and key.startswith(("state", "qmap", "absmax"))
        if in_8_bit and not key.startswith("state"):
            continue
        if key not in PER_VALUE or value.shape != weight.shape or not (value.is_floating_point() or in_8_bit):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of {tuple(value.shape)} ({value.dtype}), which cannot be "
                "moved when the support of a sparse adapter moves. Use AdamW, Adam, SGD, RMSprop, Adagrad or "
                "Adafactor (for the Trainer, for example, `optim='adamw_torch'`), or a fixed support such as "
                "`selection='random'`."
            )
        keys.append(key)
    return keys


def values_around(optimizer: Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One number for every value in the optimizers around this one, such as the slow weights of Lookahead.

    Raises:
        ValueError: They keep something else.
    """
    found = {}
    for number, outer in enumerate(steps_around(optimizer)):
        if outer.state is optimizer.state:
            continue
        for key, value in outer.state.get(weight, {}).items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                continue
            if value.shape != weight.shape or not value.is_floating_point():
                raise ValueError(
                    f"{type(outer).__name__} keeps {key!r} of {tuple(value.shape)} ({value.dtype}), which cannot be "
                    "moved when the support of a sparse adapter moves: use the optimizer inside it, or a fixed "
                    "support such as `selection='random'`."
                )
            found[f"{number} {key}"] = value
    return found


def seeds_of(
    group: dict[str, Any], state: dict[str, Any], mean: torch.Tensor, mean_square: torch.Tensor, count: int
) -> dict[str, torch.Tensor]:
    """The state that values would have if the gradients of this mean had been theirs for `count` steps."""
    seeds = {
        "square_avg": mean_square,  # RMSprop and Adafactor do not correct a bias
        "grad_avg": mean,
        "variance": mean_square,
        "sum": mean_square * float(state.get("step", 0)),
    }
    if "betas" in group and ("exp_avg_sq" in state or "state2" in state):
        beta1, beta2 = group["betas"][:2]
        step = float(state["step"])
        seeds["exp_avg"] = seeds["state1"] = mean * (1 - beta1**step)
        seeds["exp_avg_sq"] = seeds["max_exp_avg_sq"] = seeds["state2"] = mean_square * (1 - beta2**step)
    else:
        seeds["exp_avg_sq"] = mean_square
    momentum = group.get("momentum") or 0.0
    if momentum:
        seeds["momentum_buffer"] = mean * (1 - group.get("dampening", 0.0)) * sum(momentum**i for i in range(count))
    return seeds
