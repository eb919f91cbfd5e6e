"""What a method takes on a model of 1B parameters in the memory of a host, and what larger ones would take.

    python examples/benchmark/large.py                          # all methods, LoRA first; what has its line is not run again
    python examples/benchmark/large.py lora s2ft --preset smollm2-135m
    python examples/benchmark/large.py --meta                   # 8B and 70B on the meta device: counts, bytes, seconds
    python examples/benchmark/large.py --write docs/results.md  # the tables, between their markers

Each method has a process of its own, so that the peak of its memory is its own: the model is made (random weights, bf16,
the shape of Llama-3.2-1B), `get_peft_model`, three steps of AdamW at batch 1, `save_pretrained`, `from_pretrained` into
the same base, `merge_and_unload`. All have LoRA r=8's number of weights where they can choose. Lines of
`results/large.jsonl`; those of `--meta` in `results/large-meta.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import workloads
from chosen_runs import load_results
from configs import Setting
from methods import CONFIGS, COST_NAMES, LORA, adapt, title
from resumable import write_between


RESULTS = Path(__file__).parent / "results"
LINES, META = RESULTS / "large.jsonl", RESULTS / "large-meta.json"
GIB = 2**30
STEPS = 3
_LOWEST_TOKEN = 1000  # special ones come first
METHODS = [LORA, *(name for name in CONFIGS if name in COST_NAMES and name != LORA)]  # what cost.py measures
PRESETS = [name for name, workload in workloads.PRESETS.items() if workload.kind == "causal"]
META_METHODS = ["lora", "ssf", "random", "s2ft", "wegeft", "bi-lora", "adapter", "pasta"]
SHAPES = {  # Llama 3.1
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def peak() -> float:
    """The most memory that the process has had since `forget_peak`, GiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / GIB


def forget_peak() -> None:
    """What made the model does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def setting_of(model: Any, batch: dict[str, torch.Tensor]) -> Setting:
    samples = [{key: value[0] for key, value in batch.items()}]
    return Setting(model, "CAUSAL_LM", 1.0, STEPS, 0, DataLoader(samples, batch_size=1))  # type: ignore[arg-type]


def one(method: str, preset: str, length: int) -> dict[str, Any]:
    """One method from the injection to the merge."""
    torch.manual_seed(0)
    workload = workloads.PRESETS[preset]
    model: Any = workload.build().to(torch.bfloat16)
    tokens = torch.randint(_LOWEST_TOKEN, model.config.vocab_size, (1, length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
    row: dict[str, Any] = {"method": method, "preset": preset, "length": length, "model_gib": 0.0}
    forget_peak()
    row["model_gib"] = round(peak(), 3)

    def timed(name: str, start: float) -> None:
        row[f"{name}_s"] = round(time.perf_counter() - start, 2)
        row[f"{name}_peak_gib"] = round(peak(), 3)

    start = time.perf_counter()
    adapted, _ = adapt(method, setting_of(model, batch))
    timed("inject", start)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    row["trained"] = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    adapted.train()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    row["loss"] = round(float(loss.detach()), 4)
    row["steps_s"] = round(sorted(times)[1], 2)
    row["steps_peak_gib"] = round(peak(), 3)
    adapted.eval()
    del optimizer, trained, loss
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = adapted(**batch).logits.float()
        start = time.perf_counter()
        adapted.save_pretrained(folder)
        timed("save", start)
        row["files_bytes"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        base = adapted.unload()
        del adapted
        start = time.perf_counter()
        loaded = PeftModel.from_pretrained(base, folder).eval()
        timed("load", start)
        row["loaded_differs_by"] = float((loaded(**batch).logits.float() - expected).abs().max())
        start = time.perf_counter()
        try:
            merged = loaded.merge_and_unload()
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            row["merge"] = f"{type(error).__name__}: {error}"[:200]
        else:
            timed("merge", start)
            row["merged_differs_by"] = float((merged(**batch).logits.float() - expected).abs().max())
            row["largest_logit"] = float(expected.abs().max())
    row["peak_gib"] = round(peak(), 3)
    row["threads"] = torch.get_num_threads()
    return row


def on_meta() -> dict[str, Any]:
    """Counts, bytes of an adapter's file and seconds to inject, without any weight."""
    rows: dict[str, Any] = {}
    for size, shape in SHAPES.items():
        config = LlamaConfig(**shape, num_key_value_heads=8, head_dim=128, vocab_size=128256, use_cache=False)
        for method in META_METHODS:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            made = CONFIGS[method](setting_of(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}))
            start = time.perf_counter()
            try:
                adapted = get_peft_model(model, made, low_cpu_mem_usage=True)
            except (ValueError, TypeError, NotImplementedError) as error:
                rows[f"{size} {method}"] = {"refused": f"{type(error).__name__}: {error}"[:200]}
                continue
            seconds = time.perf_counter() - start
            count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            kept = adapted.base_model.state_dict()
            own = [
                t for key, t in kept.items() if any(p in key for p in (made.peft_type.value.lower() + "_", "lora_"))
            ]
            rows[f"{size} {method}"] = {
                "trained": count,
                "tensors_bytes": sum(t.numel() * t.element_size() for t in own),
                "inject_s": round(seconds, 2),
            }
            print(size, method, rows[f"{size} {method}"], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Beside LoRA's."""
    lora = next(row for row in rows if row["method"] == "lora")
    lines = [
        "| method | trained | peak, GiB | peak / LoRA's | inject, s | a step / LoRA's | file / LoRA's | load, s | merge, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    refused: dict[str, list[str]] = {}
    for row in rows:
        if "refused" in row:
            refused.setdefault(row["refused"].split(": it generates")[0], []).append(title(row["method"]))
            continue
        merge = f"{row['merge_s']:.1f}" if "merge_s" in row else "no"
        lines.append(
            f"| {title(row['method'])} | {row['trained']:,} | {row['peak_gib']:.2f} | {row['peak_gib'] / lora['peak_gib']:.2f} | "
            f"{row['inject_s']:.1f} | {row['steps_s'] / lora['steps_s']:.2f} | "
            f"{row['files_bytes'] / lora['files_bytes']:.3f} | {row['load_s']:.1f} | {merge} |"
        )
    caption = (
        f"{rows[0]['preset']}, bf16, batch 1 of {rows[0]['length']} tokens, {STEPS} steps of AdamW; the process with the model alone "
        f"has {lora['model_gib']:.2f} GiB. Each method in a process of its own, one after the other on a shared machine: "
        "the bytes are exact, the times are hints."
    )
    reasons = [f"Without {', '.join(names)} ({reason})." for reason, names in refused.items()]
    return "\n".join([caption, "", *lines, *([""] if reasons else []), *reasons])


def meta_table(rows: dict[str, Any]) -> str:
    lines = ["| model and method | trained | tensors, MiB | inject, s |", "|---|---:|---:|---:|"]
    for key, row in rows.items():
        size, _, method = key.partition(" ")
        name = f"{size}, {title(method)}"
        if "refused" in row:
            lines.append(f"| {name} | {row['refused']} | | |")
        else:
            lines.append(
                f"| {name} | {row['trained']:,} | {row['tensors_bytes'] / 2**20:,.1f} | {row['inject_s']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"{', '.join(METHODS)}; all if none is named")
    parser.add_argument("--preset", default="llama-1b", choices=PRESETS)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--meta", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, printed; for one method")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.write:
        done = {row["method"]: row for row in load_results(LINES)}
        tables = {"large": table([done[name] for name in METHODS if name in done])}
        if META.exists():
            tables["large-meta"] = meta_table(json.loads(META.read_text()))
        write_between(options.write, tables)
        return
    if options.meta:
        META.write_text(json.dumps(on_meta(), indent=1) + "\n")
        return
    if options.here:
        print(json.dumps(one(options.methods[0], options.preset, options.length)))
        return
    for method in options.methods or METHODS:
        if any(row["method"] == method and row["preset"] == options.preset for row in load_results(LINES)):
            continue
        command = [
            sys.executable,
            __file__,
            method,
            "--here",
            "--preset",
            options.preset,
            "--length",
            str(options.length),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1][:300]
            row = {"method": method, "preset": options.preset, "length": options.length, "refused": reason}
            print(done.stderr[-2000:])
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            assert math.isfinite(row["loss"]), row
        with LINES.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
