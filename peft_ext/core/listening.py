"""Layers that go by what another module of their block reads."""

from __future__ import annotations

import threading
from itertools import takewhile
from typing import Any

from torch import nn


class Listener:
    """A forward pre-hook that keeps what its module reads, until the layer that it listens for has taken it.

    Each thread has a value of its own, since a server may run several forwards of one model at a time. The hook is
    inside the block, so that gradient checkpointing runs it again. A copy of a whole block has a listener of its own. A
    copy of the module alone has the same one: PEFT copies the modules of `modules_to_save`, hooks included.

    Args:
        home: A module that holds the layer and what it listens to.
    """

    def __init__(self, home: nn.Module) -> None:
        self.home = home
        self._heard = threading.local()

    @property
    def value(self) -> Any:
        """What the module has read in this thread; `None` if it was not called, or its input was taken."""
        return getattr(self._heard, "value", None)

    @value.setter
    def value(self, value: Any) -> None:
        self._heard.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {"home": self.home}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.home = state["home"]
        self._heard = threading.local()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = args[0] if args else next(iter(kwargs.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        if id(self.home) not in memo:
            return self
        made = memo[id(self)] = Listener(memo[id(self.home)])
        return made

    def listen_to(self, module: nn.Module) -> None:
        """Hooks the module."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def stop(self, model: nn.Module) -> None:
        """Takes the hooks away, also from copies of the module."""
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is self:
                    _remove(module, key)


def listener_between(model: nn.Module, name: str, other: str) -> Listener:
    """A listener of the module `name` to the module `other`, which it hooks."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    common = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    listener = Listener(model.get_submodule(".".join(common)))
    listener.listen_to(model.get_submodule(other))
    return listener


def move_listeners(module: nn.Module, wrapper: nn.Module) -> None:
    """Hooks the layer that has taken a module's place: it may change what the module itself reads, or not call it."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Listener):
            _remove(module, key)
            hook.listen_to(wrapper)


def _remove(module: nn.Module, key: int) -> None:
    del module._forward_pre_hooks[key]
    module._forward_pre_hooks_with_kwargs.pop(key, None)
