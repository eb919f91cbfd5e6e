"""Kills trainings, resumes them, and compares what comes out, bit for bit, with a training that nobody killed.

    python tests/chaos.py --rounds 20 --seed 0 --results tests/chaos_results.json [--methods ssf spt]

A round is one training under `Trainer` with a checkpoint every second step. It is killed (SIGKILL) a few times, at any
moment or while a checkpoint is being written, and each time resumed in a process of its own from the newest checkpoint
that is whole: `trainer_state.json` is what Trainer writes last. At the end, the adapter, the optimizer's state and the
logged losses must be those of the uninterrupted training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  no network
import torch
from models import inputs, tiny
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from test_conformance import METHODS as CONFORMING
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import peft_ext
from peft_ext import MaskLoraConfig, SNELLConfig, SparseFTConfig, SPTConfig, SSFConfig, VQTConfig


STEPS = 12
STATE = "trainer_state.json"
SPIEL: dict[str, Any] = {"num_tunable_weights": 64, "reselection_steps": 3, "accumulation_steps": 2}


def calibrated(model: Any) -> SPTConfig:
    config = SPTConfig(budget=600, r=2, matrix_threshold=4.0)
    return peft_ext.calibrate(model, config, [inputs("bert")], progress=False)


METHODS: dict[str, Callable[[Any], PeftConfig]] = {
    "ssf": lambda _: SSFConfig(),
    "sparse": lambda _: SparseFTConfig(selection="random", num_tunable_weights=64),
    "spiel-ag": lambda _: SparseFTConfig(selection="spiel-ag", **SPIEL),
    "spiel-ma": lambda _: SparseFTConfig(selection="spiel-ma", **SPIEL),
    "spt": calibrated,
    "masks": lambda _: MaskLoraConfig(
        r=2, total_steps=STEPS, target_sparsity=0.25, warmup_ratio=0.2, modules_to_save=["classifier"]
    ),
    "vqt": lambda _: VQTConfig(num_queries=2),
    "below": lambda _: SparseFTConfig(selection="below", threshold=1e-3, total_steps=STEPS),
    "growing": lambda _: SparseFTConfig(selection="growing", num_tunable_weights=64, total_steps=STEPS),
    "snella": lambda _: SNELLConfig(r=2, allocation="adaptive", total_steps=STEPS),
    # the others as the kit has them
    **{
        name: lambda base, method=case.method: method.config_for("bert", base)
        for name, case in CONFORMING.items()
        if name not in ("ssf", "sparse_ft", "spt", "mask_pruning", "vqt")
    },
}


def train(method: str, folder: Path) -> None:
    """Trains to the end, from the newest whole checkpoint if there is one."""
    checkpoint = newest_whole(folder)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{STEPS}":
        return  # asked to resume what has ended, Trainer makes one step more
    torch.manual_seed(0)
    base = tiny("bert")
    model = get_peft_model(base, METHODS[method](base))
    rows = inputs("bert", batch=24)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    samples = [{key: value[i] for key, value in rows.items()} for i in range(24)]
    trainer = Trainer(model=model, args=args, train_dataset=samples)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; what a kill has left of newer ones is deleted."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        with contextlib.suppress(OSError, ValueError):
            json.loads((Path(found) / STATE).read_text())
            return Path(found)
        shutil.rmtree(found)
    return None


# Processes: forks, since importing takes longer than a training


def started(call: Callable[[], None], log: Path) -> int:
    """The id of a new process that runs `call` and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        warnings.simplefilter("ignore")
        call()
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is, the fork must not go on as its parent does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def has_ended(child: int) -> bool:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended and status != 0:
        raise RuntimeError(f"a training ended with status {status}")
    return bool(ended)


def kill_at(child: int, moment: float) -> bool:
    """Kills after so many seconds; whether there was something left to kill."""
    end = time.monotonic() + moment
    while time.monotonic() < end:
        if has_ended(child):
            return False
        time.sleep(0.002)
    if has_ended(child):
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def kill_in_save(child: int, folder: Path, saves: int, delay: float) -> bool:
    """Kills so many seconds after the last of so many further checkpoints was begun."""
    before = checkpoints(folder)
    while len(checkpoints(folder) - before) < saves:
        if has_ended(child):
            return False
        time.sleep(0.0005)
    return kill_at(child, delay)


# Rounds


def result(folder: Path) -> dict[str, Any]:
    """All that a training leaves behind, as values by name."""
    last = folder / f"checkpoint-{STEPS}"
    found: dict[str, Any] = dict(load_file(last / "adapter_model.safetensors"))
    optimizer = torch.load(last / "optimizer.pt", weights_only=False)
    for number, state in optimizer["state"].items():
        found |= {f"optimizer {number} {key}": value for key, value in state.items()}
    history = json.loads((last / STATE).read_text())["log_history"]
    return found | {f"loss {entry['step']}": entry["loss"] for entry in history if "loss" in entry}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    yield from sorted(ours.keys() ^ theirs.keys())
    for key in sorted(ours.keys() & theirs.keys()):
        first, second = ours[key], theirs[key]
        is_same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        if not is_same:
            yield key


def one_round(
    method: str, folder: Path, rng: random.Random, kills: int, seconds: float, save_seconds: float
) -> Counter[str]:
    """Counts of what happened; `folder` then holds a training that was killed up to so many times."""
    counts: Counter[str] = Counter()
    call = partial(train, method, folder)
    log = folder.with_suffix(".log")
    for _ in range(kills):
        child = started(call, log)
        if rng.random() < 0.5:
            counts["kills at any moment"] += kill_at(child, rng.uniform(0, seconds))
        else:
            delay, saves = rng.uniform(0, save_seconds), rng.randrange(1, 4)
            counts["kills in or after a save"] += kill_in_save(child, folder, saves, delay)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        counts["checkpoints left half-written"] += last is not None and newest_whole(folder) != Path(last)
    child = started(call, log)
    while not has_ended(child):
        time.sleep(0.01)
    return counts


def save_time(folder: Path) -> float:
    """How long the checkpoints of a training took, from the first file to the last."""
    spans = []
    for name in checkpoints(folder):
        times = [path.stat().st_mtime for path in (folder / name).iterdir()]
        spans.append(max(times) - min(times))
    return max(spans)


def run(methods: list[str], rounds: int, kills: int, seconds: float, seed: int) -> dict[str, Any]:
    """Rounds for each method in turn, as far as the seconds go; counts by method, and what differed."""
    end = time.monotonic() + seconds
    table: dict[str, Counter[str]] = {method: Counter() for method in methods}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        expected: dict[str, tuple[dict[str, Any], float, float]] = {}
        for number in range(rounds):
            for method in methods:
                if time.monotonic() > end:
                    return {"seed": seed, "methods": table, "wrong": wrong}
                if method not in expected:
                    folder = Path(scratch) / method
                    start = time.monotonic()
                    child = started(partial(train, method, folder), folder.with_suffix(".log"))
                    while not has_ended(child):
                        time.sleep(0.01)
                    expected[method] = (result(folder), time.monotonic() - start, 1.5 * save_time(folder))
                whole, took, save_took = expected[method]
                folder = Path(scratch) / f"{method}-{number}"
                rng = random.Random(f"{seed}-{method}-{number}")
                try:
                    table[method] += one_round(method, folder, rng, kills, took, save_took)
                except RuntimeError as error:
                    error.add_note(folder.with_suffix(".log").read_text()[-3000:])
                    raise
                table[method]["rounds"] += 1
                if found := list(differences(result(folder), whole)):
                    wrong.append(f"{method}, round {number} of seed {seed}: {', '.join(found[:5])}")
                else:
                    table[method]["the same bits"] += 1
                shutil.rmtree(folder)
    return {"seed": seed, "methods": table, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20, help="for each method")
    parser.add_argument("--kills", type=int, default=3, help="in each round")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    found = run(options.methods, options.rounds, options.kills, options.seconds, options.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if options.results:
        options.results.write_text(text + "\n")
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
