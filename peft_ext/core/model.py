"""The tuner: finds the targets, checks them all before it changes the first, and puts the layers in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_MODEL_CONFIG
from peft.utils.other import _get_submodules
from torch import nn
from transformers import PreTrainedModel

from .advice import warn_of_experts, warn_of_fresh_head, warn_of_idle_layers, watch_first_gradients
from .config import ExtConfig
from .copies import keeping_configs, own_config
from .hooks import MethodHooks
from .layer import ExtLayer
from .listening import move_listeners
from .merging import announce_unloading, check_merges
from .modes import mixed_batch
from .offloading import empty_like_of
from .quantised import weight_of
from .sharding import plain_name
from .stored import Stored, packed, refuse_other_shapes, without_inner
from .targets import (
    is_admitted,
    is_named,
    matched_targets,
    named_all_linear,
    refuse_ambiguous_names,
    refuse_no_layers,
    refuse_unknown_targets,
    refuse_unknown_tokens,
    unadapted_modules,
)
from .uncalled import uncalled_modules
from .upkeep import prepare, restore


TASKS_WITH_TRAINED_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


class ExtModel(MethodHooks, BaseTuner):
    """The tuner: finds the targets, checks them all before it touches the first, and puts the layers in.

    Subclasses set `prefix` and `tuner_layer_cls`; default targets are `target_module_mapping`, names by `model_type`, or
    what `default_modules` finds, for example with `peft_ext.architectures.describe`. What else they may override stands
    in `MethodHooks`.
    """

    tuner_layer_cls: type[ExtLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT declares it without ClassVar
    misfit_advice: ClassVar[str] = "Load it on the base model that its adapter_config.json names."
    trains_own_head: ClassVar[bool] = False
    stands_beside: ClassVar[bool] = (
        False  # its layers are children of what they act on: no tensor is named after a target
    )
    cuts: ClassVar[bool] = False  # whether `kept_units` says what can be cut out of the base

    # Injection

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        self.loads_together: list[set[str]] = []  # keys that are loaded all or none
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with keeping_configs(model):
            super().__init__(model, peft_config, *args, **kwargs)
        awaits_weights = any(getattr(config, "awaits_weights", False) for config in self.peft_config.values())
        self._trained_before = before if awaits_weights else {}
        self.register_load_state_dict_pre_hook(refuse_other_shapes)

    def discard(self, adapter_name: str) -> None:
        """Takes an adapter off again, and with the last one all of the adapter layers."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
            return
        self._unload_and_optionally_merge(merge=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before.get(name, parameter.requires_grad))

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: ExtConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """Adds the adapter to `target` if that is one of this method's layers, else returns a layer around it."""
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kwargs = cls.layer_kwargs(tuner, name, base_layer, config)
        if isinstance(target, cls.tuner_layer_cls):
            target.update_layer(adapter_name, config, **kwargs)
            return None
        layer_class = cls.layer_class_at(name, base_layer, config)
        layer = layer_class(target, **get_quantization_kwargs(tuner.model))
        layer.like = empty_like_of(tuner.model)
        layer.activate_only(adapter_name)
        layer.update_layer(adapter_name, config, **kwargs)
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until it is activated
        return layer

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        super()._cast_adapter_dtype(*args, **kwargs)
        watch_first_gradients(self.model)  # of the new parameters that PEFT makes where it casts

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model, the first or a further one.

        It gets a config of its own. If it is given the config of another adapter on the model, as TRL does to make a
        reference, it also gets what that one holds besides parameters.
        """
        if self.stands_beside:
            kwargs.pop("state_dict", None)  # in whose keys PEFT would look for the targets, and find none
        with own_config(self.peft_config, model, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            prepare(model)
            self.finish_injection(model, self.peft_config[adapter_name], adapter_name)

    @classmethod
    def replace_target(
        cls,
        tuner: BaseTuner,
        config: ExtConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Adds the adapter to one target of `tuner`, which may be a mixed tuner."""
        layer = cls.inject_layer(tuner, config, adapter_name, target, current_key)
        if layer is not None:
            tuner._replace_module(parent, target_name, layer, target)

    @classmethod
    def replace_parameters(
        cls, tuner: BaseTuner, config: ExtConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapts the parameters that `target_parameters` names; one layer for all parameters of a module."""
        names = list(cls.parameter_targets(config, model))
        for module_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
            parent, target, target_name = _get_submodules(model, module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                cls.replace_target(tuner, config, adapter_name, target, target_name, parent, module_name)
        return names

    def _create_and_replace(self, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        self.replace_target(self, peft_config, *args, **kwargs)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        return self.replace_parameters(self, peft_config, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight`, which a module trained in full may lack; our layers share the base layer
        setattr(parent, child_name, new_module)
        move_listeners(child, new_module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return self.default_targets(peft_config, model_config, self.model)

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """The full names of the modules that are adapted where the user names none; by `target_module_mapping`.

        Raises:
            ValueError: There are none, with the reason.
        """
        model_type = getattr(getattr(model, "config", None), "model_type", DUMMY_MODEL_CONFIG["model_type"])
        targets = cls.target_module_mapping.get(model_type)
        if targets is None:
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: {config.METHOD} has no default targets for models "
                f"of type {model_type!r}. It has some for {', '.join(sorted(cls.target_module_mapping)) or 'no type'}."
            )
        return {name for name, _ in unadapted_modules(model) if any(is_named(target, [name]) for target in targets)}

    @classmethod
    def default_targets(cls, config: ExtConfig, model_config: dict[str, Any], model: nn.Module) -> ExtConfig:
        """Fills in `target_modules` if the user left it open.

        Raises:
            ValueError: The method has no default for this model, or `layers_to_transform` leaves nothing of it.
        """
        if config.target_modules is None:
            names = cls.default_modules(config, model)
            if config.layers_to_transform is not None:  # of which PEFT takes no notice where a full name is given
                names = {name for name in names if is_admitted(config, name)}
                if not names:
                    raise ValueError(
                        f"`layers_to_transform` is {config.layers_to_transform!r}, which leaves none of the default "
                        f"targets of {config.METHOD} on this {type(model).__name__}: are its layers numbered like that?"
                    )
            config.target_modules = names
        return config

    @classmethod
    def resolved_targets(cls, config: ExtConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that the config would adapt on this model, by name; the config stays as it is."""
        config = copy.copy(config)
        model_config = getattr(model, "config", None)
        config = cls.default_targets(config, model_config.to_dict() if model_config is not None else {}, model)
        cls.check_modules(config, model)
        return dict(matched_targets(config, model))

    @classmethod
    def target_weights(cls, config: ExtConfig, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of those modules: what `candidates` returns where a sensitivity pass looks at nothing else.

        A quantised weight is stood for by a `QuantisedWeight`.
        """
        return {name: weight_of(module) for name, module in cls.resolved_targets(config, model).items()}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        refuse_no_layers(peft_config)
        refuse_unknown_tokens(peft_config, model)
        refuse_ambiguous_names(self.peft_config, model, self.tuner_layer_cls)
        self.check_targets(peft_config, model)

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Whatever must be known before the first module is replaced; `check_modules` as a rule."""
        cls.check_modules(config, model)

    @classmethod
    def check_modules(cls, config: ExtConfig, model: nn.Module) -> None:
        """Raises for targets that cannot be adapted while the model is still as it was.

        Raises:
            ValueError: There are no targets, or one of them names no module.
            TypeError: A target is of a type that the method does not support; the message names it.
        """
        if not config.target_modules and not cls.parameter_targets(config, model):
            raise ValueError(
                "`target_modules` is empty, so nothing would be trained; name at least one module, or leave it out to "
                f"get the default targets of {config.METHOD}."
            )
        takes_all_linear = named_all_linear(config, model)
        uncalled = uncalled_modules(model)
        if not (isinstance(config.target_modules, str) or config.inference_mode):
            refuse_unknown_targets(config.target_modules or (), model)
        is_new = not (config.inference_mode or config.awaits_weights)  # what was trained before may load
        for name, base_layer in matched_targets(config, model):
            try:
                if is_new and name in uncalled:
                    raise TypeError(f"An adapter on it would not act: {uncalled[name]}.")
                cls.layer_class(base_layer)
            except TypeError as error:
                raise TypeError(
                    f"Target module {name!r}: {error} Leave it out of `target_modules`, or list it in "
                    "`exclude_modules`."
                ) from None
        if takes_all_linear and getattr(config, "target_parameters", None) is None:
            warn_of_experts(config, model)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if isinstance(model, PreTrainedModel):
            # which class the adapter was trained on, also where the task leaves that open; and PEFT copies a model's
            # tags into the card of each adapter
            config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
            model.add_model_tags(["peft-ext", config.METHOD.lower().replace("_", "-")])
        head_is_trained = self.trains_own_head or config.task_type in TASKS_WITH_TRAINED_HEAD
        if not (config.inference_mode or head_is_trained):
            warn_of_fresh_head(model)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        warn_of_idle_layers(model, [adapter_name])
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, **kwargs)
        # PEFT looks for names with FSDP1's wrappers in them, which a full state dict does not have
        prefixes = {plain_name(prefix) for prefix in _get_tuner_state_dict_key_prefixes(model)}
        tensors |= _filter_state_dict_by_key_prefixes(kwargs["state_dict"], prefixes)
        tensors = packed(model, adapter_name, cls.prefix, tensors)
        tensors = {without_inner(key): tensor for key, tensor in tensors.items()}
        return cls.stored_tensors(model, config, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of a file by their keys in the model; `ValueError` with a list of all that is wrong with them."""
        stored = Stored(model, adapter_name, cls.prefix, state_dict)
        tuner: Any = getattr(model, "base_model", None)
        if stored.faults:
            if config.awaits_weights and hasattr(tuner, "discard"):
                tuner.discard(adapter_name)
            raise stored.refusal(cls.misfit_advice)
        if isinstance(tuner, BaseTuner):
            tuner.loads_together = stored.groups  # type: ignore[assignment]
        return stored.tensors

    # Samples of one batch on several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        with mixed_batch(self.model, self.tuner_layer_cls, list(adapter_names), kwargs.get("num_beams")):
            yield

    # Merge

    def _check_merge_allowed(self) -> None:
        """PEFT warns here of tied weights, whichever adapter is merged; `check_merges` refuses where it matters."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges the adapters into the base model's weights; `unmerge_adapter` takes them out again, bit for bit.

        Either all layers are merged or, with an error, none.
        """
        check_merges(self.model, safe_merge, adapter_names)
        warn_of_idle_layers(self.model, adapter_names or self.active_adapters)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            check_merges(self.model, safe_merge, adapter_names)
            warn_of_idle_layers(self.model, adapter_names or self.active_adapters)
        announce_unloading(self.model)
        restore(self.model)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            self.finish_merge(self.model)
        return self.model


def tuner_of(config: ExtConfig) -> type[ExtModel]:
    """The tuner class of a config."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.METHOD)]
    assert issubclass(tuner, ExtModel)
    return tuner
