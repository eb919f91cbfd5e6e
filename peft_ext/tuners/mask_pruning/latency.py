"""What a unit costs in seconds: the products that it takes part in, timed with all units and with half of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from ...groups import Group, features_of
from .config import MaskLoraConfig


def measured_costs(model: nn.Module, groups: Mapping[str, Group], config: MaskLoraConfig) -> dict[str, float]:
    """Seconds that one unit of each group adds to a forward of `batch_size` samples, on the model's device.

    Groups of one shape are timed once. Widths in between are taken to lie on a straight line.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    found: dict[tuple[int, ...], float] = {}
    costs = {}
    for name, group in groups.items():
        rows = tuple((features_of(model, row.module)[0], row.width) for row in group.rows)
        outputs = features_of(model, name)[1]
        shape = (group.units, group.width, group.head_dim, outputs, *(size for row in rows for size in row))
        if shape not in found:
            half = max(1, group.units // 2)
            times = [_seconds(group, units, rows, outputs, parameter, config) for units in (group.units, half)]
            found[shape] = max((times[0] - times[1]) / max(1, group.units - half), 1e-12)
        costs[name] = found[shape]
    return costs


@torch.no_grad()
def _seconds(
    group: Group,
    units: int,
    rows: tuple[tuple[int, int], ...],
    outputs: int,
    like: torch.Tensor,
    config: MaskLoraConfig,
) -> float:
    """The median time of the group's products with so many units."""
    batch, length = config.batch_size, config.sequence_length
    assert batch is not None and length is not None
    inputs = [like.new_ones(batch, length, columns) for columns, _ in rows]
    makers = [like.new_ones(units * width, columns) for columns, width in rows]
    consumer = like.new_ones(outputs, units * group.width)

    def run() -> None:
        made = [F.linear(x, weight) for x, weight in zip(inputs, makers, strict=True)]
        if group.kind == "heads":
            parts = made if len(made) > 1 else made[0].chunk(3, -1)  # or one product for all three
            query, key, value = (x.reshape(batch, length, -1, group.head_dim).transpose(1, 2) for x in parts[:3])
            mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
            F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), consumer)
        else:
            F.linear(F.gelu(made[0]), consumer)

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.05).median
