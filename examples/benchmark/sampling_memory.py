"""What layer sampling holds: weights, gradients and AdamW's state at their largest, against full fine-tuning.

    python examples/benchmark/sampling_memory.py smollm2-135m              # print the table
    python examples/benchmark/sampling_memory.py smollm2-135m --json       # write results/sampling-memory-PRESET.json

Real steps on the meta device, where tensors have a size and no content: a draw at each step, until all blocks have had
a turn. The formula is 4P + 12T bytes for P parameters, of which at most T are trained at a time, in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import peft_ext


sys.path.insert(0, str(Path(__file__).resolve().parent))
from cost_tables import RESULTS
from workloads import MIB, PRESETS


WAYS: dict[str, dict[str, Any] | None] = {
    "full fine-tuning": None,
    "LISA, 2 blocks": {"blocks": 2},
    "LISA, 2 blocks, embeddings and head frozen": {"blocks": 2, "always": ("norm",)},
    "HFT, half of the matrices": {"unit": "matrix", "share": 0.5},
}


def measure(preset: str, fields: dict[str, Any] | None) -> dict[str, Any]:
    """The largest sum of bytes at the end of a step, before gradients are cleared."""
    workload = PRESETS[preset]
    with torch.device("meta"):
        model: Any = workload.build().train()
        batch = workload.inputs(model.config)
        if "attention_mask" in batch:  # transformers looks at the content of masks, unless they are whole
            length = workload.length
            batch["attention_mask"] = torch.zeros(workload.batch, 1, length, length)
    sampling = None if fields is None else peft_ext.layer_sampling(model, every=1, **fields)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    weights = sum(p.nbytes for p in model.parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    peak = trained = step = 0
    seen: set[str] = set()
    while step < 2 or (sampling is not None and len(seen) < model.config.num_hidden_layers and step < 400):
        model(**batch).loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
        peak = max(peak, weights + sum(tensor.nbytes for tensor in (*gradients, *state)))
        names = sizes if sampling is None else sampling.parameters_at(step)
        trained = max(trained, sum(sizes[name] for name in names))
        seen |= (
            set() if sampling is None else {name.split("layers.")[1].split(".")[0] for name in sampling.units_at(step)}
        )
        optimizer.zero_grad()
        step += 1
    return {"steps": step, "trained": trained, "bytes": peak, "formula": weights + 12 * trained}


def main() -> None:
    """Measures one preset of `cost.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {way: measure(args.preset, fields) for way, fields in WAYS.items()}
    print("| way | trained at a time | MiB | by the formula | of full |\n|---|---:|---:|---:|---:|")
    whole = rows["full fine-tuning"]["bytes"]
    for way, row in rows.items():
        mib = f"{row['bytes'] / MIB:,.0f} | {row['formula'] / MIB:,.0f}"
        print(f"| {way} | {row['trained']:,} | {mib} | {row['bytes'] / whole:.2f} |")
    if args.json:
        result = {"preset": args.preset, "torch": torch.__version__, "rows": rows}
        (RESULTS / f"sampling-memory-{args.preset}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
