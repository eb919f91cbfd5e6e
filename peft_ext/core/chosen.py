"""Channels that a calibration has chosen, or that come with a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


_UNKNOWN = (
    "The config says how many channels were chosen, but not which they are (JSON has no room for them), and no saved "
    "adapter was loaded. Choose them before `get_peft_model`, with `config = peft_ext.calibrate(model, config, "
    "dataloader)`, or load the adapter with `PeftModel.from_pretrained`."
)


class ChosenChannels(nn.Module):
    """The base of a leaf for k of `size` channels: the buffer `indices` `(k,)`, sorted int32, says which."""

    size: int
    indices: torch.Tensor
    _is_known: bool

    def choose(self, k: int, size: int, indices: torch.Tensor | None) -> None:
        """To be called once; `indices` are `None` until a saved adapter is loaded."""
        self.size = size
        chosen = torch.full((k,), -1, dtype=torch.int32) if indices is None else indices
        self.register_buffer("indices", chosen.clone())
        self._is_known = indices is not None

    def chosen(self) -> torch.Tensor:
        """The indices of the channels, `(k,)`.

        Raises:
            ValueError: Nothing was loaded yet.
        """
        if not self._is_known:
            self._is_known = not self.is_unloaded()
            if not self._is_known:
                raise ValueError(_UNKNOWN)
        return self.indices

    def is_unloaded(self) -> bool:
        """Whether it waits for a saved adapter, to say which channels these are."""
        return not self._is_known and (self.indices.is_meta or bool((self.indices < 0).any()))

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the indices of a file are none of this module."""
        indices = tensors["indices"]
        if int(indices[0]) < 0 or int(indices[-1]) >= self.size or bool((indices.diff() <= 0).any()):
            raise ValueError(f"`indices` are not distinct, sorted and below {self.size}")
