"""What a hundred adapters on one model take: memory, the time to add one, to switch, and to exchange one in place.

    python examples/benchmark/many.py                          # all methods on the 6-layer ViT, or MiniLM's shape
    python examples/benchmark/many.py --methods SSF S2FT       # these anew, and LoRA
    python examples/benchmark/many.py --write docs/results.md  # the table, between its markers

All adapters of a method are of one config, as `cost.py` has it. A switch is `set_adapter`; an exchange is
`peft_ext.hotswap_adapter` from a directory. Times are medians; a method's are put beside LoRA's of the same process.
Results go to `results/many-adapters.json`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import workloads
from cost_methods import ADAPTERS, LORA, REFERENCES
from resumable import FOLDER, markdown, write_between

import peft_ext


RESULTS = FOLDER / "many-adapters.json"
PRESETS = ("vit-6x384", "minilm")  # the second for what the first does not take
SWITCHES = 50
NAME = "task{}"
TIMES = ("last_adds_s", "switch_s", "exchange_s", "delete_s")
SKIPPED = {*REFERENCES, "SSF, recover=False"}
METHODS = [name for name in ADAPTERS if name not in SKIPPED]


def held(model: nn.Module) -> int:
    """The bytes of all tensors that the model holds, also those that are in no state dict."""
    gc.collect()
    found: dict[int, int] = {}
    for module in model.modules():
        for value in [*vars(module).values(), *module.parameters(False), *module.buffers(False)]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def one(method: str, preset: str, number: int) -> dict[str, Any]:
    """A method's figures.

    Raises:
        ValueError: It does not apply to this model.
    """
    workload = workloads.PRESETS[preset]
    torch.manual_seed(0)
    base = workload.build()
    config = ADAPTERS[method](base, workload.common)
    empty = held(base)
    model: Any = get_peft_model(base, copy.deepcopy(config), adapter_name=NAME.format(0))
    first = held(model)
    adding = [
        seconds(lambda n=n: model.add_adapter(NAME.format(n), copy.deepcopy(config)))
        for n in range(1, number)  # type: ignore[misc]
    ]
    full = held(model)
    switches = [seconds(lambda n=n: model.set_adapter(NAME.format(n % number))) for n in range(SWITCHES)]  # type: ignore[misc]
    row = {
        "method": method,
        "preset": preset,
        "number": number,
        "first_bytes": first - empty,
        "others_bytes": full - first,
        "add_s": statistics.median(adding),
        "last_adds_s": statistics.median(adding[-10:]),
        "switch_s": statistics.median(switches),
    }
    row |= exchanged(model)
    row["delete_s"] = statistics.median(
        seconds(lambda n=n: model.delete_adapter(NAME.format(n))) for n in range(1, 11)
    )  # type: ignore[misc]
    return row


def exchanged(model: PeftModel) -> dict[str, Any]:
    """The time to put the values of another adapter into the first one, or why that is refused."""
    model.set_adapter(NAME.format(0))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[NAME.format(1)])
        path = str(Path(folder) / NAME.format(1))
        try:
            return {
                "exchange_s": statistics.median(
                    seconds(lambda: peft_ext.hotswap_adapter(model, path, NAME.format(0))) for _ in range(3)
                )
            }
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:  # PEFT's dies of a trained head
            return {"no_exchange": f"{type(error).__name__}: {error}"[:200]}


def beside(row: dict[str, Any], key: str) -> str:
    """Milliseconds, and the ratio to LoRA's where it has this time."""
    if key not in row:
        return "no"
    ratio = row["of_lora"].get(key)
    return f"{1000 * row[key]:.1f}" + (f" ({ratio:.2f})" if ratio else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Bytes of one adapter, and times beside LoRA's on the same model."""
    lines = []
    for row in rows:
        each = row["others_bytes"] / (row["number"] - 1)
        times = [beside(row, key) for key in TIMES]
        lines.append((row["method"], row["preset"], f"{row['first_bytes']:,}", f"{each:,.0f}", *times))
    head = (
        "method",
        "model",
        "the first, bytes",
        "each other one",
        "add, ms (of LoRA's)",
        "switch",
        "exchange",
        "delete",
    )
    number = rows[0]["number"]
    caption = (
        f"{number} adapters on one model, float32, on a CPU. In brackets the ratio to PEFT's LoRA r=8 of the same run; "
        "the time to add one is that of the last ten. `no`: refused, with the reason in the results file."
    )
    return f"{caption}\n\n{markdown(head, lines, 2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.write:
        write_between(options.write, {"many": table(json.loads(options.results.read_text()))})
        return
    if options.number < 11:
        parser.error(f"--number {options.number}: ten are deleted and one stays, so 11 or more")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys([LORA, *options.methods]):
        for preset in PRESETS:
            try:
                rows.append(one(method, preset, options.number))
            except (ValueError, TypeError, NotImplementedError) as error:
                print(f"{method} on {preset}: {error}", flush=True)
                continue
            print(rows[-1], flush=True)
            if method != LORA:
                break
    controls = {row["preset"]: row for row in rows if row["method"] == LORA}
    for row in rows:
        control = controls[row["preset"]]  # of this process
        row["of_lora"] = {key: row[key] / control[key] for key in TIMES if key in row and key in control}
    old = json.loads(options.results.read_text()) if options.results.exists() else []
    found = {(row["method"], row["preset"]): row for row in [*old, *rows]}
    options.results.write_text(json.dumps(list(found.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
