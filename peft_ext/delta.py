"""Sparse deltas as modules: the leaf that holds one, and the layer that adds several to a module's weight and bias."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from .core import HALF, ExactLeaf, ExtLayer, adapted_in_groups, linear_features, onloaded
from .core.schedule import exempt_from_weight_decay, listen_to_steps
from .core.sharding import call_with, held_by, refusal
from .sparse import (
    Gradient,
    LinearOperation,
    Operation,
    decode,
    decode_unchecked,
    encode,
    index_dtype,
    operation_of,
    sparse_apply,
)


_NO_SUPPORT = (
    "The config has the numbers of tuned weights, but not which they are (JSON has no room for them), and no saved "
    "adapter was loaded, so the tuned weights would be arbitrary. Give the config its support before `get_peft_model`, "
    "with `peft_ext.calibrate(...)` or `config.use_support(...)`, or load the adapter with `PeftModel.from_pretrained`."
)
INSTEAD = "a fixed support such as `selection='random'`"


class Tracker(Protocol):
    """Somebody who moves the indices of a delta as training steps go by."""

    def observe(self, leaf: SparseDelta, gradient: Gradient, values: torch.Tensor) -> None:
        """One backward through the layer: the gradient of its weight, and of the values."""

    def before_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """See `schedule.StepListener`."""

    def after_step(self, leaf: SparseDelta, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """See `schedule.StepListener`."""

    def foreign_step(self, leaf: SparseDelta, optimizer: Optimizer) -> None:
        """See `schedule.StepListener`."""

    def note_copy(self, leaf: SparseDelta, copied: SparseDelta) -> None:
        """`copied` is a deep copy of the leaf."""

    def note_load(self, leaf: SparseDelta) -> None:
        """Other tensors were loaded into the leaf."""

    def was_written(self, leaf: SparseDelta) -> bool:
        """Whether the leaf was written to in place, so that its indices must be decoded anew."""

    def see(self, values: torch.Tensor) -> None:
        """A forward reads the values `(k,)`, all of them, also where a process holds a part only."""


class SparseDelta(ExactLeaf):
    """k values at k of `size` indices: the parameter `weight` `(k,)` and the buffer `index`, the encoded indices.

    Both have shapes that follow from k and `size`, so that any loader can fill them in.
    """

    def __init__(self, indices: torch.Tensor, size: int, placeholder: bool = False) -> None:
        super().__init__()
        self.size = size
        self.k = len(indices)  # what `weight` has may be a shard of it
        self.weight = nn.Parameter(torch.zeros(self.k))
        self.register_buffer("index", encode(indices, size))
        self.index: torch.Tensor
        self.tracker: Any = None  # a `Tracker`, if the indices move as steps go by
        self.decays = True
        # indices that only hold the shape until those of a saved adapter are loaded
        self.placeholder = placeholder
        self._placeholder_code: tuple[torch.Tensor, int] | None = self._code() if placeholder else None
        self._decoded = None if indices.is_meta else indices.to(index_dtype(size), copy=True)
        self._decoded_from: tuple[torch.Tensor, int] | None = self._code()
        self._agreed = False  # whether the first process' indices were seen to be these

    def __getstate__(self) -> dict[str, Any]:
        self.is_unloaded()  # takes note of a loader that came in between
        return self.__dict__ | dict.fromkeys(("_placeholder_code", "_decoded", "_decoded_from"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._placeholder_code = self._code() if self.placeholder else None
        self._decode_ahead()
        self._register()  # copies and unpickled leaves too

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseDelta:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self.tracker is not None and not self.index.is_meta:
            self.tracker.note_copy(self, copied)
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "index" and "_decoded" in self.__dict__:  # a loader that assigns tensors
            self._decode_ahead()

    def _register(self) -> None:
        if self.tracker is not None or self.placeholder:
            listen_to_steps(self)
        if not self.decays:
            exempt_from_weight_decay(self)

    def track(self, tracker: Tracker) -> None:
        """Lets the indices move as the optimizer makes steps."""
        self.tracker = tracker
        self._register()

    def exempt_from_decay(self) -> None:
        """No optimizer decays the values."""
        self.decays = False
        self._register()

    # The indices

    def _code(self) -> tuple[torch.Tensor, int]:
        """The encoded indices, and a number that changes with what is in them."""
        return self.index, 0 if self.index.is_inference() else self.index._version

    def _decode_ahead(self) -> None:
        """Decodes now, since a compiled forward cannot; a damaged code is refused when it is used."""
        self._decoded = self._decoded_from = None
        if not self.index.is_meta:
            with suppress(ValueError):
                self.indices()

    def indices(self) -> torch.Tensor:
        """The flat indices `(k,)`, sorted; decoded once after they were set or loaded.

        Raises:
            ValueError: Nothing was loaded yet, or what was loaded are no indices.
        """
        if torch.compiler.is_compiling():
            if self.placeholder:
                raise ValueError(_NO_SUPPORT)
            decoded = self._decoded
            return decode_unchecked(self.index, self.k, self.size) if decoded is None else decoded
        if self.is_unloaded():  # takes note of a loader that came in between
            raise ValueError(_NO_SUPPORT)
        if self.tracker is not None and self.tracker.was_written(self):
            self._decoded = None
        now, before = self._code(), self._decoded_from
        if self._decoded is not None and before is not None and now[0] is before[0]:
            same = now[1] == before[1]
            if not same and self.training and torch.distributed.is_initialized():
                # the buffers of the first process are sent to all others before each forward: looked at once
                self._agreed = self._agreed or torch.equal(encode(self._decoded, self.size), self.index)
                same = self._agreed
            if same and self._decoded.device == self.index.device:
                self._decoded_from = now
                return self._decoded
        self._agreed = False
        with torch.inference_mode(False):  # what is kept must serve training, too
            self._decoded = decode(self.index, self.k, self.size)
        self._decoded_from = now
        return self._decoded

    @torch.no_grad()
    def set_indices(self, indices: torch.Tensor) -> None:
        """Moves to other indices `(k,)`, sorted; the values stay where they are in the vector."""
        self.index.copy_(encode(indices, self.size))
        self.placeholder = self._agreed = False
        with torch.inference_mode(False):
            self._decoded = indices.to(index_dtype(self.size), copy=True)
        self._decoded_from = self._code()

    def is_unloaded(self) -> bool:
        """Whether the indices only hold the shape, since no loader has filled them in yet."""
        if self.placeholder and self._placeholder_code is not None:
            kept, version = self._placeholder_code
            now = self._code()
            self.placeholder = now[0] is kept and now[1] == version
        return self.placeholder

    # Loading, casting, saving

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Values and indices are loaded together or not at all: on other indices the values would mean nothing."""
        own = [f"{prefix}weight", f"{prefix}index"]
        found = [key for key in own if key in state_dict]
        if len(found) == 1:
            (absent,) = set(own) - set(found)
            warnings.warn(
                f"{found[0]!r} is not loaded, since {absent!r} is missing or was left out for its size: the values "
                "and the indices of a sparse adapter belong together. The adapter starts anew there.",
                stacklevel=2,
            )
            missing_keys += own
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not found:  # the file of another adapter
            return
        self.placeholder = False
        if self.tracker is not None:
            self.tracker.note_load(self)
        self._decode_ahead()

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the indices of a file are none."""
        decode(tensors["index"], tensors["weight"].numel(), self.size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseDelta:
        unloaded, before = self.is_unloaded(), self.index
        super()._apply(fn, recurse)
        if unloaded:
            self._placeholder_code = self._code()
        if self.index is not before:
            self._decode_ahead()
        return self

    def forward(self) -> torch.Tensor:
        """The values `(k,)`, in fp32 at least, as a new tensor.

        They are read by calling, for FSDP gathers `weight` only while a leaf runs, and frees it afterwards.
        """
        values: torch.Tensor = self.weight.float() if self.weight.dtype in HALF else self.weight.clone()
        if self.tracker is not None and not torch.compiler.is_compiling():
            self.tracker.see(values.detach())
        return values

    def extra_repr(self) -> str:
        return f"{self.k} of {self.size}"

    # Steps

    def _is_trained(self) -> bool:
        """Whether a step may move the values, and not those of another adapter only, whose optimizer has these, too."""
        return self.weight.requires_grad or self.weight.grad is not None

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """Refuses to train what cannot be trained, then lets the tracker look at the gradient."""
        if not self._is_trained():
            return
        if self.is_unloaded():
            raise ValueError(_NO_SUPPORT)
        if self.tracker is None:
            return
        self._refuse_flattened(optimizer)
        if self.weight.dtype in HALF:
            raise ValueError(
                f"The values of a sparse adapter are in {self.weight.dtype}, where small updates are lost. Call "
                "`model.train()` after casting the model and before the optimizer is made (and before `fully_shard`): "
                "it puts them back."
            )
        self.tracker.before_step(self, optimizer, group, closure)

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Lets the tracker count the step, and move the support if it is time."""
        if self.tracker is not None and self._is_trained():
            self.tracker.after_step(self, optimizer, group, taken)

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Notices training that leaves the values out, or holds them elsewhere."""
        if self.tracker is not None:
            self._refuse_flattened(optimizer)
            self.tracker.foreign_step(self, optimizer)

    def _refuse_flattened(self, optimizer: Optimizer) -> None:
        if (holder := held_by(self, optimizer)) is not None:
            raise refusal(f"A sparse adapter whose support moves ({self.tracker.selection!r})", holder, INSTEAD)


class DeltaLayer(ExtLayer):
    """A module whose weight is W + S, and its bias b + s, with S and s the sums of the active adapters' deltas.

    Subclasses have two `ModuleDict`s of `SparseDelta`, and name them.
    """

    adds = True  # what a change of the parameters adds, an output linear in them
    delta_names: tuple[str, str]  # the containers of the deltas on weights and on biases
    supports_mixed_batches = True

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.op = self.operation()

    def operation(self) -> Operation | None:
        """The product of the module with its weight, `None` if its parameters are replaced for the forward."""
        return layer_operation(self.get_base_layer(), self._get_embed_scale())

    @property
    def deltas(self) -> nn.ModuleDict:
        """Those on the weight, by adapter."""
        return getattr(self, self.delta_names[0])

    @property
    def bias_deltas(self) -> nn.ModuleDict:
        """Those on the bias, by adapter."""
        return getattr(self, self.delta_names[1])

    def present(self, adapters: Iterable[str]) -> list[str]:
        """Those of `adapters` that this layer has."""
        return [name for name in adapters if any(name in getattr(self, kind) for kind in self.adapter_layer_names)]

    def _size(self, of_weight: bool) -> int:
        if of_weight and self.op is not None:
            return self.op.n
        parameter = getattr(self.get_base_layer(), "weight" if of_weight else "bias")
        assert isinstance(parameter, torch.Tensor)
        return parameter.numel()

    # Forward

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module with W + S for the weight, S being the sum over the adapters."""
        if self.op is None:
            base = self.get_base_layer()
            if inside := self.active_inside():
                raise ValueError(
                    f"Sparse deltas on a {type(base).__name__} are written into its parameters, and so cannot act after "
                    f"{inside[0]!r}, an adapter of another method on the same module. Add the sparse adapter first, or "
                    "list the module in its `exclude_modules`."
                )
            with onloaded(base):
                parameters = self._effective(adapters)
            output: torch.Tensor = call_with(base, parameters, args, kwargs)
            return output
        if kwargs or len(args) != 1:
            raise TypeError(f"A sparse adapter on {type(self.base_layer).__name__} takes one positional argument.")
        return self._with_bias(self._with_weight(adapters, args[0]), adapters)

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Sample `i` passes through the module with the deltas of `adapter_names[i]` alone."""
        return adapted_in_groups(self, adapter_names, *args, **kwargs)

    def _with_weight(self, adapters: list[str], x: torch.Tensor) -> torch.Tensor:
        """The output for the input x with the adapters on the weight, and not yet on the bias."""
        assert self.op is not None
        values, indices, observers = [], [], []
        start = 0
        for name in adapters:
            if name in self.deltas:
                leaf: Any = self.deltas[name]
                values.append(leaf())
                indices.append(leaf.indices())
                stop = start + len(values[-1])
                if leaf.tracker is not None and leaf.weight.requires_grad and not torch.compiler.is_compiling():
                    observers.append((_Watch(leaf), start, stop))
                start = stop
        if not values:
            return self.base_layer(x)
        all_values = values[0] if len(values) == 1 else torch.cat(values)
        all_indices = indices[0] if len(indices) == 1 else torch.cat(indices)
        return sparse_apply(self.base_layer, self.op, x, all_values, all_indices, tuple(observers))

    def _with_bias(self, output: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        bias = self._bias_delta(adapters)
        if bias is None:
            return output
        bias = bias.view(-1, 1, 1) if isinstance(self.get_base_layer(), nn.Conv2d) else bias
        return (output + bias).to(output.dtype)

    def _bias_delta(self, adapters: list[str]) -> torch.Tensor | None:
        """The sum of the adapters' deltas on the bias, written out."""
        total = None
        for name in adapters:
            if name in self.bias_deltas:
                leaf: Any = self.bias_deltas[name]
                values = leaf()
                start = values.new_zeros(leaf.size) if total is None else total
                total = start.index_add(0, leaf.indices(), values)
        return total

    def _effective(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The parameters of a norm, which are so small that they are simply written out."""
        base = self.get_base_layer()
        parameters = {}
        for key, container in (("weight", self.deltas), ("bias", self.bias_deltas)):
            if not any(name in container for name in adapters):
                continue
            own = getattr(base, key)
            total = own.to(torch.promote_types(own.dtype, torch.float32))
            for name in adapters:
                if name in container:
                    leaf: Any = container[name]
                    total = total.index_add(0, leaf.indices(), leaf().to(total.dtype))
            parameters[key] = total.to(own.dtype)
        return parameters

    # Merge

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """W + S and b + s, summed in fp32 at least and rounded once."""
        if self.quantization_backend is not None:
            raise ValueError(
                f"Cannot merge adapter {adapter_name!r} into quantised weights: rounding them to the quantised grid "
                "again would lose most of the small sparse changes. Load the base model without quantisation (or "
                "call `model.dequantize()` on it), put the adapter on that, and merge there."
            )
        base = self.get_base_layer()
        merged = {}
        for key, container in (("weight", self.deltas), ("bias", self.bias_deltas)):
            if adapter_name in container:
                leaf: Any = container[adapter_name]
                current = getattr(base, key).data
                flat = current.reshape(-1).to(torch.promote_types(current.dtype, torch.float32))
                total = flat.index_add(0, leaf.indices(), leaf().to(flat.dtype))
                merged[key] = total.view(current.shape)
        return merged


class _Watch:
    """Passes the gradient of a weight on to the leaf's tracker."""

    def __init__(self, leaf: SparseDelta) -> None:
        self.leaf = leaf

    def observe(self, gradient: Any, values: torch.Tensor) -> None:
        assert self.leaf.tracker is not None
        self.leaf.tracker.observe(self.leaf, gradient, values)


def layer_operation(base_layer: nn.Module, embed_scale: torch.Tensor | None = None) -> Operation | None:
    """The product of a supported module with its weight, `None` for a norm.

    Raises:
        TypeError: The module is of no supported type.
    """
    if type(base_layer).__name__.endswith("Norm"):
        weight = getattr(base_layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            return None
    if not isinstance(base_layer, (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)):
        features = linear_features(base_layer)
        if features is not None:
            return LinearOperation((features[1], features[0]))
    elif (op := operation_of(base_layer)) is not None:
        features = linear_features(base_layer)
        if features is not None and op.n != features[0] * features[1]:  # packed 4-bit weights
            op = LinearOperation((features[1], features[0]))
        if embed_scale is not None:
            op.scale = embed_scale  # type: ignore[attr-defined]
        return op
    raise TypeError(
        f"Sparse deltas do not support modules of type {type(base_layer).__name__}; they go on Linear, Conv1D, "
        "Conv2d, Embedding (without max_norm) and norms with a weight."
    )
