"""No optimizer decays scale and shift, whatever `weight_decay` its user set."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import inputs, loss, tiny
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from peft_ext import SSFConfig
from peft_ext.core import AdapterVector, schedule
from peft_ext.core.schedule import exempt_from_weight_decay


DECAY = 0.3


def _hooks() -> int:
    """How many of our hooks torch has."""
    ours = {schedule._before_step, schedule._after_step}
    tables = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    return sum(hook in ours for table in tables for hook in table.values())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Pair(nn.Module):
    """A vector of ours and one of somebody else, in a loss that couples them."""

    def __init__(self, exempt: bool = True) -> None:
        super().__init__()
        self.ours = AdapterVector(4) if exempt else nn.Module()
        self.ours.weight = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.other = nn.Linear(4, 4)
        with torch.no_grad():
            self.other.weight.copy_(torch.arange(16.0).view(4, 4) / 10)
            self.other.bias.fill_(0.3)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.sin(torch.arange(4.0) + step)
        return (self.other(x * self.ours.weight) - 1).square().sum()


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def _equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(actual) == list(expected) and all(torch.equal(value, expected[key]) for key, value in actual.items())


def _run(
    make: Callable[..., Optimizer], groups: list[dict[str, Any]], model: Pair, steps: int = 4
) -> tuple[dict[str, torch.Tensor], Optimizer]:
    optimizer = make(groups)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    return _values(model), optimizer


def _torch_optimizers() -> Iterator[tuple[str, Callable[..., Optimizer]]]:
    """Every optimizer of torch that decays vectors, and the variants of the common ones."""
    for name, cls in vars(torch.optim).items():
        is_optimizer = isinstance(cls, type) and issubclass(cls, Optimizer)
        if is_optimizer and "weight_decay" in inspect.signature(cls).parameters and name != "Muon":  # takes matrices
            yield name, lambda groups, cls=cls, **kwargs: cls(groups, lr=0.05, **kwargs)
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        for option in ("foreach", "fused"):
            kwargs = {option: True, "lr": 0.05}
            yield (
                f"{cls.__name__}-{option}",
                lambda groups, cls=cls, kwargs=kwargs, **more: cls(groups, **kwargs, **more),
            )
        yield f"{cls.__name__}-single", lambda groups, cls=cls, **more: cls(groups, lr=0.05, foreach=False, **more)
    for fused in (False, True):
        yield (
            f"AdamW-amsgrad-{fused}",
            lambda groups, fused=fused, **more: torch.optim.AdamW(groups, lr=0.05, amsgrad=True, fused=fused, **more),
        )
    yield "SGD-momentum", lambda groups, **more: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, **more)
    yield (
        "RMSprop-centered",
        lambda groups, **more: torch.optim.RMSprop(groups, 0.05, momentum=0.9, centered=True, **more),
    )
    yield (
        "transformers-Adafactor",
        lambda groups, **more: Adafactor(groups, lr=0.05, scale_parameter=False, relative_step=False, **more),
    )
    yield (
        "transformers-Adafactor-relative",
        lambda groups, **more: Adafactor(groups, lr=None, warmup_init=True, **more),
    )


OPTIMIZERS = dict(_torch_optimizers())


@pytest.mark.parametrize("layout", ["mixed", "wholly ours", "ours first"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_is_that_of_no_decay(name: str, layout: str) -> None:
    """Bit for bit what the optimizer does if the user puts our vectors into a group without decay."""
    make = OPTIMIZERS[name]
    model, plain, decayed = Pair(), Pair(exempt=False), Pair(exempt=False)

    def groups(model: Pair, decay: float) -> list[dict[str, Any]]:
        ours, other = [model.ours.weight], list(model.other.parameters())
        if layout == "mixed":
            return [{"params": [other[0], *ours, other[1]], "weight_decay": DECAY}]
        both = [{"params": ours, "weight_decay": decay}, {"params": other, "weight_decay": DECAY}]
        return both if layout == "ours first" else both[::-1]

    reference = [
        {"params": list(plain.other.parameters()), "weight_decay": DECAY},
        {"params": [plain.ours.weight], "weight_decay": 0.0},
    ]
    expected, reference_optimizer = _run(make, reference, plain)
    user_groups = groups(model, DECAY)
    actual, optimizer = _run(make, user_groups, model)
    assert _equal(actual, expected)
    assert not _equal(_run(make, groups(decayed, DECAY), decayed)[0], expected)  # it would have shown

    # the user's groups are as the user made them, and all state is there
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY] * len(user_groups)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == [
        [id(parameter) for parameter in group["params"]] for group in user_groups
    ]
    for mine, theirs in zip(_by_name(model, optimizer), _by_name(plain, reference_optimizer), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def _by_name(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state[parameter] for parameter in model.parameters()]


def test_groups_stay_the_same_objects() -> None:
    """A scheduler, or its user, may hold on to the list or to a group."""
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=DECAY)
    groups, first = optimizer.param_groups, optimizer.param_groups[0]
    parameters = list(first["params"])
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["weight_decay"] for group in o.param_groups]))
    model.loss(0).backward()
    optimizer.step()
    assert seen == [[DECAY]]  # in the step too
    assert optimizer.param_groups is groups and groups[0] is first and len(groups) == 1
    assert all(mine is theirs for mine, theirs in zip(first["params"], parameters, strict=True))


class Counting(torch.optim.SGD):
    """As schedule-free optimizers and those of bitsandbytes do: counts in its groups and in itself."""

    started = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.started = True
        self.calls = getattr(self, "calls", 0) + 1
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_counts_is_kept() -> None:
    for parameters in (lambda model: model.parameters(), lambda model: [model.ours.weight]):
        model = Pair()
        optimizer = Counting(parameters(model), lr=0.1, weight_decay=DECAY)
        for step in range(3):
            model.loss(step).backward()
            optimizer.step()
        assert optimizer.started and optimizer.calls == 3
        assert [group["calls"] for group in optimizer.param_groups] == [3]
        assert optimizer.param_groups[0]["weight_decay"] == DECAY


def test_optimizer_without_decay_or_without_our_parameters_is_left_alone() -> None:
    model = Pair()
    for parameters, decay in ((model.parameters(), 0.0), (model.other.parameters(), DECAY)):
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=decay)
        seen: list[Any] = []
        optimizer.register_step_pre_hook(lambda o, args, kwargs, seen=seen: seen.append(args[0]))
        model.loss(0).backward()
        optimizer.step()
        assert seen[0] is optimizer


@pytest.mark.parametrize("scheduler", ["linear", "one cycle", "plateau"])
def test_learning_rate_schedulers(scheduler: str) -> None:
    def run(exempt: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        model = Pair(exempt)
        rest = list(model.other.parameters())
        groups = [{"params": [*rest, model.ours.weight] if exempt else rest}]
        if not exempt:
            groups.append({"params": [model.ours.weight], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=DECAY)
        schedules: dict[str, Callable[[], Any]] = {
            "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
            "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=6),  # betas too
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
        }
        schedule = schedules[scheduler]()
        rates = []
        for step in range(5):
            optimizer.zero_grad()
            value = model.loss(step)
            value.backward()
            optimizer.step()
            schedule.step(*([value.detach()] if scheduler == "plateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        assert len(set(rates)) > 1
        return _values(model), rates

    (actual, rates), (expected, reference_rates) = run(True), run(False)
    assert _equal(actual, expected) and rates == reference_rates


def test_state_dict_before_and_after() -> None:
    """What is written has the user's layout; an interrupted run goes on as if it had not been."""
    model, plain = Pair(), Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=DECAY, amsgrad=True)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    whole, _ = _run(
        lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=DECAY, amsgrad=True),
        [{"params": list(plain.parameters())}],
        plain,
        steps=6,
    )
    for step in range(3):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, saved)
    assert optimizer.state_dict()["param_groups"] == before
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    resumed = Pair()
    resumed.load_state_dict(checkpoint["model"])
    second = torch.optim.AdamW(resumed.parameters(), lr=1.0, weight_decay=0.9, amsgrad=True)
    second.load_state_dict(checkpoint["optimizer"])
    assert second.state_dict()["param_groups"] == before
    for step in range(3, 6):
        second.zero_grad()
        resumed.loss(step).backward()
        second.step()
    assert _equal(_values(resumed), whole)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_closure(cls: type[Optimizer]) -> None:
    def run(exempt: bool) -> dict[str, torch.Tensor]:
        model = Pair(exempt)
        rest = list(model.other.parameters())
        groups = [{"params": [*rest, model.ours.weight] if exempt else rest}]
        if not exempt:
            groups.append({"params": [model.ours.weight], "weight_decay": 0.0})
        optimizer = cls(groups, lr=0.05, weight_decay=DECAY)
        for step in range(3):

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                value = model.loss(step)
                value.backward()
                return value

            assert torch.is_tensor(optimizer.step(closure))
        return _values(model)

    assert _equal(run(True), run(False))


def test_exception_inside_a_step() -> None:
    """The next step begins with the user's groups again, and what was changed meanwhile is not lost."""
    model, plain = Pair(), Pair(exempt=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=DECAY)
    groups = optimizer.param_groups

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 0.1
    model.loss(0).backward()
    optimizer.step()
    assert optimizer.param_groups is groups and len(groups) == 1
    assert groups[0]["lr"] == 0.1 and groups[0]["weight_decay"] == DECAY
    reference = torch.optim.SGD(
        [{"params": [plain.ours.weight], "weight_decay": 0.0}, {"params": plain.other.parameters()}],
        lr=0.1,
        weight_decay=DECAY,
    )
    plain.loss(0).backward()
    reference.step()
    assert _equal(_values(model), _values(plain))


def test_state_is_whole_after_an_exception_inside_a_step() -> None:
    """Whoever catches it may save a checkpoint, or step a scheduler, before the next step."""
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=DECAY)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
    model.loss(0).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    rate = optimizer.param_groups[0]["lr"]

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"] == before
    scheduler.step()
    model.loss(1).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] > rate and len(optimizer.param_groups) == 1


def test_two_models_and_two_optimizers() -> None:
    models_ = [Pair(), Pair()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=DECAY) for m in models_]
    plain = Pair(exempt=False)
    expected, _ = _run(
        lambda groups: torch.optim.SGD(groups, lr=0.05),
        [
            {"params": list(plain.other.parameters()), "weight_decay": DECAY},
            {"params": [plain.ours.weight], "weight_decay": 0.0},
        ],
        plain,
    )
    for step in range(4):
        for model, optimizer in zip(models_, optimizers, strict=True):
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step()
    assert all(_equal(_values(model), expected) for model in models_)


# ---------------------------------------------------------------- who is exempt, and for how long


def _adapted() -> PeftModel:
    return get_peft_model(tiny("mlp"), SSFConfig(target_modules=["fc1", "norm"]))


def _is_exempt(model: nn.Module) -> bool:
    """Whether a step without gradient of size, but with decay, leaves all trainable parameters where they are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(parameters, lr=0.1, weight_decay=DECAY).step()
    assert parameters
    return all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_copies_are_exempt_too() -> None:
    model = _adapted()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        model,
        copy.deepcopy(model),
        copy.deepcopy(copy.deepcopy(model)),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    del model
    gc.collect()
    assert all(_is_exempt(m) for m in copies)
    assert not _is_exempt(tiny("mlp"))


def test_exempt_after_moves_and_replacements() -> None:
    model = _adapted()
    assert _is_exempt(model.double()) and _is_exempt(model.to(torch.float32))
    model.add_adapter("second", SSFConfig(target_modules=["fc2"], shift=True))
    model.set_adapter("second")
    assert _is_exempt(model)
    for module in model.modules():
        if isinstance(module, AdapterVector):
            module.weight = nn.Parameter(module.weight.detach().clone())
    assert _is_exempt(model)


def test_merely_frozen_or_shared_parameters() -> None:
    """Only what an adapter itself owns is exempt: a head that is trained in full decays as ever."""
    model = get_peft_model(tiny("mlp"), SSFConfig(target_modules=["fc1"], modules_to_save=["head"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(trained.values(), lr=0.1, weight_decay=DECAY).step()
    for name, parameter in trained.items():
        assert torch.equal(parameter, before[name]) == ("ssf_" in name), name


def test_hooks_live_as_long_as_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_undecayed", weakref.WeakSet())  # other tests may hold on to their adapters
    monkeypatch.setattr(schedule, "_handles", [])
    others = _hooks()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    exempt_from_weight_decay(first)
    exempt_from_weight_decay(second)
    exempt_from_weight_decay(second)
    assert _hooks() == others + 2
    del first
    gc.collect()
    assert _hooks() == others + 2
    del second
    gc.collect()
    assert _hooks() == others and not len(schedule._undecayed)
    third = nn.Linear(2, 2)
    exempt_from_weight_decay(third)
    assert _hooks() == others + 2  # and it starts again
    del third
    gc.collect()
    assert _hooks() == others


def test_nothing_is_kept_alive() -> None:
    model = _adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=DECAY)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    leaves = [weakref.ref(module) for module in model.modules() if isinstance(module, AdapterVector)]
    watched = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert watched() is None and all(leaf() is None for leaf in leaves)


def test_optimizer_survives_the_model() -> None:
    """The hooks go with the last adapter; an optimizer that outlives it steps as usual."""
    model = Pair()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=DECAY)
    model.loss(0).backward()
    optimizer.step()
    del model
    gc.collect()
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == DECAY


# ---------------------------------------------------------------- what people train with


class _Data(Dataset):
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw_torch"},
        {"optim": "adafactor"},
        {"optim": "sgd", "gradient_accumulation_steps": 2},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=["default", "adamw", "adafactor", "sgd", "bf16"],
)
def test_trainer_with_decay_moves_ssf_as_without(options: dict[str, Any], tmp_path: Any) -> None:
    """The issue's promise, with the real `Trainer`: bit for bit."""
    data = _Data(inputs("bert", batch=12))

    def run(decay: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = get_peft_model(tiny("bert"), SSFConfig())
        before = _values(model)
        arguments = TrainingArguments(
            str(tmp_path),
            weight_decay=decay,
            learning_rate=1e-2,
            max_steps=4,
            per_device_train_batch_size=3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        Trainer(model, arguments, train_dataset=data).train()
        after = _values(model)
        moved = [key for key in after if not torch.equal(after[key], before[key])]
        assert moved and all("ssf_" in key for key in moved)
        return after

    assert _equal(run(0.1), run(0.0))


def test_grad_scaler() -> None:
    """A scaler skips steps whose gradients overflow, and takes the others, with the groups intact throughout."""

    def run(exempt: bool) -> tuple[dict[str, torch.Tensor], int]:
        model = Pair(exempt)
        rest = list(model.other.parameters())
        groups = [{"params": [*rest, model.ours.weight] if exempt else rest}]
        if not exempt:
            groups.append({"params": [model.ours.weight], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=DECAY, fused=True)
        steps = [0]
        optimizer.register_step_post_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(5):
            optimizer.zero_grad()
            value = model.loss(step) * (float("inf") if step == 2 else 1.0)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert len(optimizer.param_groups) == len(groups)
        return _values(model), steps[0]

    (actual, steps), (expected, _) = run(True), run(False)
    assert _equal(actual, expected) and steps >= 4
    assert all(torch.isfinite(value).all() for value in actual.values())


def test_accelerate() -> None:
    def run(decay: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = get_peft_model(tiny("bert"), SSFConfig())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for step in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, inputs("bert", seed=step)))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return _values(accelerator.unwrap_model(model))

    assert _equal(run(0.1), run(0.0))


# ---------------------------------------------------------------- what is set while a step is under way


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_set_during_a_step_counts(fused: bool) -> None:
    """A rate set by a step hook, a scheduler and a new group inside a closure: as if nothing stood in."""

    def run(exempt: bool) -> tuple[dict[str, torch.Tensor], list[Any]]:
        model = Pair(exempt)
        rest = [model.other.weight]
        groups = [{"params": [*rest, model.ours.weight] if exempt else rest}]
        if not exempt:
            groups.append({"params": [model.ours.weight], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=DECAY, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

        def set_betas(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                group["betas"] = (0.5, 0.9)

        optimizer.register_step_pre_hook(set_betas)
        seen = []
        for step in range(3):

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                if step:
                    scheduler.step()
                if step == 2:
                    optimizer.add_param_group({"params": [model.other.bias]})
                value = model.loss(step)
                value.backward()
                return value

            optimizer.step(closure)
            seen.append({key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay", "betas")})
        return _values(model), seen

    (actual, seen), (expected, reference) = run(True), run(False)
    assert seen == reference and _equal(actual, expected)


class CountsFirst(Counting):
    """Counts, then runs the closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        if closure is not None:
            with torch.enable_grad():
                closure()


def test_a_counter_is_kept_if_the_closure_raises() -> None:
    model = Pair()
    optimizer = CountsFirst(model.parameters(), lr=0.1, weight_decay=DECAY)
    model.loss(0).backward()

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.calls == 1 and optimizer.param_groups[0]["calls"] == 1


# ---------------------------------------------------------------- optimizers that wrap others


class Steps:
    """A listener that counts."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.seen: list[str] = []
        schedule.listen_to_steps(self)

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        self.seen.append(f"before {type(optimizer).__name__} {closure}")

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        self.seen.append(f"after {type(optimizer).__name__} {taken}")

    def foreign_step(self, optimizer: Optimizer) -> None:
        self.seen.append("foreign")


class SAM(Optimizer):
    """Sharpness-aware minimisation: a step uphill, a second gradient there, and the base's step from the start."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["e"] = 0.05 * p.grad / (norm + 1e-12)
            p.add_(self.state[p]["e"])
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p in parameters:
            p.sub_(self.state[p]["e"])
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Every second step goes half of the way back to slow weights."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = self.optimizer.step(closure)
        self.steps += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.clone())
            if self.steps % 2 == 0:
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)
        return result


@pytest.mark.parametrize("wrapper", ["sam", "lookahead"])
def test_a_step_of_a_wrapped_optimizer_counts_once(wrapper: str) -> None:
    def run(exempt: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
        model = Pair(exempt)
        steps = Steps(model.ours.weight)
        rest = list(model.other.parameters())
        groups = [{"params": [*rest, model.ours.weight] if exempt else rest}]
        if not exempt:
            groups.append({"params": [model.ours.weight], "weight_decay": 0.0})
        if wrapper == "sam":
            optimizer: Optimizer = SAM(groups, torch.optim.AdamW, lr=0.05, weight_decay=DECAY)
        else:
            optimizer = Lookahead(torch.optim.AdamW(groups, lr=0.05, weight_decay=DECAY))
        for step in range(5):

            def backward(step: int = step) -> None:
                optimizer.zero_grad()
                model.loss(step).backward()

            backward()
            optimizer.step(backward) if wrapper == "sam" else optimizer.step()
        return _values(model), steps.seen

    (actual, seen), (expected, _) = run(True), run(False)
    assert seen == ["before AdamW False", "after AdamW True"] * 5
    assert _equal(actual, expected)
    assert schedule.optimizer_of(Pair().ours.weight) is None


def _train_sharded(rank: int, path: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    model = Pair()
    steps = [Steps(model.ours.weight), Steps(model.other.weight)]
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.05, weight_decay=DECAY
    )
    for step in range(5):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    torch.save((_values(model), [listener.seen for listener in steps]), f"{path}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then deadlock with the interpreter when both go


def test_a_step_of_a_sharded_optimizer_counts_once(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path),), nprocs=2)
    plain = Pair(exempt=False)
    expected, _ = _run(
        lambda groups: torch.optim.AdamW(groups, lr=0.05),
        [
            {"params": [plain.ours.weight], "weight_decay": 0.0},
            {"params": list(plain.other.parameters()), "weight_decay": DECAY},
        ],
        plain,
        steps=5,
    )
    for rank in range(2):
        values, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert _equal(values, expected)
        assert seen == [["before ZeroRedundancyOptimizer False", "after ZeroRedundancyOptimizer True"] * 5] * 2


def test_a_step_that_only_makes_state_is_no_training() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = Pair()
    steps = Steps(model.ours.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    get_optimizer_state_dict(model, optimizer)
    assert steps.seen == ["after AdamW False"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the first step of a warm-up
    model.loss(0).backward()
    optimizer.step()
    assert steps.seen[1:] == ["before AdamW False", "after AdamW True"]


def test_distributed_checkpoints_of_masks() -> None:
    """`get_state_dict` makes a step with gradients of zero, which is none of the training of the masks."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from peft_ext import MaskLoraConfig

    model = get_peft_model(tiny("bert"), MaskLoraConfig(total_steps=None, target_sparsity=0.3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    get_state_dict(model, optimizer)
    steps = [buffer for key, buffer in model.named_buffers() if key.endswith("progress")]
    assert steps and not any(int(step) for step in steps)
