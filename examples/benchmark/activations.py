"""What sparsified activations keep for the backward, against dense ones and gradient checkpointing; bytes only.

    python examples/benchmark/activations.py vit-6x384              # print the table
    python examples/benchmark/activations.py vit-6x384 --json       # write results/activations-PRESET.json, too

Bytes as `peft_ext.activation_report` counts them in one forward in training mode.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ext import activation_report, sparse_activations


sys.path.insert(0, str(Path(__file__).resolve().parent))
from cost import copy_model
from cost_methods import head_name
from cost_tables import RESULTS
from workloads import MIB, PRESETS


def adapted(base: nn.Module, method: str) -> nn.Module:
    """A copy of the model for full fine-tuning, or with LoRA r=8 on all Linears."""
    model = copy_model(base, share=True)
    if method == "full fine-tuning":
        return model.train()
    head = head_name(model)
    config = LoraConfig(r=8, target_modules="all-linear", modules_to_save=[head] if head else None)
    return get_peft_model(model, config).train()  # type: ignore[arg-type]


def measure(preset: str, keep: float) -> list[dict[str, Any]]:
    """A row for each method and each way to keep less."""
    torch.manual_seed(0)
    workload = PRESETS[preset]
    base = workload.build()
    batch = workload.inputs(base.config)
    rows = []
    for method in ("full fine-tuning", "LoRA r=8"):
        model: Any = adapted(base, method)
        ways: dict[str, AbstractContextManager[Any]] = {
            "dense": nullcontext(),
            "sparsified": sparse_activations(model, keep),
            "sparsified, norms too": sparse_activations(model, keep, norms=True),
        }
        for way, context in ways.items():
            with context as sparse:
                row: dict[str, Any] = {"method": method, "way": way, "bytes": activation_report(model, batch).bytes}
                if sparse is not None:
                    row |= {"sparsified_bytes": sparse.dense_bytes, "kept_bytes": sparse.kept_bytes}
            rows.append(row)
        model.gradient_checkpointing_enable()
        rows.append({"method": method, "way": "checkpointing", "bytes": activation_report(model, batch).bytes})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| method | way | kept in all, MiB | of what is sparsified, dense | kept of it |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        parts = [f"{row[key] / MIB:.1f}" if key in row else "" for key in ("bytes", "sparsified_bytes", "kept_bytes")]
        lines.append(f"| {row['method']} | {row['way']} | {' | '.join(parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures one preset of `cost.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.preset, args.keep)
    print(table(rows))
    if args.json:
        result = {"preset": args.preset, "keep": args.keep, "torch": torch.__version__, "rows": rows}
        (RESULTS / f"activations-{args.preset}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
