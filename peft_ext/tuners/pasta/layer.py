"""What PASTA adds to the input of a block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core import Dropouts, ExtLayer
from ...reading import are_tokens
from .config import PASTAConfig
from .rows import LeadingRows, SpecialTokens


CHILD = "special_tokens"  # the name of the layer in its block; not the prefix, which may be an adapter's name
INIT_STD = 0.02  # as published


class SpecialVectors(nn.Module):
    """The vectors of one layer, `weight` `(m, D)`."""

    def __init__(self, vectors: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vectors, width))

    def forward(self, batch: int, dropout: float) -> torch.Tensor:
        """`(m, D)`, or, where elements are dropped, `(batch, m, D)`."""
        if dropout == 0:
            return self.weight.clone()  # under FSDP the weight is freed when this returns
        return F.dropout(self.weight.expand(batch, *self.weight.shape), dropout)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class PASTALayer(ExtLayer):
    """An adapter on the input of a block, a child of the block named `special_tokens`; `pasta_vectors` holds E_l.

    It stands inside the block and not around it, so that the names of the block's modules, and with them the keys of
    other adapters, stay what they are. A hook before the block's forward hands it the hidden states.
    """

    adapter_layer_names = ("pasta_vectors",)
    other_param_names = ("configs", "dropout")
    supports_mixed_batches = True
    pasta_vectors: nn.ModuleDict

    def __init__(self, block: nn.Module, rows: SpecialTokens | LeadingRows) -> None:
        super().__init__(nn.Identity())
        self.training = block.training
        self.rows = rows
        self.configs: dict[str, PASTAConfig] = {}
        self.dropout = Dropouts(self.training)
        self._block = (block,)  # in a tuple, which hides it from nn.Module
        self._handle = block.register_forward_pre_hook(self._before_block, with_kwargs=True)

    def update_layer(self, adapter_name: str, config: PASTAConfig, width: int = 0, **kwargs: Any) -> None:
        assert config.num_vectors is not None
        self.configs[adapter_name] = config
        vectors = SpecialVectors(config.num_vectors, width)
        self.dropout.put(adapter_name, config.dropout)
        if config.init_weights == "normal":
            nn.init.normal_(vectors.weight, std=INIT_STD)
        self.pasta_vectors[adapter_name] = vectors
        self.finish_update(adapter_name, config)

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if not are_tokens(block):  # the queries of a reader have no special ones among them
            return args, kwargs
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}

    def adapted_forward(  # type: ignore[override]
        self, adapters: list[str], hidden_states: torch.Tensor, samples: list[int] | None = None
    ) -> torch.Tensor:
        """hidden_states: `(B, N, D)`, of all samples of the batch or of those with these indices."""
        result = hidden_states
        for name in adapters:
            shares = self.rows.shares(name, self.configs[name], hidden_states, samples)
            vectors = self.pasta_vectors[name](len(hidden_states), self.dropout.acting(name))
            result = result + (shares.to(vectors.dtype) @ vectors).to(result.dtype)
        return result

    def mixed_batch_forward(self, adapter_names: list[str], hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Sample i gets the vectors of `adapter_names[i]` alone."""
        result = hidden_states
        for name in self.present(dict.fromkeys(adapter_names)):
            samples = [i for i, other in enumerate(adapter_names) if other == name]
            index = torch.tensor(samples, device=hidden_states.device)
            result = result.index_copy(0, index, self.adapted_forward([name], hidden_states[index], samples))
        return result

    def leave(self, model: nn.Module) -> None:
        self._handle.remove()
        self.rows.close()
        delattr(self._block[0], CHILD)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: PASTA adds its vectors to special tokens only, which no weight of "
            "the model can tell from others. Keep the adapter: a few hundred kilobytes that load on the base model."
        )
