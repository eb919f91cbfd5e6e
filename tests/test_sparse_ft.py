"""Sparse fine-tuning: against a dense reference, under every trainer, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, inputs, logits, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_ext
from peft_ext import SparseFTConfig
from peft_ext.tuners.sparse_ft import spiel
from peft_ext.tuners.sparse_ft.layer import SparseDelta
from peft_ext.tuners.sparse_ft.model import deltas, proportional


@pytest.fixture(autouse=True)
def forget_warnings() -> Iterator[None]:
    spiel._warned.clear()
    yield


class One(nn.Module):
    """A single Linear(6, 8), the model of the scripted runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


SHAPE, K = (8, 6), 12


def one(selection: str, total_steps: int | None = 40, **fields: Any) -> tuple[PeftModel, SparseDelta]:
    torch.manual_seed(0)
    config = SparseFTConfig(
        num_tunable_weights=K, selection=selection, target_modules=["fc"], total_steps=total_steps, **fields
    )
    model = get_peft_model(One(), config)
    (_, leaf) = next(deltas(model, "default"))
    return model, leaf


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
        self.delta *= 1 - self.lr * self.decay
        nu = {i: min(self.r[i // 6], self.c[i % 6]) + float(g[i]) ** 2 for i in self.support}
        for i, value in nu.items():
            self.delta[i] -= self.lr * g[i] / math.sqrt(value + 1e-8)
        for row in range(8):
            self.r[row] = max((value for i, value in nu.items() if i // 6 == row), default=self.r[row])
        for column in range(6):
            self.c[column] = max((value for i, value in nu.items() if i % 6 == column), default=self.c[column])
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
    model, leaf = one("spiel-ma", reselection_policy=policy, reselection_rate=0.5)
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.3)
    reference = DenseMA(set(support_of(leaf)), total=40, policy=policy, rate=0.5, decay=0.3)
    for step in range(30):
        gradients = [scripted_gradient(step, micro) for micro in range(2)]
        for gradient in gradients:
            backward_of(model, gradient)
        optimizer.step()
        optimizer.zero_grad()
        reference.step(gradients)
        assert set(support_of(leaf)) == reference.support
        torch.testing.assert_close(leaf.weight.detach(), reference.delta[leaf.indices()], rtol=1e-4, atol=1e-6)
        tracker = leaf.tracker
        torch.testing.assert_close(tracker.rows, torch.tensor(reference.r), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tracker.columns, torch.tensor(reference.c), rtol=1e-5, atol=1e-6)
    assert len(leaf.tracker.reselections) == 2


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_survivors_are_untouched_bit_for_bit(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, leaf = one(selection, reselection_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    move = spiel.Tracker._move

    def watched(self: Any, leaf: SparseDelta, optimizer: Any, *args: Any) -> None:
        def everything() -> list[dict[int, float]]:
            vectors = [leaf.weight.detach(), leaf.weight.grad]
            vectors += [optimizer.state[leaf.weight][key] for key in ("exp_avg", "exp_avg_sq") if selection != "spiel-ma"]
            return [on_support(leaf, vector) for vector in vectors]

        before = everything()
        move(self, leaf, optimizer, *args)
        seen.append((before, everything()))

    monkeypatch.setattr(spiel.Tracker, "_move", watched)
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
    model, leaf = one("spiel-ag", total_steps=100)
    tracker = leaf.tracker
    gathering = []
    for step in range(130):
        tracker.step = step
        if tracker.is_gathering(1000):
            gathering.append(step + 1)  # the update that is under way
    assert gathering[:17] == [*range(1, 6), *range(20, 26), *range(40, 46)]
    assert gathering[-1] == 85
    assert [round(tracker.rate_at(step), 4) for step in (5, 25, 85, 105)] == [1.0, 0.15, 0.03, 0.0]
