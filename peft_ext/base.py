"""What every method shares: the common config fields, the layer and the model. The one file that knows PEFT's insides.

A method subclasses the three classes here and writes only its own part:

- `ExtConfig`: its fields;
- `ExtLayer`: `update_layer` (make the trainable leaves), `adapted_forward` (its equation), `merged_tensors` (what the
  base's parameters become when the adapter is merged);
- `ExtModel`: its default targets and which layer class suits a module.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftType, TaskType
from peft import PeftMixedModel as _PeftMixedModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.mixed_model import _prepare_model_for_gradient_checkpointing
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_adapters_not_merged,
    _delete_auxiliary_adapter,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.constants import DUMMY_MODEL_CONFIG, SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .register import is_registered
from .schedule import exempt_from_weight_decay
from .sparse import HALF
from .version import __version__


BASE_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for "no adapter for this sample"
HEADS = {"lm_head", "score", "classifier", "qa_outputs", "cls", "classification_head"}
TASKS_WITH_TRAINED_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


@dataclass
class ExtConfig(PeftConfig):
    """The fields that every method of this package has.

    Args:
        target_modules: Names of the modules to adapt: a list of names (a module is taken if its full name equals one
            of them or ends with `"." +` one of them), a regular expression that must match the full name, or
            `"all-linear"`. `None` takes the method's default for the architecture.
        exclude_modules: Names, or a regular expression, of modules that are left alone although they match.
        modules_to_save: Names of modules that are trained in full and saved with the adapter, for example a fresh
            classification head.
        layers_to_transform: Index, or indices, of the layers to adapt; 0 counts as an index. Needs `target_modules`
            to be a list or `None`.
        layers_pattern: Name, or names, of the module list that holds the layers, if it is not found by itself.
        init_weights: How the adapter starts; `True` is the method's published initialisation.
        trainable_token_indices: Token ids whose embeddings are trained besides the adapter (a list for the input
            embedding, or a dict from embedding name to ids), as in PEFT's LoRA. TRL sets it when it adds a chat
            template's special tokens.
        peft_ext_version: Version of this package that wrote the config; filled in by itself.

    Raises:
        TypeError, ValueError: A field has a value that no method accepts; the message names the field.
    """

    METHOD: ClassVar[str] = ""
    awaits_weights = False  # read from a file whose weights were not loaded yet; no field, so not in the JSON

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the layers."}
    )
    init_weights: bool | str = field(
        default=True, metadata={"help": "How the adapter starts; True is the method's published initialisation."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained besides the adapter."}
    )
    peft_ext_version: str | None = field(
        default=None, metadata={"help": "Version of peft_ext that wrote this config; leave empty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_registered(type(self), self.METHOD):
            raise ValueError(
                f"{type(self).__name__} is not registered with PEFT as {self.METHOD!r}: the installed peft has a "
                "method of that name itself. Use PEFT's method, or install an older peft."
            )
        self.peft_type = PeftType(self.METHOD)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"`{name}` is no valid regular expression: {value!r} ({error}).") from None
            elif isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value):
                setattr(self, name, set(value))
            elif value is not None:
                raise TypeError(f"`{name}` must be a list of names or a string, got {value!r}.")
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"`modules_to_save` must be a list of names, got the string {self.modules_to_save!r}; "
                f"write [{self.modules_to_save!r}]."
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` has no effect when `target_modules` is a regular expression: put the layer "
                        "indices into the expression, or give `target_modules` as a list."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is set but `layers_to_transform` is not; set both or neither.")
        self._check_version()

    def _check_version(self) -> None:
        if self.peft_ext_version is None:
            self.peft_ext_version = __version__
            return
        try:
            is_newer = Version(self.peft_ext_version).release[:2] > Version(__version__).release[:2]
        except InvalidVersion:
            raise ValueError(f"`peft_ext_version` is not a version: {self.peft_ext_version!r}.") from None
        if is_newer:
            warnings.warn(
                f"This adapter was written by peft_ext {self.peft_ext_version}, {__version__} is installed; if it does "
                "not behave as expected, run `pip install -U peft-ext`.",
                UserWarning,
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Reads `adapter_config.json`.

        Raises:
            TypeError: It belongs to an adapter of another method.
        """
        config = super().from_pretrained(*args, **kwargs)
        if not isinstance(config, cls):
            raise TypeError(
                f"This is an adapter of the method {config.peft_type.value}, not {cls.METHOD}; "
                "`PeftConfig.from_pretrained` reads any."
            )
        config.awaits_weights = True
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; names come sorted, so that equal configs are written alike."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and how to load the adapter into the card that PEFT wrote beside it."""
        super().save_pretrained(save_directory, **kwargs)
        from .cards import add_usage  # cards knows the methods, the methods do not know the cards

        add_usage(save_directory)


class AdapterVector(nn.Module):
    """One trainable vector `(C,)`, kept as `weight`, in a leaf module of its own; calling it gives `weight + offset`.

    FSDP shards leaf modules that own a `weight`, and gathers it only while the leaf's `forward` runs, so the vector is
    read by calling the leaf, which returns a new tensor. Storing a scale as its offset from one keeps updates that are
    small against one, also where a trainer casts trainables to bfloat16. No optimizer decays the vector.
    """

    def __init__(self, channels: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.offset = offset
        exempt_from_weight_decay(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        exempt_from_weight_decay(self)  # copies and unpickled leaves too

    def forward(self) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        return weight + self.offset

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, offset={self.offset}"


class ExactLeaf(nn.Module):
    """A leaf whose `weight` moves in steps that are too small for half precision.

    The values stay in fp32 when a model is cast to half precision, and are put back into fp32, exactly where that is
    possible, when a trainer that has cast all trainable parameters calls `train()`: in bfloat16 an update of 1e-5 does
    not move a value of 1e-2.
    """

    weight: Any
    _exact: torch.Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._exact = self.weight.data

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._exact = self.weight.data

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExactLeaf:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            loses = tensor.is_floating_point() and moved.dtype in HALF and tensor.dtype not in HALF
            return tensor.to(moved.device) if loses else moved

        super()._apply(keep_precision, recurse)
        self._exact = self.weight.data
        return self

    def train(self, mode: bool = True) -> ExactLeaf:
        """Puts values that were cast to half precision back into fp32, for training."""
        if mode and self.weight.dtype in HALF and not self.weight.is_meta:
            exact = self._exact
            was_exact = exact is not None and exact.dtype not in HALF and exact.shape == self.weight.shape
            if was_exact and exact is not None and torch.equal(exact.to(self.weight), self.weight.data):
                self.weight.data = exact.to(self.weight.device)
            else:
                self.weight.data = self.weight.data.float()
            self.weight.grad = None
        if self.weight.dtype not in HALF:
            self._exact = self.weight.data
        super().train(mode)
        return self


class ExtLayer(nn.Module, BaseTunerLayer):
    """A module with adapters on it: dispatch between base, adapted and merged, and the merge itself.

    Subclasses set `adapter_layer_names` (the `ModuleDict`s, keyed by adapter name, that hold the trainable leaves; an
    adapter counts as present if the first of them has it) and implement `update_layer`, `adapted_forward` and
    `merged_tensors`.
    """

    supports_mixed_batches: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self._unmerged: dict[str, torch.Tensor | None] = {}
        self.like = torch.empty(0)  # of the device and dtype that a base layer without parameters works in
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def __getattr__(self, name: str) -> Any:
        """What a layer lacks is read from its base layer: Whisper, for one, asks its convolutions for `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.get_base_layer(), name)

    def activate_only(self, adapter_name: str) -> None:
        """Names the active adapter of a new layer, before it has any."""
        self._active_adapter = adapter_name

    def row_scale(self) -> torch.Tensor | None:
        """The constant by which an embedding multiplies its rows, if it does."""
        return self._get_embed_scale()

    # To be written by the method

    def update_layer(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Creates the trainable leaves of one adapter."""
        raise NotImplementedError

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the base layer as changed by `adapters`, in this order; at least one is given."""
        raise NotImplementedError

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output where sample `i` of the batch is adapted by `adapter_names[i]` alone."""
        raise NotImplementedError

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What the base layer's parameters (by name) become when this adapter is merged into what they are now.

        Raises:
            ValueError: The base layer cannot carry the adapter; the message gives the reason.
        """
        raise NotImplementedError

    def leave(self, model: nn.Module) -> None:
        """Called before the layers are taken out of `model`: a layer undoes what it did outside its own module."""

    # Forward

    def present(self, adapters: Iterable[str]) -> list[str]:
        """Those of `adapters` that this layer has."""
        owned = getattr(self, self.adapter_layer_names[0])
        return [name for name in adapters if name in owned]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        if adapter_names is not None:
            if self.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return self.mixed_batch_forward(adapter_names, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.merged:
            self._refuse_training_while_merged()
            return self.base_layer(*args, **kwargs)
        adapters = self.present(self.active_adapters)
        return self.adapted_forward(adapters, *args, **kwargs) if adapters else self.base_layer(*args, **kwargs)

    def _refuse_training_while_merged(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        trainable = [
            name
            for container in self.adapter_layer_names
            for name, leaf in getattr(self, container).items()
            if name in self.merged_adapters and any(p.requires_grad for p in leaf.parameters())
        ]
        if trainable:
            raise ValueError(
                f"Adapter(s) {sorted(set(trainable))} are merged into the base model, so training would not move "
                "them. Call `unmerge_adapter()` before training, or `eval()` to run the merged model."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> ExtLayer:
        super()._apply(fn, recurse)
        # what a merge put aside follows the layer to its device and dtype
        self._unmerged = {key: None if value is None else fn(value) for key, value in self._unmerged.items()}
        self.like = fn(self.like)
        return self

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return (self.like.device, self.like.dtype) if device is None else (device, dtype)

    def finish_update(self, adapter_name: str, config: ExtConfig) -> None:
        """To be called at the end of `update_layer`: device, dtype and `requires_grad` of the new leaves."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # Merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters into the base layer's parameters; `unmerge` puts the very same tensors back.

        Args:
            safe_merge: Refuse to write values that are not finite.
            adapter_names: The adapters to merge, in this order; the active ones if `None`.

        Raises:
            ValueError: Not finite, or the base layer cannot carry an adapter.
        """
        names = self.present(check_adapters_to_merge(self, adapter_names))
        if names and isinstance(self.base_layer, BaseTunerLayer):
            # this adapter acts on what the inner one puts out, so the inner one must be in the weights first
            owned = self.base_layer._get_available_adapters() - set(self.base_layer.merged_adapters)
            inner = [name for name in adapter_names or self.base_layer.active_adapters if name in owned]
            if inner:
                self.base_layer.merge(safe_merge=safe_merge, adapter_names=inner)
        for name in names:
            for key, value in self._checked_merge(name, safe_merge).items():
                self._set_base_tensor(key, value)
            self.merged_adapters.append(name)

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises what `merge` would raise, without changing anything."""
        names = self.present(self.active_adapters if adapter_names is None else adapter_names)
        for name in names:
            if name not in self.merged_adapters:
                self._checked_merge(name, safe_merge)

    def _checked_merge(self, name: str, safe_merge: bool) -> dict[str, torch.Tensor]:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"Cannot merge adapter {name!r} into a layer that {backend.backend_name} has quantised: its weight "
                "cannot be written. Keep the adapter unmerged, or load it on a base model that is not quantised."
            )
        with torch.no_grad():
            merged = self.merged_tensors(name)
        base = self.get_base_layer()
        for key, value in merged.items():
            current = getattr(base, key, None)
            if current is not None and key not in base._parameters and backend is None:
                raise ValueError(
                    f"Cannot merge adapter {name!r} into a {type(base).__name__}: its {key} is computed from other "
                    "parameters (weight or spectral norm). Keep the adapter unmerged, or make the weight a plain "
                    "parameter first, for example with `torch.nn.utils.parametrize.remove_parametrizations`."
                )
            if safe_merge:
                stored = value if current is None or not current.is_floating_point() else value.to(current.dtype)
                if not torch.isfinite(stored).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return merged

    def _set_base_tensor(self, key: str, value: torch.Tensor) -> None:
        base: Any = self.get_base_layer()
        if key == "weight" and self.quantization_backend is not None:
            before = base.weight if self._keeps_quantized() else self.get_base_weight().detach().clone()
            self._unmerged.setdefault(key, before)
            self.set_base_weight(value)
            return
        parameter = getattr(base, key)
        if parameter is None:
            self._unmerged.setdefault(key, None)
            like = next(base.parameters(), self.like)
            dtype = like.dtype if like.is_floating_point() else value.dtype
            setattr(base, key, nn.Parameter(value.to(like.device, dtype), requires_grad=False))
            return
        self._unmerged.setdefault(key, parameter.data)
        parameter.data = value.to(parameter.dtype)

    def _keeps_quantized(self) -> bool:
        """Whether a merge replaces the quantised weight as one object, which can then be put back as it was."""
        return self.quantization_backend is not None and self.quantization_backend.backend_name in (
            "bnb 4bit",
            "torchao",
        )

    def unmerge(self) -> None:
        """Puts the base layer's own tensors back, bit for bit (8-bit and HQQ weights: requantised)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        for key, value in self._unmerged.items():
            if value is None:
                setattr(base, key, None)
            elif key == "weight" and self.quantization_backend is not None:
                if self._keeps_quantized():
                    base.weight = value
                else:
                    self.set_base_weight(value)
            else:
                getattr(base, key).data = value
        self._unmerged = {}
        self.merged_adapters.clear()


class ExtModel(BaseTuner):
    """The tuner: finds the targets, checks them all before it touches the first, and puts the layers in.

    Subclasses set `prefix`, `tuner_layer_cls` and `target_module_mapping` (default targets per `model_type`), and may
    override `layer_class`, `layer_kwargs`, `finish_merge` and `check_model`.
    """

    tuner_layer_cls: type[ExtLayer]
    target_module_mapping: dict[str, list[str]]
    scores_kind: ClassVar[str] = "sensitivity"  # what a sensitivity pass measures unless told otherwise
    misfit_advice: ClassVar[str] = "Load it on the base model that its adapter_config.json names."
    # regular expressions that go with the default targets, by class name or model type
    default_exclusions: ClassVar[dict[str, str]] = {}
    trains_own_head: ClassVar[bool] = False

    # To be overridden by the method

    @classmethod
    def layer_class(cls, base_layer: nn.Module) -> type[ExtLayer]:
        """The layer class for a module, or `TypeError` if the method cannot adapt modules of its type."""
        return cls.tuner_layer_cls

    @classmethod
    def layer_class_at(cls, name: str, base_layer: nn.Module, config: Any) -> type[ExtLayer]:
        """The same for the module of this name, where the config has a say in it."""
        return cls.layer_class(base_layer)

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """What `update_layer` must know beyond the config, because only the whole model, `tuner.model`, tells it."""
        return {}

    @classmethod
    def parameter_targets(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that `target_parameters` names, by name."""
        return {}

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Called once all layers of a new adapter are in `model`."""

    @classmethod
    def finish_merge(cls, model: nn.Module) -> None:
        """Called once all layers of `model` are merged and unloaded."""

    @classmethod
    def stored_tensors(
        cls, model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What is written to disk of an adapter's tensors."""
        return tensors

    @classmethod
    def candidates(cls, config: Any, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that a sensitivity pass looks at, by name; for methods that look at data before training."""
        raise TypeError(
            f"{config.METHOD} looks at no data before training, so there is nothing to calibrate: give the config to "
            "`get_peft_model` as it is."
        )

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """Writes what follows from the `Scores` of the candidates into the config."""
        raise NotImplementedError

    @classmethod
    def calibration_report(cls, config: Any) -> str:
        """What a calibration decided, to be printed; empty if there is nothing to show."""
        return ""

    @classmethod
    def with_budget(cls, config: Any, budget: float) -> Any:
        """A copy of the config with another budget, for a calibration for several."""
        raise TypeError(f"{config.METHOD} has no budget of its own to vary: calibrate once for each.")

    # Injection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_refuse_other_shapes)

    def discard(self, adapter_name: str) -> None:
        """Takes an adapter off again, and with the last one all of the adapter layers."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            super()._unload_and_optionally_merge(merge=False)

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
        layer.like = next((p for p in tuner.model.parameters() if p.is_floating_point()), layer.like).new_empty(0)
        layer.activate_only(adapter_name)
        layer.update_layer(adapter_name, config, **kwargs)
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until it is activated
        return layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model, the first or a further one."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.finish_injection(model, self.peft_config[adapter_name], adapter_name)

    def _create_and_replace(self, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        _create_and_replace(self, peft_config, *args, **kwargs)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        return _inject_parameters(self, peft_config, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also copies `weight` and moves devices; our layers share the base layer and move themselves,
        # and a module that was trained in full may have no `weight`.
        setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return self.default_targets(peft_config, model_config, self.model)

    @classmethod
    def default_targets(cls, config: ExtConfig, model_config: dict[str, Any], model: nn.Module) -> ExtConfig:
        """Fills in `target_modules` for the architecture if the user left it open."""
        if config.target_modules is None:
            model_type = model_config.get("model_type", DUMMY_MODEL_CONFIG["model_type"])
            targets = cls.target_module_mapping.get(model_type)
            if targets is None:
                raise ValueError(
                    f"Please specify `target_modules` in `peft_config`: {config.METHOD} has no default targets for "
                    f"models of type {model_type!r}. It has some for {', '.join(sorted(cls.target_module_mapping))}."
                )
            names = [name for name, _ in model.named_modules()]
            config.target_modules = {target for target in targets if _is_named(target, names)}
            if config.exclude_modules is None:
                exclusions = cls.default_exclusions
                excluded = exclusions.get(type(model).__name__, exclusions.get(model_type, ""))
                if any(re.fullmatch(excluded, name) for name in names if name):
                    config.exclude_modules = excluded
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
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
        takes_all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        _maybe_include_all_linear_layers(config, model)
        if not (isinstance(config.target_modules, str) or config.inference_mode):
            _refuse_unknown_targets(config.target_modules or (), model)
        for name, base_layer in matched_targets(config, model):
            try:
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
            _warn_of_fresh_head(model)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, **kwargs)
        return cls.stored_tensors(model, config, adapter_name, tensors)

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
        _announce_unloading(self.model)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            self.finish_merge(self.model)
        return self.model


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
        if isinstance(peft_config, ExtConfig):
            tuner_of(peft_config).check_targets(peft_config, model)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, ExtConfig):
            _create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def _inject_parameters(self, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        if isinstance(peft_config, ExtConfig):
            return _inject_parameters(self, peft_config, *args, **kwargs)
        return super()._inject_parameters(peft_config, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ExtLayer):  # see `ExtModel`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter of any method on the model."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if isinstance(config, ExtConfig):
            tuner_of(config).finish_injection(model, config, adapter_name)

    # PEFT's class goes by lists of prefixes and layer types that do not know ours; the structural versions do.
    _mark_only_adapters_as_trainable = BaseTuner._mark_only_adapters_as_trainable

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        BaseTuner.set_adapter(self, adapter_name, inference_mode=inference_mode)

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
        """Merges all layers, the innermost first: an outer method acts on what an inner one has already changed."""
        check_merges(self.model, safe_merge, adapter_names)
        for module in reversed(list(self.model.modules())):
            if isinstance(module, BaseTunerLayer):
                module.merge(adapter_names=adapter_names, safe_merge=safe_merge)

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
        _announce_unloading(self.model)
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
        if not isinstance(peft_config, ExtConfig):
            super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
            return
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        try:
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter into a folder of its own name, which loads like any adapter, alone or with the others.

        Raises:
            ValueError: An adapter sits on a module that an earlier one adapts too, so that it would not load alone.
        """
        if not safe_serialization or kwargs:
            raise ValueError("A mixed model is saved as safetensors, with no other options.")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if unknown := set(names) - set(self.peft_config):
            raise ValueError(f"There are no adapters {sorted(unknown)}; there are {sorted(self.peft_config)}.")
        states = {name: get_peft_model_state_dict(self, adapter_name=name) for name in names}
        for name, state in states.items():
            inner = [key for key in state if ".base_layer." in key]
            if inner:
                raise ValueError(
                    f"Adapter {name!r} cannot be saved apart from the others: at {inner[0]!r} it sits inside another "
                    "adapter's layer. Give the adapters modules of their own, or train and save one after the other."
                )
        for name, state in states.items():
            directory = os.path.join(save_directory, name)
            os.makedirs(directory, exist_ok=True)
            tensors = {key: value.contiguous() for key, value in state.items()}
            save_file(tensors, os.path.join(directory, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
            config = copy.copy(self.peft_config[name])
            config.base_model_name_or_path = getattr(self.base_model.model, "name_or_path", None) or None
            config.inference_mode = True
            config.save_pretrained(directory)


def tuner_of(config: ExtConfig) -> type[ExtModel]:
    """The tuner class of a config."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.METHOD)]
    assert issubclass(tuner, ExtModel)
    return tuner


def _create_and_replace(
    tuner: BaseTuner,
    config: ExtConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
) -> None:
    layer = tuner_of(config).inject_layer(tuner, config, adapter_name, target, current_key)
    if layer is not None:
        tuner._replace_module(parent, target_name, layer, target)


def _inject_parameters(
    tuner: BaseTuner, config: ExtConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """Adapts the parameters that `target_parameters` names; one layer for all parameters of a module."""
    names = list(tuner_of(config).parameter_targets(config, model))
    for module_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        parent, target, target_name = _get_submodules(model, module_name)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            _create_and_replace(tuner, config, adapter_name, target, target_name, parent, module_name)
    return names


def _announce_unloading(model: nn.Module) -> None:
    for layer in [module for module in model.modules() if isinstance(module, ExtLayer)]:
        layer.leave(model)


def unadapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of `model` by name, without adapters that are on them, and without what adapters consist of."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
        yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def matched_targets(config: ExtConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `unadapted_modules` that the config's names or expressions match."""
    return ((name, module) for name, module in unadapted_modules(model) if check_target_module_exists(config, name))


def is_admitted(config: ExtConfig, name: str) -> bool:
    """Whether `exclude_modules`, `modules_to_save` and `layers_to_transform` leave a module to be adapted."""
    config = copy.copy(config)
    config.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(config, name))


def resolved_targets(tuner: type[ExtModel], config: ExtConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the config would adapt on this model, by name; the config stays as it is."""
    config = copy.copy(config)
    model_config = getattr(model, "config", None)
    config = tuner.default_targets(config, model_config.to_dict() if model_config is not None else {}, model)
    tuner.check_modules(config, model)
    return dict(matched_targets(config, model))


def layer_and_type(name: str) -> tuple[int, str]:
    """The number of the layer that a module is in, -1 if in none, and its name within the layer.

    A model may have a second stack of layers; the name then begins with that of the stack, such as `decoder.`.
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is None:
        return -1, name
    stack = re.search(r"(?:^|\.)(decoder|text_model|vision_model)\.", name[: match.start() + 1])
    return int(match[1]), (f"{stack[1]}." if stack else "") + name[match.end() :]


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `unadapted_modules` that belong to no head."""
    prefix = getattr(model, "base_model_prefix", "")
    prefix = f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in unadapted_modules(model):
        if name.startswith(prefix) and module is not output and not HEADS & set(name.split(".")):
            yield name, module


def backbone_linears(model: nn.Module) -> set[str]:
    """The names of all Linear modules (and GPT-2's Conv1D) that are no head."""
    return {name for name, module in backbone_modules(model) if linear_features(module) is not None}


def count_parameters(model: nn.Module) -> int:
    """The parameters of the model without its adapters; quantised weights count what they stand for."""
    added = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            kept = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
            added |= {id(p) for name, child in module.named_children() if name != kept for p in child.parameters()}
    counted: dict[int, int] = {}
    for module in model.modules():
        features = linear_features(module)
        for name, parameter in module.named_parameters(recurse=False):
            size = features[0] * features[1] if name == "weight" and features is not None else parameter.numel()
            if id(parameter) not in added:
                counted[id(parameter)] = size
    return sum(counted.values())


def linear_features(base_layer: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a dense or quantised linear layer (or GPT-2's Conv1D), `None` if it is neither."""
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if isinstance(base_layer, Conv1D):
        return base_layer.nx, base_layer.nf
    backend = resolve_quantization_backend(base_layer)
    if backend is None or backend.layer_type != "linear":
        return None
    inputs, outputs = _get_in_out_features(base_layer)
    return None if inputs is None or outputs is None else (inputs, outputs)


def linear_out_features(base_layer: nn.Module) -> int | None:
    """Output features of a dense or quantised linear layer (or GPT-2's Conv1D), `None` if it is neither."""
    features = linear_features(base_layer)
    return None if features is None else features[1]


def check_merges(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Raises what the merge of any of our layers would raise, while the model is still as it was."""
    refuse_tied_weights(model, adapter_names)
    for name, module in model.named_modules():
        if isinstance(module, ExtLayer):
            try:
                with onload_layer(module):
                    module.check_merge(safe_merge, adapter_names)
            except ValueError as error:
                error.add_note(f"This is about the module {name!r}.")
                raise


def refuse_tied_weights(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises `ValueError` if merging an adapted module would change another module too, since they share a weight."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    for name, layer in model.named_modules():
        if not (isinstance(layer, ExtLayer) and layer.present(adapter_names or layer.active_adapters)):
            continue
        base = layer.get_base_layer()
        for parameter in base._parameters.values():
            others = [other for other, module in owners.get(id(parameter), ()) if module is not base]
            if others:
                raise ValueError(
                    f"Cannot merge the adapter of {name!r}: its weight is tied to {others[0]!r}, which would change "
                    "too. Keep the adapter unmerged, list the module in `exclude_modules` before training, or untie "
                    "the weights before adapting the model (for tied embeddings: load with "
                    "`tie_word_embeddings=False` and copy the input embedding into the output layer)."
                )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the frozen one, in eval mode; which parameters are trained stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = [layer._disable_adapters for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled
        for module, mode in modes:
            module.training = mode


@contextmanager
def mixed_batch(
    model: nn.Module, layer_cls: type[ExtLayer], adapter_names: list[str], num_beams: int | None
) -> Iterator[None]:
    """Inside, sample `i` of a batch passes through the adapter `adapter_names[i]` (`"__base__"`: through none).

    Raises:
        ValueError: The method cannot do it, an adapter does not exist, or the model is in training mode.
    """
    if not layer_cls.supports_mixed_batches:
        raise ValueError(
            f"{layer_cls.__name__} does not support `adapter_names`; run the samples of each adapter as a batch of "
            "their own, with `set_adapter` in between."
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, layer_cls)]
    known = {BASE_ADAPTER}.union(*(layer._get_available_adapters() for layer in layers))
    if unexpected := set(adapter_names) - known:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")

    def pass_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
        return args, {**kwargs, "adapter_names": names}

    # beam search repeats each sample, but only after an encoder, if there is one, has seen it once
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder: Any = model.get_encoder() if is_encoder_decoder else None  # type: ignore[operator]
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    handles = [
        module.register_forward_pre_hook(
            partial(pass_names, names=adapter_names if module in in_encoder else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (layer_cls, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_named(target: str, names: Iterable[str]) -> bool:
    """Whether an entry of `target_modules` matches one of the module names."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def _refuse_unknown_targets(targets: Iterable[str], model: nn.Module) -> None:
    wrappers = [n for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    inner = tuple(f"{name}." for name in wrappers)
    names = [name for name, _ in model.named_modules() if not name.startswith(inner)]
    unknown = sorted(target for target in targets if not _is_named(target, names))
    if unknown:
        known = {name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdecimal()}
        similar = sorted({close for target in unknown for close in get_close_matches(target, known)} or known)
        raise ValueError(
            f"Target modules {unknown} not found in the base model, a {type(model).__name__}. Please check the target "
            f"modules and try again; it has modules called {', '.join(similar[:20])}."
        )


def _refuse_other_shapes(tuner: ExtModel, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded: if they are of another model, takes adapters that wait for them off again and raises."""
    own = tuner.state_dict(prefix=prefix)
    configs: dict[str, ExtConfig] = {n: c for n, c in tuner.peft_config.items() if isinstance(c, ExtConfig)}
    waiting = [name for name, config in configs.items() if config.awaits_weights]
    misfits = [
        key
        for key, value in state_dict.items()
        if key in own and f".{tuner.prefix}" in key and value.shape != own[key].shape
    ]
    if misfits:
        for name in waiting:
            tuner.discard(name)
        raise RuntimeError(
            "The adapter does not fit this model:\n"
            + "".join(
                f"    size mismatch for {key.removeprefix(f'{prefix}model.')}: {tuple(state_dict[key].shape)} in the "
                f"adapter, {tuple(own[key].shape)} in the model\n"
                for key in misfits[:5]
            )
            + f"({len(misfits)} in all.) {tuner.misfit_advice}"
        )
    for name in waiting:
        configs[name].awaits_weights = False


def warn_of_experts(config: ExtConfig, model: nn.Module) -> None:
    """Says so if the model has experts that `config` leaves out without a word."""
    advice = ""
    if hasattr(config, "target_parameters"):
        advice = " Name them in `target_parameters`, or set that to an empty list if they are to stay as they are."
    for name, module in model.named_modules():
        is_conv = isinstance(module, nn.modules.conv._ConvNd)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1 and not is_conv:
                warnings.warn(
                    f"{config.METHOD} leaves out the mixture-of-experts weights such as {name}.{key}: they are "
                    "parameters of three dimensions, not Linear modules, and `target_modules='all-linear'` does not "
                    f"reach them.{advice}",
                    UserWarning,
                    stacklevel=2,
                )
                return


def _warn_of_fresh_head(model: nn.Module) -> None:
    for head_name in SEQ_CLS_HEAD_NAMES:
        head = getattr(model, head_name, None)
        if not isinstance(head, nn.Module) or isinstance(head, AuxiliaryTrainingWrapper):
            continue
        linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
        if linears and not any(p.requires_grad for p in head.parameters()) and _looks_fresh(linears[-1], model):
            warnings.warn(
                f"The head {head_name!r} looks freshly initialised and stays frozen, so the adapter would be trained "
                f"against random class vectors. Set `modules_to_save=[{head_name!r}]` in the config, or a `task_type` "
                "for which PEFT trains the head.",
                UserWarning,
                stacklevel=2,
            )


def _looks_fresh(linear: nn.Linear, model: nn.Module) -> bool:
    """An initial bias is exactly zero, a trained one never; without a bias, the spread of the initial weights tells."""
    if linear.weight.is_meta:
        return False
    if linear.bias is not None:
        return not linear.bias.any()
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    return spread is not None and abs(linear.weight.float().std().item() / spread - 1) < 0.05
