"""SCT on a whole model: its targets, and the choice of channels."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...core import ExtConfig, ExtModel, Row, layer_and_type, listener_between, matched_targets, set_bias_flags
from .config import SCTConfig
from .layer import SCTLayer
from .places import Place, default_names, places_of


class SCTModel(ExtModel):
    """Puts the maps on a model; used through `get_peft_model(model, calibrate(model, SCTConfig(...), data))`."""

    prefix = "sct_"
    tuner_layer_cls = SCTLayer
    scores_kind: ClassVar[str] = "activation"

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """What `site` says.

        Raises:
            ValueError: The table of architectures does not say where that is, or one module makes queries and values.
        """
        return default_names(config, model)

    @classmethod
    def check_targets(cls, config: ExtConfig, model: nn.Module) -> None:
        """Also finds the places of the maps; `ValueError` without channels that were chosen for these very modules."""
        assert isinstance(config, SCTConfig)
        super().check_targets(config, model)
        places = places_of(config, model, [name for name, _ in matched_targets(config, model)])
        for name, place in places.items():
            count = place.count(config)
            indices = (config.support or {}).get(name)
            fits = indices is not None and indices.shape == (count,) and int(indices[-1]) < place.width
            if config.support is not None and not fits:
                raise ValueError(
                    f"The channels were chosen for another model, other targets, another `site` or `num_channels`: there "
                    f"are no {count} for {name!r}. Calibrate the config on this {type(model).__name__}."
                )
        if not (config.calibrated or config.awaits_weights):
            raise ValueError(
                "SCT tunes the channels with the largest activations, and has to look at some data before "
                "`get_peft_model(model, config)`:\n    config = peft_ext.calibrate(model, config, dataloader)"
            )
        config.places = places

    @classmethod
    def layer_kwargs(cls, tuner: BaseTuner, name: str, base_layer: nn.Module, config: Any) -> dict[str, Any]:
        """The place of the map, its channels if they are known, and the module whose input it reads, too."""
        place: Place = config.places[name]
        listen = None if place.reader is None else partial(listener_between, tuner.model, name, place.reader)
        indices = None if config.support is None else config.support[name]
        return {"place": place, "indices": indices, "listen": listen}

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Forgets what only the injection had to know."""
        config.places = None

    @classmethod
    def finish_merge(cls, model: nn.Module) -> None:
        """Sets the config flags of the biases that the merge has added, so that the stock class loads them."""
        set_bias_flags(model)

    # Calibration

    @classmethod
    def channel_sites(cls, config: Any, model: nn.Module) -> dict[str, Any]:
        """What the maps would read, by the module that they go on.

        Raises:
            ValueError: There are fewer channels than `num_channels`.
        """
        places = places_of(config, model, cls.resolved_targets(config, model))
        for place in places.values():
            place.count(config)
        return {name: place.seen for name, place in places.items()}

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """Takes the channels with the largest norms; of equal ones the first."""
        support: dict[str, torch.Tensor] = {}
        for name, place in places_of(config, model, cls.resolved_targets(config, model)).items():
            order = scores.of(name).sort(descending=True, stable=True).indices
            support[name] = order[: place.count(config)].sort().values.int()
        config.support, config.calibrated = support, True

    @classmethod
    def calibration_report(cls, config: Any, full: bool) -> tuple[str, list[Row]]:
        """How many channels of each module were chosen, or, in short, which are chosen most often."""
        support: dict[str, torch.Tensor] = config.support
        if full:
            rows = [{"module": name, "channels": ", ".join(map(str, own.tolist()))} for name, own in support.items()]
            return "Salient channels", rows
        kinds: dict[str, list[torch.Tensor]] = {}
        for name, own in support.items():
            kinds.setdefault(layer_and_type(name)[1] or name, []).append(own)
        summary: list[Row] = []
        for kind, parts in kinds.items():
            together, times = torch.cat(parts).unique(return_counts=True)
            everywhere = int((times == len(parts)).sum())
            row = {"modules": kind, "of them": len(parts), "channels of each": len(parts[0])}
            summary.append(row | {"chosen in any": len(together), "chosen in all": everywhere})
        return "Salient channels", summary
