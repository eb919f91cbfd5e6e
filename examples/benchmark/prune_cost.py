"""What mask pruning costs in training beside LoRA, and what the cut brings. Random weights, nothing is downloaded.

    python examples/benchmark/prune_cost.py minilm vit-6x384 --json     # into results/prune-cost-NAME.json
    python examples/benchmark/prune_cost.py --write docs/results.md           # the tables of the results, between markers

- **step**: forward, backward and fused AdamW while the masks learn, which is when they cost most, over LoRA r=8's step
  of the same round; **saved**: what autograd keeps for the backward, over LoRA's.
- **cut**: a share of the feed-forward channels and of the heads of every layer (as near as whole heads come), chosen
  at random, is cut out; FLOPs by torch's counter, latency the median of rounds in turns with the full model. "Kept
  promise" is the speed-up over the one that FLOPs promise.

The models are those of `cost.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import cost
import cost_methods
import cost_tables
import torch
import workloads
from torch import nn

from peft_ext.export import cut, report
from peft_ext.groups import find_groups


RESULTS = Path(__file__).parent / "results"
MASKS = "mask-pruning LoRA r=8"


def quarter_cut(model: nn.Module, share: float, round_to: int) -> nn.Module:
    """A copy with this share of the channels and heads of each layer cut out."""
    generator = torch.Generator().manual_seed(0)
    smaller = copy.deepcopy(model)
    groups = find_groups(smaller)
    kept = {
        name: torch.randperm(group.units, generator=generator)[: round((1 - share) * group.units)].sort().values
        for name, group in groups.items()
    }
    cut(smaller, groups, kept, round_to=round_to)
    return smaller


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Training and inference of one model of `cost.py`."""
    workload = workloads.PRESETS[name]
    settings = cost.Settings(rounds=args.rounds, warmup=1, threads=args.threads)
    training = cost.measure(workload, [MASKS], settings)
    ratios = cost_tables.summary(training)[MASKS]["step_ratio"]
    saved = training["rows"][MASKS]["saved_bytes"] / training["rows"][cost_methods.LORA]["saved_bytes"]
    torch.manual_seed(0)
    model = workload.build().eval()
    inputs = workload.inputs(getattr(model, "config", None))
    smaller = quarter_cut(model, args.share, args.round_to)
    inference = report(model, smaller, inputs, batch_sizes=args.batches, seconds=args.seconds, rounds=args.rounds)
    return {
        "workload": workload.size,
        "about": workload.about,
        "share": args.share,
        "round_to": args.round_to,
        "step_over_lora": ratios,
        "saved_over_lora": saved,
        "inference": inference,
        "training": training,
    }


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown."""
    machines = [found["training"]["machine"] for found in results]
    lines = [
        "; ".join(dict.fromkeys(f"{machine['cpu']}, torch {machine['torch']}" for machine in machines)),
        "",
        "| model | threads, rounds in turns | training step over LoRA's (quartiles) | saved over LoRA's | cut | batch | FLOPs | time | kept promise |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in results:
        settings = found["training"]["settings"]
        step = "{:.2f} ({:.2f} to {:.2f})".format(*found["step_over_lora"])
        left = [
            f"{found['about']}, {found['workload']}",
            f"{settings['threads']}, {settings['rounds']}",
            step,
            f"{found['saved_over_lora']:.3f}",
            f"{100 * found['share']:g} %",
        ]
        for run in found["inference"]["runs"]:
            flops = run["flops"]["after"] / run["flops"]["before"]
            time = run["seconds"]["after"] / run["seconds"]["before"]
            right = [f"{run['batch_size']}", f"{flops:.3f}", f"{time:.3f}", f"{flops / time:.2f}"]
            lines.append(f"| {' | '.join([*left, *right])} |")
            left = [""] * len(left)
    return "\n".join(lines)


def write_table(file: Path) -> None:
    """Between `<!-- prune-cost -->` and `<!-- /prune-cost -->`, the tables of all results."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("prune-cost-*.json"))]
    text = file.read_text(encoding="utf-8")
    pattern = r"(<!-- prune-cost -->)\n.*?(<!-- /prune-cost -->)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}\n{table(results)}\n{match[2]}", text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"{file} has no line `<!-- prune-cost -->` followed by `<!-- /prune-cost -->`")
    file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=", ".join(workloads.PRESETS))
    parser.add_argument("--share", type=float, default=0.25, help="of channels and heads that is cut")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each latency measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, help="a file with markers for the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    for name in args.models:
        found = measured(name, args)
        print(table([found]), flush=True)
        if args.json:
            (RESULTS / f"prune-cost-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.write:
        write_table(args.write)


if __name__ == "__main__":
    main()
