"""The fields of SNELL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core import ExtConfig


GATES = ("shrink", "weight", "none")
ALLOCATIONS = ("uniform", "adaptive")


@dataclass
class SNELLConfig(ExtConfig):
    """Configuration of SNELL; see also the common fields of [`ExtConfig`].

    Args:
        r: Numbers for each row and column of a weight, as in a LoRA of this rank. An even number.
        sparsity: The share of each update that is zero. `None`: 0.9.
        gate: What the others are weighted by: `"shrink"`, how far they are above the largest that is zero, as in the
            paper; `"weight"`, their own magnitude, as in its code; `"none"`: nothing is zero, and `sparsity` is left
            out.
        allocation: `"uniform"`: each update has that share of zeros. `"adaptive"` (SNELLA): all of them together have,
            each by how sensitive the loss is to it; the share rises from 0.01 over `total_steps`.
        total_steps: Optimizer steps of the training, for `"adaptive"`.
        drop_path: Probability with which a sample goes without the update of a module during training; 0.1 in the
            published scripts.
        init_weights: `True`: as published, uniform; the update is next to nothing, and not zero. `False`: larger, for
            tests.

    Raises:
        ValueError: A field has a value that SNELL cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "SNELL"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("total_steps", "drop_path")

    r: int = field(default=8, metadata={"help": "Numbers for each row and column of a weight; even."})
    sparsity: float | None = field(default=None, metadata={"help": "Share of each update that is zero; 0.9 if empty."})
    gate: str = field(default="shrink", metadata={"help": f"How the update is cut: one of {', '.join(GATES)}."})
    allocation: str = field(default="uniform", metadata={"help": f"Zeros over modules: {' or '.join(ALLOCATIONS)}."})
    total_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the training."})
    drop_path: float = field(default=0.0, metadata={"help": "Probability that a sample goes without an update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.r) is not int or self.r < 2 or self.r % 2:
            raise ValueError(
                f"`r` must be an even number of at least 2, half for each of two distances, got {self.r!r}."
            )
        if self.gate not in GATES:
            raise ValueError(f"`gate` must be one of {', '.join(map(repr, GATES))}, got {self.gate!r}.")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"`allocation` must be 'uniform' or 'adaptive', got {self.allocation!r}.")
        if self.gate == "none":
            for name, default in (("sparsity", None), ("allocation", "uniform")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}` has no effect with `gate='none'`, which sets nothing to zero: leave it out."
                    )
        elif self.sparsity is None:
            self.sparsity = 0.9
        if self.sparsity is not None and (isinstance(self.sparsity, bool) or not 0 < self.sparsity < 1):
            raise ValueError(
                f"`sparsity` must be above 0 and below 1, got {self.sparsity!r}: at 1 nothing would be trained. Without "
                "zeros the update is that of `gate='none'`."
            )
        if self.allocation == "uniform" and self.total_steps is not None:
            raise ValueError("`total_steps` has no effect with `allocation='uniform'`, which follows no schedule.")
        if self.allocation == "adaptive" and (type(self.total_steps) is not int or self.total_steps < 1):
            raise ValueError(
                "`allocation='adaptive'` needs `total_steps`, the optimizer steps of the training, over which zeros "
                f"become more; got {self.total_steps!r}."
            )
        if isinstance(self.drop_path, bool) or not 0 <= self.drop_path < 1:
            raise ValueError(f"`drop_path` must be at least 0 and below 1, got {self.drop_path!r}.")
