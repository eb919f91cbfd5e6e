"""The layer of a reader: a child of a model whose backbone stays frozen, with a head of its own per adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..core import ExtLayer
from .families import Family
from .forwards import run_as_before, run_without_compiler


class ReaderLayer(ExtLayer):
    """The one layer of a method that reads a frozen backbone into a head of its own; a child of the model.

    It stands beside the model's own modules and not around them, so that their names, and with them the keys of other
    adapters, stay what they are. While an adapter is active, the model's config shows the classes of its head.

    Subclasses set `child`, the name of the layer in the model, and `method`, and write `_begin` and `_end`, which run
    before and after each forward of the model. Their configs have `id2label`.
    """

    child: ClassVar[str]
    method: ClassVar[str]

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__(nn.Identity())
        self.family = family
        self._model = (model,)  # in a tuple, which hides it from nn.Module
        run_without_compiler(model)
        self.configs: dict[str, Any] = {}
        self._stock_labels = self._labels()
        self._problem_types: dict[str, str | None] = {}
        self._labels_of: str | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError

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

    def blocks(self, adapter: str) -> dict[int, nn.Module]:
        """The blocks that `adapter` reads, by their index."""
        blocks: Any = self.backbone.get_submodule(self.family.blocks)
        chosen = self.configs[adapter].layers_to_transform
        indices = range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
        for index in indices:
            if not 0 <= index < len(blocks):
                raise ValueError(
                    f"`layers_to_transform` names layer {index}; the model has layers 0 to {len(blocks) - 1}."
                )
        return {index: blocks[index] for index in indices}

    def reading_adapter(self) -> str | None:
        """The active adapter, `None` if there is none.

        Raises:
            ValueError: Several are active.
        """
        active = self.active_names()
        if len(active) > 1:
            raise ValueError(
                f"The {self.method} adapters {active} are active together, but each has a head of its own, and there "
                f"is one output. Activate one of them: `set_adapter({active[0]!r})`."
            )
        return active[0] if active else None

    # Making and removing adapters

    def _move_to_model(self, adapter: str) -> None:
        like = next(
            parameter for parameter in reversed(list(self.backbone.parameters())) if parameter.is_floating_point()
        )
        for name in self.adapter_layer_names:
            leaves = getattr(self, name)
            if adapter in leaves and not any(parameter.is_meta for parameter in leaves[adapter].parameters()):
                leaves[adapter].to(like.device, like.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self._problem_types.pop(adapter_name, None)
        self._show_labels()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._show_labels()

    def leave(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self.enable_adapters(False)
        delattr(model, self.child)
        run_as_before(model)

    # The classes: the model's config shows those of the active adapter's head

    def _labels(self) -> tuple[Any, Any]:
        return self.model.config.id2label, self.model.config.label2id

    def _show_labels(self) -> None:
        active = self.active_names()
        shown = active[0] if len(active) == 1 else None
        model, config = self.model, self.model.config
        self._problem_types[self._labels_of or ""] = config.problem_type
        id2label, label2id = self._stock_labels
        if shown is not None:
            own = self.configs[shown].id2label or {}
            if own != id2label:
                id2label, label2id = dict(own), {label: index for index, label in own.items()}
        config.id2label, config.label2id = id2label, label2id
        if hasattr(model, "num_labels"):
            model.num_labels = len(id2label)
        if shown != self._labels_of:  # transformers guesses the problem type once; another head may have another
            config.problem_type = self._problem_types.get(shown or "", self._problem_types.get(""))
        self._labels_of = shown

    def active_names(self) -> list[str]:
        return (
            []
            if self.disable_adapters
            else [name for name in self.present(self.active_adapters) if name in self.configs]
        )
