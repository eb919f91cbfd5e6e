"""Trains every method in several processes, sharded and not, and compares what comes out with one process.

    python tests/sharding.py                                     # all cells, into tests/sharding_results.json
    python tests/sharding.py --write docs/distributed.md         # between <!-- sharding --> and <!-- /sharding -->
    python tests/sharding.py --methods ssf spiel-ag --ways ddp fsdp2-blocks

A cell is a training of `STEPS` optimizer steps, of two micro-batches each, with clipped gradients, in two processes with
gloo (`PEFT_EXT_DEVICE=cuda`: in one on the GPU). Each process sees half of the rows. The adapter is saved by the first
process from the full state dict; its file must be the one that a single process saves that saw all rows. A cell is "works", "refused", with the error of this
package, or "failed". The processes are forks, since importing takes longer than a training.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


TESTS = Path(__file__).resolve().parent
for directory in (TESTS, TESTS.parent):  # as a script, only the first is there
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

import conftest  # noqa: F401  no network
import torch
import torch.distributed as dist
from models import inputs, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sharding_ways import BACKEND, DEVICE, PROCESSES, ROWS, TITLES, WAYS, ddp, optimizer_for
from test_conformance import METHODS as CONFORMING
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.nn.parallel import DistributedDataParallel

from peft_ext import MaskLoraConfig, SparseFTConfig, SPTConfig, VQTConfig
from peft_ext.testing import Method


STEPS = 4
SHARED_ROWS = "ddp, each process with its own rows"
SECONDS = 300  # that a cell may take, on a busy machine
RESULTS = TESTS / "sharding_results.json"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
BLOCK = re.compile(r"(<!-- sharding -->\n).*?(<!-- /sharding -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        method: The method, with its config.
        model: The tiny model, by its name.
        same_rows: The method decides by the batch of the first process, as documented: a single process is its equal
            only where all processes see the same rows.
    """

    method: Method
    model: str
    same_rows: bool = False

    def build(self) -> Any:
        torch.manual_seed(0)
        base = tiny(self.model)
        return get_peft_model(base, self.method.config_for(self.model, base)).train().to(DEVICE)

    def batch(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        batch = inputs(self.model, batch=ROWS, seed=10 * step + micro)
        return {key: value.to(DEVICE) for key, value in batch.items()}


def of(name: str, model: str, **changes: Any) -> Case:
    return Case(CONFORMING[name].method, model, **changes)


def sparse(selection: str, **fields: Any) -> Method:
    fields |= {"target_modules": FEW} | ({"num_tunable_weights": 256} if selection != "below" else {})
    return Method("sparse_ft_", partial(SparseFTConfig, selection=selection, **fields), ("llama",))


FEW = ["q_proj", "down_proj"]
SPIEL: dict[str, Any] = {"reselection_steps": 2, "accumulation_steps": 1, "total_steps": 2 * STEPS}
MASKS: dict[str, Any] = {"r": 2, "lora_alpha": 2, "total_steps": STEPS, "warmup_ratio": 0.2, "mask_lr_ratio": 10.0}
MASKS["target_modules"] = ["q_proj"]


def model_of(method: Method) -> str:
    return next(name for name in ("llama", "bert", "vit") if name in method.models)


CASES: dict[str, Case] = {
    "lora": Case(Method("lora_", partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"]), ("llama",)), "llama"),
    **{name: of(name, model_of(case.method)) for name, case in CONFORMING.items()},
    "spiel-ag": Case(sparse("spiel-ag", **SPIEL), "llama", same_rows=True),
    "spiel-ma": Case(sparse("spiel-ma", **SPIEL), "llama"),
    "growing": Case(sparse("growing", total_steps=STEPS), "llama", same_rows=True),
    "ssf-bert": of("ssf", "bert"),  # affine norms
    "vqt-lasso": Case(
        Method("vqt_", partial(VQTConfig, num_queries=2, dropout=0.0, group_lasso=0.1), ("bert",)), "bert"
    ),
    "spt-dora": Case(
        Method(
            "spt_",
            partial(SPTConfig, budget=600, r=2, dropout=0.0, drop_path=0.0, structured="dora", matrix_threshold=4.0),
            ("llama",),
            looks_at_data=True,
        ),
        "llama",
    ),
    "masks-distilled": Case(
        Method("mask_pruning_", partial(MaskLoraConfig, penalty=1.0, distillation=1.0, **MASKS), ("llama",)), "llama"
    ),
    "below": Case(sparse("below", threshold=0.05, reselect_at=3), "llama"),
    "mask_pruning": Case(
        Method("mask_pruning_", partial(MaskLoraConfig, target_sparsity=0.25, **MASKS), ("llama",)), "llama"
    ),
}


if HAS_DEEPSPEED:
    import deepspeed  # noqa: F401  once, before the forks


# One training


def train(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: range = range(STEPS)
) -> None:
    """Micro-batches of which this process sees these rows."""
    for step in steps:
        for micro in range(2):
            batch = {key: value[rows] for key, value in case.batch(step, micro).items()}
            (model(**batch).loss / 2).backward()
        if isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()


def train_by_engine(case: Case, engine: Any, rows: slice) -> None:
    """The same; the engine divides, clips and steps."""
    for step in range(STEPS):
        for micro in range(2):
            batch = {key: value[rows] for key, value in case.batch(step, micro).items()}
            engine.backward(engine(**batch).loss)
            engine.step()


def rows_of(case: Case, way: str) -> slice:
    if case.same_rows and way == "ddp":  # so that one process can be its equal
        return slice(None)
    each = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def save(wrapped: nn.Module, folder: Path) -> None:
    """The full state dict, gathered by all processes, goes into an adapter that the first one writes."""
    is_first = dist.get_rank() == 0
    if hasattr(wrapped, "zero_optimization_stage"):
        import deepspeed

        parameters = list(wrapped.parameters()) if wrapped.zero_optimization_stage() == 3 else []  # type: ignore[operator]
        with deepspeed.zero.GatheredParameters(parameters):
            if is_first:
                wrapped.module.save_pretrained(folder)  # type: ignore[union-attr, operator]
        return
    if isinstance(wrapped, DistributedDataParallel):
        if is_first:
            wrapped.module.save_pretrained(folder)
    elif isinstance(wrapped, FullyShardedDataParallel):
        full = FullStateDictConfig()  # what is on the CPU cannot be offloaded to it
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, full):
            state = wrapped.state_dict()
        if (
            is_first and wrapped.module.peft_config["default"].peft_type == "LORA"
        ):  # PEFT would write none of its tensors
            folder.mkdir(exist_ok=True)
            own = {key.replace(".default", ""): tensor for key, tensor in state.items() if ".lora_" in key}
            save_file(own, folder / "adapter_model.safetensors")
        elif is_first:
            wrapped.module.save_pretrained(folder, state_dict=state)
    else:
        state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_first:
            wrapped.save_pretrained(folder, state_dict=state)  # type: ignore[operator]


def alone(case: Case, folder: Path) -> None:
    """The adapter that one process makes."""
    model = case.build()
    model.save_pretrained(folder / "start")
    train(case, model, optimizer_for(model), slice(None))
    model.save_pretrained(folder / "alone")


def together(case: Case, way: str, folder: Path) -> None:
    """What each process of a cell does."""
    wrapped = (ddp if way == SHARED_ROWS else WAYS[way])(case.build())
    if way.startswith("zero"):
        train_by_engine(case, wrapped, rows_of(case, way))
    else:
        train(case, wrapped, optimizer_for(wrapped), rows_of(case, way))
    save(wrapped, folder)


# Processes


@contextlib.contextmanager
def forks(calls: list[Callable[[], None]], folder: Path) -> Iterator[list[str]]:
    """Runs the calls at once, each in a process of its own; what went wrong in each, empty if nothing did."""
    children: dict[int, int] = {}
    for number, call in enumerate(calls):
        child = os.fork()
        if not child:
            _run(call, folder / f"error-{number}")
        children[child] = number
    end = time.monotonic() + SECONDS
    errors = [""] * len(calls)
    failed = False
    while children:
        ended = _first_ended(children)
        if ended:
            number = children.pop(ended)
            log = folder / f"error-{number}"
            errors[number] = log.read_text() if log.exists() else ""
            if errors[number] and not failed:
                failed, end = True, min(end, time.monotonic() + 5)  # the others may wait for it for ever
        elif time.monotonic() > end:
            for child, number in children.items():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                stack = (folder / f"error-{number}-stack").read_text()
                errors[number] = errors[number] or f"failed: hangs\n\n{stack}"
            children = {}
        else:
            time.sleep(0.05)
    yield errors


def _first_ended(children: dict[int, int]) -> int:
    return next((child for child in children if os.waitpid(child, os.WNOHANG)[0]), 0)


def _run(call: Callable[[], None], log: Path) -> None:
    """In a fork, which must not go on as its parent does."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        with open(f"{log}-stack", "w") as stack:
            faulthandler.dump_traceback_later(SECONDS - 5, file=stack)
            if error := _error_of(call):
                log.write_text(error)
    finally:
        os._exit(0)  # gloo's threads now and then deadlock with the interpreter when both go


def _error_of(call: Callable[[], None]) -> str:
    """What went wrong in it, empty if nothing did."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001  whatever it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = isinstance(error, (ValueError, TypeError)) and "/peft_ext/" in last.filename
        kind = "refused" if is_ours else "failed"
        return f"{kind}: {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
    return ""


def apart(calls: list[Callable[[], None]], folder: Path) -> list[str]:
    """What went wrong in each, run in forks. A GPU takes none once it is in use: its single process is this one."""
    if DEVICE != "cpu":
        return [_error_of(call) for call in calls]
    with forks(calls, folder) as errors:
        return errors


def in_processes(number: int, call: Callable[[], None], folder: Path) -> list[str]:
    """Runs `call` in so many processes of one group; what went wrong in each."""
    store = tempfile.mktemp(dir=folder)

    def member(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        if not dist.is_initialized():
            dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=number)
        call()
        dist.barrier()

    return apart([partial(member, rank) for rank in range(number)], folder)


# Cells


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """What is not the same up to rounding; indices and masks to the bit."""
    found = sorted(ours.keys() ^ theirs.keys())
    for key in sorted(ours.keys() & theirs.keys()):
        first, second = ours[key], theirs[key]
        if first.shape != second.shape:
            found.append(f"{key} {tuple(first.shape)} {tuple(second.shape)}")
        elif first.is_floating_point() and not torch.allclose(first, second, atol=1e-4, rtol=1e-3):
            found.append(f"{key} by {(first - second).abs().max():.2g}")
        elif not first.is_floating_point() and not torch.equal(first, second):
            found.append(f"{key} in {int((first != second).sum())} of {first.numel()}")
    return found


@functools.cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="sharding-"))


@functools.cache
def expected(name: str) -> dict[str, torch.Tensor]:
    """What one process makes of a case."""
    folder = scratch() / name
    folder.mkdir()
    (error,) = apart([partial(alone, CASES[name], folder)], folder)
    if error:
        raise RuntimeError(f"{name} does not train in one process: {error}")
    start, end = (load_file(folder / kind / "adapter_model.safetensors") for kind in ("start", "alone"))
    if not differences(start, end):
        raise RuntimeError(f"{name} did not move in one process")
    return end


@functools.cache
def made(name: str, way: str) -> tuple[str, dict[str, torch.Tensor] | None]:
    """What two processes make of a case, or what went wrong."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    errors = [error for error in in_processes(PROCESSES, partial(together, CASES[name], way, folder), folder) if error]
    if errors:
        # a process that was left alone ends with an error of the network
        own = [error for error in errors if error.startswith("refused")] or [e for e in errors if "hangs" not in e]
        return min(own or errors, key=lambda error: "gloo" in error), None
    return "works", load_file(folder / "adapter_model.safetensors")


def outcome(name: str, way: str) -> str:
    """`works`, `refused: ...` or `failed: ...`."""
    case = CASES[name]
    found, tensors = made(name, way)
    if tensors is None:
        return found
    if case.same_rows and way != "ddp":
        what, theirs = made(name, SHARED_ROWS)
        if theirs is None:
            return what
    else:
        theirs = expected(name)
    wrong = differences(tensors, theirs)
    return (
        "works" if not wrong else f"failed: differs in {len(wrong)} of {len(theirs)} tensors: {'; '.join(wrong[:3])}"
    )


# The table


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each method, a column for each way; below, why some are refused."""
    ways = [way for way in WAYS if any(way in cells for cells in found.values())]
    lines = [f"| | {' | '.join(TITLES[way] for way in ways)} |", f"|---|{':---:|' * len(ways)}"]
    reasons: dict[str, str] = {}
    for name in (name for name in CASES if name in found):
        cells = []
        for way in ways:
            text = found[name].get(way, "-")
            if text.startswith("refused"):
                reason = re.sub(r" \('[^']*'\)", "", text.split(": ", 2)[2])  # of whichever selection
                text = f"refused [{list(reasons).index(reason) + 1 if reason in reasons else len(reasons) + 1}]"
                reasons.setdefault(reason, text)
            cells.append(text.split(":")[0])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[*WAYS][: None if HAS_DEEPSPEED else -3])
    parser.add_argument("--verbose", action="store_true", help="show where errors came from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file that cells are kept in")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="run nothing; put the table of the kept cells in FILE"
    )
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.write is not None:
        text = BLOCK.sub(lambda match: match[1] + table(found) + match[2], options.write.read_text())
        options.write.write_text(text)
        return
    for name in options.methods:
        for way in options.ways:
            text = outcome(name, way)
            found.setdefault(name, {})[way] = text.splitlines()[0]
            options.results.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name:16} {way:18} {text if options.verbose else text.splitlines()[0][:170]}", flush=True)


if __name__ == "__main__":
    main()
