"""Sparse fine-tuning: against a dense reference, under every trainer, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, inputs, logits, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_integrations import arguments, classification_data
from torch import nn
from transformers import Trainer

import peft_ext
from peft_ext import SparseFTConfig
from peft_ext.delta import SparseDelta
from peft_ext.tuners.sparse_ft import optimizer_state, tracker
from peft_ext.tuners.sparse_ft.budget import proportional
from peft_ext.tuners.sparse_ft.config import ONLY_WITH
from peft_ext.tuners.sparse_ft.deltas import deltas


class One(nn.Module):
    """A single Linear(6, 8), the model of the scripted runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


SHAPE, K = (8, 6), 12


def taken(selection: str, **fields: Any) -> dict[str, Any]:
    """Those of the fields that have an effect with this selection, which is one of them."""
    own = {name: value for name, value in fields.items() if selection in ONLY_WITH.get(name, (selection,))}
    return {"selection": selection, **own}


def one(selection: str, total_steps: int | None = 40, **fields: Any) -> tuple[PeftModel, SparseDelta]:
    torch.manual_seed(0)
    fields = taken(selection, total_steps=total_steps, **fields)
    config = SparseFTConfig(num_tunable_weights=K, target_modules=["fc"], **fields)
    model = get_peft_model(One(), config)
    (_, leaf) = next(deltas(model, "default"))
    return model, leaf


def test_a_random_support_depends_on_the_seed() -> None:
    supports = [one("random", seed=seed)[1].indices().tolist() for seed in (0, 0, 1, 2)]
    assert supports[0] == supports[1]
    assert len({tuple(support) for support in supports}) == 3


def scripted_gradient(step: int, micro: int = 0) -> torch.Tensor:
    """The gradient of the weight at a step, `(8, 6)`."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(SHAPE, generator=generator)


def backward_of(model: nn.Module, gradient: torch.Tensor) -> None:
    """A backward that gives the weight of the Linear exactly this gradient: x is the identity."""
    output = model(torch.eye(SHAPE[1]))  # (6, 8)
    output.backward(gradient.T.contiguous())


def support_of(leaf: SparseDelta) -> dict[int, float]:
    return dict(zip(leaf.indices().tolist(), leaf.weight.tolist(), strict=True))


def on_support(leaf: SparseDelta, vector: torch.Tensor) -> dict[int, float]:
    return dict(zip(leaf.indices().tolist(), vector.tolist(), strict=True))


# The dense reference: whole matrices and Python sets, written from the description of the methods alone


class DenseReference:
    """Holds the delta, the moments and the statistics as (8, 6) matrices, and the support as a set."""

    def __init__(self, support: set[int], total: int, policy: str = "linear", rate: float = 0.2) -> None:
        self.support = set(support)
        self.total, self.policy, self.rate = total, policy, rate
        self.delta = torch.zeros(SHAPE).flatten()
        self.t = 0

    def number(self) -> int:
        if self.t > self.total:
            return 0
        if self.policy == "linear":
            p = 1.0 if self.t == 5 else self.rate * (1 - self.t / self.total)
        else:
            p = self.rate * (1 + math.cos(math.pi * self.t / self.total)) / 2
        return int(len(self.support) * p)

    def smallest(self, number: int) -> list[int]:
        return sorted(sorted(self.support), key=lambda i: abs(float(self.delta[i])))[:number]

    @property
    def is_time(self) -> bool:
        return self.t >= 5 and (self.t - 5) % 20 == 0


class DenseAG(DenseReference):
    def __init__(self, *args: Any, lr: float = 1e-2, decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lr, self.decay = lr, decay
        self.m = torch.zeros(48)
        self.v = torch.zeros(48)
        self.candidates: list[int] = []
        self.seen: list[torch.Tensor] = []

    def step(self, micro_gradients: list[torch.Tensor]) -> None:
        gathering = self.t < 5 or self.t % 20 == 19 or self.t % 20 < 5
        if gathering and not self.candidates:
            first = micro_gradients[0].flatten().abs()
            self.candidates = first.argsort(descending=True)[: len(self.support)].tolist()
        g = sum(micro_gradients).flatten()
        self.t += 1
        if self.candidates:
            self.seen.append(g)
        inside = torch.zeros(48)
        inside[sorted(self.support)] = 1.0
        self.delta *= 1 - self.lr * self.decay
        self.m = inside * (0.9 * self.m + 0.1 * g)
        self.v = inside * (0.999 * self.v + 0.001 * g**2)
        m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.delta -= inside * self.lr * m_hat / (v_hat.sqrt() + 1e-8)
        if self.is_time:
            self.reselect()

    def reselect(self) -> None:
        number = self.number()
        dropped = set(self.smallest(number))
        surviving = self.support - dropped
        pool = [i for i in self.candidates if i not in surviving]
        total = sum(self.seen)
        grown = set(sorted(pool, key=lambda i: -abs(float(total[i])))[:number])
        for i in dropped - grown:
            self.delta[i] = self.m[i] = self.v[i] = 0.0
        mean, mean_square = total / len(self.seen), sum(g**2 for g in self.seen) / len(self.seen)
        for i in grown - dropped:
            self.delta[i] = 0.0
            self.m[i] = mean[i] * (1 - 0.9**self.t)
            self.v[i] = mean_square[i] * (1 - 0.999**self.t)
        assert len(grown) == number, "too few candidates: the scripted run does not reach this"
        self.support = surviving | grown
        self.candidates, self.seen = [], []


class DenseMA(DenseReference):
    def __init__(self, *args: Any, lr: float = 1e-2, decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lr, self.decay = lr, decay
        self.r, self.c = [0.0] * 8, [0.0] * 6

    def step(self, micro_gradients: list[torch.Tensor]) -> None:
        g = sum(micro_gradients).flatten()
        self.t += 1
        nu = {i: min(self.r[i // 6], self.c[i % 6]) + float(g[i]) ** 2 for i in self.support}
        for i, value in nu.items():
            self.delta[i] -= self.lr * g[i] / math.sqrt(value + 1e-8)
            self.delta[i] *= 1 - self.lr * self.decay
        for i, value in nu.items():  # running maxima, which a place that leaves the support does not take along
            self.r[i // 6] = max(self.r[i // 6], value)
            self.c[i % 6] = max(self.c[i % 6], value)
        if self.is_time:
            number = self.number()
            outside = [i for i in range(48) if i not in self.support]
            grown = sorted(outside, key=lambda i: -torch.tensor(self.r[i // 6] * self.c[i % 6]).item())[:number]
            dropped = self.smallest(len(grown))
            for i in dropped:
                self.delta[i] = 0.0
            self.support = (self.support - set(dropped)) | set(grown)


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize("fused", [False, True])
def test_ag_equals_the_dense_reference(policy: str, fused: bool, micro_steps: int) -> None:
    model, leaf = one("spiel-ag", reselection_policy=policy, reselection_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, fused=fused)
    reference = DenseAG(set(support_of(leaf)), total=40, policy=policy, rate=0.5, decay=0.3)
    turnover = 0
    for step in range(30):
        before = support_of(leaf)
        gradients = [scripted_gradient(step, micro) for micro in range(micro_steps)]
        for gradient in gradients:
            backward_of(model, gradient)
        optimizer.step()
        optimizer.zero_grad()
        reference.step(gradients)
        ours = support_of(leaf)
        assert set(ours) == reference.support
        turnover += len(set(before) - set(ours))
        state = optimizer.state[leaf.weight]
        for vector, expected in ((leaf.weight, reference.delta), (state["exp_avg"], reference.m)):
            torch.testing.assert_close(vector.detach(), expected[leaf.indices()], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"], reference.v[leaf.indices()], rtol=1e-4, atol=1e-7)
    assert turnover >= (K // 2 if policy == "linear" else 2)


@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_ma_equals_the_dense_reference(policy: str, optimizer_class: type[torch.optim.Optimizer]) -> None:
    model, leaf = one("spiel-ma", total_steps=100, reselection_policy=policy, reselection_rate=0.5)
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.3)
    reference = DenseMA(set(support_of(leaf)), total=100, policy=policy, rate=0.5, decay=0.3)
    for step in range(70):  # four reselections
        gradients = [scripted_gradient(step, micro) for micro in range(2)]
        for gradient in gradients:
            backward_of(model, gradient)
        optimizer.step()
        optimizer.zero_grad()
        reference.step(gradients)
        assert set(support_of(leaf)) == reference.support
        torch.testing.assert_close(leaf.weight.detach(), reference.delta[leaf.indices()], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(leaf.tracker.rows, torch.tensor(reference.r), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.tracker.columns, torch.tensor(reference.c), rtol=1e-5, atol=1e-6)
    assert len(leaf.tracker.reselections) == 4


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_survivors_are_untouched_bit_for_bit(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = one(selection, reselection_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    move = tracker.Tracker._move

    def watched(self: Any, leaf: SparseDelta, optimizer: Any, *args: Any) -> None:
        def everything() -> list[dict[int, float]]:
            vectors = [leaf.weight.detach(), leaf.weight.grad]
            vectors += [
                optimizer.state[leaf.weight][key] for key in ("exp_avg", "exp_avg_sq") if selection != "spiel-ma"
            ]
            return [on_support(leaf, vector) for vector in vectors]

        before = everything()
        move(self, leaf, optimizer, *args)
        seen.append((before, everything()))

    monkeypatch.setattr(tracker.Tracker, "_move", watched)
    for step in range(30):
        backward_of(model, scripted_gradient(step))
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 2
    for before, after in seen:
        survivors = set(before[0]) & set(after[0])
        assert len(after[0]) == K
        assert all(old[i] == new[i] for old, new in zip(before, after, strict=True) for i in survivors)
        assert all(after[0][i] == 0 for i in set(after[0]) - survivors)
    assert len(set(seen[1][0][0]) & set(seen[1][1][0])) >= K // 2


def test_schedule() -> None:
    _, leaf = one("spiel-ag", total_steps=100)
    gathering = []
    for step in range(130):
        leaf.tracker.step = step
        if leaf.tracker.is_gathering(1000):
            gathering.append(step + 1)  # the update that is under way
    assert gathering[:17] == [*range(1, 6), *range(20, 26), *range(40, 46)]
    assert gathering[-1] == 85
    assert [round(leaf.tracker.rate_at(step), 4) for step in (5, 25, 85, 105)] == [1.0, 0.15, 0.03, 0.0]


class DenseSaRA:
    """AdamW on the deltas of the weights below the threshold; half way those that have left it stop for good."""

    def __init__(self, weight: torch.Tensor, threshold: float, reselect_at: int, lr: float, decay: float) -> None:
        self.weight, self.threshold, self.reselect_at, self.lr, self.decay = weight, threshold, reselect_at, lr, decay
        self.delta, self.m, self.v = (torch.zeros_like(weight) for _ in range(3))
        self.mask = (weight.abs() < threshold).double()
        self.t = 0

    def step(self, gradient: torch.Tensor) -> None:
        self.t += 1
        g = gradient.double() * self.mask
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        step = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.delta = torch.where(self.mask > 0, self.delta * (1 - self.lr * self.decay) - self.lr * step, self.delta)
        if self.t == self.reselect_at:
            self.mask = self.mask * ((self.weight + self.delta).abs() < self.threshold)


def test_below_equals_the_dense_reference() -> None:
    torch.manual_seed(0)
    base = One()
    config = SparseFTConfig(selection="below", threshold=0.2, target_modules=["fc"], total_steps=40)
    reference = DenseSaRA(base.fc.weight.detach().double().clone(), 0.2, 20, lr=1e-2, decay=0.3)
    model = get_peft_model(base, config)
    (_, leaf) = next(deltas(model, "default"))
    places = reference.mask.flatten().nonzero().squeeze(1)
    assert leaf.indices().tolist() == places.tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    for step in range(30):
        run_steps(model, optimizer, range(step, step + 1))
        reference.step(scripted_gradient(step))
        torch.testing.assert_close(
            leaf.weight.detach().double(), reference.delta.flatten()[places], rtol=1e-4, atol=1e-6
        )
    frozen = reference.mask.flatten()[places] == 0
    assert 0 < frozen.sum() < len(places) and leaf.tracker.reselections == [(20, int(frozen.sum()))]


def test_frozen_values_do_not_count_in_the_norm_that_clips() -> None:
    """SaRA after its reselection: their gradients are zero from the backward on, over micro-batches, too."""
    torch.manual_seed(0)
    config = SparseFTConfig(selection="below", threshold=0.2, target_modules=["fc"], reselect_at=4)
    model = get_peft_model(One(), config)
    (_, leaf) = next(deltas(model, "default"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    run_steps(model, optimizer, range(4))
    frozen = leaf.tracker.frozen
    assert 0 < frozen.sum() < len(frozen)
    for _ in range(2):
        backward_of(model, scripted_gradient(5))
    assert not leaf.weight.grad[frozen].any() and leaf.weight.grad[~frozen].all()


class DenseID3:
    """AdamW with masked gradients, the mask growing in every step before the update."""

    def __init__(self, weight: torch.Tensor, k: int, total: int, power: float, eps: float, lr: float) -> None:
        self.weight, self.k, self.total, self.power, self.eps, self.lr = weight, k, total, power, eps, lr
        self.delta, self.m, self.v, self.mask = (torch.zeros_like(weight) for _ in range(4))
        self.t = 0

    def step(self, gradient: torch.Tensor) -> None:
        score = (gradient.double().abs() / (self.weight.abs() + self.eps) ** self.power) * (1 - self.mask)
        self.t += 1
        number = self.k * min(self.t, self.total) // self.total - int(self.mask.sum())
        self.mask.view(-1)[score.flatten().topk(number).indices] = 1.0
        g = gradient.double() * self.mask
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        self.delta -= self.lr * self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


@pytest.mark.parametrize("power", [0.5, 0.0])
def test_growing_equals_the_dense_reference(power: float) -> None:
    fields = {"growth_power": power, "growth_eps": 0.01}
    model, leaf = one("growing", total_steps=20, **fields)
    weight = model.base_model.model.fc.base_layer.weight.detach().double()
    reference = DenseID3(weight, K, 20, power, 0.01, lr=1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(25):
        if step == 11:  # taken up from a checkpoint
            tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if "sparse_ft" in key}
            state = pickle.loads(pickle.dumps(optimizer.state_dict()))
            model, leaf = one("growing", total_steps=20, seed=5, **fields)
            model.load_state_dict(tensors, strict=False)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
            optimizer.load_state_dict(state)
        run_steps(model, optimizer, range(step, step + 1))
        reference.step(scripted_gradient(step))
        dense = torch.zeros(48).index_add(0, leaf.indices(), leaf.weight.detach()).double()
        torch.testing.assert_close(dense, reference.delta.flatten(), rtol=1e-4, atol=1e-6)
        assert int(leaf.tracker.active.sum()) == int(reference.mask.sum())
    assert int(reference.mask.sum()) == K and set(support_of(leaf)) == set(
        reference.mask.flatten().nonzero()[:, 0].tolist()
    )


def test_gradual_selections_under_the_trainer(tmp_path: Path) -> None:
    for selection, fields in (
        ("below", {"threshold": 0.1, "num_tunable_weights": None}),
        ("growing", {"num_tunable_weights": 40}),
    ):
        model = classifier(selection, total_steps=None, **fields)
        settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 0.05}
        trainer_for(model, tmp_path, callbacks=[peft_ext.SparseFTCallback()], max_steps=10, **settings).train()
        leaves = [leaf for _, leaf in deltas(model, "default")]
        assert all(leaf.tracker.step == 10 and leaf.tracker.reselections for leaf in leaves)
        model.save_pretrained(tmp_path / selection)
        torch.manual_seed(1)
        loaded = PeftModel.from_pretrained(Classifier(), tmp_path / selection)
        x = torch.randn(4, 6)
        torch.testing.assert_close(loaded.eval()(x)["logits"], model.eval()(x)["logits"])
        if selection == "growing":
            assert all((leaf.weight != 0).all() for leaf in leaves)
    model, _ = one("growing", total_steps=None)
    with pytest.raises(ValueError, match="not known how fast the support is to grow"):
        run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(1))


# It drives itself


def run_steps(model: nn.Module, optimizer: Any, steps: range, micro_steps: int = 1) -> None:
    for step in steps:
        for micro in range(micro_steps):
            backward_of(model, scripted_gradient(step, micro) / micro_steps)
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "torch adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers adafactor": lambda p: _transformers_adafactor(p),
}


def _transformers_adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, selection: str) -> None:
    model, leaf = one(selection, reselection_rate=0.5)
    start = set(support_of(leaf))
    optimizer = OPTIMIZERS[name](model.parameters())
    run_steps(model, optimizer, range(26))
    assert len(leaf.tracker.reselections) == 2
    assert set(support_of(leaf)) != start
    assert torch.isfinite(leaf.weight).all() and (leaf.weight != 0).any()


def test_seeds_are_the_unbiased_means() -> None:
    """What has just grown is where Adam would be, had it seen the mean gradient and the mean square so far."""
    model, leaf = one("spiel-ag")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))
    start = set(support_of(leaf))
    gradients = [scripted_gradient(step).flatten() for step in range(5)]
    run_steps(model, optimizer, range(5))
    state = optimizer.state[leaf.weight]
    mean, square = sum(gradients) / 5, sum(g**2 for g in gradients) / 5
    new = torch.tensor([i not in start for i in leaf.indices().tolist()])
    places = leaf.indices()[new]
    assert len(places) > 3
    torch.testing.assert_close(state["exp_avg"][new] / (1 - 0.8**5), mean[places])
    torch.testing.assert_close(state["exp_avg_sq"][new] / (1 - 0.99**5), square[places])


def test_clipping_applies_to_the_seeds() -> None:
    model, leaf = one("spiel-ag")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = set(support_of(leaf))
    scaled = []
    for step in range(5):
        backward_of(model, scripted_gradient(step))
        before = leaf.weight.grad.norm()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaled.append(scripted_gradient(step).flatten() * (0.1 / before))
        optimizer.step()
        optimizer.zero_grad()
    new = torch.tensor([i not in start for i in leaf.indices().tolist()])
    mean = sum(scaled) / 5
    found = optimizer.state[leaf.weight]["exp_avg"][new] / (1 - 0.9**5)
    torch.testing.assert_close(found, mean[leaf.indices()[new]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma", "growing"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling_and_skipped_steps(selection: str, fused: bool) -> None:
    """Scaled and unscaled runs agree, and a step that overflows counts for nothing, fused or not."""
    results = []
    for scaled in (False, True):
        model, leaf = one(selection, reselection_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        step = 0
        for attempt in range(28):
            overflows = scaled and attempt in (0, 7, 22)
            if not scaled and attempt >= 25:
                break
            gradient = scaler.scale(scripted_gradient(step))
            backward_of(model, gradient * torch.inf if overflows else gradient)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += not overflows
        assert leaf.tracker.step == 25
        results.append(support_of(leaf))
    assert set(results[0]) == set(results[1])
    torch.testing.assert_close(torch.tensor(list(results[0].values())), torch.tensor(list(results[1].values())))


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
@pytest.mark.parametrize("at", [3, 5, 12, 22])
def test_resuming_changes_nothing(selection: str, at: int) -> None:
    """Adapter tensors and optimizer state through files are all it takes, also in the middle of a phase."""
    model, leaf = one(selection, reselection_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run_steps(model, optimizer, range(30), micro_steps=2)

    first, _ = one(selection, reselection_rate=0.5)
    first_optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    run_steps(first, first_optimizer, range(at), micro_steps=2)
    tensors = {key: tensor.clone() for key, tensor in first.state_dict().items() if "sparse_ft" in key}
    state = pickle.loads(pickle.dumps(first_optimizer.state_dict()))
    assert not any("candidates" in key or "sums" in key for key in tensors)

    second, second_leaf = one(selection, reselection_rate=0.5, seed=5)
    second.load_state_dict(tensors, strict=False)
    second_optimizer = torch.optim.AdamW(second.parameters(), lr=1e-2)
    second_optimizer.load_state_dict(state)
    run_steps(second, second_optimizer, range(at, 30), micro_steps=2)
    assert support_of(second_leaf) == support_of(leaf)
    assert second_leaf.tracker.reselections == leaf.tracker.reselections


def test_a_second_run_keeps_what_the_first_has_learnt() -> None:
    model, leaf = one("spiel-ag")
    run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(30))
    learnt = support_of(leaf)
    run_steps(model, torch.optim.AdamW(model.parameters(), lr=0.0), range(30, 36))
    assert leaf.tracker.step == 6
    kept = set(learnt) & set(support_of(leaf))
    assert len(kept) >= K - 2
    assert all(learnt[i] == support_of(leaf)[i] for i in kept)


@pytest.mark.parametrize("is_kept", [False, True], ids=["first optimizer gone", "first optimizer kept"])
def test_a_second_optimizer_sees_the_backward_before_its_first_step(is_kept: bool) -> None:
    model, leaf = one("spiel-ag", reselection_steps=2, accumulation_steps=1)
    kept = []
    for run in (1, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if is_kept:
            kept.append(optimizer)
        run_steps(
            model, optimizer, range(1)
        )  # the first step is the first reselection, and what sees no gradient warns
        assert (leaf.tracker.step, len(leaf.tracker.reselections)) == (1, run)


def test_one_warning_without_total_steps() -> None:
    model, leaf = one("spiel-ag", total_steps=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="total_steps is not set") as caught:
        run_steps(model, optimizer, range(26))
    assert len(caught) == 1
    assert leaf.tracker.rate_at(65) == 0.2


def test_every_model_is_warned_of() -> None:
    for _ in range(2):
        model, _ = one("spiel-ag", total_steps=None)
        with pytest.warns(UserWarning, match="total_steps is not set"):
            run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(1))


def test_a_schedule_that_never_moved_says_so(tmp_path: Path) -> None:
    model, _ = one("spiel-ag")
    run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(3))
    with pytest.warns(UserWarning, match="has not moved since it was drawn at random: 3 steps were taken"):
        model.save_pretrained(tmp_path)
    model, leaf = one("spiel-ag")
    backward_of(model, scripted_gradient(0))
    with torch.no_grad():
        leaf.weight -= leaf.weight.grad  # an update that no torch optimizer makes
    with pytest.warns(UserWarning, match="no step of an optimizer that owns its values was seen"):
        model.save_pretrained(tmp_path)


def test_values_cast_to_bfloat16_are_put_back() -> None:
    model, leaf = one("spiel-ag")
    values = torch.randn(K) * 1e-2
    leaf.weight.data = values.clone()
    leaf.train()
    for parameter in model.parameters():  # what TRL does on a quantised base
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    assert torch.equal(leaf.weight, values)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run_steps(model, optimizer, range(3))
    assert (leaf.weight != values).all()
    leaf.weight.data = leaf.weight.data.to(torch.bfloat16)  # behind everybody's back
    leaf.weight.grad = None
    backward_of(model, scripted_gradient(0))
    with pytest.raises(ValueError, match=r"in torch.bfloat16, where small updates are lost"):
        optimizer.step()


def test_casting_the_model_leaves_the_values_in_fp32() -> None:
    model, leaf = one("random")
    leaf.weight.data = torch.randn(K)
    values = leaf.weight.detach().clone()
    model.to(torch.bfloat16)
    assert model.base_model.model.fc.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(leaf.weight, values)


def test_an_optimizer_that_does_not_own_the_values() -> None:
    torch.manual_seed(0)
    base = One()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    config = SparseFTConfig(num_tunable_weights=K, target_modules=["fc"], selection="spiel-ag", total_steps=9)
    model = get_peft_model(base, config)
    backward_of(model, scripted_gradient(0))
    with pytest.raises(ValueError, match="does not own the values of the sparse adapter"):
        optimizer.step()


class OddOptimizer(torch.optim.AdamW):
    """Keeps state in a form of its own."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sketch"] = torch.zeros(3)


@pytest.mark.parametrize("selection", ["spiel-ag", "growing"])
def test_a_model_goes_with_its_last_reference(selection: str) -> None:
    """It stops listening to other optimizers there and then, and not when garbage is collected."""
    model, leaf = one(selection)
    backward_of(model, scripted_gradient(0))
    gone = weakref.ref(leaf)
    gc.disable()
    try:
        del model, leaf
        assert gone() is None
    finally:
        gc.enable()


def test_an_optimizer_whose_state_cannot_be_moved() -> None:
    model, leaf = one("spiel-ag")
    optimizer = OddOptimizer(model.parameters(), lr=1e-2)
    backward_of(model, scripted_gradient(0))
    start = set(support_of(leaf))
    with pytest.raises(ValueError, match=r"OddOptimizer keeps 'sketch' of \(3,\).*adamw_torch"):
        optimizer.step()
    assert set(support_of(leaf)) == start


def test_ma_refuses_a_closure() -> None:
    model, _ = one("spiel-ma")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"does not work with `optimizer\.step"):
        optimizer.step(lambda: 0.0)


def test_ag_with_a_closure() -> None:
    results = []
    for with_closure in (False, True):
        model, leaf = one("spiel-ag", reselection_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(26):

            def closure(step: int = step, model: nn.Module = model, optimizer: Any = optimizer) -> float:
                optimizer.zero_grad()
                with torch.enable_grad():
                    backward_of(model, scripted_gradient(step))
                return 0.0

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(support_of(leaf))
    assert results[0] == results[1]


class SAM(torch.optim.Optimizer):
    """A step uphill, a second gradient there, and the base optimizer's step from the start."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, kwargs)
        self.base_optimizer = torch.optim.AdamW(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in parameters:
            self.state[p]["uphill"] = 0.05 * p.grad / p.grad.norm()
            p.add_(self.state[p]["uphill"])
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p in parameters:
            p.sub_(self.state[p]["uphill"])
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """Every third step goes half of the way back to slow weights."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        self.fast = torch.optim.AdamW(params, **kwargs)
        self.steps = 0
        super().__init__(self.fast.param_groups, {})
        self.param_groups = self.fast.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.fast.step(closure)
        self.steps += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", torch.zeros_like(p))
            if self.steps % 3 == 0:
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
@pytest.mark.parametrize("wrapper", [SAM, Lookahead])
def test_an_optimizer_around_another_one(wrapper: type[torch.optim.Optimizer], selection: str) -> None:
    """Steps count once, and what the outer one keeps moves along: a grown value has no slow past of another weight."""
    model, leaf = one(selection, reselection_rate=0.5)
    optimizer = wrapper(model.parameters(), lr=1e-2)
    slow = dict.fromkeys(support_of(leaf), 0.0)
    for step in range(25):

        def backward(step: int = step) -> None:
            optimizer.zero_grad()
            backward_of(model, scripted_gradient(step))

        backward()
        optimizer.step(backward) if wrapper is SAM else optimizer.step()
        if wrapper is Lookahead:
            ours = support_of(leaf)
            slow = {place: slow.get(place, 0.0) for place in ours}
            if step % 3 == 2:
                slow = ours
            expected = [slow[place] for place in sorted(slow)]
            torch.testing.assert_close(optimizer.state[leaf.weight]["slow"], torch.tensor(expected))
    assert leaf.tracker.step == 25 and [step for step, _ in leaf.tracker.reselections] == [5, 25]


class Shard(torch.optim.Optimizer):
    """Leaves a part of the parameters to other processes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.part = torch.optim.AdamW([self.param_groups[0]["params"][0]])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.part.step()


def test_a_sharded_optimizer_is_refused() -> None:
    model, leaf = one("spiel-ag")
    optimizer = Shard([nn.Parameter(torch.zeros(2)), leaf.weight])
    backward_of(model, scripted_gradient(0))
    with pytest.raises(ValueError, match="Shard keeps the state of the values in one process only"):
        optimizer.step()


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """A training is taken up from a `torch.distributed.checkpoint`, in the middle of a phase and between phases."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for selection in ("spiel-ag", "spiel-ma", "growing"):
        model, leaf = one(selection, reselection_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(30):
            run_steps(model, optimizer, range(step, step + 1))
            if step not in (2, 11, 22):
                continue
            path = tmp_path / f"{selection}-{step}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a single process
                tensors, state = get_state_dict(model, optimizer)
                dcp.save({"model": tensors, "optimizer": state}, checkpoint_id=path)
                second, second_leaf = one(selection, reselection_rate=0.5, seed=5)
                other = torch.optim.AdamW(second.parameters(), lr=1e-2)
                tensors, state = get_state_dict(second, other)
                content = {"model": tensors, "optimizer": state}
                dcp.load(content, checkpoint_id=path)
                set_state_dict(second, other, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
            run_steps(second, other, range(step + 1, 30))
            resumed = (second_leaf, other.state[second_leaf.weight])
        assert support_of(resumed[0]) == support_of(leaf)
        assert resumed[0].tracker.reselections == leaf.tracker.reselections and resumed[0].tracker.step == 30
        for key, value in optimizer.state[leaf.weight].items():
            torch.testing.assert_close(resumed[1][key], value, rtol=0, atol=0)


class DenseAverage:
    """The average of the whole matrix, of which what is outside the support is dropped when the support moves."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: torch.Tensor | None = None

    def update(self, support: dict[int, float]) -> None:
        dense = torch.zeros(48, dtype=torch.float64)
        for place, value in support.items():
            dense[place] = value
        inside = torch.tensor([place in support for place in range(48)])
        before = dense if self.average is None else self.average * inside
        self.average = self.decay * before + (1 - self.decay) * dense


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma", "growing"])
@pytest.mark.parametrize("first", [0, 7])
def test_averages_move_with_the_support(selection: str, first: int) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, leaf = one(selection, reselection_rate=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    (_, averaged) = next(deltas(average.module, "default"))
    backup = copy.deepcopy(model)
    (_, kept) = next(deltas(backup, "default"))
    before = support_of(kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = DenseAverage(0.9)
    for step in range(30):
        run_steps(model, optimizer, range(step, step + 1))
        if step >= first:
            average.update_parameters(model)
            reference.update(support_of(leaf))
            assert reference.average is not None
            dense = torch.zeros(48, dtype=torch.float64)
            for place, value in support_of(averaged).items():
                dense[place] = value
            torch.testing.assert_close(dense, reference.average, rtol=1e-4, atol=1e-7)
    assert support_of(kept) == before  # a copy that nobody writes to stays what it is
    kept_model = copy.deepcopy(model)
    run_steps(model, optimizer, range(30, 50))
    kept_model.load_state_dict(model.state_dict())
    run_steps(model, optimizer, range(50, 70))
    kept_model(torch.eye(6))  # loaded, not averaged: it need not be where the original is


def test_averaged_buffers_are_refused() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, _ = one("spiel-ag", reselection_rate=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(7):
        run_steps(model, optimizer, range(step, step + 1))
        if step != 4:
            average.update_parameters(model)
    with pytest.raises(ValueError, match="use_buffers=False"):
        for _ in range(3):
            average.update_parameters(model)
            average(torch.eye(6))
    with torch.no_grad():  # an average of the parameters alone, begun after the support had moved
        for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
            theirs.lerp_(ours, 0.5)
    with pytest.raises(ValueError, match="begin to average after the last reselection"):
        other(torch.eye(6))


def test_two_adapters_train_apart() -> None:
    model, _ = one("spiel-ag")
    model.add_adapter(
        "other",
        SparseFTConfig(num_tunable_weights=6, target_modules=["fc"], selection="spiel-ag", total_steps=40, seed=1),
    )
    leaves = {name: next(deltas(model, name))[1] for name in ("default", "other")}
    optimizer = torch.optim.AdamW([leaf.weight for leaf in leaves.values()], lr=1e-2)
    before = support_of(leaves["other"])
    run_steps(model, optimizer, range(6))
    assert support_of(leaves["other"]) == before and leaves["other"].tracker.step == 0
    model.set_adapter("other")
    before = support_of(leaves["default"])
    run_steps(model, optimizer, range(6, 14))
    assert support_of(leaves["default"]) == before
    assert leaves["other"].tracker.reselections == [(5, leaves["other"].tracker.reselections[0][1])]


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma", "growing"])
def test_an_inactive_adapter_takes_no_part_in_the_training_of_another(selection: str) -> None:
    """Not even where the optimizer holds it, and the schedule lacks what it would need to be trained."""
    model, leaf = one(selection, total_steps=None)
    model.add_adapter("other", SparseFTConfig(num_tunable_weights=K, target_modules=["fc"], selection="random"))
    model.set_adapter("other")
    leaf.weight.data = leaf.weight.data.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_steps(model, optimizer, range(3))
    assert leaf not in optimizer.state and leaf.tracker.step == 0


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma", "growing"])
def test_an_adapter_that_was_loaded_beside_another_moves_once_it_is_trained(selection: str, tmp_path: Path) -> None:
    model, leaf = one(selection)
    run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(6))
    model.save_pretrained(tmp_path)
    other = get_peft_model(One(), SparseFTConfig(num_tunable_weights=K, target_modules=["fc"], selection="random"))
    other.load_adapter(str(tmp_path), "loaded")
    other.set_adapter("loaded")
    ((_, loaded),) = deltas(other, "loaded")
    before = loaded.indices().clone()
    assert torch.equal(before, leaf.indices())
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    run_steps(other, optimizer, range(30, 60))
    assert not torch.equal(loaded.indices(), before)


def test_copies_go_their_own_way_and_nothing_is_kept_alive() -> None:
    from peft_ext.core import schedule

    model, leaf = one("spiel-ag")
    run_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(3))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    (_, twin_leaf) = next(deltas(twin, "default"))
    assert support_of(twin_leaf) == support_of(leaf)
    run_steps(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2), range(6))
    assert twin_leaf.tracker.reselections and not leaf.tracker.reselections
    del model, leaf, twin, twin_leaf
    gc.collect()
    assert not len(schedule._listeners)


# Under the Trainer


class Rows(torch.utils.data.Dataset):
    """Random rows for `MLP`, or for a tiny language model."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 6, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Classifier(MLP):
    """`MLP` with the loss inside, as the Trainer wants it."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # type: ignore[override]
        output = {"logits": super().forward(x)}
        if labels is not None:
            output["loss"] = nn.functional.cross_entropy(output["logits"], labels)
        return output


def trainer_for(model: nn.Module, path: Path, callbacks: list[Any] | None = None, **fields: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "weight_decay": 0.0,
        "dataloader_pin_memory": False,
        **fields,
    }
    return Trainer(
        model=model, args=TrainingArguments(str(path), **settings), train_dataset=Rows(), callbacks=callbacks
    )


def classifier(selection: str = "spiel-ag", **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    fields = {"num_tunable_weights": 40, "target_modules": ["fc1", "fc2"], "total_steps": 60, **fields}
    fields.setdefault("reselection_rate", 0.5)
    return get_peft_model(Classifier(), SparseFTConfig(**taken(selection, **fields)))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_under_the_trainer(selection: str, optim: str, tmp_path: Path) -> None:
    model = classifier(selection)
    trainer_for(
        model, tmp_path, optim=optim, gradient_accumulation_steps=2, max_grad_norm=0.1, weight_decay=0.1
    ).train()
    for _, leaf in deltas(model, "default"):
        assert leaf.tracker.step == 30
        assert [step for step, _ in leaf.tracker.reselections] == [5, 25]


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_resuming_under_the_trainer(selection: str, tmp_path: Path) -> None:
    whole = classifier(selection)
    trainer_for(whole, tmp_path / "whole").train()
    half = classifier(selection)
    trainer_for(half, tmp_path / "half", max_steps=22, save_strategy="steps", save_steps=22).train()
    resumed = classifier(selection)
    trainer = trainer_for(resumed, tmp_path / "half")
    trainer.train(resume_from_checkpoint=str(tmp_path / "half/checkpoint-22"))
    for (_, ours), (_, theirs) in zip(deltas(resumed, "default"), deltas(whole, "default"), strict=True):
        assert support_of(ours) == support_of(theirs)
    published = load_file(tmp_path / "half/checkpoint-22/adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in published} == {"weight", "index"}


def test_the_callback_takes_the_number_of_steps(tmp_path: Path) -> None:
    model = classifier(total_steps=None)
    trainer_for(model, tmp_path, callbacks=[peft_ext.SparseFTCallback()]).train()
    assert all(
        leaf.tracker.config.total_steps is None for _, leaf in deltas(model, "default")
    )  # that training is over
    model = classifier(total_steps=None)
    with pytest.warns(UserWarning, match="3 steps were taken"):
        trainer_for(model, tmp_path, callbacks=[peft_ext.SparseFTCallback()], max_steps=3).train()


def test_the_callback_logs_the_reselections(tmp_path: Path) -> None:
    model = classifier(total_steps=None)
    trainer = trainer_for(
        model, tmp_path, callbacks=[peft_ext.SparseFTCallback()], logging_strategy="steps", logging_steps=10
    )
    trainer.train()
    leaves = [leaf for _, leaf in deltas(model, "default")]
    first, second = (sum(dict(leaf.tracker.reselections).get(step, 0) for leaf in leaves) for step in (5, 25))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["reselections"] for line in lines] == [1, 1, 2]
    assert [line["replaced"] for line in lines] == [round(first / 40, 4)] * 2 + [round(second / 40, 4)]


def test_resuming_with_another_density_is_refused(tmp_path: Path) -> None:
    model = classifier("random")
    model.save_pretrained(tmp_path)
    other = classifier("random", num_tunable_weights=60)
    with pytest.raises(RuntimeError, match="with another `density`"):
        other.load_adapter(tmp_path, "default")


# LT-SFT


def test_lt_sft_phase_two_equals_masked_dense_training(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Classifier()
    start = copy.deepcopy(base)
    config = SparseFTConfig(selection="lt-sft", num_tunable_weights=40, target_modules=["fc1", "fc2"])
    after_phase_one = []

    def make_trainer(model: nn.Module) -> Any:
        trainer = trainer_for(model, tmp_path, max_steps=12, weight_decay=0.2)
        if not isinstance(model, PeftModel):
            train = trainer.train

            def train_and_keep() -> None:
                train()
                after_phase_one.append(copy.deepcopy(model))

            trainer.train = train_and_keep
        return trainer

    model = peft_ext.lt_sft(base, config, make_trainer)
    # the mask: the 40 weights that moved most in phase one, of both modules together
    (dense,) = after_phase_one
    moved = {key: (getattr(dense, key).weight - getattr(start, key).weight).abs().flatten() for key in ("fc1", "fc2")}
    threshold = torch.cat(list(moved.values())).topk(40).values[-1]
    masks = {key: value >= threshold for key, value in moved.items()}
    support = {name: leaf.indices().tolist() for name, leaf in deltas(model, "default")}
    assert {key: mask.nonzero().squeeze(1).tolist() for key, mask in masks.items()} == support

    # phase two, densely, with masked gradients
    reference = copy.deepcopy(start)
    for key, parameter in reference.named_parameters():
        name = key.removesuffix(".weight")
        parameter.requires_grad_(name in masks)
        if name in masks:
            mask = masks[name].view(parameter.shape)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    trainer_for(reference, tmp_path, max_steps=12).train()
    merged = copy.deepcopy(model).merge_and_unload()
    for (key, ours), theirs in zip(merged.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        mask = masks.get(key.removesuffix(".weight"))
        if mask is not None:
            assert torch.equal(ours.flatten()[~mask], start.get_parameter(key).flatten()[~mask])
        else:
            assert torch.equal(ours, start.get_parameter(key))


def test_lt_sft_l1_and_biases(tmp_path: Path) -> None:
    sizes = []
    for l1 in (0.0, 1e5):
        torch.manual_seed(1)
        config = SparseFTConfig(selection="lt-sft", num_tunable_weights=60, target_modules=["fc1", "fc2"])

        def make_trainer(model: nn.Module) -> Any:
            return trainer_for(model, tmp_path, max_steps=12, optim="sgd", learning_rate=1e-4, max_grad_norm=0.0)

        model = peft_ext.lt_sft(Classifier(), config, make_trainer, train_biases=True, l1=l1)
        leaves = dict(deltas(model, "default"))
        assert "fc1.bias" in leaves and sum(leaf.weight.numel() for leaf in leaves.values()) == 60
        sizes.append(sum(float(leaf.weight.detach().abs().sum()) for leaf in leaves.values()))
    assert sizes[1] > 5 * sizes[0]  # a step of 1e5 / 400 times the sign, to and fro, outweighs every gradient


class Pulled(Classifier):
    """Has the L1 term in its loss."""

    start: list[torch.Tensor]
    coefficient = 0.0
    on_head = True

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # type: ignore[override]
        output = super().forward(x, labels)
        if labels is not None:
            for (name, parameter), start in zip(self.named_parameters(), self.start, strict=True):
                if parameter.requires_grad and (self.on_head or not name.startswith("head")):
                    output["loss"] = output["loss"] + self.coefficient * (parameter - start).abs().sum()
        return output


@pytest.mark.parametrize("on_head", [True, False])
def test_lt_sft_l1_is_part_of_the_loss(on_head: bool, tmp_path: Path) -> None:
    """Also of what is clipped and accumulated; it pulls the head unless told otherwise."""
    settings: dict[str, Any] = {"max_steps": 6, "max_grad_norm": 0.5, "optim": "sgd", "learning_rate": 0.05}
    settings["gradient_accumulation_steps"] = 2
    torch.manual_seed(1)
    base = Classifier()
    total = sum(parameter.numel() for parameter in base.parameters())
    reference = Pulled()
    reference.load_state_dict(base.state_dict())
    reference.start = [parameter.detach().clone() for parameter in base.parameters()]
    reference.coefficient, reference.on_head = 300.0 / total, on_head
    for key, parameter in reference.named_parameters():
        parameter.requires_grad_(key.startswith("head") or key in ("fc1.weight", "fc2.weight"))
    trainer_for(reference, tmp_path, **settings).train()
    seen = []

    def make_trainer(model: nn.Module) -> Any:
        trainer = trainer_for(model, tmp_path, **settings)
        train = trainer.train

        def train_and_keep() -> None:
            train()
            seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})

        trainer.train = train_and_keep
        return trainer

    config = SparseFTConfig(
        selection="lt-sft", num_tunable_weights=60, target_modules=["fc1", "fc2"], modules_to_save=["head"]
    )
    model = peft_ext.lt_sft(base, config, make_trainer, l1=300.0, l1_on_head=on_head)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(seen[0][key], tensor, rtol=1e-4, atol=1e-6)
    # phase two: the same loss on the support alone, and the whole head
    again = Pulled()
    again.start, again.coefficient, again.on_head = reference.start, reference.coefficient, on_head
    with torch.no_grad():
        for parameter, start in zip(again.parameters(), again.start, strict=True):
            parameter.copy_(start)
    again.requires_grad_(False)
    again.head.requires_grad_(True)
    for name, leaf in deltas(model, "default"):
        weight = again.get_parameter(f"{name}.weight").requires_grad_(True)
        mask = torch.zeros(weight.numel()).index_fill(0, leaf.indices().long(), 1.0).view(weight.shape)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    trainer_for(again, tmp_path, **settings).train()
    for key, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, again.state_dict()[key], rtol=1e-4, atol=1e-6)


class Interrupted(Exception):
    pass


def test_lt_sft_in_rounds_and_resumed(tmp_path: Path) -> None:
    """Each round adds half of the places, from where the last one has ended; killed and taken up again, the same."""
    from transformers import TrainerCallback

    def config() -> SparseFTConfig:
        return SparseFTConfig(selection="lt-sft", num_tunable_weights=41, target_modules=["fc1", "fc2"])

    class Kill(TrainerCallback):
        left = 10**9

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            Kill.left -= 1
            if Kill.left == 0:
                raise Interrupted

    def maker(folder: str) -> Any:
        fields: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.0}
        return lambda model: trainer_for(model, tmp_path / folder, callbacks=[Kill()], **fields)

    def base() -> Classifier:
        torch.manual_seed(1)
        return Classifier()

    model = peft_ext.lt_sft(base(), config(), maker("whole"), n_iterations=2, dense_learning_rate=3e-3)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()

    # the reference: dense models, masked gradients
    current, masks = base(), {name: torch.zeros(getattr(base(), name).weight.shape) for name in ("fc1", "fc2")}
    for share in (20, 21):
        dense = copy.deepcopy(current)
        for key, parameter in dense.named_parameters():
            parameter.requires_grad_(key in ("fc1.weight", "fc2.weight"))
        trainer_for(dense, tmp_path, max_steps=6, learning_rate=3e-3).train()
        moved = {
            name: (getattr(dense, name).weight - getattr(base(), name).weight).detach().abs() * (1 - mask)
            for name, mask in masks.items()
        }
        least = torch.cat([value.flatten() for value in moved.values()]).topk(share).values[-1]
        masks = {name: mask + (moved[name] >= least) for name, mask in masks.items()}
        handles = []
        for key, parameter in current.named_parameters():
            name = key.removesuffix(".weight")
            parameter.requires_grad_(name in masks)
            if name in masks:
                handles.append(parameter.register_hook(lambda g, mask=masks[name]: g * mask))
        trainer_for(current, tmp_path, max_steps=6).train()
        for handle in handles:
            handle.remove()
    for name, leaf in deltas(model, "default"):
        assert leaf.indices().tolist() == masks[name].flatten().nonzero().squeeze(1).tolist()
    for key, tensor in current.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6)

    for kill in (3, 11, 21):
        folder = f"killed-{kill}"
        Kill.left = kill
        with pytest.raises(Interrupted):
            peft_ext.lt_sft(base(), config(), maker(folder), n_iterations=2, dense_learning_rate=3e-3)
        Kill.left = 10**9
        again = peft_ext.lt_sft(base(), config(), maker(folder), n_iterations=2, dense_learning_rate=3e-3, resume=True)
        for (_, ours), (_, theirs) in zip(deltas(again, "default"), deltas(model, "default"), strict=True):
            assert support_of(ours) == support_of(theirs)


@pytest.mark.parametrize("heads", [["classifier"], ["classifier.dense", "classifier.out_proj"]])
def test_lt_sft_trains_heads_in_the_dense_phase(heads: list[str], tmp_path: Path) -> None:
    base, trained = tiny("roberta"), []

    def make_trainer(model: nn.Module) -> Trainer:
        trained.append({name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name})
        return Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=classification_data())

    config = SparseFTConfig(selection="lt-sft", num_tunable_weights=20, modules_to_save=heads)
    peft_ext.lt_sft(base, config, make_trainer)
    assert trained[0] == {f"classifier.{name}.{kind}" for name in ("dense", "out_proj") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, config: model.requires_grad_(False), "'fc1' is frozen"),
        (lambda model, config: model.bfloat16(), r"'fc1' is in torch.bfloat16.*`dtype=torch.float32`"),
        (lambda model, config: setattr(config, "selection", "random"), "needs a config with `selection='lt-sft'`"),
        (lambda model, config: setattr(config, "num_tunable_weights", 10**6), "does not fit"),
        (lambda model, config: setattr(config, "num_tunable_weights", None), "set `density` or `num_tunable_weights`"),
    ],
)
def test_lt_sft_refuses(change: Any, message: str) -> None:
    model, config = Classifier(), SparseFTConfig(selection="lt-sft", num_tunable_weights=4, target_modules=["fc1"])
    change(model, config)
    with pytest.raises(ValueError, match=message):
        peft_ext.lt_sft(model, config, lambda model: None)
    assert not any("sparse_ft" in key for key, _ in model.named_parameters())


# Composition


def random_values(model: PeftModel, *names: str, seed: int = 0) -> None:
    for number, name in enumerate(names):
        for place, (_, leaf) in enumerate(deltas(model, name)):
            generator = torch.Generator().manual_seed(100 * seed + 10 * number + place)
            leaf.weight.data = torch.randn(leaf.weight.shape, generator=generator)


def two_adapters() -> PeftModel:
    model = classifier("random", num_tunable_weights=90)
    config = SparseFTConfig(num_tunable_weights=70, selection="random", target_modules=["fc1", "fc2"], seed=1)
    model.add_adapter("other", config)
    random_values(model, "default", "other")
    return model.eval()


def dense_delta(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(leaf.size).index_add(0, leaf.indices(), leaf.weight.detach())
        for name, leaf in deltas(model, adapter)
    }


@pytest.mark.capability("adapters added into one", "sparse_ft")
def test_several_active_adapters_are_their_weighted_sum(tmp_path: Path) -> None:
    model = two_adapters()
    x = torch.randn(5, 6)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)["logits"]
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x)["logits"], both)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "difference")
    first, second = dense_delta(model, "default"), dense_delta(model, "other")
    for name, delta in dense_delta(model, "difference").items():
        torch.testing.assert_close(delta, 0.5 * first[name] - 2.0 * second[name])
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path / "sum")
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path / "sum")
    torch.testing.assert_close(loaded(x)["logits"], both)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["q_proj"]}, {"exclude_modules": ["down_proj"]}),
        ({"target_modules": r".*\.q_proj"}, {"target_modules": r".*\.(q|v)_proj"}),
    ],
)
def test_adapters_add_up_wherever_they_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    """On equal places, with which nothing is new to the config, and on different modules."""
    model = get_peft_model(tiny("llama"), SparseFTConfig(selection="random", **first))
    model.add_adapter("other", SparseFTConfig(selection="random", **second))
    random_values(model, "default", "other")
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs("llama"))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, inputs("llama")), both)


def test_a_sum_carries_over_what_is_trained_besides(tmp_path: Path) -> None:
    """A head and trained tokens of one adapter; of several only if they are equal."""
    model = classifier("random", modules_to_save=["head"])
    fields: dict[str, Any] = {"num_tunable_weights": 50, "selection": "random", "target_modules": ["fc1"]}
    model.add_adapter("plain", SparseFTConfig(**fields))
    model.add_adapter("other", SparseFTConfig(modules_to_save=["head"], **fields))
    random_values(model, "default", "plain", "other")
    heads = model.base_model.model.head.modules_to_save
    with torch.no_grad():
        heads["default"].weight.add_(1.0)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="'default' and 'other' have both trained the module 'head'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert list(model.state_dict()) == before and "sum" not in model.peft_config
    x = torch.randn(5, 6)
    model.add_weighted_adapter(["plain", "default"], [2.0, 1.0], "sum")
    model.set_adapter("sum")
    merged = Classifier()
    merged.load_state_dict(model.base_model.model.state_dict(), strict=False)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            total = dense_delta(model, "default")[name] + 2 * dense_delta(model, "plain").get(name, torch.zeros(()))
            layer = model.base_model.model.get_submodule(name).base_layer
            getattr(merged, name).weight.copy_(layer.weight + total.view(layer.weight.shape))
            if layer.bias is not None:
                getattr(merged, name).bias.copy_(layer.bias)
        merged.head.load_state_dict(heads["default"].state_dict())
    torch.testing.assert_close(model(x)["logits"], merged(x)["logits"])
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path / "sum")
    torch.testing.assert_close(loaded(x)["logits"], merged(x)["logits"])


def test_a_sum_carries_over_trained_tokens() -> None:
    config = SparseFTConfig(density=0.02, selection="random", trainable_token_indices=[3, 5])
    model = get_peft_model(tiny("llama"), config)
    model.add_adapter("plain", SparseFTConfig(density=0.02, selection="random", seed=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta.default" in name:
                parameter.add_(1.0)
    model.eval()
    expected = logits(model, inputs("llama"))
    model.add_weighted_adapter(["plain", "default"], [0.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, inputs("llama")), expected)
    assert model.peft_config["sum"].trainable_token_indices == [3, 5]


def test_ties_elects_signs() -> None:
    from peft_ext.tuners.sparse_ft.sums import combine

    first = (torch.tensor([1, 4, 6]), torch.tensor([1.0, 2.0, -3.0]))
    second = (torch.tensor([1, 5, 6]), torch.tensor([-0.5, 4.0, -1.0]))
    places, values = combine([first, second], [1.0, 1.0], "ties")
    assert places.tolist() == [1, 4, 5, 6]
    assert values.tolist() == [1.0, 2.0, 4.0, -2.0]


def test_overlap() -> None:
    model = two_adapters()
    found = peft_ext.overlap(model, "default", "other")
    first = {(name, i) for name, leaf in deltas(model, "default") for i in leaf.indices().tolist()}
    second = {(name, i) for name, leaf in deltas(model, "other") for i in leaf.indices().tolist()}
    assert (found[""].first, found[""].second, found[""].shared) == (90, 70, len(first & second))
    assert found[""].jaccard == len(first & second) / len(first | second)
    one_, other = dense_delta(model, "default"), dense_delta(model, "other")
    assert found[""].same_sign == sum(int((one_[name] * other[name] > 0).sum()) for name in one_)
    assert found["fc1"].shared + found["fc2"].shared == found[""].shared
    with pytest.raises(ValueError, match="no sparse adapter named 'third'"):
        peft_ext.overlap(model, "default", "third")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0, 2.0], "new"), "give one weight per adapter"),
        ((["default", "third"], [1.0, 2.0], "new"), "no sparse adapter named 'third'"),
        ((["default"], [1.0], "other"), "named 'other' exists"),
        ((["default"], [1.0], "new", "svd"), "'linear' or 'ties'"),
    ],
)
def test_add_weighted_adapter_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_adapters().add_weighted_adapter(*arguments)


def test_grafting_the_difference_of_two_checkpoints() -> None:
    torch.manual_seed(1)
    base, tuned = Classifier(), Classifier()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.fc1.weight[3, 2] += 0.5
        tuned.fc2.weight.view(-1)[::50] -= 0.25
        tuned.fc1.bias[1] += 1.0
    x = torch.randn(5, 6)
    expected = tuned(x)["logits"]
    config = SparseFTConfig(selection="given", target_modules=["fc1", "fc2"])
    model = peft_ext.graft(copy.deepcopy(base), tuned, config)
    assert {name: leaf.weight.numel() for name, leaf in deltas(model, "default")} == {
        "fc1": 1,
        "fc1.bias": 1,
        "fc2": 6,
    }
    torch.testing.assert_close(model(x)["logits"], expected)
    torch.testing.assert_close(model.merge_and_unload()(x)["logits"], expected)
    config = SparseFTConfig(selection="given", num_tunable_weights=2, target_modules=["fc1", "fc2"])
    model = peft_ext.graft(copy.deepcopy(base), tuned.state_dict(), config)
    kept = {name: round(leaf.weight.item(), 5) for name, leaf in deltas(model, "default")}
    assert kept == {"fc1": 0.5, "fc1.bias": 1.0}
    with pytest.raises(ValueError, match="do not differ"):
        config = SparseFTConfig(selection="given", target_modules=["fc1"])
        peft_ext.graft(copy.deepcopy(base), base, config)


@pytest.mark.parametrize("tokens", [[4, 9], {"word_embeddings": [4, 9]}])
def test_a_graft_takes_heads_and_tokens_along(tokens: Any) -> None:
    base, batch = tiny("bert"), inputs("bert")
    batch["input_ids"][:, 2:4] = torch.tensor([4, 9])
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.bert.embeddings.word_embeddings.weight[[4, 9]] += 1
        tuned.classifier.bias += 1
        tuned.bert.encoder.layer[0].attention.self.query.weight[:3] += 0.5
    fields = {"target_modules": ["query"], "modules_to_save": ["classifier"], "trainable_token_indices": tokens}
    model = peft_ext.graft(copy.deepcopy(base), tuned, SparseFTConfig(selection="given", **fields))
    torch.testing.assert_close(logits(model.eval(), batch), logits(tuned, batch), atol=1e-5, rtol=0)
    assert (logits(tuned, batch) - logits(base, batch)).abs().max() > 0.1


def test_a_graft_says_what_it_leaves_out_and_leaves_the_config_as_it_is() -> None:
    base = tiny("bert")
    config = SparseFTConfig(selection="given", modules_to_save=["classifier"], trainable_token_indices=[4])
    for number, name in enumerate(("query", "value")):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for layer in tuned.bert.encoder.layer[number:]:
                layer.attention.self.get_submodule(name).weight[0] += 0.5
            tuned.classifier.bias += 1
            tuned.bert.embeddings.word_embeddings.weight[4:6] += 1
            tuned.bert.embeddings.LayerNorm.bias += 1
        with pytest.warns(UserWarning, match=r"2 tensors.*word_embeddings.weight, .*LayerNorm.bias.*`target_modules`"):
            model = peft_ext.graft(copy.deepcopy(base), tuned, config)
        assert len(dict(deltas(model, "default"))) == len(base.bert.encoder.layer) - number
        assert config.target_modules is None and config.support is None


def lt_sft_file(path: Path, base: nn.Module, tuned: nn.Module, head: str) -> None:
    """Writes what the published code writes: column-major flat places, as steps, with numpy numbers among them."""
    import numpy

    diffs = {}
    for key, parameter in base.named_parameters():
        delta = (tuned.get_parameter(key) - parameter).detach()
        if key.startswith(head):
            continue
        flat = delta.permute(*range(delta.ndim - 1, -1, -1)).reshape(-1)  # the first dimension runs fastest
        places = flat.nonzero().squeeze(1).numpy()
        steps = numpy.diff(places, prepend=0)
        diffs[key] = {"size": delta.shape, "index_steps": list(steps), "values": flat[places]}
    whole = {key: p.detach() for key, p in tuned.named_parameters() if key.startswith(head)}
    torch.save({"diffs": diffs, "abs": whole}, path)


def test_importing_a_published_lt_sft_file(tmp_path: Path) -> None:
    base, tuned = tiny("bert"), tiny("bert")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            mask = torch.rand(parameter.shape, generator=generator) < (1.0 if "classifier" in key else 0.05)
            parameter += mask * torch.randn(parameter.shape, generator=generator)
    lt_sft_file(tmp_path / "pytorch_diff.bin", base, tuned, "classifier")
    batch = inputs("bert")
    model = peft_ext.import_lt_sft(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(model, batch), logits(tuned, batch), rtol=1e-4, atol=1e-5)
    without = peft_ext.import_lt_sft(copy.deepcopy(base), tmp_path / "pytorch_diff.bin", with_abs=False)
    assert torch.equal(without.get_base_model().classifier.weight, base.classifier.weight)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/adapter_model.safetensors").exists()


def test_a_hostile_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"diffs": {}, "abs": Bomb()}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(ValueError, match="LT-SFT"):
        peft_ext.import_lt_sft(Classifier(), tmp_path)
    assert not (tmp_path / "ran").exists()


# Several processes


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, torch.Tensor] = {}
    for selection in ("spiel-ag", "spiel-ma", "growing"):
        found |= _trained_in_parallel(rank, selection)
    save_file(found, f"{folder}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then deadlock with the interpreter when both go


def _trained_in_parallel(rank: int, selection: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)  # what differs between processes must not matter
    fields = taken(selection, total_steps=60, reselection_rate=0.5, seed=rank)
    config = SparseFTConfig(num_tunable_weights=60, target_modules=["fc1", "fc2"], **fields)
    model = get_peft_model(Classifier(), config)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    for step in range(26):
        for micro in range(2):
            generator = torch.Generator().manual_seed(10 * step + 2 * rank + micro)
            x = torch.randn(8, 6, generator=generator)
            labels = torch.randint(3, (8,), generator=generator)
            (parallel(x, labels=labels)["loss"] / 2).backward()
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, leaf in deltas(model, "default"):
        key = f"{selection} {name}"
        found[f"{key} indices"], found[f"{key} index"] = leaf.indices().long(), leaf.index
        found[f"{key} values"] = leaf.weight.detach()
        found[f"{key} reselections"] = torch.tensor(leaf.tracker.reselections)
        for vector in ("exp_avg", "exp_avg_sq") if selection != "spiel-ma" else ():
            found[f"{key} {vector}"] = optimizer.state[leaf.weight][vector]
    return {key: tensor.contiguous() for key, tensor in found.items()}


def test_all_processes_hold_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(len(first[f"{selection} fc1 reselections"]) == 2 for selection in ("spiel-ag", "spiel-ma"))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def _train_unevenly(rank: int, path: str) -> None:
    """A module that one process does not use in one step, and another one in another, as experts are."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = SparseFTConfig(
        num_tunable_weights=40, target_modules=["fc1", "fc2"], selection="spiel-ag", total_steps=60
    )
    model = get_peft_model(Classifier(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    leaves = dict(deltas(model, "default"))
    for step in range(6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        if (step, rank) in ((0, 0), (2, 1)):  # without fc1
            model.base_model.model.fc2(torch.cat([x, x, x[:, :4]], 1)).square().sum().backward()
        else:
            model(x)["logits"].square().sum().backward()
        for leaf in leaves.values():  # what DistributedDataParallel does, with `find_unused_parameters`
            leaf.weight.grad = torch.zeros_like(leaf.weight) if leaf.weight.grad is None else leaf.weight.grad
            torch.distributed.all_reduce(leaf.weight.grad)
            leaf.weight.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: leaf.indices().long() for name, leaf in leaves.items()}, f"{path}/{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # see `_train_in_parallel`


def test_a_module_that_one_process_does_not_use(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_unevenly, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    start = dict(
        deltas(
            get_peft_model(Classifier(), SparseFTConfig(num_tunable_weights=40, target_modules=["fc1", "fc2"])),
            "default",
        )
    )
    assert all(not torch.equal(tensor, start[key].indices().long()) for key, tensor in first.items())


# Configs and loading


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.1, "num_tunable_weights": 3}, "give one of them"),
        ({"density": 0.0}, r"`density` must be in \(0, 1\]"),
        ({"density": 1.5}, r"`density` must be in \(0, 1\]"),
        ({"num_tunable_weights": 0}, "`num_tunable_weights` must be a positive integer"),
        ({"density": 0.1, "selection": "best"}, "`selection` must be one of"),
        ({"density": 0.1, "selection": "nonzero"}, "`density` has no effect"),
        ({"selection": "below"}, "`threshold` must be a positive number"),
        ({"selection": "below", "threshold": 0.1, "density": 0.1}, "takes all weights below `threshold`"),
        ({"density": 0.1, "threshold": 0.1}, "`threshold` has no effect with"),
        ({"density": 0.1, "reselect_at": 3}, "`reselect_at` has no effect with"),
        ({"density": 0.1, "growth_power": -1.0}, "`growth_power` must not be negative"),
        ({"density": 0.1, "growth_eps": 0.0}, "`growth_eps` must be positive"),
        ({"selection": "growing", "growth_power": float("nan")}, "`growth_power` must be a finite number"),
        ({"selection": "growing", "growth_power": "1"}, "`growth_power` must be a number, got '1'"),
        ({"selection": "growing", "growth_eps": True}, "`growth_eps` must be a number, got True"),
        ({"density": 0.1, "growth_power": 3.0}, "`growth_power` has no effect with `selection='random'`"),
        ({"selection": "random", "growth_eps": 0.5}, "`growth_eps` has no effect with `selection='random'`"),
        (
            {"selection": "random", "total_steps": 9},
            "`total_steps` has no effect with `selection='random'`, only with",
        ),
        ({"selection": "given", "reselection_rate": 0.5}, "`reselection_rate` has no effect with .* leave it out"),
        ({"selection": "below", "threshold": "1e-3"}, "`threshold` must be a number or None, got '1e-3'"),
        ({"selection": "below", "threshold": True}, "`threshold` must be a number, got True"),
        ({"selection": "below", "threshold": float("inf")}, "`threshold` must be a finite number"),
        (
            {"selection": "below", "threshold": 0.1, "reselect_at": 500, "total_steps": 10},
            r"`reselect_at` \(500\) must be below `total_steps` \(10\)",
        ),
        ({"selection": "growing", "total_steps": True}, "`total_steps` must be a positive integer, got True"),
        ({"density": 0.1, "selection": "spiel-ag", "reselection_steps": 5}, "must be below `reselection_steps`"),
        ({"density": 0.1, "selection": "spiel-ag", "reselection_rate": 0.0}, "`reselection_rate` must be in"),
        ({"density": 0.1, "selection": "spiel-ag", "reselection_policy": "step"}, "must be 'linear' or 'cosine'"),
        ({"density": 0.1, "selection": "spiel-ag", "total_steps": 0}, "`total_steps` must be a positive integer"),
        ({"density": 0.1, "save_dtype": "int8"}, "`save_dtype` must be one of"),
        ({"num_weights_per_module": {"fc": -1}}, "must map module names to numbers"),
        ({"num_weights_per_module": {}}, "must map module names to numbers"),
        ({"num_tunable_weights": True}, "`num_tunable_weights` must be a positive integer, got True"),
        ({"density": True}, r"`density` must be in \(0, 1\], got True"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparseFTConfig(**fields)


def test_fields_without_effect_that_an_older_version_wrote_are_let_pass(tmp_path: Path) -> None:
    model, leaf = one("random")
    leaf.weight.data.fill_(1.0)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_steps": 9}))
    loaded = PeftModel.from_pretrained(One(), tmp_path)
    assert loaded.peft_config["default"].total_steps == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tunable_weights": 1, "target_modules": ["fc1", "fc2"]}, "leaves 'fc1' .of 96 weights. without any"),
        (
            {"num_tunable_weights": 97, "target_modules": ["fc1"]},
            "asks for 97 tuned weights, the target modules have 96",
        ),
        ({"density": 0.9, "target_modules": ["fc1"]}, "`density` asks for"),
        ({"density": 0.1, "target_modules": ["norm", "fc2"], "selection": "spiel-ag"}, "'norm' is a norm"),
        ({"density": 0.1, "selection": "lt-sft"}, "peft_ext.lt_sft"),
        ({"density": 0.1, "selection": "sensitivity"}, "config.use_scores"),
        ({"selection": "given"}, "config.use_support"),
        ({"num_weights_per_module": {"fc7": 3}}, "'fc7', which is not among the target modules"),
        ({"num_weights_per_module": {"fc1": 97}}, "97 weights of 'fc1', which has 96"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_unchanged(fields: dict[str, Any], message: str) -> None:
    model = MLP()
    before = list(model.state_dict())
    fields = {"target_modules": ["fc1", "fc2"], **fields}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SparseFTConfig(**fields))
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ({"fc1": torch.tensor([0.5])}, "must be a vector of integers"),
        ({"fc1": torch.tensor([1, 1])}, "must be distinct indices"),
        ({"fc1": torch.tensor([-1])}, "must be distinct indices"),
        ({"fc1": torch.tensor([96])}, "place 96 of 'fc1', which has 96 weights"),
        ({"fc9": torch.tensor([1])}, "'fc9', which is not among the target modules"),
    ],
)
def test_a_support_that_does_not_fit(support: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = SparseFTConfig(selection="given", target_modules=["fc1"]).use_support(support)
        get_peft_model(MLP(), config)


def test_a_support_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"support of 'fc' must be a tensor of indices, got a list"):
        SparseFTConfig(selection="given").use_support({"fc": [1, 2]})  # type: ignore[dict-item]


def test_a_support_from_a_file(tmp_path: Path) -> None:
    support = {"fc1": torch.tensor([5, 3, 95]), "fc1.bias": torch.tensor([2])}
    first = SparseFTConfig(selection="given", target_modules=["fc1"]).use_support(support)
    first.save_support(tmp_path / "support.safetensors")
    config = SparseFTConfig(selection="given", target_modules=["fc1"]).use_support(tmp_path / "support.safetensors")
    model = get_peft_model(MLP(), config)
    assert {name: leaf.indices().tolist() for name, leaf in deltas(model, "default")} == {
        "fc1": [3, 5, 95],
        "fc1.bias": [2],
    }
    with pytest.raises(ValueError, match="needs `selection='given'`"):
        SparseFTConfig(density=0.1).use_support(support)


def test_a_config_without_its_adapter_is_not_trained(tmp_path: Path) -> None:
    config = SparseFTConfig(selection="given", target_modules=["fc"]).use_support({"fc": torch.tensor([1, 7])})
    get_peft_model(One(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(One(), tmp_path, is_trainable=True)
    run_steps(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1), range(2))
    assert set(support_of(next(deltas(loaded, "default"))[1])) == {1, 7}
    config = SparseFTConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    fresh = get_peft_model(One(), config)
    with pytest.raises(ValueError, match="no saved adapter was loaded"):
        run_steps(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), range(1))


@pytest.mark.parametrize("selection", ["smallest", "largest", "nonzero", "random", "sensitivity"])
def test_fixed_supports(selection: str) -> None:
    torch.manual_seed(0)
    base = MLP()
    with torch.no_grad():
        base.fc2.weight.mul_(torch.rand(16, 16) < 0.3)
    budget = {} if selection == "nonzero" else {"num_tunable_weights": 44}
    config = SparseFTConfig(selection=selection, target_modules=["fc1", "fc2"], **budget)
    scores = {name: torch.rand(getattr(base, name).weight.shape) for name in ("fc1", "fc2")}
    if selection == "sensitivity":
        config.use_scores(scores)
    model = get_peft_model(copy.deepcopy(base), config)
    found = {name: leaf.indices().tolist() for name, leaf in deltas(model, "default")}
    for name in ("fc1", "fc2"):
        weight = getattr(base, name).weight.detach().flatten()
        k = {"fc1": 12, "fc2": 32}[name]
        order = weight.abs().argsort(stable=True)
        if selection == "smallest":
            assert found[name] == order[:k].sort().values.tolist()
        elif selection == "largest":
            assert found[name] == order[-k:].sort().values.tolist()
        elif selection == "nonzero":
            assert found[name] == weight.nonzero().squeeze(1).tolist()
        elif selection == "random":
            assert len(found[name]) == k
    if selection == "sensitivity":
        together = torch.cat([scores["fc1"].flatten(), scores["fc2"].flatten()])
        best = set(together.topk(44).indices.tolist())
        assert {*found["fc1"], *(i + 96 for i in found["fc2"])} == best
    if selection == "nonzero":
        random_values(model, "default")
        merged = model.merge_and_unload()
        assert torch.equal(merged.fc2.weight == 0, base.fc2.weight == 0)


@pytest.mark.parametrize("selection", ["largest", "smallest"])
def test_a_bias_is_chosen_by_its_own_values(selection: str) -> None:
    base = One()
    config = SparseFTConfig(selection=selection, target_modules=["fc"], num_weights_per_module={"fc": 2, "fc.bias": 3})
    model = get_peft_model(base, config)
    order = base.fc.bias.detach().abs().argsort(descending=selection == "largest")
    assert dict(deltas(model, "default"))["fc.bias"].indices().tolist() == sorted(order[:3].tolist())


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma", "below", "growing"])
def test_the_support_of_a_bias_does_not_move(selection: str) -> None:
    counts = {"fc": 2, "fc.bias": 3}
    config = SparseFTConfig(**taken(selection, threshold=0.2), target_modules=["fc"], num_weights_per_module=counts)
    with pytest.raises(ValueError, match=r"'fc.bias'.*a fixed selection such as 'random'"):
        get_peft_model(One(), config)


def test_a_weight_in_any_memory_layout_is_merged() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last),
        SparseFTConfig(selection="random", num_tunable_weights=20, target_modules=["0"], init_weights=False),
    )
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_budget_is_spread_without_loss() -> None:
    sizes = {"a": 7, "b": 100, "c": 33}
    for budget in range(1, 140):
        counts = proportional(budget, sizes)
        assert sum(counts.values()) == budget
        assert all(abs(counts[name] - budget * size / 140) < 1 for name, size in sizes.items())


def test_density_counts_all_parameters_of_the_model() -> None:
    base = tiny("llama")
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, SparseFTConfig(density=0.03))
    names = {name for name, _ in deltas(model, "default")}
    assert sum(leaf.weight.numel() for _, leaf in deltas(model, "default")) == int(0.03 * total)
    assert len(names) == 14 and not any("lm_head" in name or "embed" in name for name in names)


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_values_on_disk(save_dtype: str, tmp_path: Path) -> None:
    model = classifier("random", save_dtype=save_dtype)
    random_values(model, "default")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(t.dtype) for key, t in stored.items() if key.endswith("weight")} == {f"torch.{save_dtype}"}
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path)
    for (_, leaf), (_, other) in zip(deltas(model, "default"), deltas(loaded, "default"), strict=True):
        assert torch.equal(leaf.indices(), other.indices())
        assert other.weight.dtype == torch.float32
        expected = leaf.weight.to(getattr(torch, save_dtype)).float()
        assert torch.equal(other.weight, expected)


def test_unmerging_is_exact_and_merging_rounds_once() -> None:
    model = classifier("random")
    random_values(model, "default")
    model.to(torch.bfloat16)
    layer = model.base_model.model.fc1
    before = layer.base_layer.weight.clone()
    leaf = layer.sparse_ft_delta["default"]
    exact = before.float().flatten().index_add(0, leaf.indices(), leaf.weight.detach())
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight.flatten(), exact.to(torch.bfloat16))
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_figure(tmp_path: Path) -> None:
    plots = pytest.importorskip("peft_ext.plots")
    pytest.importorskip("matplotlib")
    model = get_peft_model(
        tiny("llama"), SparseFTConfig(selection="spiel-ag", density=0.05, total_steps=60, reselection_rate=0.5)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(6):
        model(**inputs("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    figure = plots.plot(model)
    figure.savefig(tmp_path / "figure.png")
    left, right = figure.axes[:2]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["0", "1"]
    assert list(right.lines[0].get_xdata()) == [5]
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        plots.plot(model, "other")


@pytest.mark.capability("4-bit base", "sparse_ft")
def test_4_bit_base(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"), nn.Linear(32, 3))
    model = model.to("cpu")
    x = torch.randn(4, 64)
    model(x)  # quantises
    config = SparseFTConfig(
        density=0.02, target_modules=["0"], selection="spiel-ag", total_steps=60, reselection_rate=0.5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        (_, leaf) = next(deltas(adapted, "default"))
        assert (leaf.size, leaf.weight.numel()) == (64 * 32, int(0.02 * (64 * 32 + 32 + 99)))
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        for _ in range(6):
            adapted(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert leaf.tracker.reselections and leaf.weight.dtype == torch.float32
        with pytest.raises(ValueError, match=r"Cannot merge adapter 'default' into quantised weights.*dequantize"):
            adapted.merge_and_unload()


def test_ag_under_gradient_checkpointing_and_shared_modules() -> None:
    torch.manual_seed(0)
    results = []
    for checkpointing in (False, True):
        model = get_peft_model(
            tiny("llama"),
            SparseFTConfig(selection="spiel-ag", density=0.05, total_steps=60, reselection_rate=0.5),
            autocast_adapter_dtype=True,
        )
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(6):
            model(**inputs("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: set(support_of(leaf)) for name, leaf in deltas(model, "default")})
    assert results[0] == results[1]

    class Twice(One):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.fc(2 * x)

    model = get_peft_model(
        Twice(), SparseFTConfig(num_tunable_weights=K, target_modules=["fc"], selection="spiel-ag", total_steps=40)
    )
    (_, leaf) = next(deltas(model, "default"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(4):
        backward_of(model, scripted_gradient(step))
        torch.testing.assert_close(leaf.tracker._raw, leaf.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
    total = 3 * sum(scripted_gradient(step) for step in range(4)).flatten()
    torch.testing.assert_close(leaf.tracker.sums, total[leaf.tracker.candidates])


@pytest.mark.parametrize("size", [1000, 6000])  # below 4,096 values the state is kept in fp32
def test_8_bit_adam(size: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 100))
    config = SparseFTConfig(
        num_tunable_weights=size, target_modules=["0"], selection="spiel-ag", total_steps=60, reselection_rate=0.5
    )
    model = get_peft_model(model, config)
    (_, leaf) = next(deltas(model, "default"))
    optimizer = bnb.optim.AdamW8bit([leaf.weight], lr=1e-2)
    moments: list[dict[int, float]] = []
    move = tracker.Tracker._move

    def watched(self: Any, leaf: SparseDelta, *args: Any) -> None:
        def first_moment() -> dict[int, float]:
            state = optimizer.state[leaf.weight]
            vector = state["state1"] if size < 4096 else optimizer_state.from_8_bit(state, "state1")
            return on_support(leaf, vector)

        moments.append(first_moment())
        move(self, leaf, *args)
        moments.append(first_moment())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker.Tracker, "_move", watched)
        for step in range(25):
            x = torch.randn(16, 128, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(leaf.tracker.reselections) == 2
    survivors = set(moments[2]) & set(moments[3])
    before, after = (torch.tensor([moment[i] for i in sorted(survivors)]) for moment in moments[2:])
    assert (before - after).norm() <= (0.0 if size < 4096 else 0.05) * before.norm()
