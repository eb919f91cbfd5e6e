"""Sparsified activations (Back Razor): what Linears keep for the backward is cut to its largest entries.

    forward:   y = W x + b                     as ever, bit for bit
    kept:      x~ = x where |x| is among the largest `keep` of its sample, else 0; values and one bit an entry
    backward:  dx = W' dy, db = sum dy exact;  dW = dy x~'

Norms likewise, if asked for: with their statistics exact, their gradients are computed from x~, that of the input too.
Attention, activation functions and all else keep what they keep.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..architectures import is_norm
from ..core import ExtLayer, linear_features
from .observing import is_observed, observe
from .sparsify import Sparsified, sparsify


_handled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that a context sparsifies


@contextmanager
def sparse_activations(
    model: nn.Module,
    keep: float = 0.1,
    modules: Iterable[str] | str | None = None,
    norms: bool = False,
    exact: bool = True,
) -> Iterator[SparseActivations]:
    """Inside, Linears keep a share of their inputs for the backward.

    The forward is unchanged, and so are gradients that flow through Linears to their inputs; gradients of weights are
    those of the sparsified inputs. Saves with full fine-tuning, LoRA and DoRA (enter it when the adapter is on the model),
    with autocast and `DistributedDataParallel`. What keeps no input of a trained Linear stays as it is: most other
    methods of PEFT, which train something else than Linears; frozen Linears; inputs that the operation before keeps too,
    as fused attention, ReLU and tanh do with their outputs; checkpointed blocks, in which nothing is kept. A backward may
    come after the context.

    Args:
        model: The model.
        keep: The share of the entries that is kept of each sample (the first dimension of the input).
        modules: Which modules: names (a module is taken if it, or one that it is part of, has that name, or ends with
            `"." +` it), or a regular expression that matches the full name. `None`: all Linears, and this package's
            adapters on them.
        norms: Norms, too. Their gradients of inputs are no longer exact, nor are those of all layers before them; with
            an RMSNorm they may be far off.
        exact: Keep exactly that share; otherwise what exceeds a threshold that is estimated from 4,096 entries of the
            sample, which is faster.

    Yields:
        Counts of what was kept.

    Raises:
        ValueError: `keep` is not above 0 and at most 1, no module has such a name, or the model has no Linear at all,
            gradients are disabled, or another context handles some of the modules. In a backward with
            `create_graph=True`: the gradient of such a gradient would be wrong.
        TypeError: `model` is no module, `keep` no number, or `modules` no names.
    """
    if not torch.is_grad_enabled():
        raise ValueError("Nothing is kept for a backward under `torch.no_grad`: enter `sparse_activations` outside.")
    sparse = SparseActivations(model, keep, modules, norms, exact)
    try:
        yield sparse
    finally:
        sparse.close()


class SparseActivations:
    """Sparsifies from its making until `close()`; see [`sparse_activations`].

    Attributes:
        tensors: How many were sparsified.
        dense_bytes: Their size.
        kept_bytes: What is kept of them.
    """

    def __init__(
        self, model: nn.Module, keep: float, modules: Iterable[str] | str | None, norms: bool, exact: bool
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` is a {type(model).__name__}: give the module whose Linears are to be sparsified."
            )
        self.keep, self.exact = _share(keep), exact
        self.tensors = self.dense_bytes = self.kept_bytes = 0
        self._forwards = 0
        self._thread = _OfThread()
        self._modules = _chosen(model, _names(modules), norms)
        if taken := [name for name, module in self._modules.items() if module in _handled]:
            raise ValueError(
                f"The activations of {len(taken)} modules, {taken[0]} for one, are sparsified already, by another "
                "`sparse_activations`: leave that one first; after a training that was interrupted call `close()` of its "
                "`SparseActivationsCallback`."
            )
        self._handles = [model.register_forward_pre_hook(_Hook(self, "_begin"))]
        for module in self._modules.values():
            _handled.add(module)
            self._handles.append(module.register_forward_pre_hook(_Hook(self, "_before"), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Hook(self, "_after"), always_call=True))

    def close(self) -> None:
        """Ends it. Warns if there was a forward, but nothing to sparsify."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for module in self._modules.values():
            _handled.discard(module)
        self._handles = []
        self._begin()
        self._thread.recent.clear()
        if self._forwards and not self.tensors and self.keep < 1:
            warnings.warn(
                "`sparse_activations` had nothing to sparsify: the weights of the modules are frozen, or the operations "
                "before them keep the same tensors anyway, or gradient checkpointing (or other `saved_tensors_hooks`) "
                "handles what is kept for the backward.",
                stacklevel=3,
            )

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return not self._handles

    def _begin(self, *call: Any) -> None:
        """Leaves calls that Ctrl-C has ended: torch runs hooks after a forward for an `Exception` only."""
        while self._thread.open and not _is_in_backward():
            self._thread.open.pop().leave()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while self._thread.open and not _is_inside(module, self._thread.open[-1].module):
            self._thread.open.pop().leave()  # likewise, where the forward is not that of the whole model
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        call = _Call(module)
        if x is not None and x.ndim > 1 and x.numel() and torch.is_grad_enabled():
            self._forwards += 1
            if not (_is_recomputed() or _is_kept_by_its_maker(x)):
                packer = _Packer(self, module, x)
                call = _Call(module, packer, saved_tensors_hooks(packer, _unpack))
                call.enter()
        self._thread.open.append(call)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._thread.open and self._thread.open[-1].module is module:
            self._thread.open.pop().leave()

    def _sparsified(self, tensor: torch.Tensor, x: torch.Tensor, is_x: bool) -> Sparsified | None:
        """Of the same input, which several modules may have, the same object."""
        key = (x._version, tensor.shape, tensor.dtype)
        for other, other_key, packed_ref in self._thread.recent if is_x else ():
            if other() is x and other_key == key and (known := packed_ref()) is not None:
                return known
        packed = sparsify(tensor, x.shape[0], self.keep, self.exact)
        if packed is not None:
            self.tensors += 1
            self.dense_bytes += tensor.nbytes
            self.kept_bytes += packed.nbytes
            if is_x:
                self._thread.recent.append((weakref.ref(x), key, weakref.ref(packed)))
        return packed


class SparseActivationsCallback(TrainerCallback):
    """`sparse_activations` from the begin to the end of a training by `Trainer`.

    Args:
        keep: See [`sparse_activations`]; so for `modules`, `norms` and `exact`.
    """

    def __init__(
        self,
        keep: float = 0.1,
        modules: Iterable[str] | str | None = None,
        norms: bool = False,
        exact: bool = True,
    ) -> None:
        self.keep, self.modules, self.norms, self.exact = _share(keep), _names(modules), norms, exact
        self.sparse: SparseActivations | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins; a training before, which ended with an error, is ended first."""
        self.close()
        self.sparse = SparseActivations(kwargs["model"], self.keep, self.modules, self.norms, self.exact)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends."""
        self.close()

    def close(self) -> None:
        """To be called after a training that ended with an error or Ctrl-C, if the model is used on."""
        if self.sparse is not None:
            self.sparse.close()
            self.sparse = None


class _Hook:
    """What modules call. A copied or pickled module calls nothing: it is not sparsified."""

    def __init__(self, sparse: SparseActivations | None = None, method: str = "") -> None:
        self.sparse, self.method = sparse, method

    def __call__(self, *call: Any) -> None:
        if self.sparse is not None:
            getattr(self.sparse, self.method)(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _OfThread(threading.local):
    """What each thread has of its own, as torch's hooks are a thread's."""

    def __init__(self) -> None:
        self.open: list[_Call] = []  # of the modules that are running, the innermost last
        # the inputs before, for modules that have one in common; between two of them LoRA's B has another
        self.recent: deque[tuple[weakref.ref[torch.Tensor], Any, weakref.ref[Sparsified]]] = deque(maxlen=8)


class _Call(NamedTuple):
    """A module that is running, and what handles what it keeps; nothing does where that is left as it is."""

    module: nn.Module
    packer: _Packer | None = None
    hooks: saved_tensors_hooks | None = None

    def enter(self) -> None:
        if self.hooks is not None:
            self.hooks.__enter__()

    def leave(self) -> None:
        if self.packer is not None and self.hooks is not None:
            self.packer.is_closed = True
            self.hooks.__exit__()


class _Packer:
    """What is done with the tensors that one call of a module keeps."""

    def __init__(self, sparse: SparseActivations, module: nn.Module, x: torch.Tensor) -> None:
        self.sparse, self.module, self.x = sparse, module, x
        self.is_closed = False

    def __call__(self, tensor: torch.Tensor) -> Any:
        packed: Any = tensor
        is_open = not (self.is_closed or self.sparse.is_closed)
        if is_open and tensor.is_floating_point() and tensor.numel() == self.x.numel() and not self._is_weight(tensor):
            is_x = _storage(tensor) == _storage(self.x)
            if is_x or self._is_made_of_input(tensor):
                packed = self.sparse._sparsified(tensor, self.x, is_x) or tensor
        observe(packed)
        return packed

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether this is a weight, perhaps expanded over the samples: with it sparse, gradients of inputs were wrong."""
        return any(_storage(tensor) == _storage(parameter) for parameter in self.module.parameters())

    def _is_made_of_input(self, tensor: torch.Tensor) -> bool:
        """Whether this is the input in another type or memory, or the normalised input, and no weight in another type.

        Where that is not certain from the shape, its entries are compared: our functions may keep outputs, from which
        they compute exactly; a frozen Linear keeps its weight alone, and autocast makes that another tensor.
        """
        shapes = [size for p in self.module.parameters() for size in (tuple(p.shape), tuple(p.shape)[::-1])]
        if (features := linear_features(self.module)) is not None:
            shapes += [features, features[::-1]]
        is_trained = any(p.requires_grad and p.ndim > 1 for p in self.module.parameters())
        is_like_x = tensor.ndim > 0 and tensor.shape[-1] == self.x.shape[-1] and tuple(tensor.shape[-2:]) not in shapes
        is_norm_or_trained = features is None or is_trained
        if is_like_x and is_norm_or_trained and not isinstance(self.module, ExtLayer):
            return True
        return torch.equal(tensor.reshape(-1), self.x.detach().to(tensor.dtype).reshape(-1))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_inside(module: nn.Module, outer: nn.Module) -> bool:
    return module is not outer and any(part is module for part in outer.modules())


def _unpack(packed: Any) -> torch.Tensor:
    if not isinstance(packed, Sparsified):
        return packed
    if torch.is_grad_enabled():
        raise ValueError(
            "Gradients of gradients (`create_graph=True`) would be wrong with sparsified activations: compute this "
            "backward without `sparse_activations`."
        )
    return packed.restore()


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_recomputed() -> bool:
    """Whether what is kept now is for a checkpoint's backward, or somebody else's hooks handle it."""
    if _is_in_backward():
        return True
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and not isinstance(top[0], _Packer) and not is_observed(top[0])


_VIEWS = (
    r"(|Unsafe|_Reshape)(View|Alias|Transpose|Permute|Slice|Select|Unsqueeze|Squeeze|Expand|T|ReshapeAlias)Backward\d*"
)


def _is_kept_by_its_maker(x: torch.Tensor) -> bool:
    """Whether the operation that computed x keeps it whole for its own backward, as fused attention, ReLU and tanh do.

    Then a sparsified copy would be more to keep, and not less.
    """
    node: Any = x.grad_fn
    while node is not None and re.fullmatch(_VIEWS, node.name()):
        node = node.next_functions[0][0]
    return any(hasattr(type(node), f"_saved_{name}") for name in ("result", "out", "output"))


def _chosen(model: nn.Module, modules: list[str] | str | None, norms: bool) -> dict[str, nn.Module]:
    """The modules whose inputs are sparsified, by name; of what is inside of an adapter's layer of ours, none."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, ExtLayer):
            inside += (f"{name}.",)
            base = module.get_base_layer()
        elif isinstance(module, BaseTunerLayer):
            continue
        else:
            base = module
        if linear_features(base) is not None or (norms and is_norm(base)):
            found[name] = module
    if not found:
        raise ValueError(
            f"This {type(model).__name__} has no Linear{' and no norm' if norms else ''}, so there is nothing to sparsify: "
            "give a model with `nn.Linear` (or quantised Linears, or transformers' `Conv1D`)."
        )
    return found if modules is None else _named(found, modules)


def _share(keep: float) -> float:
    """`keep`, if it is one."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"`keep` is {keep!r}: give the share that is kept, a number above 0 and at most 1.")
    if not 0 < keep <= 1:
        raise ValueError(f"`keep`, the share that is kept, must be above 0 and at most 1, not {keep}.")
    return float(keep)


def _names(modules: Iterable[str] | str | None) -> list[str] | str | None:
    """`modules`, if it names any: a regular expression, or names."""
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(
                f"`modules` is {modules!r}, which is no regular expression ({error}): for a name as it is, give a list "
                "with it."
            ) from error
        return modules
    if modules is None:
        return None
    found = list(modules) if isinstance(modules, Iterable) else [modules]
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise TypeError(f"`modules` has {wrong[0]!r}: give names of modules, a regular expression or `None`.")
    if not found:
        raise ValueError("`modules` is empty: give names, or `None` for all Linears.")
    return found


def _named(found: Mapping[str, nn.Module], modules: list[str] | str) -> dict[str, nn.Module]:
    if isinstance(modules, str):
        chosen = {name: module for name, module in found.items() if re.fullmatch(modules, name)}
        unknown = [] if chosen else [modules]
    else:
        hits = {name: [part for part in modules if f".{part}." in f".{name}."] for name in found}
        chosen = {name: found[name] for name, parts in hits.items() if parts}
        unknown = [part for part in modules if not any(part in parts for parts in hits.values())]
    if unknown:
        raise ValueError(
            f"No Linear of this model (with `norms=True`: or norm) is, or is part of, a module that `modules` names: "
            f"{', '.join(unknown)}. There are {', '.join(sorted({name.rpartition('.')[2] for name in found}))}."
        )
    return chosen
