"""What the sensitivity pass costs: memory, time, and what the smaller memory loses. SmolLM2-135M, no network needed.

    python examples/benchmark/calibrate_cost.py --json           # into results/calibrate-cost.json
    python examples/benchmark/calibrate_cost.py --write docs/results.md

- **memory**: by how much the resident set of a process of its own grows at most during the pass, less what it grows
  by if it makes the same backward passes and releases each gradient at once. In multiples of the candidates' fp32 size.
- **time**: of the pass over that of as many plain backward passes, in turns; median of the rounds.
- **overlap**: of the weights that a budget of LoRA r=8 goes to, the share that the smaller memory finds too.

The candidates are all Linear weights of the backbone and all norms, as `SPTConfig` takes them by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import question_answers, resolve_model

from peft_ext import SPTConfig
from peft_ext.calibrate import measure
from peft_ext.core import tuner_of
from peft_ext.scores import Scores


RESULTS = Path(__file__).parent / "results" / "calibrate-cost.json"
MODES = ("plain", "exact", "pool")
TOPICS = ["tech_support", "trivia", "science", "history", "computers", "literature", "ai", "botprofile", "sports"]


def prepared(args: argparse.Namespace) -> tuple[nn.Module, dict[str, nn.Parameter], list[dict[str, torch.Tensor]]]:
    """The model, the candidates, and batches of questions with their answers."""
    name = resolve_model("smollm2")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(" ".join(f"{a} {b}\n" for a, b in question_answers(TOPICS))).input_ids
    size = args.batch * args.length
    batches = [
        {"input_ids": chunk, "labels": chunk}
        for start in range(0, args.batches * size, size)
        for chunk in [torch.tensor(ids[start : start + size]).view(args.batch, args.length)]
    ]
    config = SPTConfig(budget=1)
    return model, tuner_of(config).candidates(config, model), batches


def plain(model: nn.Module, candidates: dict[str, nn.Parameter], batches: list[dict[str, Any]], keep: bool) -> None:
    """As many backward passes; with `keep` the gradients of a pass are released together, at its end."""
    model.train()
    chosen = {id(parameter) for parameter in candidates.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)

    def release(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [] if keep else [p.register_post_accumulate_grad_hook(release) for p in candidates.values()]
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()
    for handle in handles:
        handle.remove()


def run(mode: str, parts: tuple[Any, Any, Any], keep: bool = True) -> Scores | None:
    """One pass."""
    model, candidates, batches = parts
    if mode == "plain":
        plain(model, candidates, batches, keep)
        return None
    return measure(model, candidates, batches, num_batches=len(batches), memory=mode, progress=False)


def peak(mode: str, args: argparse.Namespace) -> None:
    """In a process of its own: prints by how many bytes the resident set grew at most during the passes."""
    parts = prepared(args)
    run("plain", (*parts[:2], parts[2][:1]), keep=False)  # what a first pass sets up for good
    page, done, most = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run(mode, parts, keep=False)
    done.set()
    watcher.join()
    print(most[0] - before)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """All that the table shows."""

    def alone(mode: str) -> int:
        command = [sys.executable, __file__, "--peak", mode, *sizes(args)]
        # the allocator gives blocks from 64 KiB on back at once, so that the resident set is what is really held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout.split()[-1])

    peaks = {mode: alone(mode) for mode in MODES}
    parts = prepared(args)
    wanted = sum(p.numel() for p in parts[1].values()) * 4
    found = {mode: run(mode, parts) for mode in MODES}
    budget = sum(8 * sum(p.shape) for p in parts[1].values() if p.ndim == 2)
    tops = {mode: scores.top(budget) for mode, scores in found.items() if scores is not None}
    common = sum(
        len(set(places.tolist()) & set(tops["pool"].get(name, torch.zeros(0)).tolist()))
        for name, places in tops["exact"].items()
    )
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.rounds):
        for mode in MODES:
            start = time.perf_counter()
            run(mode, parts)
            times[mode].append(time.perf_counter() - start)
    return {
        "candidates_bytes": wanted,
        "peak_bytes": peaks,
        "memory": {mode: (peaks[mode] - peaks["plain"]) / wanted for mode in MODES[1:]},
        "seconds": times,
        "time": {mode: median(a / b for a, b in zip(times[mode], times["plain"], strict=True)) for mode in MODES[1:]},
        "budget": budget,
        "overlap": common / budget,
        "settings": {name: getattr(args, name) for name in ("batches", "batch", "length", "rounds", "threads")},
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "load_average": os.getloadavg()[0],
    }


def sizes(args: argparse.Namespace) -> Iterator[str]:
    for name in ("batches", "batch", "length", "threads"):
        yield from (f"--{name}", str(getattr(args, name)))


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    settings = found["settings"]
    caption = (
        f"SmolLM2-135M, {settings['batches']} batches of {settings['batch']} x {settings['length']} tokens, float32; "
        f"{found['machine']['cpu']}, {settings['threads']} threads, torch {found['machine']['torch']}; "
        f"{settings['rounds']} rounds in turns."
    )
    lines = [
        caption,
        "",
        "| `memory` | extra memory, in candidates' fp32 size | time over plain backward passes | overlap |",
        "|---|---:|---:|---:|",
    ]
    for mode, overlap in (("exact", 1.0), ("pool", found["overlap"])):
        lines.append(f"| {mode} | {found['memory'][mode]:.2f} | {found['time'][mode]:.2f} | {overlap:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--write", type=Path, help="a file with markers for the table")
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.peak:
        peak(args.peak, args)
        return
    if args.json or not args.write:
        found = measured(args)
        print(table(found))
        if args.json:
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        rows = table(json.loads(RESULTS.read_text()))
        pattern = r"(<!-- calibrate-cost -->)\n.*?(<!-- /calibrate-cost -->)"
        text, count = re.subn(pattern, lambda match: f"{match[1]}\n{rows}\n{match[2]}", text, flags=re.DOTALL)
        if not count:
            parser.error(f"{args.write} has no line `<!-- calibrate-cost -->` followed by `<!-- /calibrate-cost -->`")
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
