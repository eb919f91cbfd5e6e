"""A module with adapters on it: which path a forward takes, and the merge."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn

from .config import ExtConfig
from .leaves import FirstGradient, SharedLeaf
from .offloading import onloaded, refuse_new_parameter, working_device
from .quantised import put_in_order
from .targets import features_of


FEATURES = ("in_features", "out_features")
START_NOISE = 0.1  # standard deviation of what `init_weights=False` adds


class ExtLayer(nn.Module, BaseTunerLayer):
    """A module with adapters on it: dispatch between base, adapted and merged, and the merge itself.

    Subclasses set `adapter_layer_names` (the `ModuleDict`s, keyed by adapter name, of trainable leaves; an adapter is
    present if the first of them has it) and implement `update_layer`, `adapted_forward` and `merged_tensors`. Dicts of
    other things by adapter name are listed in `other_param_names`: they go with the adapter when it is deleted.
    """

    supports_mixed_batches: ClassVar[bool] = False
    why_not_mixed: ClassVar[str] = ""  # what stands in the way, for the error
    adds: ClassVar[bool] = False  # what `adds_alone` says of all adapters
    holds_whole_adapters: ClassVar[bool] = False  # it is the only layer of its method

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # an adapter that is put on a model in eval mode drops nothing out
        self.merged_adapters: list[str] = []
        self._quantization_kwargs = quantization_kwargs
        self._look_at_quantization()
        self.cast_input_dtype_enabled = True  # switched off by `peft.helpers.disable_input_dtype_casting`
        self._unmerged: dict[str, torch.Tensor | None] = {}
        self.has_run = False  # whether an adapter on it ever acted in a forward with gradients
        self.watched: set[str] = set()  # adapters whose first gradient would be seen,
        self.learnt: set[str] = set()  # those of them that had one,
        self.reported: set[str] = set()  # and those that it was said of that they had none
        self.like = torch.empty(0)  # of the device and dtype that a base layer without parameters works in
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict().train(self.training))

    def __getattr__(self, name: str) -> Any:
        """What a layer lacks is read from its base layer: Whisper, for one, asks its convolutions for `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            base_layer = self.get_base_layer()
            if name in FEATURES and not hasattr(base_layer, name):
                return features_of(base_layer)[FEATURES.index(name)]
            return getattr(base_layer, name)

    @property
    def quantization_backend(self) -> Any:
        """How the base layer is quantised, `None` if it is not; a model may be dequantised with adapters on it."""
        base, weight_type = self._backend_of
        if base is not self.get_base_layer() or weight_type is not type(getattr(base, "weight", None)):
            self._look_at_quantization()
        return self._backend

    def _look_at_quantization(self) -> None:
        base = self.get_base_layer()
        self._backend = resolve_quantization_backend(base, **self._quantization_kwargs)
        self._backend_of = (base, type(getattr(base, "weight", None)))  # a tuple, so that it is no submodule

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
        if torch.is_grad_enabled():
            self.has_run = True
        return self.adapted_forward(adapters, *args, **kwargs) if adapters else self.base_layer(*args, **kwargs)

    def names_of_rows(self, adapter_names: list[str], rows: int) -> list[str]:
        """The adapter of each row of a batch; window attention folds the windows of a sample into the batch.

        Raises:
            ValueError: The module does not see the samples of the batch.
        """
        if rows % len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"names where a {type(self.get_base_layer()).__name__} sees {rows} rows. If the batch has as "
                "many samples as names, the model calls the module on something that is not per sample (DeBERTa's "
                "shared projections on its position embeddings): run the samples of each adapter as a batch."
            )
        return [name for name in adapter_names for _ in range(rows // len(adapter_names))]

    def active_inside(self) -> list[str]:
        """The adapters of other methods that act between this layer and its base layer."""
        inner: Any = self.base_layer
        found: list[str] = []
        while isinstance(inner, BaseTunerLayer):
            if not (inner.disable_adapters or inner.merged):
                owned = inner._get_available_adapters()
                found += [name for name in inner.active_adapters if name in owned]
            inner = inner.base_layer  # type: ignore[attr-defined]
        return found

    def _refuse_training_while_merged(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        trainable = [
            name
            for container in self.adapter_layer_names
            for name, leaf in getattr(self, container).items()
            if name in self.merged_adapters and any(p.requires_grad for p in SharedLeaf.owned(leaf).parameters())
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
        return (self.like.device, self.like.dtype) if device is None else (working_device(base_layer, device), dtype)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones, and trainable unless `inference_mode`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.watch_first_gradients(self.active_adapters)  # no other is trained now; there may be a hundred

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes the adapter off, and what is known of its training."""
        super().delete_adapter(adapter_name)
        for record in (self.watched, self.learnt, self.reported):
            record.discard(adapter_name)

    def watch_first_gradients(self, adapter_names: Iterable[str] | None = None) -> None:
        """Hooks on the parameters of these adapters, of all if `None`, note that there was a gradient."""
        for adapter in self._get_available_adapters() if adapter_names is None else adapter_names:
            if adapter in self.learnt:
                continue
            for parameter in (p for leaf in self.leaves_of(adapter) for p in leaf.parameters()):
                if parameter.requires_grad and not parameter._backward_hooks:
                    self.watched.add(adapter)
                    parameter.register_hook(FirstGradient(self, adapter))

    def finish_update(self, adapter_name: str, config: ExtConfig) -> None:
        """To be called at the end of `update_layer`: device, dtype, `requires_grad` and, for tests, a random start."""
        self.start_at_random(adapter_name, config)
        for leaf in self.leaves_of(adapter_name):
            if leaf.training != self.training:
                leaf.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def start_at_random(self, adapter_name: str, config: ExtConfig) -> None:
        """With `init_weights=False`, adds noise to the trainable leaves of an adapter, so that it is no identity."""
        if config.init_weights is not False:
            return
        for leaf in self.leaves_of(adapter_name):
            for parameter in leaf.parameters():
                if not parameter.is_meta:
                    parameter.add_(torch.randn_like(parameter), alpha=START_NOISE)

    def leaves_of(self, adapter_name: str) -> list[nn.Module]:
        """The trainable leaves that an adapter has on this layer."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        return [container[adapter_name] for container in containers if adapter_name in container]

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
            if inner := [name for name in adapter_names or self.base_layer.active_adapters if name in owned]:
                self.base_layer.merge(safe_merge=safe_merge, adapter_names=inner)
        for name in names:
            for key, value in self.checked_merge(name, safe_merge).items():
                self._set_base_tensor(key, value)
            self.merged_adapters.append(name)

    def adds_alone(self, adapter_name: str) -> bool:
        """Whether an adapter adds to the output what depends on the input alone, and not on other adapters."""
        return self.adds

    def check_inner_merge(self, adapter_names: list[str]) -> None:
        """Raises `ValueError` if merging these adapters, which act inside, would change what this layer does."""

    def checked_merge(self, name: str, safe_merge: bool) -> dict[str, torch.Tensor]:
        """`merged_tensors`; `ValueError` where the base cannot take them, or, with `safe_merge`, they are not finite."""
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
            refuse_new_parameter(name, key, base)
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

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, dequantised."""
        base = self.get_base_layer()
        put_in_order(base)
        with onloaded(base):
            return super().get_base_weight()

    def unmerged_weight(self) -> torch.Tensor:
        """The base layer's weight as it was before any adapter of this layer was merged, dequantised."""
        if "weight" not in self._unmerged:
            return self.get_base_weight()
        kept: Any = self._unmerged["weight"]
        if not self._keeps_quantized():
            return kept
        base: Any = self.get_base_layer()
        current, base.weight = base.weight, kept
        weight = self.get_base_weight()
        base.weight = current
        return weight

    def _keeps_quantized(self) -> bool:
        """Whether a merge replaces the quantised weight as one object, which can then be put back as it was."""
        return getattr(self.quantization_backend, "backend_name", None) in ("bnb 4bit", "torchao")

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
