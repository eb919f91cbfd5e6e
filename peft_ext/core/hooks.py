"""What a method may tell its tuner: class methods to override, each with a default."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .files import Row
from .layer import ExtLayer
from .registry import about_of


class MethodHooks:
    """The part of `ExtModel` that is there to be overridden. All are class methods: the mixed tuner calls them, too."""

    tuner_layer_cls: Any
    prefix: str
    scores_kind: ClassVar[str] = "sensitivity"  # what a sensitivity pass measures unless told otherwise

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
    def kind_for(cls, config: Any) -> str:
        """What a calibration with this config measures unless told otherwise; `"activation"`: see `channel_sites`."""
        return cls.scores_kind

    @classmethod
    def channel_sites(cls, config: Any, model: nn.Module) -> dict[str, Any]:
        """Whose channels a pass over activations looks at: a `channel_norms.ChannelSite` by a name of the method's."""
        raise NotImplementedError

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """Writes what follows from the `Scores` of the candidates, or the `ChannelNorms`, into the config."""
        raise NotImplementedError

    @classmethod
    def calibration_report(cls, config: Any, full: bool) -> tuple[str, list[Row]]:
        """What a calibration decided, to be printed: a title, and rows of a table whose columns are the rows' keys.

        A summary, or, if `full`, all of it; no rows if there is nothing to show.
        """
        return "", []

    @classmethod
    def with_budget(cls, config: Any, budget: float) -> Any:
        """A copy of the config with another budget, for a calibration for several."""
        raise TypeError(f"{config.METHOD} has no budget of its own to vary: calibrate once for each.")

    @classmethod
    def own_head(cls, model: nn.Module, adapter_name: str) -> tuple[str, nn.Module] | None:
        """The module that makes the logits in place of the model's own, and its name; it has a `weight` and a `bias`."""
        return None

    # What can be made of an adapter

    @classmethod
    def kept_units(cls, model: nn.Module, adapter_name: str) -> dict[str, tuple[Any, torch.Tensor]]:
        """Which units of which groups stay if the base is cut: the `groups.Group` and the units' sorted indices, by name.

        Called by `prune_and_unload` for each active adapter; empty if the method cuts nothing.

        Raises:
            ValueError: What to cut is not decided yet.
        """
        return {}

    @classmethod
    def as_lora(
        cls, model: nn.Module, adapter_name: str
    ) -> tuple[LoraConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The adapter's low-rank updates in PEFT's words: a config, and A `(r, inputs)`, B `(outputs, r)` by module.

        Called by `prune_and_unload(keep_lora=True)`.

        Raises:
            ValueError: It has none.
        """
        raise ValueError(f"An adapter of the method {about_of(cls.prefix[:-1].upper()).name} has no LoRA to keep.")
