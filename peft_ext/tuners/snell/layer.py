"""A linear module with an update from distances of points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from ...core import HALF, ExactLeaf, ExtConfig, ExtLayer, needs_plain_operations
from ...core.schedule import listen_to_steps
from ...core.sharding import held_by, refusal, unwrapped
from .config import SNELLConfig
from .kernel import kernel_product, update_of


FAR = 3.0  # standard deviation of the points with `init_weights=False`


class Points(ExactLeaf):
    """The points of the inputs, or of the outputs, of a module: `weight` `(2, count, r/2)`.

    With a module size `(out, in)`, the points are those of the outputs of a module whose zeros are allocated: the
    buffer `kept` says how many entries of its update are none, and `progress` how many steps were made.
    """

    kept: torch.Tensor
    progress: torch.Tensor

    def __init__(self, count: int, half: int, size: int | None = None, kept: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, count, half))
        # `kaiming_uniform_(a=sqrt(5))` of a tensor of three dimensions, as published
        nn.init.uniform_(self.weight, -((count * half) ** -0.5), (count * half) ** -0.5)
        self._exact = self.weight.data
        self.shape = self.weight.shape  # what `weight` has may be a shard of it
        self.size = size
        self.allocation: Any = None  # an `Allocation`, if it is told of steps
        if size is not None:
            self.register_buffer("kept", torch.tensor([kept]))
            self.register_buffer("progress", torch.zeros(1, dtype=torch.int64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.allocation is not None:
            listen_to_steps(self)

    def drive(self, allocation: Any) -> None:
        """Tells an `Allocation` of the optimizer steps that move the points."""
        self.allocation = allocation
        listen_to_steps(self)

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the numbers of a file are none of this module."""
        if self.size is not None and not 0 < int(tensors["kept"]) <= self.size:
            raise ValueError(f"`kept` is {int(tensors['kept'])} of {self.size} entries")
        if self.size is not None and int(tensors["progress"]) < 0:
            raise ValueError(f"`progress` is a number of steps, got {int(tensors['progress'])}")

    def sparsity(self) -> float:
        """The share of zeros that `kept` leaves."""
        assert self.size is not None
        return 1.0 - int(self.kept) / self.size

    def forward(self) -> torch.Tensor:
        """The points in fp32 at least, as a new tensor: FSDP frees its own when the leaf's forward ends."""
        return self.weight.float() if self.weight.dtype in HALF else self.weight.clone()

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Measures how sensitive the loss is to the points."""
        self._refuse_flattened(optimizer)
        self.allocation.before_step(self, optimizer, closure)

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Counts, and has the zeros allocated anew."""
        self.allocation.after_step(self, optimizer, taken)

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Of no concern, unless that optimizer holds the points in a flattened copy."""
        self._refuse_flattened(optimizer)

    def _refuse_flattened(self, optimizer: Optimizer) -> None:
        if (holder := held_by(self, optimizer)) is not None:
            raise refusal("SNELL with `allocation='adaptive'`", holder, "`allocation='uniform'`")

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class SNELLLinear(ExtLayer):
    """A Linear (or Conv1D) with `snell_outputs` and `snell_inputs`, whose distances make an update of its weight."""

    adds = True
    adapter_layer_names = ("snell_outputs", "snell_inputs")
    other_param_names = ("configs",)
    supports_mixed_batches = True
    snell_outputs: nn.ModuleDict
    snell_inputs: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.configs: dict[str, SNELLConfig] = {}

    def update_layer(self, adapter_name: str, config: SNELLConfig, *, kept: int | None) -> None:
        """Creates the points of one adapter; `kept`: of a module whose zeros are allocated, how many are none."""
        inputs, outputs = self.in_features, self.out_features
        size = None if kept is None else inputs * outputs
        self.configs[adapter_name] = config
        self.snell_outputs[adapter_name] = Points(outputs, config.r // 2, size, kept or 0)
        self.snell_inputs[adapter_name] = Points(inputs, config.r // 2)
        self.finish_update(adapter_name, config)

    @torch.no_grad()
    def start_at_random(self, adapter_name: str, config: ExtConfig) -> None:
        """With `init_weights=False`, moves the points far apart: distances count by a tenth, and then by their square."""
        if config.init_weights is False:
            for leaf in self.points(adapter_name):
                if not leaf.weight.is_meta:
                    leaf.weight.add_(torch.randn_like(leaf.weight), alpha=FAR)

    def points(self, adapter_name: str) -> tuple[Points, Points]:
        """Those of the outputs and of the inputs."""
        outputs, inputs = (unwrapped(leaves[adapter_name]) for leaves in (self.snell_outputs, self.snell_inputs))
        assert isinstance(outputs, Points) and isinstance(inputs, Points)
        return outputs, inputs

    def _values(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The points of the outputs and of the inputs, as tensors; FSDP1 gathers them where its wrappers are called."""
        return self.snell_outputs[adapter_name](), self.snell_inputs[adapter_name]()

    def sparsity(self, adapter_name: str) -> float:
        """The share of the update that is zero."""
        outputs, _ = self.points(adapter_name)
        return (self.configs[adapter_name].sparsity or 0.0) if outputs.size is None else outputs.sparsity()

    def added(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to the output `(..., out)` of x `(..., in)`."""
        config = self.configs[adapter_name]
        outputs, inputs = self._values(adapter_name)
        plain = needs_plain_operations()
        y = kernel_product(x, outputs, inputs, self.sparsity(adapter_name), config.gate, plain)
        if self.training and config.drop_path:
            kept = y.new_empty((len(y),) + (1,) * (y.ndim - 1)).bernoulli_(1 - config.drop_path)
            y = y * kept / (1 - config.drop_path)
        return y

    def adapted_forward(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x `(..., in)`."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            y = y + self.added(name, x).to(y.dtype)
        return y

    def mixed_batch_forward(
        self, adapter_names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """x `(B, ..., in)`."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        names = self.names_of_rows(adapter_names, len(x))
        for name in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            y = y.index_add(0, rows, self.added(name, x.index_select(0, rows)).to(y.dtype))
        return y

    def update(self, adapter_name: str) -> torch.Tensor:
        """The update of the weight, in its shape and in fp32 at least."""
        outputs, inputs = (values.detach() for values in self._values(adapter_name))
        found = update_of(outputs, inputs, self.sparsity(adapter_name), self.configs[adapter_name].gate)
        return found.T if isinstance(self.get_base_layer(), Conv1D) else found

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """W + D * g(D)."""
        update, weight = self.update(adapter_name), self.get_base_weight()
        return {"weight": weight.to(torch.promote_types(weight.dtype, update.dtype)) + update.to(weight.device)}
