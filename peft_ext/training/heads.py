"""Where the logits are made: the last Linear of the head, whatever stands around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core import ExtConfig, head_modules, tuner_of


@dataclass(frozen=True)
class Head:
    """The module that makes the logits: `weight` `(C, F)` and perhaps `bias` `(C,)`.

    Attributes:
        name: Its name in the model without adapters.
        module: The module itself, of a head in `modules_to_save` the active adapter's copy.
    """

    name: str
    module: Any

    @property
    def outputs(self) -> int:
        return self.module.weight.shape[0]

    def features_of(self, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the logits of each sample are made of: `(B, F)`, or `(B, T, F)` where each token has logits.

        The head hands out its input in place of its output, so the model itself picks the row that counts: of a
        language model, the last token that is no padding.

        Raises:
            ValueError: The logits are not what the head makes.
        """
        device = self.module.weight.device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        widths = []

        def hand_out(module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
            widths.append(args[0].shape[-1])
            return args[0]

        handle = self.module.register_forward_hook(hand_out)
        output, cause = None, None
        try:
            output = model(**moved)
        except Exception as error:
            if not widths or isinstance(error, torch.OutOfMemoryError):
                raise  # not because of what was handed out
            cause = error
        finally:
            handle.remove()
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[0]
        if not isinstance(logits, torch.Tensor) or len(widths) != 1 or logits.shape[-1] != widths[0]:
            raise ValueError(
                f"The model's logits are not the output of {self.name!r} alone (it was called {len(widths)} times), so "
                "no head can be fitted to its features; name the Linear that makes them in `head`."
            ) from cause
        columns = getattr(self.module, "columns", None)  # of a head that reads a selection
        return logits if columns is None else logits[..., columns.long()]

    @torch.no_grad()
    def write(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """weight `(C, F)`, bias `(C,)`."""
        self.module.weight.copy_(weight)
        if self.module.bias is not None:
            self.module.bias.copy_(bias)


def find_head(model: nn.Module, name: str | None = None) -> Head:
    """The Linear that makes the logits: the one named, that of an adapter with its own, or the last of the head.

    Raises:
        ValueError: There is none, several, or one that cannot be written.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if name is not None:
        try:
            head = Head(name, _inner(base.get_submodule(name)))
        except AttributeError as error:
            raise ValueError(f"The model has no module {name!r} to be its head.") from error
        return _writable(head, base)
    if (own := _head_of_adapter(model, base)) is not None:
        return _writable(own, base)
    classes = getattr(getattr(base, "config", None), "num_labels", None)
    linears = dict(_linears(base))
    fitting = [name for name, module in linears.items() if _outputs(module) == classes]
    if not fitting:
        kind = type(base).__name__
        heads = f"its head is made of {', '.join(linears)}" if linears else "it has no head"
        raise ValueError(
            f"No Linear of {kind} makes logits of {classes} labels: {heads}. Load a model with a classification head "
            "(`AutoModelFor...Classification`), or name its last Linear in `head`."
        )
    if len(fitting) > 1:
        raise ValueError(f"{', '.join(fitting)} could all be the head: name one in `head`.")
    return _writable(Head(fitting[0], linears[fitting[0]]), base)


def _linears(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Linears outside the backbone, an adapted one as its layer."""
    modules = dict(base.named_modules())
    for name in sorted(head_modules(base), key=list(modules).index):
        module = modules[name]
        if isinstance(module, ModulesToSaveWrapper):
            for part, inner in _inner(module).named_modules():
                if isinstance(inner, (nn.Linear, BaseTunerLayer)):
                    yield f"{name}.{part}" if part else name, inner
        elif isinstance(module, (nn.Linear, BaseTunerLayer)):
            yield name, module


def _inner(module: nn.Module) -> nn.Module:
    """What a wrapper of `modules_to_save` calls."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module


def _outputs(module: nn.Module) -> int | None:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return getattr(base, "out_features", None)


def _head_of_adapter(model: nn.Module, base: nn.Module) -> Head | None:
    """The head of an active adapter that has its own."""
    configs: Any = getattr(model, "peft_config", None)
    if not configs:  # transformers' `active_adapters` raises then
        return None
    active: Any = getattr(model, "active_adapters", [])
    for adapter in active() if callable(active) else active:
        config = configs.get(adapter)
        if isinstance(config, ExtConfig) and (found := tuner_of(config).own_head(base, adapter)) is not None:
            return Head(*found)
    return None


def _writable(head: Head, base: Any) -> Head:
    module = head.module
    is_adapted = isinstance(module, BaseTunerLayer)
    if is_adapted:
        raise ValueError(
            f"The head {head.name!r} has an adapter on it: fit the head before, or leave it out of `target_modules` "
            "(`modules_to_save` trains it in full)."
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(f"{head.name!r} is a {type(module).__name__} without a matrix that could be written.")
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if type(base).__name__ in causal and _inner(base.get_output_embeddings() or base) is module:
        raise ValueError(
            f"{head.name!r} of {type(base).__name__} predicts the next token, and its labels are those of other places: "
            "`linear_probe` is for heads of classes, as those of `AutoModelFor...Classification`."
        )
    own = {id(parameter) for parameter in module.parameters()}
    shared = [
        name
        for name, other in base.named_modules()
        if other is not module and any(id(parameter) in own for parameter in other._parameters.values())
    ]
    if shared:
        raise ValueError(
            f"The head {head.name!r} shares its weight with {', '.join(map(repr, shared))} (tied), which would be "
            "overwritten with it: load the model with a head of its own."
        )
    return head
