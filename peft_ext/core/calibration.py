"""Configs that carry what a calibration has chosen: indices are too bulky for JSON, and lie in a file beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import ExtConfig


CALIBRATION = "calibration.safetensors"


@dataclass
class CalibratedConfig(ExtConfig):
    """A config with what a calibration has chosen (indices, factors, logits), `support`, by the name of a module or tensor.

    It is an attribute and no field; `save_pretrained` writes it to `calibration.safetensors`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.support: dict[str, torch.Tensor] | None = None

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if the indices of the file `where` do not fit the fields of this config."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and the indices that were chosen beside it.

        With a trained adapter PEFT calls this too; then they are in the adapter's own file.
        """
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, CALIBRATION)
        if self.support is not None and not self.inference_mode:
            save_file(self.support, file)
        else:
            file.unlink(missing_ok=True)  # of the config that was here before

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """Reads `adapter_config.json`, and the indices that were chosen if they are written beside it.

        A trained adapter has them in its own file; what lies beside that is of a config that was here before.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        file = os.path.join(pretrained_model_name_or_path, CALIBRATION)
        if isinstance(config, CalibratedConfig) and not config.inference_mode and os.path.exists(file):
            try:
                support = load_file(file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"The calibration in {file} cannot be read: {error}") from None
            config.check_support(support, file)
            config.support = support
        return config
