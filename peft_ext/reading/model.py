"""The tuner of a reader: one layer beside the model, which is its one target."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..core import ExtLayer, ExtModel
from .config import NO_MODULE
from .families import HEAD_NAMES, Family, check_model, family_of
from .layer import ReaderLayer


class ReaderModel(ExtModel):
    """Puts a reader's layer beside a model. Subclasses set `prefix` and `tuner_layer_cls`.

    The head's leaves are those of the layer's container named `<prefix>head`.
    """

    tuner_layer_cls: type[ReaderLayer]
    trains_own_head = True
    stands_beside = True

    @classmethod
    def _family(cls, model_type: str | None, model: nn.Module | None = None) -> Family:
        layer = cls.tuner_layer_cls
        return family_of(layer.method, model_type, model, layer.with_queries)

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], *_: Any) -> Any:
        """The one target is the backbone, whose name alone depends on the architecture."""
        target = {cls._family(model_config.get("model_type")).backbone}
        if config.target_modules not in (None, target):
            raise ValueError(
                f"`target_modules` is {config.target_modules!r}, but {config.METHOD} adapts no module: it reads the "
                f"backbone {target!r}. Leave it out, and use `layers_to_transform` to choose the layers that are read."
            )
        config.target_modules = target
        # here and not in the config, since PEFT adds the head of sequence classifiers only after that was made
        added = [name for name in config.modules_to_save or () if name in HEAD_NAMES]
        if added:
            config.modules_to_save = [name for name in config.modules_to_save if name not in added] or [NO_MODULE]
        return config

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module) -> None:
        family = cls._family(getattr(model.config, "model_type", None), model)  # type: ignore[union-attr]
        check_model(cls.tuner_layer_cls.method, family, model)

    @classmethod
    def own_head(cls, model: nn.Module, adapter_name: str) -> tuple[str, nn.Module] | None:
        name = f"{cls.prefix}head"
        layer: Any = getattr(model, cls.tuner_layer_cls.child, None)
        if layer is None or adapter_name not in getattr(layer, name) or layer.disable_adapters:
            return None
        return f"{layer.child}.{name}.{adapter_name}", getattr(layer, name)[adapter_name]

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        model: Any = tuner.model
        child = cls.tuner_layer_cls.child
        layer: Any = getattr(model, child, None)
        is_new = layer is None
        if is_new:
            layer = cls.tuner_layer_cls(model, cls._family(model.config.model_type, model))
            layer.activate_only(adapter_name)
        try:
            layer.update_layer(adapter_name, config)
        except ValueError:
            layer.configs.pop(adapter_name, None)
            if is_new:
                layer.let_go(model)
            raise
        if is_new:
            model.add_module(child, layer)
        if adapter_name not in tuner.active_adapters:
            for leaves in layer.adapter_layer_names:  # an additional adapter is not trained until it is activated
                if adapter_name in getattr(layer, leaves):
                    getattr(layer, leaves)[adapter_name].requires_grad_(False)
        return None
