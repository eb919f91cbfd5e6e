r"""What VQT costs against a linear probe and LoRA: bytes kept for the backward, time of a step, time of a cached epoch.

    OMP_NUM_THREADS=1 python examples/benchmark/vqt_cost.py --output examples/benchmark/results/vqt_cost.json
    OMP_NUM_THREADS=1 python examples/benchmark/vqt_cost.py --size base --batch 2 --rounds 2 \
        --output examples/benchmark/results/vqt_cost_base.json
    python examples/benchmark/vqt_cost.py --write docs/results.md         # the tables of the results, between their markers

The model is a random ViT of 6 layers and width 384 on 8 images of 224 px (`--size base`: ViT-B/16). Times are of the
CPU and not of the clock, so that with one thread a busy machine counts little; methods take turns, and a ratio is the
median over rounds of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_ext import FrozenPassCache, VQTConfig
from peft_ext.training.toys import saved_bytes


RESULTS = Path(__file__).parent / "results"
SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
}


def step(model: nn.Module, batch: dict[str, Any]) -> float:
    """CPU seconds of one forward and backward."""
    start = time.process_time()
    model(**batch).loss.backward()
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds


def methods(base: nn.Module) -> dict[str, nn.Module]:
    probe = copy.deepcopy(base).requires_grad_(False)
    probe.classifier.requires_grad_(True)
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"])
    found = {"linear probe": probe, "LoRA": get_peft_model(copy.deepcopy(base), lora)}
    for queries in (1, 10, 20):
        for checkpointing in (False, True):
            model = get_peft_model(copy.deepcopy(base), VQTConfig(num_queries=queries))
            if checkpointing:
                model.base_model.model.gradient_checkpointing_enable()
            found[f"VQT, {queries}" + (", checkpointing" if checkpointing else "")] = model
    return {name: model.train() for name, model in found.items()}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    settings = results["settings"]
    shape = {"small": "ViT, 6 layers of width 384", "base": "ViT-B/16"}[settings["size"]]
    images = f"{settings['batch']} images of 224 x 224"
    lines = [
        f"{shape}, {images}, {settings['threads']} thread; CPU time, median of {settings['rounds']} rounds.",
        "",
        "| method, with its queries | saved for backward, MiB | in LoRA's | step in the probe's | in LoRA's |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        share = row["of LoRA's"]
        kept = ["", ""] if share is None else [f"{row['MiB kept']:.1f}", f"{share:.3f}"]
        times = [f"{row[key]:.2f}" for key in ("of the probe's", "of LoRA's time")]
        lines.append(f"| {' | '.join([row['method'], *kept, *times])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the table of the results there; measure nothing"
    )
    args = parser.parse_args()
    if args.write:
        results = [RESULTS / "vqt_cost.json", RESULTS / "vqt_cost_base.json"]
        found = "\n\n".join(table(json.loads(file.read_text())) for file in results if file.exists())
        pattern = r"(<!-- vqt-cost -->)\n.*?(<!-- /vqt-cost -->)"
        text, count = re.subn(
            pattern, lambda match: f"{match[1]}\n{found}\n{match[2]}", args.write.read_text(), flags=re.DOTALL
        )
        if not count:
            parser.error(f"{args.write} has no line `<!-- vqt-cost -->` followed by `<!-- /vqt-cost -->`")
        args.write.write_text(text)
        return
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = ViTForImageClassification(ViTConfig(**SIZES[args.size], **dropout, num_labels=10))
    batch = {"pixel_values": torch.randn(args.batch, 3, 224, 224), "labels": torch.randint(0, 10, (args.batch,))}
    models = methods(base)
    kept = {name: saved_bytes(model, batch) for name, model in models.items()}
    for model in models.values():
        model.zero_grad()

    times: dict[str, list[float]] = {name: [] for name in [*models, "VQT, 1, cached"]}
    with tempfile.TemporaryDirectory() as directory:
        cached = models["VQT, 1"]
        cache = FrozenPassCache.write(cached, [batch], Path(directory) / "cache", num_samples=args.batch)
        for _ in range(args.rounds):
            for name, model in models.items():
                times[name].append(step(model, batch))
            with cache.use(cached):
                times["VQT, 1, cached"].append(step(cached, batch))

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[name], times[other], strict=True)), 3)

    rows = [
        {
            "method": name,
            "MiB kept": round(kept[name] / 2**20, 1) if name in kept else None,
            "of LoRA's": round(kept[name] / kept["LoRA"], 4) if name in kept else None,
            "CPU seconds a step": round(statistics.median(times[name]), 4),
            "of the probe's": ratio(name, "linear probe"),
            "of LoRA's time": ratio(name, "LoRA"),
        }
        for name in times
    ]
    for row in rows:
        print(row)
    if args.output:
        settings = {"size": args.size, "batch": args.batch, "rounds": args.rounds, "threads": torch.get_num_threads()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
