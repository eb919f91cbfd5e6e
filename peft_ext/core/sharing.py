"""A tuner whose layers share leaves: each is one module of the model, saved, sharded and counted once."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .config import ExtConfig
from .layer import ExtLayer
from .model import ExtModel


class StandIn(nn.Identity):
    """Stands for all modules that share leaves; `in_features` is how long the vectors are that they read."""

    def __init__(self, in_features: int = 0) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features


class SharedLayer(ExtLayer):
    """The base of the layers of such a tuner: around a `StandIn`, which nobody calls, or around a module."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off; while they are off, nothing is merged."""
        super().enable_adapters(enabled)
        if not enabled and self.merged and isinstance(self.base_layer, StandIn):
            self.unmerge()  # the layers of the modules do so in their forward

    def unmerge(self) -> None:
        """Takes out what was merged; a stand-in that is not merged any more has nothing to say."""
        if self.merged or not isinstance(self.base_layer, StandIn):
            super().unmerge()


class SharingModel(ExtModel):
    """Keeps the shared leaves in layers around `StandIn`s, in the child `shared` of the model, by the name of a group.

    A subclass sets `shared`, says in `group_of` which modules share leaves, and gives the layer of their group, which
    `shared_layer` finds, to the layers of the modules (`layer_kwargs`), which link to its leaves by `SharedLeaf`.
    `layer_class` must know a `StandIn`, and the `leave` of its layer takes the child off the model.
    """

    shared: ClassVar[str]

    @classmethod
    def group_of(cls, name: str, base_layer: nn.Module, config: Any) -> str | None:
        """The group of modules that this one shares leaves with, a name without dots; `None` if it has its own."""
        raise NotImplementedError

    @classmethod
    def stand_in(cls, base_layer: nn.Module) -> StandIn:
        """What stands for the modules of a group; `base_layer` is one of them."""
        return StandIn()

    @classmethod
    def shared_layer(cls, model: nn.Module, name: str, base_layer: nn.Module, config: Any) -> ExtLayer | None:
        """The layer with the shared leaves of this module; `None` if it has its own, or is a stand-in."""
        group = None if isinstance(base_layer, StandIn) else cls.group_of(name, base_layer, config)
        return None if group is None else getattr(model, cls.shared)[group]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model.

        Which modules it is on is read from the config, also where PEFT would read it from a file's keys: of modules
        that share leaves these say nothing.
        """
        super().inject_adapter(model, adapter_name, *args, **{**kwargs, "state_dict": None})

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: ExtConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """Of a module that shares leaves, puts these on the model first, if they are not there."""
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        group = None if isinstance(base_layer, StandIn) else cls.group_of(name, base_layer, config)
        if group is not None:
            groups: Any = getattr(tuner.model, cls.shared, None)
            if groups is None:
                groups = Shared()
                setattr(tuner.model, cls.shared, groups)
            owner = groups[group] if group in groups else cls.stand_in(base_layer)
            if not (isinstance(owner, ExtLayer) and any(adapter_name in leaves for leaves in containers(owner))):
                layer = super().inject_layer(tuner, config, adapter_name, owner, f"{cls.shared}.{group}")
                groups[group] = owner if layer is None else layer
        return super().inject_layer(tuner, config, adapter_name, target, name)


class Shared(nn.ModuleDict):
    """The layers with shared leaves, a child of the model."""

    def forward(self, x: Any) -> Any:
        """Its argument: a model that is an `nn.Sequential` runs all of its children."""
        return x


def containers(layer: ExtLayer) -> list[nn.ModuleDict]:
    """The dicts of a layer that hold leaves by the names of adapters."""
    return [getattr(layer, name) for name in layer.adapter_layer_names]
