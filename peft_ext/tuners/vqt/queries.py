"""What VQT trains: queries, the weights of a learnt pooling, and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...reading import ReaderHead


@dataclass
class QueryRows:
    """The query rows `(B, T, D)` of one layer, and which of their elements are dropped.

    The dropout is applied where the rows are used, so that for the backward one byte an element is kept and not eight.
    """

    rows: torch.Tensor
    dropped: torch.Tensor | None = None
    probability: float = 0.0

    def __call__(self) -> torch.Tensor:
        """The rows after the dropout."""
        return self.rows if self.dropped is None else self.rows.masked_fill(self.dropped, 0.0) / (1 - self.probability)


class QueryTokens(nn.Module):
    """The queries of all layers, `weight` `(L, T, D)`."""

    def __init__(self, layers: int, queries: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, queries, width))

    def forward(self, batch: int, dropout: float = 0.0) -> list[QueryRows]:
        """The rows of each layer for `batch` samples, with elements dropped at this rate."""
        layers, queries, width = self.weight.shape
        weight = self.weight.clone()  # under FSDP the weight is freed when this returns, and the rows are used later
        rows = weight.unsqueeze(1).expand(layers, batch, queries, width)
        if dropout == 0:
            return [QueryRows(one) for one in rows.unbind(0)]
        dropped = torch.rand(rows.shape, device=rows.device) < dropout
        return [QueryRows(one, mask, dropout) for one, mask in zip(rows.unbind(0), dropped.unbind(0), strict=True)]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class PoolingWeights(nn.Module):
    """The weights `(L, T)` of a learnt sum over the queries of each layer."""

    def __init__(self, layers: int, queries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(layers, queries))

    def forward(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """outputs: `(B, T, D)` of each layer; returns `(B, D)` of each."""
        weight = self.weight
        return [torch.einsum("btd,t->bd", z, w.to(z.dtype)) for z, w in zip(outputs, weight.unbind(0), strict=True)]


class QueryHead(ReaderHead):
    """The linear head, which after feature selection reads only the `columns` `(F,)` of the features."""

    columns: torch.Tensor | None

    def __init__(self, features: int, classes: int, selected: int | None) -> None:
        super().__init__(features, classes, selected)
        self.columns_are_known = False
        # negative until a selection, or a loaded adapter, fills them in
        self.register_buffer("columns", None if selected is None else torch.full((selected,), -1, dtype=torch.int32))

    def forward(self, features: torch.Tensor, with_lasso: bool = False) -> Any:
        """features `(B, F)`; returns `(B, C)`, and, `with_lasso`, the sum of the columns' L2 norms beside it.

        That is computed in here, since FSDP gathers the weight only while the head runs.
        """
        output = super().forward(features)
        return (output, self.group_lasso()) if with_lasso else output

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """The features that were selected, if some were."""
        if self.columns is None:
            return features
        if not self.columns_are_known and self.columns[0] < 0:
            raise ValueError(
                "`num_selected_features` is set, but no features were selected: it is written by "
                "`peft_ext.select_features`. Leave it out of a new config."
            )
        self.columns_are_known = True  # so that a GPU is asked once only
        return features[:, self.columns.long()]

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the columns of a file are none."""
        columns = tensors.get("columns")
        if columns is None or bool((columns == -1).all()):
            return
        if int(columns.min()) < 0 or int(columns.max()) >= self.features or bool((columns.diff() <= 0).any()):
            raise ValueError(f"`columns` must be distinct, sorted and below {self.features}")

    def group_lasso(self) -> torch.Tensor:
        """The sum over the feature columns of their L2 norms."""
        return self.weight.norm(dim=0).sum()
