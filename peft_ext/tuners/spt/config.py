"""The configuration of SPT, and what calibration writes into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...core import CalibratedConfig
from ...sparse import check_spread
from .structures import STRUCTURES


DEFAULT_BUDGET = 0.004  # the 0.4 % of the paper


@dataclass
class SPTConfig(CalibratedConfig):
    """Configuration of SPT; see also the common fields of [`ExtConfig`].

    A new one knows nothing of the data: `peft_ext.calibrate(model, config, dataloader)` fills in the last four fields,
    and only then does `get_peft_model` take it. Without `target_modules`, all Linear modules (and GPT-2's Conv1D) and
    all norms of the backbone are looked at.

    Args:
        budget: Trainable parameters, those of heads not counted: a number, or a fraction of the model if below 1.
            `None` is 0.004, the larger of the two budgets of the paper.
        target_parameters: Names of parameters that are no Linear's weight, such as the experts of a mixture
            (`["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`), matched like names of modules. Each of their
            matrices goes low-rank or sparse by itself, without dropout and drop-path. An empty list leaves the experts
            out without a warning.
        structured: What a matrix of many sensitive weights gets: `"lora"`, `"dora"`, `"adapter"` (which cannot be
            merged), or `None` for single weights only.
        unstructured: Whether single weights are tuned at all. Without them there are structures and whole vectors only.
        r: Rank of the low-rank structures, width of the adapters.
        lora_alpha: The low-rank product is scaled by `lora_alpha / r`; `None`: by 1, as published.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        dropout: Of the structure's input.
        drop_path: Probability with which a sample goes without the low-rank output during training.
        spread: 0: the tau most sensitive weights are those of largest score, as published. Above 0 they are drawn
            without replacement, with chances in proportion to score^(1 / spread); scores are squares of gradients by
            default, so that 2 draws in proportion to gradients.
        seed: Of what is drawn; the same in all processes.
        matrix_threshold: alpha: a matrix is structured if it has `cost / matrix_threshold` sensitive weights.
        vector_threshold: beta: a vector (a bias, the weight of a norm) is tuned whole if a `1 / vector_threshold` of it
            is sensitive, also with `unstructured=False`; `None`: never.
        kinds: What each tuned tensor gets: `"sparse"`, `"whole"` or the name of a structure.
        counts: The number of tuned weights of the tensors that are sparse or whole.
        ranks: Rank or width of the structured modules.
        architecture: The class of the model that was looked at.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    METHOD: ClassVar[str] = "SPT"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = (
        "budget",
        "dropout",
        "drop_path",
        "spread",
        "seed",
        "matrix_threshold",
        "vector_threshold",
    )
    SIZES: ClassVar[tuple[str, ...]] = ("ranks",)

    budget: float | int | None = field(
        default=None, metadata={"help": "Trainable parameters, or a fraction of the model's if below 1."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no Linear's weight, such as experts."}
    )
    structured: str | None = field(
        default="lora", metadata={"help": f"What sensitive matrices get: {', '.join(STRUCTURES)}, or None."}
    )
    unstructured: bool = field(default=True, metadata={"help": "Whether single weights are tuned."})
    r: int = field(default=8, metadata={"help": "Rank, or width, of the structures."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale times r; None scales by 1."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the structure's input."})
    drop_path: float = field(default=0.1, metadata={"help": "Drop-path probability of the low-rank output."})
    spread: float = field(
        default=0.0, metadata={"help": "0: the largest scores are sensitive; above: drawn by score^(1 / spread)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn."})
    matrix_threshold: float = field(default=10.0, metadata={"help": "alpha of the paper."})
    vector_threshold: float | None = field(
        default=5.0, metadata={"help": "beta of the paper; None tunes no vector whole."}
    )
    kinds: dict[str, str] | None = field(default=None, metadata={"help": "What each tensor gets; by `calibrate`."})
    counts: dict[str, int] | None = field(default=None, metadata={"help": "Tuned weights; by `calibrate`."})
    ranks: dict[str, int] | None = field(default=None, metadata={"help": "Of structured modules; by `calibrate`."})
    architecture: str | None = field(default=None, metadata={"help": "What was calibrated on; by `calibrate`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds is None and self.budget is None:
            self.budget = DEFAULT_BUDGET
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"`budget` must be positive, got {self.budget!r}.")
        if isinstance(self.budget, float) and self.budget >= 1 and not self.budget.is_integer():
            raise ValueError(f"`budget` must be a whole number, or a fraction below 1, got {self.budget!r}.")
        if not (self.structured is None or isinstance(self.structured, str)):
            raise TypeError(f"`structured` must be a string or None, got {self.structured!r}.")
        if self.structured is not None and self.structured not in STRUCTURES:
            raise ValueError(f"`structured` must be one of {', '.join(STRUCTURES)} or None, got {self.structured!r}.")
        names = self.target_parameters
        if names is not None:
            if not (isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names)):
                raise TypeError(f"`target_parameters` must be a list of names, got {names!r}.")
            self.target_parameters = sorted(set(names))
        if self.target_parameters and self.structured == "adapter":
            raise ValueError(
                "`structured='adapter'` goes behind the output of a Linear, which `target_parameters` have not: set "
                "'lora' or 'dora'."
            )
        if self.structured is None and not self.unstructured and self.vector_threshold is None:
            raise ValueError(
                "`structured=None`, `unstructured=False` and `vector_threshold=None` leave nothing to train: set one of "
                "them."
            )
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"`r` must be a positive integer, got {self.r!r}.")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)!r}.")
        for name in ("matrix_threshold", "vector_threshold"):
            value = getattr(self, name)
            if not (name == "vector_threshold" and value is None) and not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        check_spread(self.spread)
        if self.lora_alpha == 0:
            raise ValueError("`lora_alpha` must not be zero, with which nothing would be trained: leave it out for 1.")
        if self.use_rslora and self.lora_alpha is None:
            raise ValueError("`use_rslora` changes what `lora_alpha` is divided by: set `lora_alpha` too.")
        self._check_allocation()

    def _check_allocation(self) -> None:
        """`ValueError` if what calibration has written, or a file says, is no allocation."""
        allowed = ("sparse", "whole", *STRUCTURES)
        if self.kinds is not None and not (
            isinstance(self.kinds, dict)
            and all(isinstance(kind, str) and kind in allowed for kind in self.kinds.values())
        ):
            raise ValueError(f"`kinds` must map names of tensors to one of {', '.join(allowed)}.")
        for field_name in ("counts", "ranks"):
            numbers = getattr(self, field_name)
            if numbers is not None and not (
                isinstance(numbers, dict)
                and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers.values())
            ):
                raise ValueError(f"`{field_name}` must map names of tensors to positive integers.")

    def check_consistent(self) -> None:
        """`ValueError` if `counts` and `ranks` are not of the tensors of `kinds`."""
        kinds = self.kinds or {}
        counted = {name for name, kind in kinds.items() if kind in ("sparse", "whole")}
        for field_name, names in (("counts", counted), ("ranks", kinds.keys() - counted)):
            if wrong := names ^ (getattr(self, field_name) or {}).keys():
                raise ValueError(
                    f"`kinds` and `{field_name}` of this SPTConfig do not fit each other at {min(wrong)!r}: calibrate "
                    "anew, or restore the file that was saved."
                )

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not the indices of the sparse tensors of this allocation."""
        sparse = {name for name, kind in (self.kinds or {}).items() if kind == "sparse"}
        faults = [f"{name} is missing" for name in sorted(sparse - support.keys())]
        faults += [f"{name} is not sparse" for name in sorted(support.keys() - sparse)]
        for name in sorted(sparse & support.keys()):
            indices, count = support[name], (self.counts or {}).get(name)
            if indices.dtype not in (torch.int32, torch.int64) or indices.shape != (count,):
                faults.append(f"{name} has {tuple(indices.shape)} of {indices.dtype}, not {count} integers")
            elif int(indices[0]) < 0 or bool((indices.diff() <= 0).any()):
                faults.append(f"{name} has indices that are not distinct, sorted and from zero")
        if faults:
            raise ValueError(f"The calibration in {where} is damaged:\n    " + "\n    ".join(faults[:8]))

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
