"""`peft-ext plan`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..training import Advice, Plan, recommend
from .printing import console, in_bytes, print_json, print_pairs
from .running import explained


def main(arguments: argparse.Namespace) -> None:
    """Shows what each method needs on a model."""
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with explained(f"No plan for {arguments.model!r}"):
        plan = recommend(
            arguments.model,
            (arguments.batch, arguments.length),
            memory=arguments.memory,
            goal=arguments.goal,
            dtype=dtype,
            chosen=arguments.methods,
        )
    if arguments.json:
        print_json(_plain(plan))
        return
    out = console()
    print_pairs(
        out,
        {
            "model": f"{arguments.model}, {plan.parameters:,} parameters in {plan.dtype}",
            "batch": f"{plan.batch} x {plan.tokens} tokens",
            "memory": None if plan.memory is None else in_bytes(plan.memory),
            "sizes": "GB (10^9 bytes)",
        },
    )
    out.print(str(plan))
    for name, reason in plan.left_out.items():
        out.print(f"\nwithout {name}: {reason}")


def _plain(plan: Plan) -> dict[str, Any]:
    return {**vars(plan), "rows": [_row(row) for row in plan.rows]}


def _row(row: Advice) -> dict[str, Any]:
    return {**vars(row), "total": row.total, "total_checkpointed": row.total_checkpointed}
