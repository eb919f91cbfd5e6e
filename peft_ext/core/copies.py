"""An adapter has a config of its own, and a copy of an adapter has all that its function depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import TaskType
from torch import nn

from .config import ExtConfig
from .layer import ExtLayer
from .leaves import copy_state


# tasks whose class of PEFT extends the list of heads of the config it was given once the adapter is on the model
HEADS_NAMED_AFTERWARDS = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


@contextmanager
def own_config(configs: dict[str, Any], model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside, `adapter_name` is put on the model, with a copy of the config that it was given."""
    given = configs[adapter_name]
    others = [name for name, other in configs.items() if name != adapter_name and isinstance(other, ExtConfig)]
    # several adapters may have equal configs: the one whose own config was given comes first
    others.sort(key=lambda name: configs[name] is not given)
    source = next((name for name in others if given.is_of(configs[name])), None)
    own = configs[adapter_name] = given.for_adapter(reopen=source is None)
    before = dict(vars(own))
    yield
    own.note_filled_in(before)
    # PEFT looks at the one that it has given once more, and for some tasks extends the list in it
    if own.task_type in HEADS_NAMED_AFTERWARDS:
        own.modules_to_save = own.modules_to_save or []
        given.modules_to_save = own.modules_to_save
    else:
        given.modules_to_save = None if own.modules_to_save is None else list(own.modules_to_save)
    if source is not None:
        copy_leaves(model, source, adapter_name)


def copy_leaves(model: nn.Module, source: str, target: str) -> None:
    """Gives the leaves of the adapter `target` what those of `source` hold besides their parameters."""
    for layer in [module for module in model.modules() if isinstance(module, ExtLayer)]:
        for container in (getattr(layer, name) for name in layer.adapter_layer_names):
            if source in container and target in container:
                copy_state(container[source], container[target])


@contextmanager
def keeping_configs(model: nn.Module) -> Iterator[None]:
    """Leaves the configs of the adapters on a model as they were if an error comes: PEFT notes a new one beforehand."""
    configs = getattr(model, "peft_config", None)
    before = dict(configs) if isinstance(configs, dict) else {}
    try:
        yield
    except Exception:
        if isinstance(configs, dict):
            configs.clear()
            configs.update(before)
        raise
