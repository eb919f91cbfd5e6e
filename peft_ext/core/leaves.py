"""The modules that hold trainable parameters. They own a `weight`, which FSDP can shard and gather."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .schedule import exempt_from_weight_decay
from .sharding import is_sharded, note_weight


HALF = (torch.float16, torch.bfloat16)


class AdapterVector(nn.Module):
    """One trainable vector `(C,)`, kept as `weight`, in a leaf module of its own; calling it gives `weight + offset`.

    FSDP shards leaf modules that own a `weight`, and gathers it only while the leaf's `forward` runs, so the vector is
    read by calling the leaf, which returns a new tensor. Storing a scale as its offset from one keeps updates that are
    small against one, also where a trainer casts trainables to bfloat16. No optimizer decays the vector.
    """

    def __init__(self, channels: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.offset = offset
        exempt_from_weight_decay(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        exempt_from_weight_decay(self)  # copies and unpickled leaves too

    def forward(self) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        return weight + self.offset

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, offset={self.offset}"


class SharedLeaf(nn.Module):
    """Stands in a layer for a leaf that another module of the model owns and several layers use: a linear map or a vector.

    It has no parameters of its own, so that these are saved, sharded and counted once, at their owner's.

    Args:
        container: The owner's leaves.
        key: Which of them: the adapter's name.
    """

    def __init__(self, container: nn.ModuleDict, key: str) -> None:
        super().__init__()
        self._owner = (container, key)  # in a tuple, so that it is no submodule; FSDP may exchange the leaf in there

    @staticmethod
    def owned(leaf: nn.Module) -> Any:
        """The leaf that has the parameters: that which `leaf` stands for, or `leaf` itself."""
        if not isinstance(leaf, SharedLeaf):
            return leaf
        container, key = leaf._owner
        return container[key]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the leaf makes of x `(..., in)`, if it takes one, on any device: a layer may be on another one than it."""
        leaf = self.owned(self)
        if all(leaf.weight.device == x.device for x in inputs):
            output: torch.Tensor = leaf(*inputs)
            return output
        return functional_call(leaf, {"weight": leaf.weight.to(inputs[0].device)}, inputs)


def copy_state(source: nn.Module, target: nn.Module) -> bool:
    """Gives a leaf what another one holds besides its parameters; `False` if that was never filled in itself.

    It goes through `load_state_dict`, so that the leaf takes notice as it does of a file.
    """
    is_unloaded: Any = getattr(source, "is_unloaded", None)
    if is_unloaded is not None and is_unloaded():
        return False
    buffers = dict(source.named_buffers())
    if buffers:
        target.load_state_dict(target.state_dict() | buffers)  # its own parameters, so that nothing is missing
    return True


Cast = Callable[[torch.Tensor], torch.Tensor]


def keeping_precision(cast: Cast) -> Cast:
    """The cast or move of a module, `_apply`'s, without the step to half precision of what has more."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        moved = cast(tensor)
        loses = tensor.is_floating_point() and moved.dtype in HALF and tensor.dtype not in HALF
        return tensor.to(moved.device) if loses else moved

    return keep


class ExactLeaf(nn.Module):
    """A leaf whose `weight` moves in steps that are too small for half precision.

    The values stay in fp32 when a model is cast to half precision, and are put back into fp32, exactly where that is
    possible, when a trainer that has cast all trainable parameters calls `train()`: in bfloat16 an update of 1e-5 does
    not move a value of 1e-2.
    """

    weight: Any
    _exact: torch.Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and is_sharded(value):
            note_weight(self, value)
            vars(self)["_exact"] = None  # all of the values, which no process is to keep

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._exact = self.weight.data

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._exact = self.weight.data

    def _apply(self, fn: Cast, recurse: bool = True) -> ExactLeaf:
        super()._apply(keeping_precision(fn), recurse)
        self._exact = self.weight.data
        return self

    def train(self, mode: bool = True) -> ExactLeaf:
        """Puts values that were cast to half precision back into fp32, for training."""
        if is_sharded(self.weight):  # what FSDP2 gathers in half precision, it keeps in full precision
            super().train(mode)
            return self
        if mode and self.weight.dtype in HALF and not self.weight.is_meta:
            exact = self._exact
            was_exact = exact is not None and exact.dtype not in HALF and exact.shape == self.weight.shape
            if was_exact and exact is not None and torch.equal(exact.to(self.weight), self.weight.data):
                self.weight.data = exact.to(self.weight.device)
            else:
                self.weight.data = self.weight.data.float()
            self.weight.grad = None
        if self.weight.dtype not in HALF:
            self._exact = self.weight.data
        super().train(mode)
        return self


class FirstGradient:
    """A hook on a parameter that notes in its layer that there was a gradient."""

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer = weakref.ref(layer)
        self.adapter_name = adapter_name

    def __call__(self, grad: torch.Tensor) -> None:
        layer = self.layer()
        if layer is not None:
            layer.learnt.add(self.adapter_name)
