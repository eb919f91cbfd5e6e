"""Choices that are drawn by score: the probabilities, the same numbers everywhere, and every method that takes `spread`."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from models import tiny
from peft import get_peft_model
from test_calibrate import batches, bert
from test_sparse_ft import K, backward_of, one, run_steps, scripted_gradient, support_of
from test_spt import SHAPES, plain_allocation, random_scores

import peft_ext
from peft_ext import MaskLoraConfig, SparseFTConfig, SPTConfig
from peft_ext.calibrate import measure
from peft_ext.core import stable_generator, tuner_of
from peft_ext.scores import ExactScores, PooledScores
from peft_ext.sparse import drawn_keys, top_indices
from peft_ext.tuners.spt.allocation import allocate


VALUES = [0.1, 3.0, 0.5, 1.0, 0.02, 7.0]


def exact_scores(*parts: list[float]) -> ExactScores:
    scores = ExactScores({str(index): len(part) for index, part in enumerate(parts)})
    for sums, part in zip(scores.sums.values(), parts, strict=True):
        sums.copy_(torch.tensor(part))
    return scores


def chances(values: list[float], power: float, k: int) -> torch.Tensor:
    """The probability that each is among k drawn one after the other, from all orders in which that can happen."""
    weights = torch.tensor(values, dtype=torch.float64) ** power
    found = torch.zeros(len(values), dtype=torch.float64)
    for order in itertools.permutations(range(len(values)), k):
        left, probability = float(weights.sum()), 1.0
        for place in order:
            probability *= float(weights[place]) / left
            left -= float(weights[place])
        found[list(order)] += probability
    return found


# The draw


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_keys_have_the_probabilities_of_a_draw_without_replacement(power: float) -> None:
    trials = 100_000
    rows = torch.tensor(VALUES).expand(trials, -1)
    keys = drawn_keys(rows, power, torch.Generator().manual_seed(0))
    for k in (1, 3):
        frequency = torch.zeros(len(VALUES)).index_add_(
            0, keys.topk(k, dim=1).indices.reshape(-1), torch.ones(trials * k)
        )
        expected = chances(VALUES, power, k)
        deviation = (expected * (1 - expected) / trials).sqrt()
        assert ((frequency / trials - expected).abs() < 5 * deviation + 1e-9).all()


def test_scores_are_drawn_over_all_tensors_together() -> None:
    scores, trials = exact_scores(VALUES[:2], VALUES[2:]), 2000
    generator = torch.Generator().manual_seed(0)
    counts: Counter[int] = Counter()
    for _ in range(trials):
        found = scores.draw(3, 0.5, generator)
        chosen = [place + (0 if name == "0" else 2) for name, places in found.items() for place in places.tolist()]
        assert len(set(chosen)) == 3 and all((places.diff() > 0).all() for places in found.values())
        counts.update(chosen)
    expected = chances(VALUES, 0.5, 3)
    deviation = (expected * (1 - expected) / trials).sqrt()
    frequency = torch.tensor([counts[i] / trials for i in range(6)], dtype=torch.float64)
    assert ((frequency - expected).abs() < 5 * deviation).all()
    assert set(scores.draw(2, 1.0, generator, ["1"])) == {"1"}


def test_a_draw_follows_from_its_seed_alone() -> None:
    scores = random_scores(SHAPES)
    first, second, other = (scores.draw(40, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    torch.rand(3)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(name not in other or not torch.equal(first[name], other[name]) for name in first)
    larger = scores.spread_out(1.0, 5).top(60)
    smaller = scores.spread_out(1.0, 5).top(20)  # the same noise: budgets are nested
    assert all(set(places.tolist()) <= set(larger[name].tolist()) for name, places in smaller.items())


def test_without_spread_and_with_little_it_is_the_largest() -> None:
    scores = random_scores(SHAPES)
    assert scores.spread_out(0, 3) is scores
    largest = scores.top(40)
    drawn = scores.spread_out(1e-9, 3).top(40)
    assert drawn.keys() == largest.keys() and all(torch.equal(drawn[name], largest[name]) for name in largest)
    with pytest.raises(ValueError, match="`power` must be positive"):
        scores.draw(3, 0.0, torch.Generator())


def test_what_has_no_score() -> None:
    values = torch.tensor([0.0, 1e-38, -1.0, float("nan"), 1e38, 0.0, float("inf"), 1e-45])
    for power in (0.1, 1.0, 50.0):
        keys = drawn_keys(values, power, torch.Generator().manual_seed(1))
        assert keys[[1, 4, 7]].min() > 0 and keys[[0, 5]].tolist() == [0, 0]
        assert bool(torch.isfinite(keys[[1, 4, 7]]).all())
        for k, expected in ((4, {1, 4, 6, 7}), (8, {0, 1, 4, 5, 6, 7})):  # zeros come last, what is out never
            assert set(top_indices(lambda a, b, keys=keys: keys[a:b], 8, k).tolist()) == expected


def test_keys_do_not_depend_on_how_a_weight_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(1000)
    whole = drawn_keys(scores, 1.0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    pieces = torch.cat([drawn_keys(part, 1.0, generator) for part in scores.split(250)])
    assert torch.equal(whole, pieces)


def test_the_pool_draws_what_it_has_forgotten_too() -> None:
    torch.manual_seed(0)
    sizes = {"a": 4000, "b": 6000}
    exact, pooled = ExactScores(sizes), PooledScores(sizes)
    for _ in range(4):
        for name, size in sizes.items():
            values = torch.rand(size, generator=torch.Generator().manual_seed(size)) ** 4  # the same in each batch
            exact.add(name, values.clone())
            pooled.add(name, values.clone())
    share = {"exact": 0.0, "pooled": 0.0}
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for kind, scores in (("exact", exact), ("pooled", pooled)):
            found = scores.draw(2000, 0.5, generator)  # more than the pool has room for
            low = sum(int((pooled.of(name)[places] < 0).sum()) for name, places in found.items())  # forgotten
            share[kind] += low / 2000 / 20
    assert 0.2 < share["exact"] < 0.9
    assert share["pooled"] == pytest.approx(share["exact"], rel=0.05)
    with pytest.raises(ValueError, match="use `memory='exact'`"):
        pooled.top(2000)


# Sparse fine-tuning by sensitivity


@pytest.mark.parametrize("memory", ["exact", "pool"])
def test_a_support_drawn_by_sensitivity(memory: str) -> None:
    def calibrated(seed: int, **fields: Any) -> SparseFTConfig:
        config = SparseFTConfig(selection="sensitivity", num_tunable_weights=300, seed=seed, **fields)
        return peft_ext.calibrate(bert(), config, batches(), memory=memory, progress=False)

    first, second = calibrated(0, spread=2.0), calibrated(0, spread=2.0)
    torch.manual_seed(7)
    other, largest = calibrated(1, spread=2.0), calibrated(0)
    for config in (first, second, other, largest):
        assert config.support is not None and sum(map(len, config.support.values())) == 300
    assert all(torch.equal(first.support[name], second.support[name]) for name in first.support)
    assert str(first.support) != str(other.support) != str(largest.support)
    assert len(first.support) > len(largest.support)  # the largest lie close together

    if memory == "exact":  # scores that are handed over are drawn from in the same way
        model = bert()
        given = SparseFTConfig(selection="sensitivity", num_tunable_weights=300, spread=2.0)
        scores = measure(model, tuner_of(given).candidates(given, model), batches(), progress=False)
        given.use_scores({name: scores.of(name) for name in scores.sizes})
        adapted = get_peft_model(model, given).peft_config["default"]
        assert all(torch.equal(adapted.support[name], first.support[name]) for name in first.support)


# SpIEL


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_spiel_grows_where_it_is_drawn(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reselection, of all at first, by hand: what was drawn from |g|, or from r_i c_j outside the support."""
    model, leaf = one(selection, spread=1.0)
    before = set(leaf.indices().tolist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run_steps(model, optimizer, range(1))
    tracker: Any = leaf.tracker
    if selection == "spiel-ag":
        keys = drawn_keys(scripted_gradient(0).abs().reshape(-1), 1.0, stable_generator(0, f"{tracker.name} 0"))
        assert set(tracker.candidates.tolist()) == set(keys.topk(K).indices.tolist())
        assert set(keys.topk(K).indices.tolist()) != set(
            scripted_gradient(0).abs().reshape(-1).topk(K).indices.tolist()
        )
        expected = set(tracker.candidates.tolist())
        run_steps(model, optimizer, range(1, 5))
    else:
        run_steps(model, optimizer, range(1, 4))
        seen: list[torch.Tensor] = []
        drawing = tracker._drawing

        def watched(leaf: Any) -> Any:
            draw = drawing(leaf)
            return lambda scores, start, stop: seen.append(scores.clone()) or draw(scores, start, stop)

        monkeypatch.setattr(tracker, "_drawing", watched)
        run_steps(model, optimizer, range(4, 5))
        keys = drawn_keys(seen[0], 1.0, stable_generator(0, f"{tracker.name} 5"))
        assert {place for place in range(48) if seen[0][place] < 0} == before
        expected = set(keys.nan_to_num(-1).topk(K).indices.tolist())
    assert set(leaf.indices().tolist()) == expected


def test_candidates_are_drawn_in_proportion_to_the_gradient() -> None:
    gradient = torch.tensor([0.05, 1.0, 0.2, 0.4, 2.0, 0.1]).repeat(8, 1)
    counts = torch.zeros(6)
    trials = 150
    model, leaf = one("spiel-ag", spread=1.0)
    tracker: Any = leaf.tracker
    for seed in range(trials):
        tracker.config.seed = seed
        tracker._discard_step()
        backward_of(model, gradient)
        counts += torch.bincount(tracker.candidates % 6, minlength=6)
    simulated = drawn_keys(gradient.reshape(-1).expand(20_000, -1), 1.0, torch.Generator().manual_seed(1))
    expected = torch.bincount(simulated.topk(K, dim=1).indices.reshape(-1) % 6, minlength=6) / 20_000
    assert ((counts / trials - expected).abs() < 0.5).all()  # of up to 8 a column
    assert counts[0] < counts[3] < counts[4]


@pytest.mark.parametrize("selection", ["spiel-ag", "spiel-ma"])
def test_resuming_draws_the_same(selection: str) -> None:
    model, leaf = one(selection, reselection_rate=0.5, spread=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run_steps(model, optimizer, range(30))
    first, _ = one(selection, reselection_rate=0.5, spread=1.0)
    first_optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    run_steps(first, first_optimizer, range(22))
    second, second_leaf = one(selection, reselection_rate=0.5, spread=1.0)
    second.load_state_dict(first.state_dict())
    second_optimizer = torch.optim.AdamW(second.parameters(), lr=1e-2)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    torch.manual_seed(9)
    run_steps(second, second_optimizer, range(22, 30))
    assert support_of(second_leaf) == support_of(leaf)


# SPT


@pytest.mark.parametrize("budget", [17, 100, 200])
def test_an_allocation_by_what_was_drawn(budget: int) -> None:
    config = SPTConfig(budget=budget, r=2, spread=1.0)
    drawn = random_scores(SHAPES).spread_out(config.spread, config.seed)
    found = allocate(drawn, SHAPES, config, budget)
    sensitive, kinds = plain_allocation(drawn, config, budget)
    assert found.sensitive == sensitive and found.total == budget
    assert {name: kind for name, kind in found.kinds.items() if kind != "sparse"} == kinds


def test_spt_draws_by_its_own_seed() -> None:
    def calibrated(**fields: Any) -> SPTConfig:
        config = SPTConfig(budget=400, r=2, **fields)
        return peft_ext.calibrate(bert(), config, batches(), progress=False)

    first, second, other, largest = (
        calibrated(**fields) for fields in ({"spread": 2.0}, {"spread": 2.0}, {"spread": 2.0, "seed": 1}, {})
    )
    assert first.counts == second.counts and str(first.support) == str(second.support)
    assert str(first.support) != str(other.support) != str(largest.support)
    for config in (first, largest):
        model = get_peft_model(bert(), config)
        assert config.allocation.total == 400  # type: ignore[attr-defined]
        assert sum(p.numel() for n, p in model.named_parameters() if "spt_" in n) == 400


# Masks


def test_calibrated_logits_in_an_order_that_is_drawn() -> None:
    def logits(**fields: Any) -> dict[str, torch.Tensor]:
        config = MaskLoraConfig(init_logits="sensitivity", total_steps=10, **fields)
        peft_ext.calibrate(tiny("llama"), config, causal, progress=False)
        assert config.support is not None
        return config.support

    ids = torch.arange(24).view(2, 12) % 30 + 2
    causal = [{"input_ids": ids, "labels": ids}]
    plain, nearly, drawn, again = (
        logits(**fields) for fields in ({}, {"spread": 1e-9}, {"spread": 1.0}, {"spread": 1.0})
    )
    for name, values in plain.items():
        torch.testing.assert_close(nearly[name], values)
        torch.testing.assert_close(drawn[name], again[name])
    together, mixed = torch.cat(list(plain.values())), torch.cat(list(drawn.values()))
    assert not torch.equal(together, mixed)
    torch.testing.assert_close(together.sort().values, mixed.sort().values)  # the same quantiles, in another order


# What is refused


@pytest.mark.parametrize("spread", [-1.0, float("inf"), float("nan"), "1", 1e-12])
@pytest.mark.parametrize("config", [SPTConfig, SparseFTConfig])
def test_spread_is_a_number_from_zero_on(config: Any, spread: Any) -> None:
    with pytest.raises(TypeError if isinstance(spread, str) else ValueError, match="`spread` must be"):
        config(spread=spread)


def test_spread_without_effect_is_refused() -> None:
    for selection in ("random", "growing", "smallest", "given"):
        with pytest.raises(ValueError, match=r"`spread` has no effect with `selection="):
            SparseFTConfig(selection=selection, spread=1.0)
    with pytest.raises(ValueError, match="`spread` has no effect without `init_logits='sensitivity'`"):
        MaskLoraConfig(spread=1.0)
