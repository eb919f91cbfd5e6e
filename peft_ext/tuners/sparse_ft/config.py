"""The configuration of sparse fine-tuning, and the supports that are handed to it from outside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from ...core import CalibratedConfig
from ...sparse import check_spread


DEFAULT_DENSITY = 0.01
SPIEL = ("spiel-ag", "spiel-ma")
GIVEN = ("given", "lt-sft", "sensitivity")  # the support comes from outside, by `use_support`
FIXED = ("random", "smallest", "largest", "nonzero")
GRADUAL = ("below", "growing")  # which values take part changes, once or step by step
UNBUDGETED = ("nonzero", "below")  # the base's weights say how many
ONLY_WITH = {  # fields that have an effect with some selections only
    "spread": ("sensitivity", *SPIEL),
    "reselection_steps": SPIEL,
    "accumulation_steps": SPIEL,
    "reselection_rate": SPIEL,
    "reselection_policy": SPIEL,
    "total_steps": (*SPIEL, *GRADUAL),
    "threshold": ("below",),
    "reselect_at": ("below",),
    "growth_power": ("growing",),
    "growth_eps": ("growing",),
}
SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHERE_FROM = {
    "given": "config.use_support({module_name: flat_indices, ...})  # or the path of a safetensors file of them",
    "lt-sft": "peft_ext.lt_sft(model, config, make_trainer)  # trains densely first to find the support",
    "sensitivity": "config.use_scores({module_name: scores, ...})  # what a sensitivity pass has measured",
}


@dataclass
class SparseFTConfig(CalibratedConfig):
    """Configuration of sparse fine-tuning; see also the common fields of [`ExtConfig`].

    One of `density` and `num_tunable_weights` sets the budget, which is spread over the target modules in proportion to
    the sizes of their weights; without either it is `density=0.01`.

    Args:
        density: Tuned weights as a fraction of all parameters of the model, those outside the targets included.
            `None`: 0.01, unless `num_tunable_weights` is given.
        num_tunable_weights: The same as a number of weights.
        selection: Which weights are tuned. `"random"`, `"smallest"`, `"largest"`: a fixed support, drawn or by
            magnitude of the base's weights. `"spiel-ag"`: a random support at first, from which the values that moved
            least are dropped, and where weights of large accumulated gradient grow. `"spiel-ma"`: the same, grown by
            the momentum-free row and column statistics of SM3, which also makes the updates. `"nonzero"`: all weights
            that are not zero in the base, whatever the budget, which keeps a pruned model's zeros; takes no budget.
            `"below"` (SaRA): all weights smaller than `threshold`, of which those that have left that range in
            the middle of the training are frozen then; takes no budget. `"growing"` (ID3): empty at first, it grows
            to the budget step by step, by |gradient| / (|weight| + `growth_eps`) ^ `growth_power`, over `total_steps`.
            `"lt-sft"`: found by `peft_ext.lt_sft`. `"sensitivity"`: by the scores of a calibration, or of `use_scores`.
            `"given"`: the support of `use_support`.
        spread: `"sensitivity"` and SpIEL: 0 takes the weights of largest score, as published. Above 0 they are drawn
            without replacement, with chances in proportion to score^(1 / spread): 1 draws in proportion to the score,
            more spreads them wider. The score is the calibration's (a square of gradients by default, so that 2 draws
            in proportion to gradients); for `"spiel-ag"` the magnitude of the gradient, by which the candidates are
            named; for `"spiel-ma"` the product of the row's and the column's statistics. What is dropped is the same.
        reselection_steps: SpIEL: optimizer steps between two reselections.
        accumulation_steps: SpIEL: optimizer steps for which gradients are gathered before a reselection.
        reselection_rate: SpIEL: fraction of the support that is replaced at a reselection, at the start of training.
        reselection_policy: SpIEL: how that fraction falls to zero over `total_steps`: `"linear"`: everything at
            the first reselection of a new adapter, then `reselection_rate * (1 - t / T)`; `"cosine"`: half a cosine from
            `reselection_rate` to zero.
        total_steps: SpIEL, `"below"` and `"growing"`: optimizer steps of the whole training. `SparseFTCallback` takes the
            number from the Trainer if it is `None`. Without either, SpIEL's fraction stays at `reselection_rate`,
            `"below"` is not reselected, and `"growing"` refuses to train.
        threshold: `"below"`: the magnitude below which weights are tuned, for example 1e-3.
        reselect_at: `"below"`: optimizer steps before the reselection, half of `total_steps` if `None`.
        growth_power: `"growing"`: how much small weights are preferred; 0 goes by the gradient alone.
        growth_eps: `"growing"`: added to a weight's magnitude, so that those near zero do not outdo all others.
        seed: Of the random supports, and of what is drawn; the same in all processes.
        save_dtype: Type of the values on disk: `"float32"`, which is exact, `"bfloat16"` or `"float16"`. It holds for
            the checkpoints of a training too.
        num_weights_per_module: Tuned weights of every target, by module name (`"<module>.bias"` for a bias, with a
            fixed `selection`). Filled in by itself, so that an adapter loads whatever the rest of the model is; given by hand, it replaces the budget.

    Raises:
        ValueError: A field is out of its range, or both budget fields are set; the message names the field.
    """

    METHOD: ClassVar[str] = "SPARSE_FT"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = (
        "density",
        "num_tunable_weights",
        "selection",
        "spread",
        "reselection_steps",
        "accumulation_steps",
        "reselection_rate",
        "reselection_policy",
        "total_steps",
        "threshold",
        "reselect_at",
        "growth_power",
        "growth_eps",
        "seed",
        "save_dtype",
    )

    density: float | None = field(
        default=None, metadata={"help": "Tuned weights as a fraction of all parameters of the model."}
    )
    num_tunable_weights: int | None = field(default=None, metadata={"help": "Number of tuned weights."})
    selection: str = field(
        default="random",
        metadata={"help": f"Which weights are tuned: one of {', '.join((*SPIEL, *FIXED, *GRADUAL, *GIVEN))}."},
    )
    spread: float = field(
        default=0.0, metadata={"help": "0: the largest scores are taken; above: drawn by score^(1 / spread)."}
    )
    reselection_steps: int = field(default=20, metadata={"help": "Optimizer steps between two reselections."})
    accumulation_steps: int = field(
        default=5, metadata={"help": "Optimizer steps over which gradients are gathered before a reselection."}
    )
    reselection_rate: float = field(
        default=0.2, metadata={"help": "Fraction of the support that is replaced at a reselection, at the start."}
    )
    reselection_policy: str = field(
        default="linear", metadata={"help": "How the replaced fraction falls over the training: linear or cosine."}
    )
    total_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the whole training."})
    threshold: float | None = field(default=None, metadata={"help": "SaRA: weights of smaller magnitude are tuned."})
    reselect_at: int | None = field(default=None, metadata={"help": "SaRA: optimizer steps before its reselection."})
    growth_power: float = field(default=1.0, metadata={"help": "ID3: how much small weights are preferred."})
    growth_eps: float = field(default=1e-3, metadata={"help": "ID3: added to a weight's magnitude."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn at random."})
    save_dtype: str = field(
        default="float32", metadata={"help": f"Type of the values on disk: {', '.join(SAVE_DTYPES)}."}
    )
    num_weights_per_module: dict[str, int] | None = field(
        default=None, metadata={"help": "Tuned weights of every target; filled in by itself."}
    )

    def __post_init__(self) -> None:
        was_written = self.peft_ext_version is not None  # by a version that let fields without effect pass
        super().__post_init__()
        self.scores: Mapping[str, torch.Tensor] | None = None
        if self.selection not in (*SPIEL, *FIXED, *GRADUAL, *GIVEN):
            raise ValueError(
                f"`selection` must be one of {', '.join((*SPIEL, *FIXED, *GRADUAL, *GIVEN))}, got {self.selection!r}."
            )
        self._check_budget()
        self._check_gradual()
        check_spread(self.spread)
        for name in ("reselection_steps", "accumulation_steps", "total_steps", "reselect_at"):
            value = getattr(self, name)
            may_be_open = name in ("total_steps", "reselect_at")
            if not (type(value) is int and value > 0) and not (may_be_open and value is None):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.reselect_at is not None and self.total_steps is not None and self.reselect_at >= self.total_steps:
            raise ValueError(
                f"`reselect_at` ({self.reselect_at}) must be below `total_steps` ({self.total_steps}), or there is no "
                "reselection."
            )
        if self.accumulation_steps >= self.reselection_steps:
            raise ValueError(
                f"`accumulation_steps` ({self.accumulation_steps}) must be below `reselection_steps` "
                f"({self.reselection_steps}), for gradients are gathered between two reselections."
            )
        if not 0 < self.reselection_rate <= 1:
            raise ValueError(f"`reselection_rate` must be in (0, 1], got {self.reselection_rate!r}.")
        if self.reselection_policy not in ("linear", "cosine"):
            raise ValueError(f"`reselection_policy` must be 'linear' or 'cosine', got {self.reselection_policy!r}.")
        if self.save_dtype not in SAVE_DTYPES:
            raise ValueError(f"`save_dtype` must be one of {', '.join(SAVE_DTYPES)}, got {self.save_dtype!r}.")
        for name, selections in () if was_written else ONLY_WITH.items():
            if self.selection not in selections and getattr(self, name) != getattr(type(self), name):
                takers = " and ".join(repr(selection) for selection in selections)
                raise ValueError(
                    f"`{name}` has no effect with `selection={self.selection!r}`, only with {takers}: leave it out."
                )

    def _check_gradual(self) -> None:
        for name in ("threshold", "growth_power", "growth_eps"):
            if isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be a number, got {getattr(self, name)!r}.")
        if self.selection == "below" and not (self.threshold is not None and self.threshold > 0):
            raise ValueError(
                f"`threshold` must be a positive number for `selection='below'`, for example 1e-3, got {self.threshold!r}."
            )
        if self.growth_power < 0:
            raise ValueError(f"`growth_power` must not be negative, got {self.growth_power!r}.")
        if self.growth_eps <= 0:
            raise ValueError(f"`growth_eps` must be positive, got {self.growth_eps!r}.")

    def _check_budget(self) -> None:
        given = [name for name in ("density", "num_tunable_weights") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("`density` and `num_tunable_weights` both set the budget: give one of them.")
        if given and self.selection in UNBUDGETED:
            takes = "all non-zero weights" if self.selection == "nonzero" else "all weights below `threshold`"
            raise ValueError(f"`{given[0]}` has no effect with `selection={self.selection!r}`, which takes {takes}.")
        needs_budget = self.selection not in ("given", *UNBUDGETED)
        if not given and needs_budget and self.num_weights_per_module is None:
            self.density = DEFAULT_DENSITY
        if self.density is not None and (isinstance(self.density, bool) or not 0 < self.density <= 1):
            raise ValueError(f"`density` must be in (0, 1], got {self.density!r}.")
        if self.num_tunable_weights is not None and (
            type(self.num_tunable_weights) is not int or self.num_tunable_weights < 1
        ):
            raise ValueError(f"`num_tunable_weights` must be a positive integer, got {self.num_tunable_weights!r}.")
        per_module = self.num_weights_per_module
        if per_module is not None and not (
            isinstance(per_module, dict)
            and per_module
            and all(type(count) is int and count >= 0 for count in per_module.values())
        ):
            raise ValueError(
                f"`num_weights_per_module` must map module names to numbers of weights, got {per_module!r}."
            )

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the training: `total_steps`, or else what a callback has from its Trainer."""
        return self.trainer_steps if self.total_steps is None else self.total_steps

    def use_support(self, support: Mapping[str, torch.Tensor] | str | os.PathLike[str]) -> SparseFTConfig:
        """Sets which weights are tuned, and returns the config.

        Args:
            support: By module name (`"<module>.bias"` for its bias) the flat indices in the weight as it is stored,
                or the path of a safetensors file with the same content (see `save_support`).

        Raises:
            TypeError: The indices of a module are no tensor.
            ValueError: The indices are not distinct non-negative integers. Whether they fit the model is checked when
                the adapter is put on it.
        """
        if not isinstance(support, Mapping):
            support = load_file(os.fspath(support))
        checked = {}
        for name, indices in support.items():
            if not isinstance(indices, torch.Tensor):
                raise TypeError(
                    f"The support of {name!r} must be a tensor of indices, got a {type(indices).__name__}: "
                    "`torch.tensor([...])`."
                )
            if indices.is_floating_point() or indices.ndim != 1:
                raise ValueError(f"The support of {name!r} must be a vector of integers, got {tuple(indices.shape)}.")
            checked[name] = indices.long().sort().values
            if len(indices) and (checked[name][0] < 0 or (checked[name].diff() == 0).any()):
                raise ValueError(f"The support of {name!r} must be distinct indices from zero.")
        if self.selection not in GIVEN:
            raise ValueError(f"`use_support` needs `selection='given'`, the config says {self.selection!r}.")
        self.support = checked
        self.num_weights_per_module = {name: len(indices) for name, indices in checked.items()}
        return self

    def use_scores(self, scores: Mapping[str, torch.Tensor]) -> SparseFTConfig:
        """Sets the scores `selection="sensitivity"` goes by, and returns the config.

        Args:
            scores: By module name a non-negative score for every weight, in the weight's shape. The budget goes to
                the largest scores of all modules together (with `spread`, to those drawn), not in proportion to the modules' sizes.
        """
        if self.selection != "sensitivity":
            raise ValueError(f"`use_scores` needs `selection='sensitivity'`, the config says {self.selection!r}.")
        self.scores = scores
        return self

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not as many places as the config says."""
        counts = self.num_weights_per_module or {}
        for name in sorted(support.keys() | counts.keys()):
            places = support.get(name, torch.empty(0, dtype=torch.int64))
            is_sorted = places.dtype == torch.int64 and places.ndim == 1 and not bool((places.diff() <= 0).any())
            if not is_sorted or len(places) != counts.get(name, 0) or (len(places) and int(places[0]) < 0):
                raise ValueError(
                    f"The calibration in {where} is damaged: {name!r} has no {counts.get(name, 0)} distinct, sorted "
                    "indices of int64."
                )

    def save_support(self, path: str | os.PathLike[str]) -> None:
        """Writes the support that was set, for `use_support`."""
        if self.support is None:
            raise ValueError("The config has no support of its own; set one with `use_support`.")
        save_file(self.support, os.fspath(path))


def require_selection(config: Any, function: str, selection: str) -> None:
    """`TypeError` or `ValueError` unless it is a config with the `selection` that a function works for."""
    if not isinstance(config, SparseFTConfig):
        raise TypeError(f"`config` must be a SparseFTConfig, got {type(config).__name__}.")
    if config.selection != selection:
        raise ValueError(f"`{function}` needs a config with `selection={selection!r}`, got {config.selection!r}.")
