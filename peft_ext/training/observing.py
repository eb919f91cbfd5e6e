"""What each module keeps for the backward: measured in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase

from ..core import HeatMap, layer_and_type
from ..plots import draw
from .sparsify import Sparsified


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MIB = 2**20


@dataclass
class Kept:
    """What one module keeps, without its children.

    Attributes:
        module: Its full name; empty for the model itself.
        kind: Its class.
        tensors: How many tensors.
        bytes: Of their memory; what several modules keep counts for the first of them.
    """

    module: str
    kind: str
    tensors: int = 0
    bytes: int = 0


@dataclass
class ActivationReport:
    """What a forward keeps for the backward; made by [`activation_report`].

    Attributes:
        rows: A row for each module that keeps something, in the order of the forward.
        training: Whether the model was in training mode, in which dropout keeps masks and checkpointing acts.
    """

    rows: list[Kept] = field(default_factory=list)
    training: bool = False

    @property
    def bytes(self) -> int:
        """Of all modules."""
        return sum(row.bytes for row in self.rows)

    def by_type(self) -> list[Kept]:
        """The rows of all layers together, the largest first; `module` is the name within a layer."""
        found: dict[str, Kept] = {}
        for row in self.rows:
            name = layer_and_type(row.module)[1]
            total = found.setdefault(name, Kept(name, row.kind))
            total.tensors += row.tensors
            total.bytes += row.bytes
        return sorted(found.values(), key=lambda row: -row.bytes)

    def table(self) -> str:
        """Bytes and share by type of module, as text."""
        rows = [(row.module or "(the model)", row.kind, row.tensors, row.bytes) for row in self.by_type()]
        rows.append(("all", f"{'train' if self.training else 'eval'} mode", sum(row[2] for row in rows), self.bytes))
        names, kinds = (max(len(str(row[i])) for row in rows) for i in (0, 1))
        lines = [f"{'module':<{names}}  {'class':<{kinds}}  tensors         MiB   share"]
        for name, kind, tensors, size in rows:
            share = size / (self.bytes or 1)
            lines.append(f"{name:<{names}}  {kind:<{kinds}}  {tensors:>7}  {size / MIB:>10.3f}  {share:>6.1%}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """A figure: MiB by layer and type of module. Needs matplotlib."""
        values: dict[tuple[int, str], float] = {}
        for row in self.rows:
            place = layer_and_type(row.module)
            values[place] = values.get(place, 0.0) + row.bytes / MIB
        return draw([HeatMap(values, "kept for the backward (MiB)")])


def activation_report(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any] | torch.Tensor) -> ActivationReport:
    """Runs one forward, and says which module keeps how much for the backward.

    Counted is the memory of the tensors that autograd keeps, each once; parameters and buffers are not. Inside
    [`sparse_activations`] it is what is kept of them. Running statistics of batch norms are left as they were.

    Args:
        model: The model, in the mode that is to be measured: call `model.train()` before, as a training does.
        batch: What its forward gets: keyword arguments, positional ones, or a tensor.

    Raises:
        ValueError: Gradients are disabled, or nothing in the model requires one.
        TypeError: `model` is no module, or `batch` nothing that a forward could get.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}: give the module that is to be measured.")
    if not isinstance(batch, (Mapping, list, tuple, torch.Tensor)):
        raise TypeError(
            f"`batch` is a {type(batch).__name__}: give what the forward gets, a mapping of keyword arguments, a sequence "
            "of positional ones, or a tensor."
        )
    if not torch.is_grad_enabled():
        raise ValueError("Nothing is kept for a backward under `torch.no_grad`: call `activation_report` outside.")
    observer = _Observer(model)
    with _statistics_kept(model), observer:
        output = model(**batch) if isinstance(batch, Mapping) else model(*_positional(batch))
    del output  # only now may memory be used again, and addresses with it
    if not observer.kept:
        raise ValueError(
            "The model keeps nothing for a backward: none of its parameters, and no input, needs a gradient."
        )
    return ActivationReport([row for row in observer.rows.values() if row.tensors], model.training)


def _positional(batch: Sequence[Any] | torch.Tensor) -> Sequence[Any]:
    return (batch,) if isinstance(batch, torch.Tensor) else batch


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, a forward may move running statistics; afterwards they are as before."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class _Observer:
    """Listens to a forward: which module runs, and what is kept meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, Kept] = {}
        self.kept: list[Any] = []  # held, so that no two of them have one address
        self._seen = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._running: list[str] = []
        self._handles: list[Any] = []
        self._model = model
        self._hooks = saved_tensors_hooks(self, lambda kept: kept)

    def __call__(self, kept: Any) -> Any:
        """What autograd asks for each tensor that it keeps."""
        address = id(kept) if isinstance(kept, Sparsified) else _address(kept)
        if address not in self._seen:
            self._seen.add(address)
            self.kept.append(kept)
            row = self.rows[self._running[-1]]
            row.tensors += 1
            row.bytes += kept.nbytes if isinstance(kept, Sparsified) else kept.untyped_storage().nbytes()
        return kept

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            # first and last, so that this is the outermost
            self._handles.append(module.register_forward_pre_hook(self._before(name, module), prepend=True))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))
        _observers.append(self)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__()
        _observers.remove(self)
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, module: nn.Module) -> Callable[..., None]:
        def enter(*args: Any) -> None:
            self._running.append(name)
            self.rows.setdefault(name, Kept(name, type(module).__name__))

        return enter

    def _after(self, *args: Any) -> None:
        self._running.pop()


_observers: list[_Observer] = []


def observe(kept: Any) -> None:
    """Tells observers what the hooks of `sparse_activations`, which go before theirs, keep."""
    for observer in _observers:
        observer(kept)


def is_observed(pack: Any) -> bool:
    """Whether these hooks are an observer's."""
    return isinstance(pack, _Observer)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
