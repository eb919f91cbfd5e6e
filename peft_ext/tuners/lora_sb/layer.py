"""A linear module with B R A on its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...core import ExactLeaf, ExtLayer
from .config import CORE, DOWN, UP, LoraSBConfig


START_STD = 1e-5  # of R in LoRA-XS
ITERATIONS, OVERSAMPLED = 10, 10  # of the power iterations, as in the published code of LoRA-XS
WORTHWHILE = 4  # how many times as large as that a matrix is of which they are faster


class Between(ExactLeaf):
    """R `(r, r)`, trained as `weight`, between the frozen A `down` `(r, in)` and B `up` `(out, r)`.

    All stay in fp32: in bf16 the factors would not be orthonormal, and R would not move.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, down: torch.Tensor, core: torch.Tensor, up: torch.Tensor, is_placeholder: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(core.clone())
        self.register_buffer("down", down.clone())
        self.register_buffer("up", up.clone())
        self.is_placeholder = is_placeholder
        self._exact = self.weight.data

    def is_unloaded(self) -> bool:
        """Whether the factors are still to come, from a file or another adapter."""
        if self.is_placeholder and bool(self.up.any()):  # looked at, since transformers loads past all load hooks
            self.is_placeholder = False
        return self.is_placeholder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B R A x, `(..., out)` of `(..., in)`."""
        if self.is_unloaded():
            raise ValueError(
                "This LoRA-SB adapter has no factors yet: load its weights, or calibrate a new config and use that."
            )
        core = self.weight.to(self.down.dtype)  # trainers cast what is trained, and leave the factors as they are
        return F.linear(F.linear(F.linear(x, self.down), core), self.up)


class LoraSBLinear(ExtLayer):
    """A linear module with one matrix for each adapter."""

    adds = True
    adapter_layer_names = ("low_rank_core_matrix",)
    other_param_names: tuple[str, ...] = ()
    supports_mixed_batches = True
    low_rank_core_matrix: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: LoraSBConfig, *, name: str) -> None:
        """With the factors that a calibration has found for the module `name`, or those of its weight."""
        will_load = config.inference_mode or config.awaits_weights
        if config.init_weights is True or will_load:
            found = config.support or {}
            shapes = {
                DOWN: (config.r, self.in_features),
                CORE: (config.r, config.r),
                UP: (self.out_features, config.r),
            }
            parts = {part: found.get(f"{name}.{part}", torch.zeros(shape)) for part, shape in shapes.items()}
            leaf = Between(parts[DOWN], parts[CORE], parts[UP], is_placeholder=not found)
        else:
            down, values, up = leading_factors(self._as_matrix(self.unmerged_weight()), config.r)
            leaf = Between(values[:, None] * down, torch.randn(config.r, config.r) * START_STD, up)
        self.low_rank_core_matrix[adapter_name] = leaf
        self.finish_update(adapter_name, config)

    def product(self, adapter_name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output with B R A x added."""
        leaf: Any = self.low_rank_core_matrix[adapter_name]
        return output + leaf(self._cast_input_dtype(x, leaf.down.dtype)).to(output.dtype)

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x `(..., in)`."""
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            output = self.product(name, x, output)
        return output

    def mixed_batch_forward(
        self, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x `(B, ..., in)`."""
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        names = self.names_of_rows(adapter_names, len(x))
        for name in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            own = self.product(name, x.index_select(0, rows), output.index_select(0, rows))
            output = output.index_copy(0, rows, own)
        return output

    def low_rank(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The update as one of rank r: A `(r, in)` and B R `(out, r)`."""
        leaf: Any = self.low_rank_core_matrix[adapter_name]
        return leaf.down, leaf.up @ leaf.weight.detach().to(leaf.up.dtype)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """W + B R A."""
        down, up = self.low_rank(adapter_name)
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, down.dtype)
        return {"weight": weight.to(dtype) + self._as_matrix(up @ down).to(weight.device, dtype)}

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out, in)`, of what the base keeps; and back. GPT-2's Conv1D keeps `(in, out)`."""
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight


def factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first r right singular vectors `(r, in)`, values `(r,)`, and left vectors `(out, r)` of `(out, in)`, in fp32.

    From the whole decomposition: the singular values of matrices of signs lie too close for random projections.
    """
    left, values, right = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    return right[:r].contiguous(), values[:r].contiguous(), left[:, :r].contiguous()


def leading_factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of a weight; of one that is much larger than r by power iterations, as LoRA-XS does it.

    The random start is that of a generator of its own, so that all processes find the same.
    """
    matrix = matrix.detach().float()
    size = r + OVERSAMPLED
    if WORTHWHILE * size > min(matrix.shape):
        return factors(matrix, r)
    start = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return right[:r].contiguous(), values[:r].contiguous(), (basis @ left[:, :r]).contiguous()
