"""Several processes: DDP in its modes, FSDP, DeepSpeed's marks, checkpoints for another number of processes, Trainer.

The whole table of methods and ways is made by `tests/sharding.py`; a part of it is tested here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import MLP, inputs, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sharding import (
    CASES,
    RESULTS,
    STEPS,
    differences,
    expected,
    forks,
    in_processes,
    outcome,
    rows_of,
    save,
    table,
    train,
)
from sharding_ways import ddp, fsdp2, optimizer_for
from test_conformance import METHODS
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from peft_ext import SNELLConfig, SparseFTConfig, lt_sft
from peft_ext.core import sharding as core


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def succeeded(errors: list[str]) -> None:
    assert not any(errors), next(error for error in errors if error)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("lora", "fsdp2-policy"),  # the control
        ("ssf-bert", "fsdp1-orig"),
        ("spt-dora", "fsdp1-orig"),
        ("vqt-lasso", "fsdp2-policy"),
        ("mask_pruning", "fsdp2-policy"),
        ("spiel-ag", "fsdp2-policy"),
        ("spiel-ma", "fsdp2-blocks"),
        ("below", "fsdp2-policy"),
    ],
)
def test_sharded_training_is_that_of_one_process(name: str, way: str) -> None:
    assert outcome(name, way) == "works"


@pytest.mark.parametrize(
    ("name", "way", "holder"),
    [
        ("spiel-ag", "fsdp1-orig", "FSDP1 (`use_orig_params=True`)"),
        ("mask_pruning", "fsdp1-flat", "FSDP1 (`use_orig_params=False`)"),
    ],
)
def test_flattened_parameters_are_refused_at_the_first_step(name: str, way: str, holder: str) -> None:
    found = outcome(name, way).splitlines()[0]
    assert found.startswith("refused: ValueError:") and f"cannot be trained under {holder}" in found
    assert "Use FSDP2" in found


def test_table_in_the_docs_is_that_of_the_results() -> None:
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    found = json.loads(RESULTS.read_text())
    assert table(found) in page
    assert not [
        cell for cells in found.values() for cell in cells.values() if not cell.startswith(("works", "refused"))
    ]


# Checkpoints


def _on_from(folder: Path, units: str | None) -> None:
    """Trains adapters that were saved before, sharded or in one process."""
    for name in FROM_FILES:
        case = CASES[name]
        base = tiny(case.model)
        model = PeftModel.from_pretrained(base, str(folder / name), is_trainable=True).train()
        wrapped = model if units is None else fsdp2(model, units)
        rows = slice(None) if units is None or case.same_rows else rows_of(case, "fsdp2")
        train(case, wrapped, optimizer_for(wrapped), rows, range(2))
        if units is None:
            model.save_pretrained(folder / f"{name}-alone")
        else:
            save(wrapped, folder / f"{name}-sharded")


FROM_FILES = ("binary_low_rank", "spiel-ag", "growing")


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    for name in FROM_FILES:
        model = CASES[name].build()
        CASES[name].method.randomize(model)
        model.save_pretrained(tmp_path / name)
    with forks([partial(_on_from, tmp_path, None)], tmp_path) as errors:
        succeeded(errors)
    succeeded(in_processes(2, partial(_on_from, tmp_path, "policy"), tmp_path))
    for name in FROM_FILES:
        assert not differences(adapter(tmp_path / f"{name}-sharded"), adapter(tmp_path / f"{name}-alone")), name


def test_lt_sft_refuses_weights_that_are_sharded(tmp_path: Path) -> None:
    def make_trainer(model: nn.Module) -> Trainer:
        args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        trainer = Trainer(model=model, args=args)  # type: ignore[arg-type]
        trainer.is_fsdp_enabled = True  # accelerate starts it on GPUs only
        return trainer

    config = SparseFTConfig(selection="lt-sft", density=0.01)
    with pytest.raises(ValueError, match=r"LT-SFT compares the weights .* and FSDP leaves each process a part"):
        lt_sft(tiny("bert"), config, make_trainer)


RESUMED = ("spiel-ag", "spiel-ma", "below", "mask_pruning", "binary_low_rank")
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def _begin(folder: Path) -> None:
    """Half of the training, and a sharded checkpoint."""
    for name in RESUMED:
        case = CASES[name]
        model = fsdp2(case.build(), "policy")
        optimizer = optimizer_for(model)
        train(case, model, optimizer, _rows(name), range(STEPS // 2))
        of_model, of_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / name)


def _resume(folder: Path) -> None:
    """The other half, on a model that was sharded before anything was loaded."""
    for name in RESUMED:
        case = CASES[name]
        model = fsdp2(case.build(), "blocks")
        optimizer = optimizer_for(model)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / name)
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=OPTIONS)
        train(case, model, optimizer, _rows(name), range(STEPS // 2, STEPS))
        save(model, folder / name / "resumed")


def _rows(name: str) -> slice:
    # where the first process' rows decide, all see the same ones
    return slice(None) if CASES[name].same_rows else rows_of(CASES[name], "fsdp2")


def test_resuming_with_another_number_of_processes(tmp_path: Path) -> None:
    succeeded(in_processes(2, partial(_begin, tmp_path), tmp_path))
    succeeded(in_processes(4, partial(_resume, tmp_path), tmp_path))
    for name in RESUMED:
        assert not differences(adapter(tmp_path / name / "resumed"), expected(name)), name


# DDP


DDP_MODES: dict[str, dict[str, Any]] = {
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}
IN_DDP = ("ssf", "spiel-ag", "spiel-ma", "mask_pruning", "vqt")


def _in_modes(folder: Path) -> None:
    for mode, kwargs in DDP_MODES.items():
        for name in IN_DDP:
            case = CASES[name]
            wrapped = DistributedDataParallel(case.build(), **kwargs)
            train(case, wrapped, optimizer_for(wrapped), rows_of(case, "ddp"))
            save(wrapped, folder / f"{name}-{mode}")


def test_modes_of_ddp(tmp_path: Path) -> None:
    succeeded(in_processes(2, partial(_in_modes, tmp_path), tmp_path))
    for mode in DDP_MODES:
        for name in IN_DDP:
            assert not differences(adapter(tmp_path / f"{name}-{mode}"), expected(name)), (name, mode)


def _accumulate(case: Any, wrapped: Any, rows: slice) -> None:
    """As `train`, with gradients that are exchanged with those of the last micro-batch only."""
    optimizer = optimizer_for(wrapped)
    for step in range(STEPS):
        for micro in range(2):
            batch = {key: value[rows] for key, value in case.batch(step, micro).items()}
            is_last = micro == 1
            if isinstance(wrapped, DistributedDataParallel):
                with contextlib.nullcontext() if is_last else wrapped.no_sync():
                    (wrapped(**batch).loss / 2).backward()
            else:
                wrapped.set_requires_gradient_sync(is_last)
                (wrapped(**batch).loss / 2).backward()
        nn.utils.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()


def _without_sync(folder: Path) -> None:
    for name in IN_DDP:
        case = CASES[name]
        for way, wrap in {"ddp": ddp, "fsdp2": partial(fsdp2, units="policy")}.items():
            wrapped = wrap(case.build())
            _accumulate(case, wrapped, slice(None) if case.same_rows else rows_of(case, way))
            save(wrapped, folder / f"{name}-{way}")


def test_gradients_that_are_exchanged_once_a_step(tmp_path: Path) -> None:
    succeeded(in_processes(2, partial(_without_sync, tmp_path), tmp_path))
    for name in IN_DDP:
        for way in ("ddp", "fsdp2"):
            assert not differences(adapter(tmp_path / f"{name}-{way}"), expected(name)), (name, way)


def _checkpointed(folder: Path) -> None:
    for name in ("spiel-ag", "mask_pruning", "s2ft"):
        case = CASES[name]
        for reentrant in (False, True):
            for way, wrap in {"ddp": ddp, "fsdp2": partial(fsdp2, units="blocks")}.items():
                model = case.build()
                base = model.get_base_model()
                base.gradient_checkpointing_enable({"use_reentrant": reentrant})
                base.enable_input_require_grads()
                wrapped = wrap(model)
                rows = slice(None) if case.same_rows else rows_of(case, way)
                train(case, wrapped, optimizer_for(wrapped), rows)
                save(wrapped, folder / f"{name}-{way}-{reentrant}")


def test_gradient_checkpointing_in_both_modes(tmp_path: Path) -> None:
    succeeded(in_processes(2, partial(_checkpointed, tmp_path), tmp_path))
    for folder in tmp_path.glob("*-*-*/"):
        if folder.is_dir():
            name = folder.name.split("-ddp")[0].split("-fsdp2")[0]
            assert not differences(adapter(folder), expected(name)), folder.name


class Branches(nn.Module):
    """Two branches, of which a batch may use one only, as experts are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = MLP(), MLP()

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        y = self.first(x)
        return ((y + self.second(x)) if both else y).sin().sum()


OF_ONE_MODEL = ("mask_pruning", "fused_low_rank")  # their configs in the kit name modules of the MLP itself
BRANCHED = [name for name, case in METHODS.items() if "mlp" in case.method.models and name not in OF_ONE_MODEL]


def _branched(name: str) -> Any:
    model = Branches()
    torch.manual_seed(0)
    return get_peft_model(model, METHODS[name].method.config_for("mlp", model)).train()


def _uses_one_branch(step: int, rank: int) -> bool:
    return (step, rank) in ((0, 0), (2, 1))


def _train_branches(folder: Path) -> None:
    for name in BRANCHED:
        model = DistributedDataParallel(_branched(name), find_unused_parameters=True)
        optimizer = optimizer_for(model)
        for step in range(4):
            rank = dist.get_rank()
            model(inputs("mlp", 4, seed=10 * step + rank)["x"], not _uses_one_branch(step, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        save(model, folder / name)


def test_modules_that_one_process_does_not_use(tmp_path: Path) -> None:
    succeeded(in_processes(2, partial(_train_branches, tmp_path), tmp_path))
    for name in BRANCHED:
        model = _branched(name)
        optimizer = optimizer_for(model)
        for step in range(4):
            for rank in range(2):
                loss = model(inputs("mlp", 4, seed=10 * step + rank)["x"], not _uses_one_branch(step, rank))
                (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / f"{name}-alone")
        assert not differences(adapter(tmp_path / name), adapter(tmp_path / f"{name}-alone")), name


# Trainer


def _with_trainer(names: tuple[str, ...], rows: int, folder: Path, rank: int, world: int, port: int) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name in names:
        case = CASES[name]
        batch = inputs(case.model, batch=rows, seed=3)
        samples = [{key: value[i] for key, value in batch.items()} for i in range(rows)]
        args = TrainingArguments(
            output_dir=str(folder / f"{name}-{world}"),
            num_train_epochs=2,
            per_device_train_batch_size=4 // world,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            # else Trainer multiplies the loss of classifiers, which is a mean, by the number of processes
            average_tokens_across_devices=False,
        )
        trainer = Trainer(model=case.build(), args=args, train_dataset=samples)  # type: ignore[arg-type]
        trainer.train()
        trainer.save_model(str(folder / f"{name}-{world}" / f"model-{rank}"))
        tensors = {key: p.detach() for key, p in trainer.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}-{world}-{rank}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _trainers(names: tuple[str, ...], rows: int, folder: Path, world: int) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    port = _free_port()
    calls = [partial(_with_trainer, names, rows, folder, rank, world, port) for rank in range(world)]
    with forks(calls, folder) as errors:
        succeeded(errors)


def test_trainer_in_several_processes_is_one_with_the_larger_batch(tmp_path: Path) -> None:
    names = ("ssf", "spiel-ma", "mask_pruning", "vqt", "sparse_ft")
    for world in (1, 2, 4):
        _trainers(names, 12, tmp_path, world)
    for name, world in product(names, (2, 4)):
        alone = load_file(tmp_path / f"{name}-1-0")
        first, *others = (load_file(tmp_path / f"{name}-{world}-{rank}") for rank in range(world))
        assert not differences(first, alone), (name, world)
        for other in others:
            assert all(torch.equal(value, other[key]) for key, value in first.items()), (name, world)


def test_an_uneven_last_batch(tmp_path: Path) -> None:
    """Eleven rows for two processes: all go on to the end, and hold the same."""
    names = ("spiel-ag", "mask_pruning")
    _trainers(names, 11, tmp_path, 2)
    for name in names:
        first, second = (load_file(tmp_path / f"{name}-2-{rank}") for rank in range(2))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


# What the helpers say


def test_names_without_wrappers() -> None:
    assert core.plain_name("a._fsdp_wrapped_module.b.weight") == "a.b.weight"
    assert core.plain_name("_fsdp_wrapped_module.a._checkpoint_wrapped_module") == "a"
    assert core.plain_name("my_fsdp_wrapped_module.b") == "my_fsdp_wrapped_module.b"


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_decay_of_flattened_scales_is_refused(weight_decay: float) -> None:
    model = CASES["ssf"].build()
    for parameter in model.parameters():
        parameter.ds_id = 0
    flat = nn.Parameter(torch.ones(3))
    flat.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([flat], weight_decay=weight_decay)
    refused = pytest.raises(ValueError, match=r"DeepSpeed holds flattened copies.*weight_decay=0")
    with refused if weight_decay else contextlib.nullcontext():
        optimizer.step()


def marked_by_deepspeed(model: nn.Module, stage: int) -> SimpleNamespace:
    """An engine, whose `optimizer` has a flattened copy of the model's parameters, as their marks say."""
    flat = nn.Parameter(torch.ones(3))
    flat.grad = torch.ones(3)
    engine = SimpleNamespace(optimizer=torch.optim.AdamW([flat], weight_decay=0.1))
    for parameter in model.parameters():
        if stage == 3:
            parameter.ds_id, parameter._z3_optimizer = 0, engine
        else:
            parameter._hp_mapping = SimpleNamespace(hp_fragment=flat.data[:2], param_group_index=0)
    return engine


@pytest.mark.parametrize("stage", [1, 3])
def test_decay_of_another_model_is_not_refused(stage: int) -> None:
    """One model is trained by DeepSpeed, another in the same process by a plain optimizer, which may decay its own."""
    model = CASES["ssf"].build()
    engine = marked_by_deepspeed(model, stage)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other], weight_decay=0.1).step()
    with pytest.raises(ValueError, match="DeepSpeed holds flattened copies"):
        engine.optimizer.step()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["spiel-ag", "mask_pruning"])
def test_deepspeed_is_refused_where_supports_and_masks_move(name: str, stage: int) -> None:
    """The optimizer with the flattened copies, which owns none of the parameters, is; another one in the process is not."""
    model = CASES[name].build()
    model(**inputs("llama")).loss.backward()
    engine = marked_by_deepspeed(model, stage)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other]).step()
    with pytest.raises(ValueError, match=r"cannot be trained under DeepSpeed.*Use FSDP2"):
        engine.optimizer.step()


@pytest.mark.parametrize("name", ["spiel-ag", "mask_pruning", "snell"])
def test_fsdp1_with_original_parameters_is_refused_where_they_are_stepped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the optimizer that owns the flattened parameters, and by no other one in the process."""
    monkeypatch.setattr(core, "world_size", lambda: 2)
    if name == "snell":
        config = SNELLConfig(
            r=2, allocation="adaptive", total_steps=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        model: Any = get_peft_model(tiny("llama"), config)
    else:
        model = CASES[name].build()
    model.train()(**inputs("llama")).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter._fsdp_flattened = True
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other]).step()
    with pytest.raises(ValueError, match=r"cannot be trained under FSDP1 \(`use_orig_params=True`\).*Use FSDP2"):
        torch.optim.AdamW(trained).step()
