"""A module some channels of whose output, or of the residual stream that it joins, are mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...core import ChosenChannels, ExtLayer, Listener
from .config import SCTConfig
from .places import Place


START_STD = 0.02  # as published


class ChannelMap(ChosenChannels):
    """M, `weight` `(K, K)`, and c, `bias` `(K,)`, for the channels `indices` `(K,)`, sorted int32.

    Args:
        k: K.
        width: Channels of what it acts on.
        has_bias: Whether there is a vector c.
        indices: The channels; `None` until a saved adapter is loaded.
    """

    def __init__(self, k: int, width: int, has_bias: bool, indices: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(k, k))
        self.register_parameter("bias", nn.Parameter(torch.zeros(k)) if has_bias else None)
        self.bias: nn.Parameter | None
        self.choose(k, width, indices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """M x + c, of the chosen channels alone: `(..., K)` of `(..., K)`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} of {self.size} channels"


class SCTLayer(ExtLayer):
    """A module with `sct_map` on its output.

    At `site="attn"` in a block that adds the attention to its input, the map reads the sum of both. That input is what
    the block's first norm reads: a hook there keeps it, and the forward of this layer lets it go. The hook is inside the
    block, so that gradient checkpointing runs it again.
    """

    adapter_layer_names = ("sct_map",)
    other_param_names = ("sites", "joins")
    supports_mixed_batches = True
    sct_map: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        self.sites: dict[str, str] = {}
        self.joins: dict[str, bool] = {}  # whether the map reads the residual stream before the addition, too
        self.listener: Listener | None = None  # to the module whose input is that stream

    def update_layer(
        self,
        adapter_name: str,
        config: SCTConfig,
        *,
        place: Place,
        indices: torch.Tensor | None,
        listen: Callable[[], Listener] | None,
    ) -> None:
        """Creates the map of one adapter; `listen` hooks the module that `place.reader` names."""
        leaf = ChannelMap(place.count(config), place.width, place.has_bias, indices)
        if config.init_weights != "identity":
            nn.init.trunc_normal_(leaf.weight, std=START_STD)
        self.sct_map[adapter_name] = leaf
        self.sites[adapter_name] = config.site
        self.joins[adapter_name] = listen is not None
        if listen is not None and self.listener is None:
            self.listener = listen()
        self.finish_update(adapter_name, config)

    def leave(self, model: nn.Module) -> None:
        if self.listener is not None:
            self.listener.stop(model)

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().forward(*args, **kwargs)
        finally:
            if self.listener is not None:
                self.listener.value = None

    @property
    def _stream(self) -> torch.Tensor | None:
        return None if self.listener is None else self.listener.value

    def mapped(self, adapter_name: str, y: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        """The output y `(..., C)` with what the map adds; the map reads the sum with `stream` where they join."""
        leaf: Any = self.sct_map[adapter_name]
        chosen = leaf.chosen()
        read = y.index_select(-1, chosen)
        if self.joins[adapter_name]:
            if stream is None:
                raise ValueError(
                    "A module with an SCT adapter at `site='attn'` was run without the norm before it, whose input it "
                    "has to know: it was called outside its block, or a model that was adapted later has replaced the "
                    "norm. Call the model, and put the SCT adapter on last."
                )
            read = read + stream.index_select(-1, chosen)
        added = leaf(self._cast_input_dtype(read, leaf.weight.dtype))
        return y.index_add(-1, chosen, added.to(y.dtype))

    def adapted_forward(self, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(*args, **kwargs)
        for name in adapters:
            y = self.mapped(name, y, self._stream)
        return y

    def mixed_batch_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(*args, **kwargs)
        names = self.names_of_rows(adapter_names, len(y))
        for adapter in self.present(dict.fromkeys(adapter_names)):
            rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=y.device)
            kept = self._stream
            own = self.mapped(adapter, y.index_select(0, rows), None if kept is None else kept.index_select(0, rows))
            y = y.index_copy(0, rows, own)
        return y

    # Merge

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """(I + E M E^T) W and (I + E M E^T) b + E c."""
        if self.sites[adapter_name] == "attn":
            raise ValueError(
                f"Cannot merge adapter {adapter_name!r}: at `site='attn'` its maps act on the residual stream, which "
                "the next norm and the skip connection both read, and which no weight makes. Keep the adapter, or "
                "train one at `site='mlp'` or `site='qkv'`, which can be merged."
            )
        leaf: Any = self.sct_map[adapter_name]
        base: Any = self.get_base_layer()
        weight, chosen = self.get_base_weight(), leaf.chosen().long()
        dtype = torch.promote_types(torch.promote_types(weight.dtype, leaf.weight.dtype), torch.float32)
        matrix = leaf.weight.detach().to(weight.device, dtype)
        is_transposed = isinstance(base, Conv1D)
        rows = (weight.T if is_transposed else weight).to(dtype)
        rows = rows.index_add(0, chosen, matrix @ rows[chosen])
        merged = {"weight": rows.T if is_transposed else rows}
        bias = getattr(base, "bias", None)
        if bias is not None or leaf.bias is not None:
            shift = rows.new_zeros(len(rows)) if bias is None else bias.detach().to(dtype)
            added = matrix @ shift[chosen]
            added = added if leaf.bias is None else added + leaf.bias.detach().to(added)
            merged["bias"] = shift.index_add(0, chosen, added)
        return merged
