"""Mask-pruning LoRA: the masks' maths against closed forms, the phases, the target, and what is refused."""

from __future__ import annotations

import copy
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import zoo
from models import inputs, logits, loss, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

import peft_ext
from peft_ext import MaskLoraCallback, MaskLoraConfig
from peft_ext.groups import Group, find_groups
from peft_ext.tuners.mask_pruning import MaskGate, MaskLoraLayer, gates_of, keep_ratios, kept_units
from peft_ext.tuners.mask_pruning.gate import (
    MaskSchedule,
    check_reachable,
    choose,
    cost_of,
    penalty_gradient,
    shift_to,
)


FEW_HEADS = {"num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 2}


def config(**fields: Any) -> MaskLoraConfig:
    defaults: dict[str, Any] = {"r": 2, "total_steps": 20, "target_sparsity": 0.3, "task_type": "SEQ_CLS"}
    if "penalty" in fields:
        del defaults["target_sparsity"]
    return MaskLoraConfig(**{**defaults, **fields})


def group(name: str = "fc", units: int = 8, kind: str = "ffn", width: int = 1, parameters: int = 3) -> Group:
    return Group(name, kind, units, width, (), (), None, 0, parameters)


def gate(logits_: torch.Tensor, **fields: Any) -> MaskGate:
    """A gate in the middle of the mask phase, with its schedule."""
    made = MaskGate(group(units=len(logits_)), 50.0, logits_)
    MaskSchedule(config(warmup_ratio=0.0, fix_ratio=1.0, **fields), [made])
    return made


def train(model: nn.Module, steps: int, optimizer: Any = None, name: str = "bert", start: int = 0) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(start, start + steps):
        loss(model, inputs(name, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# The mask


def test_units_are_kept_with_the_probability_of_their_logit() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0])
    for temperature in (1.0, 0.1):
        made = gate(values, initial_temperature=temperature, final_temperature=temperature, total_steps=4000)
        assert made.schedule is not None
        counts = torch.zeros(len(values))
        for step in range(4000):
            made.schedule._step = step
            counts += made().detach()  # type: ignore[union-attr]
        p = values.sigmoid()
        assert ((counts / 4000 - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()


def test_the_gradient_is_that_of_the_soft_mask() -> None:
    values = torch.linspace(-2, 2, 8)
    made = gate(values, initial_temperature=0.7, final_temperature=0.7)
    assert made.schedule is not None
    mask = made()
    assert mask is not None and set(mask.detach().round(decimals=6).tolist()) <= {0.0, 1.0}
    upstream = torch.randn(8)
    mask.backward(upstream)
    noise = made.schedule.noise_of(made).double()
    soft = torch.sigmoid((values.double() + noise) / 0.7)
    expected = upstream.double() * soft * (1 - soft) / 0.7 * made.rate
    torch.testing.assert_close(made.weight.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(mask.detach().round(), (values + noise > 0).float())


def test_one_draw_a_step_for_everybody() -> None:
    made = gate(torch.zeros(64))
    schedule = made.schedule
    assert schedule is not None
    first = made()
    assert torch.equal(first, made()) and torch.equal(first, copy.deepcopy(made)())  # type: ignore[arg-type]
    schedule._step = 1
    assert not torch.equal(first, made())  # type: ignore[arg-type]
    assert not torch.equal(first, gate(torch.zeros(64), seed=1)())  # type: ignore[arg-type]


def test_evaluation_is_deterministic_and_hard() -> None:
    made = gate(torch.tensor([-1.0, -0.01, 0.01, 3.0])).eval()
    assert made().tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]
    made.fix(torch.tensor([True, False, False, True]))
    assert made().tolist() == made.train()().tolist() == [1, 0, 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_mask_on_the_consumer_is_one_on_what_it_consumes(name: str) -> None:
    """methods.md: the mask comes after bias and LoRA of the modules that make the channels."""
    prune = ["ffn"] if name == "t5" else ["ffn", "heads"]
    fields: dict[str, Any] = {"llama": FEW_HEADS, "bert": {"num_attention_heads": 4}}.get(name, {})
    model = get_peft_model(tiny(name, **fields), config(task_type=None, prune=prune)).eval()
    for key, parameter in model.named_parameters():
        if ".mask_pruning_" in key:
            nn.init.normal_(parameter, std=0.2)
    for made in gates_of(model, "default").values():
        made.fix(torch.rand(made.group.units) > 0.4)
    expected = logits(model, inputs(name))
    modules = dict(model.base_model.model.named_modules())
    for made in gates_of(model, "default").values():
        mask = made.hard().clone()
        made.kept.fill_(1)
        for row in made.group.rows:

            def masked(module: Any, args: Any, output: Any, row: Any = row, mask: Any = mask) -> Any:
                full = torch.ones(output.shape[-1])
                full[row.start : row.start + row.width * len(mask)] = mask.repeat_interleave(row.width)
                return output * full

            modules[row.module].register_forward_hook(masked)
    torch.testing.assert_close(logits(model, inputs(name)), expected, atol=1e-5, rtol=1e-4)
    for made in gates_of(model, "default").values():
        assert bool(made.kept.all())  # it is the hooks that mask now


def test_the_layer_against_its_equation() -> None:
    model = get_peft_model(tiny("bert"), config(lora_alpha=4))
    layer: Any = model.base_model.model.bert.encoder.layer[0].output.dense
    layer.double()
    nn.init.normal_(layer.mask_pruning_up["default"].weight)
    made = layer.mask_pruning_gate["default"]
    made.eval().fix(torch.arange(24) % 3 != 0)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    masked = x * made.hard().double()
    a, b = layer.mask_pruning_down["default"].weight, layer.mask_pruning_up["default"].weight
    expected = F.linear(masked, layer.base_layer.weight, layer.base_layer.bias) + 2 * masked @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)
    weight = layer.merged_tensors("default")["weight"]
    assert not weight[:, ::3].any() and weight[:, 1::3].all()
    torch.testing.assert_close(F.linear(x, weight, layer.base_layer.bias), expected)


# The size


def test_the_penalty_is_the_gradient_of_what_is_kept() -> None:
    values = torch.randn(10, dtype=torch.float64, requires_grad=True)
    (1.7 * (0.05 * values.sigmoid()).sum()).backward()
    torch.testing.assert_close(penalty_gradient(values.detach(), 0.05, 1.7), values.grad)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_optimizer_gets_the_penalty(scale: float | None) -> None:
    made = gate(torch.randn(8), penalty=2.0)
    before = made.logits().detach()
    optimizer = torch.optim.SGD([made.weight], lr=1.0, fused=True)
    if scale is not None:  # as a GradScaler leaves it to a fused optimizer
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    made.weight.grad = torch.full_like(made.weight, 0.5 * (scale or 1.0))
    optimizer.step()
    gradient = 0.5 + penalty_gradient(before, 1 / 8, 2.0) * 50
    torch.testing.assert_close(made.logits().detach(), before - 50 * gradient)


def test_a_penalty_prunes_and_a_larger_one_more() -> None:
    removed = []
    for penalty in (0.01, 30.0):
        torch.manual_seed(0)
        model = get_peft_model(tiny("bert"), config(penalty=penalty, initial_logit=1.0))
        train(model, 20)
        removed.append(1 - sum(keep_ratios(model).values()) / 4)
    assert removed[1] > 0.6 > removed[0]


def test_shift_to() -> None:
    values, costs = torch.randn(500) * 5, torch.rand(500) + 0.1
    for target in (0.001, 0.25, 0.9):
        shifted = values + shift_to(values, costs, target)
        assert float((costs * torch.sigmoid(-shifted)).sum() / costs.sum()) == pytest.approx(target, abs=1e-5)


def _removed(kept: list[torch.Tensor], groups: list[Group]) -> float:
    cost = sum(float((~units).sum()) * g.parameters for units, g in zip(kept, groups, strict=True))
    return cost / sum(g.units * g.parameters for g in groups)


def test_choosing_takes_the_smallest_logits_within_the_target() -> None:
    groups = [group("a", 40, parameters=5), group("b", 60, parameters=5), group("c", 4, "heads", 8, 100)]
    values = [torch.randn(g.units) for g in groups]
    values[2] += 10
    kept = choose(values, groups, config(target_sparsity=0.25))
    assert _removed(kept, groups) == pytest.approx(0.25, abs=0.01)
    everything = torch.cat(values[:2])
    stays = torch.cat(kept[:2])
    assert kept[2].all() and everything[stays].min() > everything[~stays].max()
    # a head is too much for what is left: smaller units go instead
    values[2] -= 20
    kept = choose(values, groups, config(target_sparsity=0.3))
    assert not kept[2][values[2].argmin()] and _removed(kept, groups) == pytest.approx(0.3, abs=0.01)


def test_uniform_and_rounded_choices() -> None:
    groups = [group(str(i), 64, parameters=5) for i in range(3)] + [
        group(f"h{i}", 8, "heads", 4, 40) for i in range(3)
    ]
    values = [torch.randn(g.units) for g in groups]
    kept = choose(values, groups, config(target_sparsity=0.4, uniform=True))
    assert len({int(units.sum()) for units in kept[:3]}) == len({int(units.sum()) for units in kept[3:]}) == 1
    assert _removed(kept, groups) == pytest.approx(0.4, abs=0.02)
    for units, scores in zip(kept, values, strict=True):
        assert units.all() or scores[units].min() > scores[~units].max()
    kept = choose(values, groups, config(target_sparsity=0.4, round_to=8))
    assert all(int(units.sum()) % 8 == 0 for units in kept[:3])
    assert len({int(units.sum()) for units in kept[:3]}) > 1
    odd = [group("a", 20, parameters=5), group("b", 24, parameters=5)]
    with pytest.raises(ValueError, match="`uniform=True` needs layers of one size; 'b' has 24 units"):
        choose([torch.randn(20), torch.randn(24)], odd, config(uniform=True))


def test_flops_count_the_attention_too() -> None:
    groups = find_groups(tiny("bert", num_attention_heads=4))
    by_parameters = config()
    by_flops = config(cost="flops", sequence_length=512)
    values = [torch.zeros(g.units) for g in groups.values()]
    check_reachable(groups, by_parameters)
    heads, ffn = (next(g for g in groups.values() if g.kind == kind) for kind in ("heads", "ffn"))
    assert cost_of(ffn, by_flops) == 2 * 512 * ffn.parameters
    assert cost_of(heads, by_flops) == 2 * 512 * heads.parameters + 4 * 512 * 512 * 4
    assert len(choose(values, list(groups.values()), by_flops)) == len(groups)


def test_latency_is_measured_once_and_kept(tmp_path: Path) -> None:
    settings = config(cost="latency", batch_size=2, sequence_length=16, target_sparsity=0.5, task_type="CAUSAL_LM")
    base = tiny("llama", intermediate_size=256, num_attention_heads=8, head_dim=4, num_key_value_heads=4)
    model = get_peft_model(base, settings)
    costs = model.peft_config["default"].unit_costs
    assert costs is not None and set(costs) == set(gates_of(model, "default")) and min(costs.values()) > 0
    ffn = [cost for name, cost in costs.items() if name.endswith("down_proj")]
    assert ffn[0] == ffn[1]  # equal shapes are timed once
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), str(tmp_path))
    assert again.peft_config["default"].unit_costs == costs


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_latency_of_fused_projections(name: str) -> None:
    settings = config(cost="latency", batch_size=2, sequence_length=16, target_sparsity=0.5, task_type="CAUSAL_LM")
    base = zoo.build("gpt_neox") if name == "gpt_neox" else tiny(name)
    costs = get_peft_model(base, settings).peft_config["default"].unit_costs
    assert costs is not None and min(costs.values()) > 0


def test_uniform_towers_of_other_widths() -> None:
    """As in the cut, each tower is uniform by itself."""
    base = tiny("clip", text_config={"intermediate_size": 40}, vision_config={"intermediate_size": 24})
    model = get_peft_model(base, config(task_type=None, uniform=True, prune=["ffn"], target_sparsity=0.25))
    peft_ext.fix_masks(model)
    left = {name: len(units) for name, units in kept_units(model).items()}
    for tower in ("text", "vision"):
        assert len({count for name, count in left.items() if tower in name}) == 1
    assert len({group.tower for group in find_groups(base).values()}) == 2


# The phases


def test_phases() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("bert", num_attention_heads=4), config(warmup_ratio=0.2, fix_ratio=0.6))
    gates = list(gates_of(model, "default").values())
    schedule = gates[0].schedule
    assert schedule is not None and all(made.schedule is schedule for made in gates)
    model.train()
    start = [made.logits().detach().clone() for made in gates]
    optimizer = train(model, 4)
    assert all(torch.equal(made.logits(), before) for made, before in zip(gates, start, strict=True))
    assert schedule.temperature == 1.0 and gates[0]() is not None
    train(model, 4, optimizer)
    assert schedule.step == 8 and schedule.temperature == pytest.approx(0.65)
    expected = sum(float((1 - made.logits().detach().sigmoid()).sum()) * made.group.parameters for made in gates)
    total = sum(made.group.units * made.group.parameters for made in gates)
    assert expected / total == pytest.approx(0.3, abs=1e-3)  # the ramp ends in the middle of the phase
    with pytest.raises(ValueError, match="not decided yet, after 8 steps"):
        kept_units(model)
    train(model, 4, optimizer)
    kept = kept_units(model)
    removed = sum((made.group.units - len(kept[made.group.name])) * made.group.parameters for made in gates)
    assert removed / total == pytest.approx(0.3, abs=0.01)
    decided = {key: value.clone() for key, value in kept.items()}
    up: Any = model.base_model.model.bert.encoder.layer[0].output.dense.mask_pruning_up["default"]
    lora = up.weight.detach().clone()
    train(model, 8, optimizer)
    assert all(torch.equal(decided[name], units) for name, units in kept_units(model).items())
    assert not torch.equal(up.weight, lora)  # LoRA goes on


@pytest.mark.parametrize("fields", [{"uniform": True}, {"round_to": 4}, {"prune": ["ffn"]}, {"prune": ["heads"]}])
def test_the_target_is_met(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny("llama", num_attention_heads=8, head_dim=4, num_key_value_heads=4, intermediate_size=64),
        config(task_type="CAUSAL_LM", target_sparsity=0.25, **fields),
    )
    train(model, 20, name="llama")
    gates = gates_of(model, "default")
    removed = sum((g.group.units - len(kept_units(model)[name])) * g.group.parameters for name, g in gates.items())
    assert removed / sum(g.group.units * g.group.parameters for g in gates.values()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", ["sgd", "adamw", "fused", "adafactor"])
def test_optimizers_and_weight_decay(name: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("bert"), config(warmup_ratio=0.5))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-3, weight_decay=0.5),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.5),
        "fused": lambda: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.5, fused=True),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-3, weight_decay=0.5),
    }[name]()
    gates = list(gates_of(model, "default").values())
    train(model, 5, optimizer)
    assert all(torch.equal(made.logits(), torch.full_like(made.logits(), 3.0)) for made in gates)
    train(model, 15, optimizer)
    assert all(made.is_fixed for made in gates)


def test_skipped_steps_do_not_count() -> None:
    made = gate(torch.zeros(8))
    assert made.schedule is not None
    optimizer = torch.optim.SGD([made.weight], lr=1.0, fused=True)
    made.weight.grad = torch.zeros_like(made.weight)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert made.schedule.step == 0
    optimizer.found_inf.zero_()  # type: ignore[attr-defined]
    optimizer.step()
    assert made.schedule.step == 1 and int(made.progress) == 1


def test_without_total_steps_the_first_step_says_so() -> None:
    model = get_peft_model(tiny("bert"), config(total_steps=None))
    with pytest.raises(ValueError, match=r"total_steps is not set.*MaskLoraCallback"):
        train(model, 1)


def test_logits_cast_to_bfloat16_are_put_back() -> None:
    model = get_peft_model(tiny("bert"), config())
    gates = list(gates_of(model, "default").values())
    before = [made.logits().detach().clone() for made in gates]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # what TRL does on a quantised base
    model.train()
    assert all(made.weight.dtype == torch.float32 for made in gates)
    assert all(torch.equal(made.logits(), value) for made, value in zip(gates, before, strict=True))


@pytest.mark.parametrize("way", ["a process group of one", "set_to_none=False"])
def test_gradients_of_zero_while_masks_do_not_learn_do_not_count(way: str) -> None:
    """AdamW would average them with those that come later."""

    def decided(other: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(tiny("bert"), config(warmup_ratio=0.3)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        gates = list(gates_of(model, "default").values())
        for step in range(20):
            loss(model, inputs("bert", seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not (other and way == "set_to_none=False"))
        assert all(made.is_fixed for made in gates)
        return [tensor for made in gates for tensor in (made.kept, made.weight.detach())]

    expected = decided(False)
    if way == "a process group of one":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = decided(True)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("fields", [{}, {"penalty": 5.0}])
@pytest.mark.parametrize("way", ["one for each parameter", "one for each half", "some gates in none"])
def test_gates_in_several_optimizers(way: str, fields: dict[str, Any]) -> None:
    """The same steps, the same penalty, the same target as with all in one."""

    def trained(split: bool) -> dict[str, MaskGate]:
        torch.manual_seed(0)
        model = get_peft_model(tiny("bert"), config(warmup_ratio=0.1, **fields)).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        made = gates_of(model, "default")
        if way == "some gates in none":
            left_out = [gate.weight for gate in list(made.values())[::2]]
            parameters = [p for p in parameters if all(p is not other for other in left_out)]
        parts = [parameters]
        if split:
            size = len(parameters) // 2 if way == "one for each half" else 1
            parts = [parameters[i : i + size] for i in range(0, len(parameters), size)]
        optimizers = [torch.optim.AdamW(part, lr=1e-2) for part in parts]
        for step in range(21):  # where some gates are in none, a step ends with the next one
            loss(model, inputs("bert", seed=step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return made

    together, apart = trained(False), trained(True)
    for name, made in together.items():
        assert made.is_fixed and int(made.progress) == 21
        assert torch.equal(apart[name].kept, made.kept) and int(apart[name].progress) == 21
        torch.testing.assert_close(apart[name].weight, made.weight)
    assert any(not made.kept.all() for made in together.values())


@pytest.mark.parametrize("fields", [{}, {"penalty": 5.0}])
@pytest.mark.parametrize("step", [5, 13])  # in the middle of the mask phase, and in its last step
def test_nothing_is_decided_from_what_is_not_finite(step: int, fields: dict[str, Any]) -> None:
    model = get_peft_model(tiny("bert"), config(warmup_ratio=0.1, **fields))
    optimizer = train(model, step)
    (loss(model, inputs("bert")) * float("nan")).backward()
    with pytest.raises(ValueError, match=r"logits of the masks are not finite since step \d+"):
        optimizer.step()
        train(model, 1, optimizer)
    assert not any(made.is_fixed for made in gates_of(model, "default").values())
    with pytest.raises(ValueError, match="not finite"):
        peft_ext.fix_masks(model)


@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_an_averaged_model_has_the_decision_or_says_what_is_wrong(average: str, with_buffers: bool) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model = get_peft_model(tiny("bert"), config())
    average_fn = get_ema_multi_avg_fn(0.9) if average == "ema" else None
    averaged = AveragedModel(model, multi_avg_fn=average_fn, use_buffers=with_buffers)
    optimizer = train(model, 1)
    for step in range(1, 20):
        train(model, 1, optimizer, start=step)
        averaged.update_parameters(model)
    copied: Any = averaged.module
    if with_buffers:
        with pytest.raises(ValueError, match=r"it was averaged .* `use_buffers=False`"):
            averaged.eval()
        with pytest.raises(ValueError, match="it was averaged"):
            kept_units(copied)
    else:
        averaged.eval()
        assert all(torch.equal(units, kept_units(model)[name]) for name, units in kept_units(copied).items())
        pruned = peft_ext.prune_and_unload(copy.deepcopy(copied))
        torch.testing.assert_close(logits(pruned, inputs("bert")), logits(copied, inputs("bert")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["train anew", "stay in eval mode"])
def test_a_hand_written_average_has_the_decision(way: str) -> None:
    """It copies buffers by way of `data`, which leaves no trace at the tensor."""
    model = get_peft_model(tiny("bert"), config())
    average = copy.deepcopy(model).eval()
    logits(average, inputs("bert"))
    train(model, 20)
    model.eval()
    for own, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        own.data.copy_(other)
    if way == "train anew":
        average.train().eval()
    torch.testing.assert_close(logits(average, inputs("bert")), logits(model, inputs("bert")))


def test_a_closure_and_a_penalty() -> None:
    made = gate(torch.zeros(8), penalty=1.0)
    with pytest.raises(ValueError, match=r"SGD\.step was given a closure"):
        torch.optim.SGD([made.weight], lr=1.0).step(lambda: 0.0)


def test_training_in_eval_mode_is_refused() -> None:
    model = get_peft_model(tiny("bert"), config(warmup_ratio=0.0)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model, inputs("bert")).backward()
    with pytest.raises(ValueError, match=r"in eval mode.*call `model\.train\(\)`"):
        optimizer.step()


# Under the Trainer


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in inputs("bert", batch=1, seed=index).items()}


def trainer(model: Any, path: Path, callbacks: list[Any] | None = None, **fields: Any) -> tf.Trainer:
    arguments = tf.TrainingArguments(
        str(path),
        **{"max_steps": 10, "per_device_train_batch_size": 4, "save_strategy": "no", **fields},
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        logging_steps=2,
        disable_tqdm=True,
    )
    return tf.Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


def test_the_callback(tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), config(total_steps=None))
    run = trainer(model, tmp_path, [MaskLoraCallback()])
    run.train()
    assert model.peft_config["default"].total_steps is None  # the number was that of this training
    assert len(kept_units(model)) == 4
    ratios = [entry["keep_ffn"] for entry in run.state.log_history if "loss" in entry]
    assert ratios[0] > 0.8 > ratios[-1] and all("keep_heads" in entry for entry in run.state.log_history)


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(tiny("bert"), config(total_steps=10))

    whole, halves = fresh(), fresh()
    trainer(whole, tmp_path / "whole").train()
    trainer(halves, tmp_path / "half", save_strategy="steps", save_steps=4, max_steps=10).train()
    resumed = fresh()
    trainer(resumed, tmp_path / "half").train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-4"))
    expected = gates_of(whole, "default")
    for name, made in gates_of(resumed, "default").items():
        assert torch.equal(made.kept, expected[name].kept) and int(made.progress) == 10
        torch.testing.assert_close(made.weight, expected[name].weight)


@pytest.mark.parametrize("stop", [2, 8, 16])  # before the masks learn, while they do, and once they are decided
def test_distributed_checkpoints(stop: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def started(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = get_peft_model(tiny("bert"), config(warmup_ratio=0.25))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = started(0)
    train(whole, stop, optimizer)
    resumed, other = started(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        tensors, state = get_state_dict(whole, optimizer)
        dcp.save({"model": tensors, "optimizer": state}, checkpoint_id=tmp_path)
        tensors, state = get_state_dict(resumed, other)
        content = {"model": tensors, "optimizer": state}
        # until masks learn, their logits have no state, which the empty one of `get_state_dict` stands for
        planner = dcp.DefaultLoadPlanner(allow_partial_load=stop == 2)
        dcp.load(content, checkpoint_id=tmp_path, planner=planner)
        set_state_dict(resumed, other, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    train(whole, 20 - stop, optimizer, start=stop)
    train(resumed, 20 - stop, other, start=stop)
    expected = gates_of(whole, "default")
    for name, made in gates_of(resumed, "default").items():
        assert torch.equal(made.kept, expected[name].kept) and int(made.progress) == 20
        assert torch.equal(made.weight, expected[name].weight)


def test_a_training_that_never_moved_the_masks_says_so(tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), config()).train()
    loss(model, inputs("bert")).backward()
    model.save_pretrained(tmp_path)  # nothing was trained yet
    for key, parameter in model.named_parameters():
        if ".mask_pruning_up." in key:
            parameter.data -= parameter.grad  # by some means that is no torch optimizer
    with pytest.warns(UserWarning, match="its masks took part in no step"):
        model.save_pretrained(tmp_path)
    train(model, 1)
    model.save_pretrained(tmp_path)


def _train_in_parallel(rank: int, folder: str) -> None:
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = get_peft_model(tiny("bert"), config())
    parallel = nn.parallel.DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    for step in range(20):
        parallel(**inputs("bert", seed=2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: made.kept for name, made in gates_of(model, "default").items()}
    save_file(found, os.path.join(folder, f"{rank}.safetensors"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then deadlock with the interpreter when both go


def test_all_processes_decide_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert any(not units.all() for units in first.values())
    assert all(torch.equal(units, second[name]) and (units >= 0).all() for name, units in first.items())


# Saving


def test_a_published_adapter_holds_its_decision(tmp_path: Path) -> None:
    model = get_peft_model(tiny("bert"), config())
    train(model, 20)
    expected = logits(model.eval(), inputs("bert"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, inputs("bert")), expected)
    assert all(torch.equal(units, kept_units(loaded)[name]) for name, units in kept_units(model).items())
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs("bert")), expected, atol=1e-5, rtol=1e-4)
    cut = [name for name, made in gates_of(model, "default").items() if not made.kept.all()]
    assert cut
    for name in cut:
        units = gates_of(model, "default")[name]
        zero = ~units.kept.bool().repeat_interleave(units.group.width)
        assert not merged.get_submodule(name).weight[:, zero].any()


@pytest.mark.parametrize("way", ["load_adapter", "from_pretrained"])
def test_transformers_loads_the_decision(way: str, tmp_path: Path) -> None:
    """Its loader puts other tensors in the place of the buffers, and runs no hooks."""
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config())
    train(model, 20)
    expected = logits(model.eval(), inputs("bert"))
    model.save_pretrained(tmp_path)
    if way == "load_adapter":
        loaded: Any = tiny("bert").eval()
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded.eval(), inputs("bert")), expected)
    assert all(torch.equal(units, kept_units(loaded)[name]) for name, units in kept_units(model).items())


def test_fix_masks_decides_early() -> None:
    model = get_peft_model(tiny("bert"), config())
    train(model, 5)
    with pytest.raises(ValueError, match=r"peft_ext\.fix_masks\(model\)"):
        kept_units(model)
    peft_ext.fix_masks(model)
    assert any(len(units) < gates_of(model, "default")[name].group.units for name, units in kept_units(model).items())
    with pytest.raises(ValueError, match="no mask-pruning adapter named 'other'"):
        kept_units(model, "other")


def test_a_loaded_adapter_compiles_and_exports_at_once(tmp_path: Path) -> None:
    """Whether the masks are decided is known before the first forward."""
    model = get_peft_model(tiny("bert"), config())
    for made in gates_of(model, "default").values():
        made.fix(torch.arange(made.group.units) % 2 == 0)
    batch = {key: value for key, value in inputs("bert").items() if key != "labels"}
    expected = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert"), str(tmp_path))
    exported = torch.export.export(copy.deepcopy(loaded).base_model.model, (), batch).module()
    torch.testing.assert_close(exported(**batch).logits, expected)
    compiled: Any = torch.compile(loaded, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, expected)


# Distillation


def _kl(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """In float64, of logits at temperature 2: mean over all but the last dimension."""
    old, new = (F.log_softmax(x.double() / 2, -1) for x in (old, new))
    return 4 * (old.exp() * (old - new)).sum(-1).mean()


def test_distillation_adds_the_divergence_from_the_dense_model() -> None:
    settings = {"task_type": "CAUSAL_LM", "warmup_ratio": 0.0}
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config(**settings, distillation=0.7)).train()
    torch.manual_seed(0)
    plain = get_peft_model(tiny("llama"), config(**settings)).train()
    batch = inputs("llama")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :3] = -100
    output, alone = model(**batch), plain(**batch)
    dense = tiny("llama")(**batch).logits
    # the output at a position predicts the next token, the first of an answer at the last one of its prompt
    chosen = batch["labels"][:, 1:] != -100
    expected = alone.loss + 0.7 * _kl(dense[:, :-1][chosen], alone.logits[:, :-1][chosen]).float()
    torch.testing.assert_close(output.loss, expected)
    assert expected > alone.loss + 1e-3
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.training and all(made.training for made in gates_of(model, "default").values())
    torch.testing.assert_close(model.eval()(**batch).loss, plain.eval()(**batch).loss)
    with pytest.raises(ValueError, match="pass `labels`"):
        model.train()(input_ids=batch["input_ids"])


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "mixed"])
def test_distillation_without_a_task_type(way: str) -> None:
    """As for images: PEFT then calls the base model and not the tuner."""

    def made(weight: float) -> Any:
        base, wanted = tiny("bert"), config(task_type=None, initial_logit=0.0, warmup_ratio=0.0, distillation=weight)
        torch.manual_seed(0)
        if way == "add_adapter":
            base.add_adapter(wanted)
            return base.train()
        return (get_peft_model if way == "get_peft_model" else peft_ext.PeftMixedModel)(base, wanted).train()

    model, plain = made(0.7), made(0.0)
    batch = inputs("bert")
    assert model(**batch).loss > plain(**batch).loss
    if way != "add_adapter":
        with model.disable_adapter(), plain.disable_adapter():
            assert model(**batch).loss == plain(**batch).loss
        copied = copy.deepcopy(model)
        assert copied(**batch).loss == model(**batch).loss
        assert not copied.unload()._forward_hooks


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
def test_distillation_counts_gradient_accumulation_as_the_loss_does(name: str) -> None:
    """Trainer passes the labels of a whole step. Llama and ViT divide by their number, BERT's classifier does not."""
    batch, task = inputs(name), {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}.get(name)
    if name == "llama":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, :3] = -100

    def made(**more: Any) -> PeftModel:
        torch.manual_seed(0)
        base = tiny(name)
        for weight in (p for p in base.parameters() if p.ndim > 1):
            nn.init.normal_(weight, std=0.2)
        settings = {"warmup_ratio": 0.0, "initial_logit": 0.0, "distillation_teacher": "frozen", "task_type": task}
        return get_peft_model(base, config(**settings, **more)).train()

    def added(**more: Any) -> torch.Tensor:
        return made(distillation=0.7)(**batch, **more).loss - made()(**batch, **more).loss

    labels = batch["labels"][:, 1:] if name == "llama" else batch["labels"]
    count = int((labels != -100).sum())
    share = 1.0 if name == "bert" else 0.25
    assert added() > 1e-3
    torch.testing.assert_close(added(num_items_in_batch=torch.tensor(4 * count)), share * added())
    if name == "llama":  # a micro-batch without labels
        batch["labels"][:] = -100
        assert added(num_items_in_batch=torch.tensor(count)) == 0


def test_distillation_of_a_sequence_to_sequence_model_shifts_nothing() -> None:
    settings = {"task_type": "SEQ_2_SEQ_LM", "warmup_ratio": 0.0, "prune": ["ffn"]}
    batch = inputs("t5")
    torch.manual_seed(0)
    model = get_peft_model(tiny("t5"), config(**settings, distillation=1.0)).train()
    torch.manual_seed(0)
    alone = get_peft_model(tiny("t5"), config(**settings)).train()(**batch)
    expected = alone.loss + _kl(tiny("t5")(**batch).logits, alone.logits).float()
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_distillation_is_measured_as_the_loss_is(problem: str) -> None:
    batch = inputs("bert")
    fields: dict[str, Any] = {"num_labels": 1} if problem == "regression" else {}
    batch["labels"] = torch.rand(2, 1) if problem == "regression" else torch.randint(0, 2, (2, 3)).float()

    def made(**more: Any) -> PeftModel:
        torch.manual_seed(0)
        settings = {"warmup_ratio": 0.0, "distillation_teacher": "frozen", "initial_logit": 0.0, **more}
        return get_peft_model(tiny("bert", **fields), config(**settings)).train()

    alone, dense = made()(**batch), tiny("bert", **fields)(**batch).logits
    if problem == "regression":
        expected = (alone.logits - dense).square().mean()
    else:
        expected = _kl(torch.stack((dense, 0 * dense), -1), torch.stack((alone.logits, 0 * alone.logits), -1)).float()
    assert expected > 1e-3
    torch.testing.assert_close(made(distillation=0.5)(**batch).loss, alone.loss + 0.5 * expected)


@pytest.mark.parametrize(("is_fresh", "teacher"), [(True, None), (False, None), (False, "self"), (True, "frozen")])
def test_the_teacher_of_a_fresh_head_is_the_model_without_masks(is_fresh: bool, teacher: str | None) -> None:
    batch = inputs("bert")

    def made(**more: Any) -> PeftModel:
        base = tiny("bert")
        if is_fresh:
            nn.init.zeros_(base.classifier.bias)
        torch.manual_seed(0)
        model = get_peft_model(base, config(**{"warmup_ratio": 0.0, "initial_logit": 0.0, **more})).train()
        for key, parameter in model.named_parameters():
            if "_up." in key or "classifier.modules_to_save" in key:
                nn.init.normal_(parameter, std=0.3)
        return model

    alone = made()(**batch)
    with_lora = made(initial_logit=5.0).eval()  # all are kept
    if teacher == "frozen" or (teacher is None and not is_fresh):
        with with_lora.disable_adapter():
            dense = with_lora(**batch).logits
    else:
        dense = with_lora(**batch).logits
    model = made(distillation=0.5, distillation_teacher=teacher)
    torch.testing.assert_close(model(**batch).loss, alone.loss + 0.5 * _kl(dense, alone.logits).float())
    assert all(not made.is_open and made.training for made in gates_of(model, "default").values())


# Calibration


def test_first_logits_follow_the_sensitivity() -> None:
    base, batches = tiny("bert", num_attention_heads=4), [inputs("bert", seed=seed) for seed in range(3)]
    settings = config(init_logits="sensitivity")
    with pytest.raises(ValueError, match=r"peft_ext\.calibrate\(model, config, dataloader\)"):
        get_peft_model(base, settings)
    peft_ext.calibrate(base, settings, batches, progress=False)
    groups = find_groups(base)
    scores: dict[str, torch.Tensor] = {}
    for batch in batches:
        base.zero_grad()
        loss(base.train(), batch).backward()
        for name, made in groups.items():
            weight = base.get_submodule(name).weight
            taylor = (weight * weight.grad).abs().sum(0).view(made.units, -1).sum(1)
            scores[name] = scores.get(name, 0) + taylor.detach()
    assert settings.support is not None
    for kind in ("ffn", "heads"):
        names = [name for name, made in groups.items() if made.kind == kind]
        found = torch.cat([settings.support[name] for name in names])
        assert torch.equal(found.argsort(), torch.cat([scores[name] for name in names]).argsort())
        assert float(found.mean()) == pytest.approx(3.0, abs=0.01) and 1.5 < float(found.std()) < 2.2
    model = get_peft_model(tiny("bert", num_attention_heads=4), settings)
    for name, made in gates_of(model, "default").items():
        torch.testing.assert_close(made.logits(), settings.support[name])
    with pytest.raises(ValueError, match="calibrated on another model"):
        get_peft_model(tiny("bert", intermediate_size=16, num_attention_heads=4), settings)


# Groups


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_groups_of_grouped_queries(kind: str) -> None:
    groups = find_groups(tiny("llama", **FEW_HEADS), [kind])
    first = next(iter(groups.values()))
    if kind == "heads":
        assert first.name == "model.layers.0.self_attn.o_proj" and (first.units, first.width) == (2, 8)
        assert [(row.module.split(".")[-1], row.width) for row in first.rows] == [
            *[("q_proj", 8), ("k_proj", 4), ("v_proj", 4)]
        ]
        assert first.parameters == 16 * (8 + 4 + 4 + 8)
    else:
        assert (first.units, first.width, first.parameters) == (24, 1, 16 * 3)


def test_fused_projections() -> None:
    groups = find_groups(tiny("phi3", **FEW_HEADS))
    heads, ffn = (groups[f"model.layers.0.{name}"] for name in ("self_attn.o_proj", "mlp.down_proj"))
    assert [(row.start, row.width) for row in heads.rows] == [(0, 8), (16, 4), (24, 4)]
    assert [(row.start, row.width) for row in ffn.rows] == [(0, 1), (24, 1)]


def test_a_shared_layer_is_one_group() -> None:
    fields = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"intermediate_size": 24, "vocab_size": 40, "num_labels": 3}
    base = tf.AlbertForSequenceClassification(tf.AlbertConfig(**fields, **sizes))
    model = get_peft_model(base, config())
    assert len(gates_of(model, "default")) == 2
    train(model, 20)
    assert len(kept_units(model)) == 2


def test_declared_groups_and_unknown_architectures() -> None:
    entry = {"kind": "ffn", "rows": ["fc1"], "columns": "fc2"}
    with pytest.raises(ValueError, match=r"(?s)'MLP' model hang together, so none is pruned.*groups=\["):
        get_peft_model(tiny("mlp"), config(task_type=None, target_modules=["fc1", "fc2"], prune=["ffn"]))
    fields: dict[str, Any] = {"task_type": None, "target_modules": ["fc1"], "prune": ["ffn"], "target_sparsity": 0.25}
    model = get_peft_model(tiny("mlp"), config(**fields, groups=[entry]))
    layer: Any = model.base_model.model.fc2
    assert isinstance(layer, MaskLoraLayer) and not layer.mask_pruning_down and "default" in layer.mask_pruning_gate
    assert model.peft_config["default"].lora_modules == ["fc1"]
    with pytest.raises(ValueError, match=r"entry of `groups` is not understood.*'row'"):
        get_peft_model(tiny("mlp"), config(**fields, groups=[{"kind": "ffn", "row": ["fc1"], "columns": "fc2"}]))
    bad = {"kind": "ffn", "rows": ["mlp.fc1"], "columns": "attention.o_proj"}
    with pytest.raises(ValueError, match=r"The 24 rows of .*mlp\.fc1' do not go with 16 channels"):
        find_groups(tiny("vit"), ["ffn"], [bad])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_sparsity": 1.0}, "`target_sparsity` must be between 0 and 1"),
        ({"target_sparsity": 0.2, "penalty": 1.0}, "either `target_sparsity`"),
        ({"penalty": 0.0}, "`penalty` must be positive"),
        ({"prune": ["layers"]}, "`prune` must name some of ffn, heads"),
        ({"prune": []}, "`prune` must name some of"),
        ({"cost": "bytes"}, "`cost` must be one of"),
        ({"cost": "flops"}, "`sequence_length` goes with"),
        ({"cost": "latency", "sequence_length": 8}, "`batch_size` goes with"),
        ({"batch_size": 8}, "`batch_size` goes with"),
        ({"sequence_length": 8}, "`sequence_length` goes with"),
        ({"total_steps": 0}, "`total_steps` must be positive"),
        ({"warmup_ratio": 0.8}, "`warmup_ratio` and `fix_ratio` must be in this order"),
        ({"init_logits": "zero"}, "`init_logits` must be 'constant' or 'sensitivity'"),
        ({"round_to": 0}, "`round_to` must be a positive integer"),
        ({"final_temperature": 0.0}, "`final_temperature` must be positive"),
        ({"lora_dropout": 1.5}, "`lora_dropout` must be between 0 and 1"),
        ({"distillation_teacher": "dense"}, "`distillation_teacher` must be one of frozen, self or None"),
        ({"distillation": -1.0}, "`distillation` must not be negative"),
        ({"r": 0}, "`r` must be a positive integer"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{"target_sparsity": 0.3, **fields}) if "penalty" not in fields or "target_sparsity" in fields else (
            config(**fields)
        )


def test_what_cannot_be_reached_is_refused_before_training() -> None:
    base = tiny("bert", num_attention_heads=4)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"cannot be reached within 1 %: the smallest step of these 2 groups removes"):
        get_peft_model(base, config(prune=["heads"], target_sparsity=0.2))
    for groups in ("ffn", 3, ["ffn"]):
        with pytest.raises(TypeError, match=r"`groups` must .*\"kind\": \"ffn\""):
            get_peft_model(base, config(groups=groups))
    with pytest.raises(ValueError, match=r"No layer of the 4 groups .* is named by `layers_to_transform=3`"):
        get_peft_model(base, config(layers_to_transform=3, target_modules=["bert.encoder.layer.0.output.dense"]))
    with pytest.raises(ValueError, match="no groups of kind 'heads'"):
        get_peft_model(tiny("t5"), config(task_type=None, prune=["ffn", "heads"]))
    assert [name for name, _ in base.named_modules()] == before


def test_layers_and_exclusions() -> None:
    model = get_peft_model(tiny("bert"), config(layers_to_transform=[1], layers_pattern="layer"))
    assert all(".1." in name for name in gates_of(model, "default"))
    model = get_peft_model(tiny("bert"), config(exclude_modules=r".*\.0\.output\.dense"))
    assert "bert.encoder.layer.0.output.dense" not in gates_of(model, "default")
    assert len(gates_of(model, "default")) == 3


@pytest.mark.capability("4-bit base", "mask_pruning")
def test_a_quantised_base_trains_and_says_how_to_cut() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    first, second = (bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4") for _ in range(2))
    base = nn.Sequential(first, nn.ReLU(), second, nn.Linear(64, 3)).to("cpu")
    x = torch.randn(4, 64)
    base(x)  # quantises
    entry = {"kind": "ffn", "rows": ["0"], "columns": "2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            base, config(task_type=None, target_modules=["0", "2"], prune=["ffn"], groups=[entry])
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(20):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(kept_units(model)["2"]) == 45
        assert math.isfinite(float(model.eval()(x).sum()))
