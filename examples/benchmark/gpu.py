"""All that is to be measured on one GPU, in parts that are made once: what has its results is not run again.

    python examples/benchmark/gpu.py                        # everything that is missing, within eight minutes
    python examples/benchmark/gpu.py tests cost-llama-1b    # these parts
    python examples/benchmark/gpu.py --device cpu --quick   # tries every part on the CPU, in its smallest size

Every part is a command of this repository. What it prints, how it ended and how long it took stand in
`results/gpu/run-PART.json`; the figures that it measures stand beside it, in files of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "gpu"
METHODS = [
    *["frozen backbone", "full fine-tuning", "LoRA r=8", "SSF", "SpIEL-AG", "S2FT", "WeGeFT", "mask-pruning LoRA r=8"],
    *["VQT, 4 queries", "VPT, 10 prompts"],
]
SHARDED = ["lora", "ssf", "sparse_ft", "spiel-ag", "spt", "mask_pruning", "vqt", "s2ft", "wegeft"]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def cost(preset: str, device: str, is_quick: bool, *sizes: str) -> list[str]:
    """The table of cost.py for one preset, LoRA beside ours, in bf16."""
    rounds = ["--rounds", "1", "--warmup", "1"] if is_quick else ["--rounds", "10", "--json", str(RESULTS)]
    common = ["--device", device, "--autocast", "bfloat16", "--table", *rounds]
    return ["examples/benchmark/cost.py", preset, *common, *sizes, "--methods", *METHODS]


def parts(device: str, is_quick: bool) -> dict[str, tuple[list[str], int]]:
    """By name, most important first: the arguments of Python, and the most seconds."""
    text = ["--batch", "1", "--length", "16"] if is_quick else []
    image = ["--batch", "1"] if is_quick else ["--batch", "32"]
    common = ["--device", device, *["--quick"] * is_quick]
    sharded = ["ddp", "fsdp2-policy", *[f"zero{stage}" for stage in (1, 2, 3)] * HAS_DEEPSPEED]
    return {
        "tests": (
            ["-m", "pytest", "-q", "-p", "no:benchmark", "-n", "2" if is_quick else "8", "tests/test_gpu.py"],
            200,
        ),
        "cost-vit-b16": (cost("vit-b16", device, is_quick, *image), 90),
        "cost-llama-1b": (cost("llama-1b", device, is_quick, *text), 120),
        **{
            f"speed-{part}": (["examples/benchmark/gpu_speed.py", part, *common], 90)
            for part in ("waits", "four-bit", "cut", "compiled", "routes")
        },
        "sharding": (
            ["tests/sharding.py", "--results", str(RESULTS / "sharding-cells.json"), "--ways", *sharded, "--methods"]
            + ["lora", "ssf"] * is_quick
            + SHARDED * (not is_quick),
            120,
        ),
        "cost-bert-base": (cost("bert-base", device, is_quick, *(text or ["--batch", "32"])), 90),
    }


def run(name: str, arguments: Sequence[str], limit: int, device: str) -> dict[str, object]:
    """Runs one part; how it ended."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PEFT_EXT_DEVICE": device, "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        code, output = 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return {
        "part": name,
        "command": " ".join(["python", *arguments]),
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "output": output[-8000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(parts("cuda", False)))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; nothing is kept")
    parser.add_argument("--again", action="store_true", help="also what has its results")
    parser.add_argument("--seconds", type=int, default=480, help="after which no part is begun")
    options = parser.parse_args()
    known = parts(options.device, options.quick)
    if unknown := set(options.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}: take {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; `--device cpu --quick` tries the parts without one")
    RESULTS.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), []
    for name in options.parts or known:
        file = RESULTS / f"run-{name}.json"
        if file.exists() and json.loads(file.read_text())["code"] == 0 and not (options.again or options.quick):
            continue
        left = int(options.seconds - (time.monotonic() - start))
        if left <= 0:
            print(f"{name}: not begun, the {options.seconds} seconds are over; run this again")
            continue
        arguments, limit = known[name]
        result = run(name, arguments, min(limit, left) if not options.quick else 1200, options.device)
        if not options.quick:
            file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: ended with {result['code']} after {result['seconds']} s", flush=True)
        if result["code"]:
            failed.append(name)
            print(result["output"])
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
