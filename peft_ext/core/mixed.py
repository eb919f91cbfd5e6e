"""Adapters of several methods, ours and PEFT's, in one model."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from peft import PeftMixedModel as _PeftMixedModel
from peft.mixed_model import _check_config_compatible, _prepare_model_for_gradient_checkpointing
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_adapters_not_merged,
    _delete_auxiliary_adapter,
)
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.constants import DUMMY_MODEL_CONFIG
from safetensors.torch import save_file
from torch import nn

from .advice import warn_of_idle_layers
from .config import ExtConfig
from .copies import own_config
from .layer import ExtLayer
from .listening import move_listeners
from .merging import announce_unloading, check_merges
from .model import tuner_of
from .stored import without_inner
from .targets import named_all_linear, refuse_ambiguous_names, refuse_no_layers, refuse_unknown_tokens
from .upkeep import prepare, restore


ORDER = "mixed_adapters.json"  # beside the folders of several adapters: in which order they were added, which act
# the modules that PEFT's classes for a task train and save
HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


class _MixedModel(MixedModel):
    """PEFT's mixed tuner, opened to the methods of this package."""

    tuner_layer_cls = BaseTunerLayer
    prefix = ""

    def _check_new_adapter_config(self, config: Any) -> None:
        if not isinstance(config, ExtConfig):
            super()._check_new_adapter_config(config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if isinstance(peft_config, ExtConfig):
            return tuner_of(peft_config).default_targets(peft_config, model_config, self.model)
        return MixedModel._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        layer_class = tuner_of(peft_config).tuner_layer_cls if isinstance(peft_config, ExtConfig) else None
        refuse_ambiguous_names(self.peft_config, model, layer_class)
        if isinstance(peft_config, ExtConfig):
            refuse_no_layers(peft_config)
            refuse_unknown_tokens(peft_config, model)
            tuner_of(peft_config).check_targets(peft_config, model)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, ExtConfig):
            tuner_of(config).replace_target(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        if isinstance(peft_config, ExtConfig):
            return tuner_of(peft_config).replace_parameters(self, peft_config, *args, **kwargs)
        return super()._inject_parameters(peft_config, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ExtLayer):  # see `ExtModel`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        move_listeners(child, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter of any method on the model."""
        given = self.peft_config[adapter_name]
        if not isinstance(given, ExtConfig):
            named_all_linear(given, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            prepare(model)
            return
        with own_config(self.peft_config, model, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            prepare(model)
            tuner_of(given).finish_injection(model, self.peft_config[adapter_name], adapter_name)

    # PEFT's class goes by lists of prefixes and layer types that do not know ours; the structural versions do.
    _mark_only_adapters_as_trainable = BaseTuner._mark_only_adapters_as_trainable

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        BaseTuner.set_adapter(self, adapter_name, inference_mode=inference_mode)

    def discard(self, adapter_name: str) -> None:
        """Takes an adapter off again, and with the last one all of the adapter layers."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            self._unload_and_optionally_merge(merge=False)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        _check_adapters_not_merged(self.model, names)
        active = [name for name in self.active_adapters if name not in names]
        for name in names:
            del self.peft_config[name]
            for layer in [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]:
                layer.delete_adapter(name)
            _delete_auxiliary_adapter(self.model, name, new_active_adapters=active)
        # a layer that has lost an adapter may have picked another one for itself
        self.set_adapter(active)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges all layers, the innermost first: an outer method acts on what an inner one has already changed.

        What is merged already is merged again, in that order, with what comes to it.
        """
        check_merges(self.model, safe_merge, adapter_names)
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        warn_of_idle_layers(self.model, names)
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
        if merged and not set(names) <= merged.keys():
            for layer in layers:  # the outermost first
                if layer.merged:
                    layer.unmerge()
            names = list(dict.fromkeys([*merged, *names]))
        for layer in reversed(layers):
            layer.merge(adapter_names=names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        methods = {tuner_of(config) for config in self.peft_config.values() if isinstance(config, ExtConfig)}
        announce_unloading(self.model)
        restore(self.model)
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        if merge:
            for method in methods:
                method.finish_merge(self.model)
        return self.model


class PeftMixedModel(_PeftMixedModel):
    """PEFT's `PeftMixedModel` that also takes the methods of this package: ours with LoRA, or ours with ours.

    PEFT's own class goes by closed lists of its tuners. This one is used in the same way, except that it is named
    here instead of in `get_peft_model(..., mixed=True)`:

    ```py
    model = peft_ext.PeftMixedModel(model, SSFConfig(), adapter_name="ssf")
    model.add_adapter("lora", LoraConfig())
    model.set_adapter(["ssf", "lora"])
    ```

    On a module that both adapt, the method that was added later acts on the output of the earlier one.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        nn.Module.__init__(self)
        _prepare_model_for_gradient_checkpointing(model)
        self.modules_to_save = None
        peft_config = with_head(peft_config, model)
        configs: Any = {adapter_name: peft_config}
        self.base_model = _MixedModel(model, configs, adapter_name)
        self.set_modules_to_save(peft_config, adapter_name)
        self.config = getattr(model, "config", DUMMY_MODEL_CONFIG)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a fresh adapter of any method; activate it with `set_adapter`.

        Raises:
            ValueError: The name is taken.
        """
        peft_config = with_head(peft_config, self.base_model.model)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        if not isinstance(peft_config, ExtConfig):
            _check_config_compatible(peft_config)
        try:
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with the active adapters; a `ValueError` if `adapter_names` asks for others."""
        _refuse_names_of_rows(kwargs)
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        _refuse_names_of_rows(kwargs)
        return super().generate(*args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter into a folder of its own name, which loads like any adapter, alone or with the others.

        The order in which they act on modules that several adapt is written beside the folders, for `from_pretrained`.

        Raises:
            ValueError: There is no such adapter, or an option is none of a mixed model.
        """
        if not safe_serialization or kwargs:
            raise ValueError("A mixed model is saved as safetensors, with no other options.")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if unknown := set(names) - set(self.peft_config):
            raise ValueError(f"There are no adapters {sorted(unknown)}; there are {sorted(self.peft_config)}.")
        states = {name: get_peft_model_state_dict(self, adapter_name=name) for name in names}
        for name, state in states.items():
            directory = os.path.join(save_directory, name)
            os.makedirs(directory, exist_ok=True)
            tensors = {without_inner(key): value.contiguous() for key, value in state.items()}
            save_file(tensors, os.path.join(directory, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
            config = copy.copy(self.peft_config[name])
            config.base_model_name_or_path = getattr(self.base_model.model, "name_or_path", None) or None
            config.inference_mode = True
            config.save_pretrained(directory)
        order = sorted(names, key=lambda name: -_depth(self.base_model.model, name))
        active = [name for name in self.active_adapters if name in names]
        Path(save_directory, ORDER).write_text(json.dumps({"adapters": order, "active": active}, indent=1))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> PeftMixedModel:
        """Loads one adapter, or all that `save_pretrained` has written into one directory, under their own names.

        Raises:
            ValueError: The directory does not say which adapters are in it.
        """
        if not Path(model_id, ORDER).is_file():
            return super().from_pretrained(model, model_id, adapter_name, *args, **kwargs)
        names, active = _read_order(Path(model_id))
        mixed = super().from_pretrained(model, os.path.join(model_id, names[0]), names[0], *args, **kwargs)
        for name in names[1:]:
            mixed.load_adapter(os.path.join(model_id, name), name, *args, **kwargs)
        mixed.set_adapter(active)
        return mixed

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Loads one more adapter, also onto modules that others adapt."""
        output = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if isinstance(self.peft_config[adapter_name], ExtConfig):
            return output
        # PEFT does not look inside the layers of other methods
        own = get_peft_model_state_dict(self, adapter_name=adapter_name)
        inner = {key: without_inner(key) for key in own if key != without_inner(key)}
        if inner:
            hub = {k: v for k, v in kwargs.items() if k in ("revision", "subfolder", "token", "cache_dir")}
            weights = load_peft_weights(model_id, device=kwargs.get("torch_device"), **hub)
            if missing := sorted(set(inner.values()) - weights.keys()):
                raise ValueError(f"The adapter in {str(model_id)!r} has no {missing[0]!r}: its file is damaged.")
            found = {key: weights[stored] for key, stored in inner.items()}
            set_peft_model_state_dict(self, {**own, **found}, adapter_name)
        return output


def with_head(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The config with the head of its task in `modules_to_save`, as PEFT's classes for tasks have it."""
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = [name for name in HEADS.get(config.task_type, ()) if name in there]  # type: ignore[call-overload]
    if not heads or (isinstance(config, ExtConfig) and tuner_of(config).trains_own_head):
        return config
    config = copy.copy(config)
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))  # type: ignore[attr-defined]
    return config


def _refuse_names_of_rows(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "A mixed model takes no `adapter_names`: all samples go through the active adapters. Run the samples of each "
            "adapter as a batch of their own (`set_adapter`), or put adapters of one method into a `PeftModel`."
        )


def _depth(model: nn.Module, adapter_name: str) -> int:
    """In how many layers of other adapters an adapter's layers are at most."""
    return max(
        (
            f".{name}.".count(".base_layer.")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
        ),
        default=0,
    )


def _read_order(directory: Path) -> tuple[list[str], list[str]]:
    try:
        found = json.loads((directory / ORDER).read_text())
        names, active = found["adapters"], found["active"]
        if not (
            names and set(active) <= set(names) and all((directory / name / CONFIG_NAME).is_file() for name in names)
        ):
            raise ValueError("it names adapters that are not there")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(directory / ORDER)!r} does not say which adapters to load ({error}); load them one by one."
        ) from None
    return names, active
