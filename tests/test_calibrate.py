"""The sensitivity pass: its scores against a plain computation, what it leaves behind, and its errors."""

from __future__ import annotations

import copy
import os
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import inputs, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import peft_ext
from peft_ext import LoraSBConfig, MaskLoraConfig, S2FTConfig, SCTConfig, SparseFTConfig, SPTConfig, SSFConfig
from peft_ext.calibrate import KINDS, measure
from peft_ext.scores import ExactScores, PooledScores, random_scores


def batches(count: int = 3, size: int = 4, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 30, (size, length), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[:, 0] % 2} for t in tokens]


def bert() -> Any:
    model = tiny("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("dense.weight") and "layer" in name}


def plain_scores(model: Any, data: list[dict[str, torch.Tensor]], kind: str) -> dict[str, torch.Tensor]:
    """The same by whole gradients, one after the other."""
    model = copy.deepcopy(model).train()
    weights = linears(model)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in data:
        singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)] if kind == "fisher" else [batch]
        for part in singles:
            grads = torch.autograd.grad(model(**part).loss, list(weights.values()))
            for (name, weight), grad in zip(weights.items(), grads, strict=True):
                sums[name] += {
                    "sensitivity": grad**2,
                    "fisher": grad**2,
                    "magnitude": (weight * grad).abs(),
                    "snip": weight * grad,
                    "gradient": grad,
                }[kind].detach()
    return {name: (value if kind == "gradient" else value.abs()).flatten() for name, value in sums.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind: str) -> None:
    model = bert()
    expected = plain_scores(model, batches(), kind)
    found = measure(model, linears(model), batches(), kind=kind, progress=False)
    assert found.batches == 3
    for name, value in expected.items():
        torch.testing.assert_close(found.of(name), value, rtol=1e-5, atol=1e-12 if kind != "gradient" else 1e-7)
    if kind == "gradient":  # sums with a sign, which nobody ranks
        return
    everything = torch.cat(list(expected.values()))
    threshold = everything.sort(descending=True).values[99]
    top = found.top(100)
    assert sum(len(places) for places in top.values()) == 100
    for name, places in top.items():
        assert torch.equal(places, (expected[name] >= threshold).nonzero().squeeze(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant: bool) -> None:
    model = bert()
    expected = plain_scores(model, batches(), "sensitivity")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = measure(model, linears(model), batches(), progress=False)
    for name, value in expected.items():
        torch.testing.assert_close(found.of(name), value, rtol=1e-4, atol=1e-12)


def test_in_half_precision_sums_are_not() -> None:
    model = bert().to(torch.bfloat16)
    found = measure(model, linears(model), batches(), progress=False)
    assert all(found.of(name).dtype == torch.float32 for name in found.sizes)
    expected = plain_scores(model.float(), batches(), "sensitivity")
    name = max(expected, key=lambda key: float(expected[key].sum()))
    torch.testing.assert_close(found.of(name).sum(), expected[name].sum(), rtol=0.1, atol=0.0)


def test_a_causal_model_and_a_loss_of_ones_own() -> None:
    model = tiny("llama")
    data = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in batches()]
    candidates = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
    found = measure(model, candidates, data, progress=False)
    halved = measure(model, candidates, data, lambda m, b: m(**b).loss / 2, progress=False)
    for name in candidates:
        torch.testing.assert_close(halved.of(name) * 4, found.of(name))


def test_the_pool_keeps_the_largest() -> None:
    torch.manual_seed(0)
    sizes = {"a": 4000, "b": 6000}
    exact, pooled = ExactScores(sizes), PooledScores(sizes)
    scale = {name: torch.rand(size) ** 8 for name, size in sizes.items()}  # few matter
    for _ in range(16):
        for name, factor in scale.items():
            values = torch.randn(len(factor)).square() * factor
            exact.add(name, values.clone())
            pooled.add(name, values.clone())
            assert sum(len(sums) for sums in pooled.sums.values()) <= pooled.room == 1250
            assert all(len(p.unique()) == len(p) == len(pooled.sums[n]) for n, p in pooled.places.items())
    first, second = exact.top(200), pooled.top(200)
    common = sum(len(set(first[n].tolist()) & set(second[n].tolist())) for n in sizes)
    assert common >= 190  # draws that do not depend on each other are the worst case
    with pytest.raises(ValueError, match="use `memory='exact'`"):
        pooled.top(1251)


def test_the_pool_finds_nearly_the_same_on_a_model() -> None:
    model = bert()
    data = batches(8)
    first, second = (measure(model, linears(model), data, memory=m, progress=False).top(50) for m in ("exact", "pool"))
    common = sum(len(set(first[n].tolist()) & set(second.get(n, torch.zeros(0)).tolist())) for n in first)
    assert common >= 48


class Failing(nn.Module):
    """A model that gives up at its second batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **batch: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken")
        return self.model(**batch)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = tiny("bert").eval()  # with dropout, which draws random numbers
    model.bert.embeddings.train()
    model.bert.pooler.requires_grad_(False)
    weights = linears(model)
    kept = torch.ones_like(model.classifier.weight)
    model.classifier.weight.grad = kept
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            measure(Failing(model), weights, batches(), progress=False)
    else:
        measure(model, weights, batches(), progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.classifier.weight.grad is kept and all(p.grad is None for p in weights.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in weights.values())


def test_a_frozen_model_with_batch_norm_is_measured_and_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).requires_grad_(False)
    statistics = model[1].running_mean.clone()
    found = measure(
        model,
        {"0.weight": model[0].weight},
        [torch.randn(5, 3)],
        lambda m, x: m(x).square().mean(),
        progress=False,
    )
    assert found.of("0.weight").sum() > 0
    assert torch.equal(model[1].running_mean, statistics)


def test_sparse_fine_tuning_goes_by_it(tmp_path: Path) -> None:
    model = bert()
    config = SparseFTConfig(selection="sensitivity", num_tunable_weights=120, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="needs to be told which weights"):
        get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    returned = peft_ext.calibrate(model, config, batches(), progress=False)
    assert returned is config and config.num_weights_per_module is not None
    assert sum(config.num_weights_per_module.values()) == 120
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, config)
    for name, leaf in peft_ext.tuners.sparse_ft.deltas.deltas(adapted, "default"):
        assert torch.equal(leaf.indices().long(), config.support[name])
        nn.init.normal_(leaf.weight)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    batch = batches(1)[0]
    torch.testing.assert_close(loaded.eval()(**batch).logits, adapted.eval()(**batch).logits)


def test_on_the_batches_of_a_trainer(tmp_path: Path) -> None:
    model = bert()
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(4)]
    data = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows])
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True)
    config = SparseFTConfig(selection="sensitivity", density=0.01, target_modules=["query", "value"])
    peft_ext.calibrate(model, config, trainer=Trainer(model, args, train_dataset=data), progress=False)
    assert config.support


def _in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    data = torch.randn(4, 8, 6)  # one process gets a batch more, which is left out
    mine = [batch[4 * rank : 4 * rank + 4] for batch in data[: 3 + rank]]
    found = measure(model, {"weight": model.weight}, iter(mine), lambda m, x: m(x).square().mean(), progress=False)
    save_file({"scores": found.of("weight")}, f"{folder}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then deadlock with the interpreter when both go


def test_several_processes_measure_the_global_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_parallel, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors")["scores"] for rank in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    data = torch.randn(4, 8, 6)[:3]
    expected = measure(model, {"weight": model.weight}, list(data), lambda m, x: m(x).square().mean(), progress=False)
    torch.testing.assert_close(first, expected.of("weight"))


@pytest.mark.parametrize("memory", ["exact", "pool"])
def test_targets_that_the_loss_does_not_use(memory: str) -> None:
    model = bert()
    used = "bert.encoder.layer.0.output.dense.weight"
    with pytest.warns(UserWarning, match=r"does not depend on 'bert.encoder.layer.0.*and [0-9]+ more: they get"):
        scores = measure(
            model,
            linears(model),
            batches(),
            lambda m, b: m.get_parameter(used).square().sum() * b["input_ids"].numel(),
            memory=memory,
            progress=False,
        )
    assert {name for name in scores.sizes if (scores.of(name) > 0).any()} == {used}
    one = {name: p for name, p in linears(model).items() if name != used}
    with pytest.raises(ValueError, match="which are all targets"):
        measure(model, one, batches(), lambda m, b: m.get_parameter(used).requires_grad_().sum(), progress=False)


def _with_an_expert(rank: int, folder: str) -> None:
    """One process uses a module that the other does not, and the other way round, in another order."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = measure(*_experts(range(rank, 8, 2)), progress=False)
    save_file({name: found.of(name) for name in found.sizes}, f"{folder}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)


def _experts(chosen: range) -> tuple[Any, Any, Any, Any]:
    """Four experts; sample i goes to expert i % 4, and to all in reverse order for i = 6, 7. A batch is one sample."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
    data = torch.randn(8, 2, 3)

    def loss(m: Any, item: Any) -> torch.Tensor:
        index, x = item
        for layer in reversed(m[:4]) if index >= 6 else [m[index % 4]]:
            x = layer(x)
        return x.square().mean()

    candidates = {f"{i}.weight": layer.weight for i, layer in enumerate(model[:4])}
    return model, candidates, [(i, data[i]) for i in chosen], loss


def test_processes_that_use_different_modules(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_with_an_expert, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    model, candidates, items, loss = _experts(range(8))
    expected = {name: torch.zeros(9, dtype=torch.float64) for name in candidates}
    for pair in zip(items[::2], items[1::2], strict=True):
        total = sum(loss(model, item) for item in pair) / 2
        grads = torch.autograd.grad(total, list(candidates.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(candidates, grads, strict=True):
            expected[name] += grad.double().flatten().square()
    for name, sums in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name].double(), sums)


def _unlabelled() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch["input_ids"]} for batch in batches()]


def _used_up() -> Iterator[Any]:
    iterator = iter(batches())
    list(iterator)
    return iterator


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataloader": []}, ValueError, "The data loader gave no batch"),
        ({"dataloader": _used_up()}, ValueError, "used up before"),
        ({"dataloader": batches(), "num_batches": 0}, ValueError, "`num_batches` must be at least 1"),
        ({"dataloader": batches(), "kind": "grad"}, ValueError, "`kind` must be one of"),
        ({"dataloader": batches(), "memory": "disk"}, ValueError, "`memory` must be"),
        ({"dataloader": batches(), "memory": "pool", "kind": "snip"}, ValueError, "change their sign"),
        ({}, ValueError, "either `dataloader` or `trainer`"),
        ({"dataloader": _unlabelled()}, ValueError, "returns no loss for input_ids: add `labels`"),
        ({"dataloader": [torch.ones(1)]}, ValueError, "must be a mapping"),
        ({"dataloader": batches(), "loss_fn": lambda m, b: m(**b).logits}, ValueError, "a single number"),
        ({"dataloader": batches(), "loss_fn": lambda m, b: m(**b).loss.detach()}, ValueError, "does not depend"),
        ({"dataloader": batches(), "loss_fn": lambda m, b: m(**b).loss * torch.nan}, ValueError, "batch 0 .* is nan"),
        (
            {"dataloader": batches(), "loss_fn": lambda m, b: m.bert.embeddings(b["input_ids"]).mean()},
            ValueError,
            "does not depend",
        ),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = bert()
    with pytest.raises(error, match=message):
        measure(model, linears(model), progress=False, **arguments)


def test_configs_that_look_at_no_data() -> None:
    model = bert()
    with pytest.raises(TypeError, match="SSF looks at no data"):
        peft_ext.calibrate(model, SSFConfig(task_type="SEQ_CLS"), batches())
    with pytest.raises(ValueError, match="needs `selection='sensitivity'`"):
        peft_ext.calibrate(model, SparseFTConfig(density=0.01, selection="random"), batches())
    with pytest.raises(TypeError, match="LoraConfig is no config of this package"):
        peft_ext.calibrate(model, LoraConfig(), batches())  # type: ignore[type-var]


CALIBRATED: dict[str, Any] = {
    "spt": lambda: SPTConfig(budget=300, r=2),
    "s2ft": lambda: S2FTConfig(ratios=0.5, selection="activation"),
    "sct": SCTConfig,
    "lora-sb": lambda: LoraSBConfig(r=2),
    "sparse": lambda: SparseFTConfig(num_tunable_weights=200, selection="sensitivity"),
    "masks": lambda: MaskLoraConfig(init_logits="sensitivity", total_steps=4),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_what_a_calibration_has_found_is_saved_with_the_config(name: str, tmp_path: Path) -> None:
    """Into a file beside it; the adapter that is made of the config that was read starts as that of the first."""
    config = peft_ext.calibrate(tiny("llama"), CALIBRATED[name](), [inputs("llama")], progress=False)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "calibration.safetensors").is_file()
    again = type(config).from_pretrained(tmp_path)
    states = []
    for made in (config, again):
        torch.manual_seed(0)
        states.append(get_peft_model(tiny("llama"), made).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("name", ["spt", "sparse", "masks"])
def test_by_chance(name: str) -> None:
    """Without data, from the config's seed; another seed chooses others."""
    found = []
    for seed in (0, 0, 1):
        config = CALIBRATED[name]()
        config.seed = seed
        peft_ext.calibrate(tiny("llama"), config, kind="random", progress=False)
        torch.manual_seed(0)
        found.append(get_peft_model(tiny("llama"), config).state_dict())
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    assert any(key not in found[2] or not torch.equal(tensor, found[2][key]) for key, tensor in found[0].items())


def test_random_scores_are_spread_over_all_tensors() -> None:
    sizes = {"a": 40_000, "b": 10_000}
    scores = random_scores(sizes, seed=3)
    top = scores.top(5_000)
    assert {name: len(places) for name, places in top.items()} == pytest.approx({"a": 4_000, "b": 1_000}, abs=120)
    assert not torch.equal(scores.of("a")[:10_000], scores.of("b"))


@pytest.mark.parametrize("given", ["dataloader", "loss_fn", "trainer", "memory"])
def test_what_a_choice_by_chance_does_not_look_at_is_refused(given: str) -> None:
    value: Any = {"dataloader": batches(), "loss_fn": lambda m, b: m(**b).loss, "trainer": object(), "memory": "pool"}
    with pytest.raises(ValueError, match=f"looks at no data, so that `{given}` has no effect"):
        peft_ext.calibrate(tiny("llama"), CALIBRATED["spt"](), kind="random", **{given: value[given]})
    with pytest.raises(ValueError, match="is not what this LoraSBConfig goes by"):
        peft_ext.calibrate(tiny("llama"), CALIBRATED["lora-sb"](), kind="random")


def test_kinds_are_named_where_they_can_be_given() -> None:
    """`random` is one of `calibrate`; the pass itself has no such kind, and does not offer it."""
    with pytest.raises(ValueError, match=r"must be one of sensitivity, .*, gradient, random, got 'grad'"):
        peft_ext.calibrate(tiny("llama"), CALIBRATED["spt"](), batches(), kind="grad")
    model = bert()
    with pytest.raises(ValueError, match=r"must be one of sensitivity, .*, gradient, got 'random'"):
        measure(model, linears(model), batches(), kind="random", progress=False)


@pytest.mark.parametrize("name", ["spt", "sparse"])
@pytest.mark.parametrize(
    ("budgets", "error"),
    [
        ([-3], ValueError),
        ([0], ValueError),
        ([1.5], ValueError),
        ([float("nan")], ValueError),
        ([0.01, 0.01], ValueError),
        ([], ValueError),
        (["a"], TypeError),
        ([True], TypeError),
        (300, TypeError),
        ("300", TypeError),
    ],
)
def test_budgets_are_looked_at_before_the_pass(name: str, budgets: Any, error: type[Exception]) -> None:
    def data() -> Iterator[Any]:
        raise AssertionError("the pass has begun")
        yield

    with pytest.raises(error, match="`budgets`"):
        peft_ext.calibrate(tiny("llama"), CALIBRATED[name](), data(), budgets=budgets, progress=False)


@pytest.mark.parametrize("name", ["sparse", "masks"])
def test_a_damaged_or_missing_calibration_is_refused(name: str, tmp_path: Path) -> None:
    config = peft_ext.calibrate(tiny("llama"), CALIBRATED[name](), [inputs("llama")], progress=False)
    config.save_pretrained(tmp_path)
    file = tmp_path / "calibration.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    save_file({**tensors, key: tensors[key].flip(0).float() / 0}, file)
    with pytest.raises(ValueError, match=r"calibration in .* is damaged"):
        type(config).from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="calibrate"):  # where nothing else can come, at the first forward
        model = get_peft_model(tiny("llama"), type(config).from_pretrained(tmp_path)).train()
        model(**inputs("llama")).loss.backward()


def test_named_tuples_as_batches() -> None:
    Batch = namedtuple("Batch", "input_ids labels")
    data = [Batch(batch["input_ids"], batch["labels"]) for batch in batches(1)]
    config = SparseFTConfig(selection="sensitivity", density=0.01)
    found = peft_ext.calibrate(bert(), config, data, lambda model, batch: model(**batch._asdict()).loss)
    assert found.support


def test_numbers_by_module_are_no_budget_for_a_calibration() -> None:
    name = "bert.encoder.layer.0.intermediate.dense"
    config = SparseFTConfig(selection="sensitivity", num_weights_per_module={name: 4})
    with pytest.raises(ValueError, match="set `density` or `num_tunable_weights` instead"):
        peft_ext.calibrate(bert(), config, batches())
