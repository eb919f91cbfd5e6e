"""Damages the files that the package reads, and looks at what becomes of them.

    python tests/fuzz.py --inputs 50000 --seconds 3600 --seed 0 --results tests/fuzz_results.json

Every input is one damage of one file, drawn from the seed and the input's number alone, so that `--only NUMBER` runs it
again. What may become of it:

- refused: a `ValueError`, `TypeError` or one of the errors that PEFT, transformers and safetensors have for such files;
- same: accepted, and the output is what it was (a byte of white space, a field that nothing depends on);
- other: accepted as a whole and finite file with other contents, such as another value of a weight;
- SILENT: accepted though a tensor was missing, surplus, of a wrong kind or not finite, or a checksum was wrong;
- CRASH: any other error. HANG: more than ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import nn

import peft_ext
from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    FrozenPassCache,
    LoraFusionConfig,
    LoraSBConfig,
    PASTAConfig,
    S2FTConfig,
    SCTConfig,
    SNELLConfig,
    SparseFTConfig,
    SPTConfig,
    UniPTConfig,
    VPTConfig,
    WeGeFTConfig,
)
from peft_ext.inspection import describe


FIXTURES = Path(__file__).parent / "fixtures" / "adapters-0.1"
REFUSALS = (ValueError, TypeError, SafetensorError, OSError)
OUTCOMES = ("refused", "same", "other", "SILENT", "CRASH", "HANG")
HOSTILE: list[Any] = [None, -1, 0, 1, 3, 10**9, 1e308, -0.5, "", "x", "../..", [], {}, [1], {"a": 1}, True, [None]]
Tensors = dict[str, torch.Tensor]


class Hang(BaseException):
    """An input took too long."""


def script() -> Any:
    spec = importlib.util.spec_from_file_location("adapters_0_1", FIXTURES / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = script()


@dataclass
class Kind:
    """A kind of file: where a whole one lies, which file of it is damaged, and what reads it."""

    name: str
    folder: Path
    file: str
    read: Callable[[Path], torch.Tensor | None]
    has_checksum: bool = False


# Damages: each returns the new bytes, and whether they must be refused


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    start = rng.randrange(len(changed))
    how = rng.randrange(5)
    if how == 0:
        changed[start] ^= 1 << rng.randrange(8)
    elif how == 1:
        del changed[start:]
    elif how == 2:
        stop = min(len(changed), start + rng.randrange(1, 64))
        changed[start:stop] = bytes(rng.randrange(256) for _ in range(stop - start))
    elif how == 3:
        changed[start:start] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 16)))
    else:
        changed[start : start + 16] = bytes(16)
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def damage_json(content: bytes, rng: random.Random) -> bytes:
    document = json.loads(content)
    *path, last = rng.choice(list(places(document)))
    parent = document
    for key in path:
        parent = parent[key]
    how = rng.randrange(4)
    if how == 0:
        del parent[last]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "r", "kinds", "pruned"])] = rng.choice(HOSTILE)
    else:
        parent[last] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(document).encode()


def damage_tensors(content: bytes, rng: random.Random) -> tuple[bytes, bool]:
    tensors = load(content)
    key = rng.choice(sorted(tensors))
    tensor, must = tensors[key], True
    how = rng.randrange(7)
    if how == 0:
        del tensors[key]
    elif how == 1:
        tensors[key + rng.choice(["x", ".x"])] = tensors.pop(key)
    elif how == 2:
        tensors[key.replace(".weight", ".more") + "more"] = tensor.clone()
    elif how == 3:
        tensors[key] = tensor.int() if tensor.is_floating_point() else tensor.float()
        must = tensors[key].dtype != tensor.dtype
    elif how == 4 and tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    elif how == 5:
        tensors[key] = torch.cat([tensor, tensor])
    else:
        flat, must = tensor.view(-1), False
        flat[rng.randrange(len(flat))] = rng.randrange(-100, 100)
    return save({name: value.contiguous() for name, value in tensors.items()}), must


def damaged(kind: Kind, content: bytes, rng: random.Random) -> tuple[bytes, bool]:
    if rng.random() < 0.3 or not kind.file.endswith(("json", "safetensors")):
        return damage_bytes(content, rng), kind.has_checksum
    if kind.file.endswith("json"):
        return damage_json(content, rng), False
    return damage_tensors(content, rng)


# Kinds


WRITTEN: dict[str, tuple[str, Any]] = {  # by today's code: base and config
    "s2ft": ("llama", S2FTConfig(ratios={"down": 0.25, "o": 0.5})),
    "wegeft": ("llama", WeGeFTConfig(r=2)),
    "lora-xs": ("llama", LoraSBConfig(r=4, init_weights="weights")),
    "sct": ("vit", SCTConfig(site="mlp", num_channels=4)),
    "snell": ("vit", SNELLConfig(r=2)),
    "vpt": ("vit", VPTConfig(num_tokens=2, project_dim=4)),
    "unipt": ("vit", UniPTConfig(reduction_factor=4)),
    "pasta": ("bert", PASTAConfig(special_tokens=[3, 4])),
    "bi-lora": ("llama", BinaryLoraConfig(r=2)),
    "bi-adaptformer": ("bert", BinaryAdapterConfig(r=2)),
}


def base_of(name: str) -> nn.Module:
    base, dtype = (WRITTEN[name][0], torch.float32) if name in WRITTEN else MAKE.CASES[name][:2]
    if name not in _bases:
        _bases[name] = MAKE.BASES[base](dtype)
    return copy.deepcopy(_bases[name])


_bases: dict[str, nn.Module] = {}


def write(name: str, folder: Path) -> None:
    """Saves an adapter of today's code, with values other than those of its start."""
    torch.manual_seed(0)
    kind, config = WRITTEN[name]
    base = base_of(name)
    config = copy.deepcopy(config)
    if name == "sct":
        config = peft_ext.calibrate(base, config, [MAKE.batch(kind)], progress=False)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))


def read_adapter(name: str) -> Callable[[Path], torch.Tensor]:
    def read(folder: Path) -> torch.Tensor:
        model = peft_ext.load(folder, base_of(name))
        return MAKE.outputs(model, WRITTEN[name][0] if name in WRITTEN else MAKE.CASES[name][0])

    return read


def inspect(folder: Path) -> None:
    describe(str(folder))


def read_pruned(folder: Path) -> torch.Tensor:
    return MAKE.outputs(peft_ext.load_pruned(folder), "bert")


def read_calibration(folder: Path) -> torch.Tensor:
    model = get_peft_model(base_of("spt"), SPTConfig.from_pretrained(folder))
    return torch.tensor([p.numel() for p in model.parameters() if p.requires_grad])


def read_support(folder: Path) -> torch.Tensor:
    config = SparseFTConfig(selection="given").use_support(folder / "support.safetensors")
    model = get_peft_model(base_of("sparse-lt-sft"), config)
    return MAKE.outputs(model, "llama")


def read_lt_sft(folder: Path) -> torch.Tensor:
    return MAKE.outputs(peft_ext.import_lt_sft(base_of("masks"), folder), "bert")


def read_cache(folder: Path) -> torch.Tensor:
    model = peft_ext.load(FIXTURES / "vqt", base_of("vqt"))
    with FrozenPassCache(folder).use(model):
        return MAKE.outputs(model, "vit")


def read_order(folder: Path) -> torch.Tensor:
    return MAKE.outputs(peft_ext.PeftMixedModel.from_pretrained(base_of("masks"), folder), "bert")


def made(folder: Path) -> list[Kind]:
    """All kinds, with whole files of those that are no fixtures in `folder`."""
    kinds = []
    for name in MAKE.CASES:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            kinds.append(Kind(f"{name}: {file}", FIXTURES / name, file, read_adapter(name)))
            kinds.append(Kind(f"inspect {name}: {file}", FIXTURES / name, file, inspect))
    for name in WRITTEN:
        write(name, folder / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            kinds.append(Kind(f"{name}: {file}", folder / name, file, read_adapter(name)))
            kinds.append(Kind(f"inspect {name}: {file}", folder / name, file, inspect))
    for file in ("config.json", "model.safetensors"):
        kinds.append(Kind(f"pruned: {file}", FIXTURES / "pruned", file, read_pruned))
    kinds.append(Kind("inspect pruned: config.json", FIXTURES / "pruned", "config.json", inspect))
    for sub in ("calibration", "support", "lt-sft", "order", "fused"):
        (folder / sub).mkdir()
    for seed in (1, 2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=seed, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base_of("sparse-lt-sft"), lora).save_pretrained(str(folder / f"lora-{seed}"))
    fusion = LoraFusionConfig(adapters=[str(folder / f"lora-{seed}") for seed in (1, 2)], magnitude=True)
    get_peft_model(base_of("sparse-lt-sft"), fusion).save_pretrained(str(folder / "fused"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        kinds.append(Kind(f"fused: {file}", folder / "fused", file, read_adapter("sparse-lt-sft")))
        kinds.append(Kind(f"inspect fused: {file}", folder / "fused", file, inspect))
    config = SPTConfig(budget=300, structured=None, target_modules=["query", "LayerNorm"])
    config = peft_ext.calibrate(base_of("spt"), config, [MAKE.batch("bert")], progress=False)
    config.save_pretrained(folder / "calibration")
    for file in ("adapter_config.json", "calibration.safetensors"):
        kinds.append(Kind(f"calibration: {file}", folder / "calibration", file, read_calibration))
    save_file({"model.layers.0.self_attn.q_proj": torch.arange(0, 250, 7)}, folder / "support" / "support.safetensors")
    kinds.append(Kind("support", folder / "support", "support.safetensors", read_support))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    part = {"size": [16, 16], "index_steps": torch.tensor([3] + [7] * 35), "values": torch.ones(36)}
    torch.save({"diffs": {name: part}, "abs": {}}, folder / "lt-sft" / "pytorch_diff.bin")
    kinds.append(Kind("LT-SFT import", folder / "lt-sft", "pytorch_diff.bin", read_lt_sft))
    model = peft_ext.load(FIXTURES / "vqt", base_of("vqt"))
    with contextlib.redirect_stdout(io.StringIO()):
        FrozenPassCache.write(model, [MAKE.batch("vit")], folder / "cache")
    for file in ("frozen_pass.json", "frozen_pass.arrow"):
        kinds.append(Kind(f"cache: {file}", folder / "cache", file, read_cache, has_checksum=file.endswith("arrow")))
    for name in ("masks", "ssf"):
        shutil.copytree(FIXTURES / name, folder / "order" / name)
    order = {"adapters": ["masks", "ssf"], "active": ["ssf"]}
    (folder / "order" / "mixed_adapters.json").write_text(json.dumps(order))
    kinds.append(Kind("mixed_adapters.json", folder / "order", "mixed_adapters.json", read_order))
    return kinds


# Running


def is_refusal(error: BaseException) -> bool:
    fits_not = isinstance(error, RuntimeError) and "does not fit this model" in str(error)
    head_fits_not = isinstance(error, RuntimeError) and "size mismatch for" in str(error)
    return isinstance(error, REFUSALS) or fits_not or head_fits_not


def outcome(kind: Kind, whole: torch.Tensor | None, folder: Path, number: int, seed: int, show: bool) -> str:
    rng = random.Random(f"{seed}-{number}")
    content = (folder / kind.file).read_bytes()
    changed, must = damaged(kind, content, rng)
    if changed == content:
        return "same"
    (folder / kind.file).write_bytes(changed)
    signal.alarm(10)
    try:
        found = kind.read(folder)
    except Hang:
        return "HANG"
    except Exception as error:  # noqa: BLE001
        if show:
            traceback.print_exc()
        return "refused" if is_refusal(error) else "CRASH"
    finally:
        signal.alarm(0)
        (folder / kind.file).write_bytes(content)
    if found is None:
        return "other"
    if whole is not None and found.shape == whole.shape and torch.equal(found, whole):
        return "same"
    return "SILENT" if must else "other"


def hang(*_: Any) -> None:
    raise Hang


Table = dict[str, Counter[str]]


def run(
    numbers: Iterable[int],
    seconds: float,
    seed: int,
    show: bool = False,
    progress: Callable[[Table, list[str]], None] | None = None,
) -> tuple[Table, list[str]]:
    """The inputs of these numbers, as far as the seconds go; the outcomes by kind, and what is to be looked at.

    `progress` is told the table and the faults after every 500 inputs; `show` prints what was raised.
    """
    signal.signal(signal.SIGALRM, hang)
    table: Table = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(scratch)
        (place / "whole").mkdir()
        kinds = made(place / "whole")
        expected: dict[str, torch.Tensor | None] = {}
        end = time.monotonic() + seconds
        for done, number in enumerate(numbers):
            if time.monotonic() > end:
                break
            kind = kinds[number % len(kinds)]
            folder = place / str(number % len(kinds))
            if not folder.exists():
                shutil.copytree(kind.folder, folder)
            if kind.name not in expected:
                expected[kind.name] = kind.read(folder)
            result = outcome(kind, expected[kind.name], folder, number, seed, show)
            table.setdefault(kind.name, Counter())[result] += 1
            if result.isupper():
                wrong.append(f"{result} at --seed {seed} --only {number}: {kind.name}")
            if progress is not None and done % 500 == 499:
                progress(table, wrong)
    return table, wrong


def rows(table: Table) -> Iterator[str]:
    """As a table in Markdown."""
    yield "| what is damaged | " + " | ".join(("inputs", *OUTCOMES)) + " |"
    yield "|---" * (len(OUTCOMES) + 2) + "|"
    for name, counts in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        yield f"| {name} | {counts.total():,} | " + " | ".join(f"{counts[one]:,}" for one in OUTCOMES) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=50_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, with what it raises")
    parser.add_argument("--results", type=Path, help="a JSON file for the table, written every 500 inputs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(options.start, options.start + options.inputs) if options.only is None else (options.only,)

    def write(table: Table, wrong: list[str]) -> None:
        content = {"seed": options.seed, "start": options.start, "inputs": sum(map(Counter.total, table.values()))}
        options.results.write_text(json.dumps({**content, "table": table, "wrong": wrong}, indent=1) + "\n")

    progress = write if options.results else None
    found, wrong = run(numbers, options.seconds, options.seed, options.only is not None, progress)
    if progress is not None:
        progress(found, wrong)
    print("\n".join(rows(found)))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
