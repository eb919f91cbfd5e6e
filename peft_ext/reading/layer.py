"""The layer of a reader: a child of a model whose backbone stays frozen, with a head of its own per adapter.

Who calls whom, in one forward: `_begin`, a pre-forward hook on the model, opens a `Reading`. That puts `_run_backbone`,
which each reader writes, in the place of the backbone's `forward`, a hook before the head that takes what the stock head
reads, and one after it that puts the logits of `_logits` in the place of its output, so that the loss is the model's
own. `_end`, a hook after the model's forward, takes everything away again. Forwards of other threads wait meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import nn

from ..core import ExtLayer, empty_like_of, require_model
from .families import Family
from .forwards import (
    is_checkpointed,
    refuse_reentrant_checkpointing,
    replaced_forward,
    run_as_before,
    run_without_compiler,
)
from .kept import Kept, KeptPass


BackboneCall = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Reading:
    """One forward of the model with an adapter active.

    Attributes:
        adapter: Its name.
        stack: What is undone when the forward ends.
        grad: Whether autograd was on when the backbone was called.
        class_token: `(B, F)`, what the stock head reads.
    """

    adapter: str
    stack: ExitStack
    grad: bool = False
    class_token: torch.Tensor | None = None


@dataclass
class ShownHead:
    """Whose classes the model's config shows; one for all readers of a model.

    Args:
        stock: `id2label` and `label2id` of the model's own head.
        of: The head that they are shown of; empty: the stock head.
        problem_types: The problem type by head, since transformers guesses it once only.
    """

    stock: tuple[Any, Any]
    of: str = ""
    problem_types: dict[str, str | None] = field(default_factory=dict)


class Turn:
    """Held by the one thread whose forward runs now, since hooks and forwards of the model change during one.

    A thread that holds it may take it again. A copy of the model has one of its own.
    """

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


class ReaderLayer(ExtLayer):
    """The one layer of a method that reads a frozen backbone into a head of its own; a child of the model.

    It stands beside the model's own modules and not around them, so that their names, and with them the keys of other
    adapters, stay what they are. While an adapter is active, the model's config shows the classes of its head.

    Subclasses set `child`, the name of the layer in the model, `method`, and `keeps`, which says what a cache holds of a
    pass; they write `_run_backbone`, `_logits` and `to_keep`. Their configs are `ReaderConfig`s.
    """

    child: ClassVar[str]
    method: ClassVar[str]
    keeps: ClassVar[str]
    why_not_mixed = "each adapter has a head with classes of its own, and a batch of logits has one number of classes"
    holds_whole_adapters = True
    with_queries: ClassVar[bool] = False  # whether it reads with learnt queries
    reading_class: ClassVar[type[Reading]] = Reading

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__(nn.Identity())
        self.family = family
        self._model = (model,)  # in a tuple, which hides it from nn.Module
        self.configs: dict[str, Any] = {}
        self.cache: KeptPass | None = None
        self._reading: Any = None
        self._is_paused = False
        others = readers_of(model)
        if not others:
            run_without_compiler(model)
        config: Any = model.config
        self._shown: ShownHead = others[0]._shown if others else ShownHead((config.id2label, config.label2id))
        self._turn: Turn = others[0]._turn if others else Turn()
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    # To be written by the method

    def _run_backbone(self, reading: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the backbone, whose own forward is `forward`, and reads what the adapter needs; returns its output."""
        raise NotImplementedError

    def _logits(self, reading: Any, class_token: torch.Tensor) -> torch.Tensor:
        """The logits `(B, C)`, from what was read and from what the stock head reads, `(B, F)`."""
        raise NotImplementedError

    def _finish(self, reading: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """What is to be put in the place of the model's output; `None`: nothing."""
        return None

    def to_keep(self, adapter: str, inputs: Mapping[str, Any]) -> tuple[Kept, BackboneCall]:
        """What the frozen pass of `inputs` leaves behind, and the arguments that the backbone was called with."""
        raise NotImplementedError

    # What there is to read

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def backbone(self) -> nn.Module:
        return self.model.get_submodule(self.family.backbone)

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        config: Any = self.backbone.config
        return config.hidden_size

    @property
    def all_blocks(self) -> list[nn.Module]:
        """All blocks of the backbone."""
        blocks: Any = self.backbone.get_submodule(self.family.blocks)
        return list(blocks)

    def blocks(self, adapter: str) -> dict[int, nn.Module]:
        """The blocks that `adapter` reads, by their index."""
        blocks = self.all_blocks
        chosen = self.configs[adapter].layers_to_transform
        indices = (
            range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(set(chosen))
        )
        for index in indices:
            if not 0 <= index < len(blocks):
                raise ValueError(
                    f"`layers_to_transform` names layer {index}; the model has layers 0 to {len(blocks) - 1}."
                )
        return {index: blocks[index] for index in indices}

    def reading_adapter(self) -> str | None:
        """The active adapter, `None` if there is none.

        Raises:
            ValueError: Several are active, of this reader or another.
        """
        active = self.active_names()
        if not active:
            return None
        others = [name for reader in self._readers() if reader is not self for name in reader.active_names()]
        if len(active) + len(others) > 1:
            methods = " and ".join(sorted({reader.method for reader in self._readers() if reader.active_names()}))
            raise ValueError(
                f"The {methods} adapters {active + others} are active together, but each has a head of its own, and "
                f"there is one output. Activate one of them: `set_adapter({active[0]!r})`."
            )
        return active[0]

    # One forward

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._turn)
            self._close()  # a forward that was interrupted from the keyboard has left its own behind
            adapter = None if self._is_paused else self.reading_adapter()
            if adapter is None:
                return
            reading = self.reading_class(adapter, stack)
            backbone, head = self.backbone, model.get_submodule(self.family.head)
            stack.enter_context(replaced_forward(backbone, partial(self._run_backbone, reading, backbone.forward)))
            take = partial(self._take_class_token, reading)
            stack.callback(self._before_head().register_forward_pre_hook(take).remove)
            stack.callback(head.register_forward_hook(partial(self._answer, reading)).remove)
            reading.stack = stack.pop_all()  # `_end` closes it
            self._reading = reading

    def _before_head(self) -> nn.Module:
        return self.model.get_submodule(self.family.class_token or self.family.head)

    def _take_class_token(self, reading: Reading, module: nn.Module, args: tuple[Any, ...]) -> None:
        if reading.class_token is None:
            states = args[0]
            reading.class_token = states[:, 0] if states.ndim == 3 else states

    def _answer(self, reading: Reading, head: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
        assert reading.class_token is not None
        return self._logits(reading, reading.class_token)

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with self._turn:  # so that what is closed is this thread's own
            reading = self._close()
        return None if output is None or reading is None else self._finish(reading, kwargs, output)

    def _close(self) -> Any:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.stack.close()
        return reading

    def _modes(self, reading: Reading) -> tuple[bool, bool]:
        """Whether the backbone is trained too, and whether its frozen pass is to be run again in the backward.

        A frozen backbone is put in eval mode.
        """
        backbone, blocks = self.backbone, self.all_blocks
        trains_backbone = any(parameter.requires_grad for parameter in backbone.parameters())
        if trains_backbone:
            refuse_reentrant_checkpointing(blocks)
        elif backbone.training:
            backbone.eval()
        return trains_backbone, is_checkpointed(blocks) and reading.grad and not trains_backbone

    def run_paused(
        self, adapter: str, inputs: Mapping[str, Any], capture: AbstractContextManager[Any]
    ) -> tuple[torch.Tensor, BackboneCall]:
        """Runs the base model alone, with no autograd and under `capture`.

        Returns:
            What the stock head reads, `(B, F)`, and the arguments that the backbone was called with.
        """
        with self._turn:
            reading = Reading(adapter, ExitStack())
            calls: list[BackboneCall] = []

            def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((args, kwargs))

            handles = [
                self.backbone.register_forward_pre_hook(note_call, with_kwargs=True),
                self._before_head().register_forward_pre_hook(partial(self._take_class_token, reading)),
            ]
            if self.backbone.training:
                self.backbone.eval()
            self._is_paused = True
            try:
                with torch.no_grad(), capture:
                    device = empty_like_of(self.backbone).device
                    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                    self.model(**moved)
            finally:
                self._is_paused = False
                for handle in handles:
                    handle.remove()
            assert reading.class_token is not None
            return reading.class_token, calls[-1]

    # Making and removing adapters

    def _move_to_model(self, adapter: str) -> None:
        like = empty_like_of(self.backbone, last=True)
        for name in self.adapter_layer_names:
            leaves = getattr(self, name)
            if adapter in leaves and not any(parameter.is_meta for parameter in leaves[adapter].parameters()):
                leaves[adapter].to(like.device, like.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self._shown.problem_types.pop(self._head_name(adapter_name), None)
        self._show_labels()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._show_labels()

    def leave(self, model: nn.Module) -> None:
        self.enable_adapters(False)
        delattr(model, self.child)
        self.let_go(model)

    def let_go(self, model: nn.Module) -> None:
        """Takes away what was put on `model`, whose child this layer is not, or no more."""
        for handle in self._handles:
            handle.remove()
        if not readers_of(model):
            run_as_before(model)

    def active_names(self) -> list[str]:
        """The active adapters of this reader, none while they are disabled."""
        return (
            []
            if self.disable_adapters
            else [name for name in self.present(self.active_adapters) if name in self.configs]
        )

    # The classes: the model's config shows those of the active adapter's head

    def _readers(self) -> list[ReaderLayer]:
        others = [reader for reader in readers_of(self.model) if reader is not self]
        return [self, *others]

    def _head_name(self, adapter: str) -> str:
        return f"{self.child}.{adapter}"

    def _own_labels(self, config: Any) -> None:
        """Fills in the model's own classes where the config names none."""
        if config.id2label is None:
            config.id2label = dict(self._shown.stock[0])

    def _show_labels(self) -> None:
        active = [(reader, name) for reader in self._readers() for name in reader.active_names()]
        model, config, shown = self.model, self.model.config, self._shown
        shown.problem_types[shown.of] = config.problem_type
        id2label, label2id = shown.stock
        of = ""
        if len(active) == 1:
            reader, name = active[0]
            of, own = reader._head_name(name), reader.configs[name].id2label or {}
            if own != id2label:
                id2label, label2id = dict(own), {label: index for index, label in own.items()}
        config.id2label, config.label2id = id2label, label2id
        if hasattr(model, "num_labels"):
            model.num_labels = len(id2label)
        if of != shown.of:  # transformers guesses the problem type once; another head may have another
            config.problem_type = shown.problem_types.get(of, shown.problem_types.get(""))
        shown.of = of


def readers_of(model: nn.Module) -> list[ReaderLayer]:
    """The readers of a model, which are its children."""
    return [child for child in model.children() if isinstance(child, ReaderLayer)]


def reader_of(model: nn.Module, adapter_name: str | None = None, method: str | None = None) -> tuple[Any, str]:
    """The reader of a model, wrapped by PEFT or not, that has an adapter, and the adapter's name.

    Args:
        model: The model.
        adapter_name: The adapter; `None`: the active one.
        method: The name of the reader; `None`: any.

    Raises:
        ValueError: The model has no reader, there is no such adapter, or not exactly one is active.
    """
    require_model(model)
    readers = [module for module in model.modules() if isinstance(module, ReaderLayer)]
    readers = [reader for reader in readers if method in (None, reader.method)]
    if not readers:
        named = "that reads a frozen backbone" if method is None else f"of {method}"
        raise ValueError(f"The model has no adapter {named}; add one with `get_peft_model`.")
    found = [
        (reader, name)
        for reader in readers
        for name in (reader.active_names() if adapter_name is None else [adapter_name])
        if name in reader.configs
    ]
    if len(found) != 1:
        kinds = "/".join(sorted({reader.method for reader in readers}))
        there = sorted({name for reader in readers for name in reader.configs})
        raise ValueError(f"`adapter_name` must be one of the {kinds} adapters {there}, got {adapter_name!r}.")
    return found[0]
