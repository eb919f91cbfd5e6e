"""SPT on the experts of mixtures, parameters that are no Linear's weight, against plain computations with dense weights.

Mixtral and Qwen3-MoE keep an expert as `(outputs, inputs)`, gpt-oss as `(inputs, outputs)`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_ext
from peft_ext import SPTConfig, inspection
from peft_ext.core import about_of
from peft_ext.tuners.spt.model import SPTModel, allocation_rows
from peft_ext.tuners.spt.parameters import SPTParameters, matrices_of


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARED |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "num_experts_per_tok": 2}
SHARED |= {"pad_token_id": 0, "tie_word_embeddings": False}
MODELS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SHARED, num_local_experts=4, intermediate_size=24, output_router_logits=False)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SHARED, num_experts=5, moe_intermediate_size=12, intermediate_size=24, mlp_only_layers=[0])
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SHARED, num_local_experts=3, intermediate_size=16)
    ),  # square, as published
}
NAMES = list(MODELS)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else nn.init.normal_(parameter, 1.0, 0.1)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others have no product in double precision
    return model.to(dtype).eval()


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 40, (3, 6), generator=generator) for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in ids]


def calibrated(model: nn.Module, budget: float = 500, **fields: Any) -> SPTConfig:
    settings = {"r": 2, "target_parameters": EXPERTS, "target_modules": [], "task_type": "CAUSAL_LM"}
    return peft_ext.calibrate(model, SPTConfig(budget=budget, **{**settings, **fields}), batches(), progress=False)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values for all trained leaves, so that each of them has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model with an adapter on its experts alone, with random values."""
    model = get_peft_model(tiny(name, dtype), calibrated(tiny(name), **fields))
    fill(model)
    return model.to(dtype).eval()


def numbered(config: SPTConfig, kind: str) -> dict[str, list[int]]:
    """The numbers of the matrices of this kind, by parameter, without the functions of the package."""
    found: dict[str, list[int]] = {}
    for name, got in (config.kinds or {}).items():
        if got == kind and name.endswith("]"):
            parameter, _, number = name[:-1].partition("[")
            found.setdefault(parameter, []).append(int(number))
    return {parameter: sorted(numbers) for parameter, numbers in found.items()}


def dense(model: Any, base: nn.Module, turned: bool, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The experts with the adapter in them, `W + scale B A` or `W + S`, matrix by matrix."""
    config = model.peft_config[adapter]
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters() if "experts" in name}
    for parameter, numbers in numbered(config, "lora").items():
        module, _, key = parameter.rpartition(".")
        layer = model.get_base_model().get_submodule(module)
        for place, number in enumerate(numbers):
            down, up = (getattr(layer, f"spt_{leaf}_{key}")[adapter].weight[place].detach() for leaf in ("down", "up"))
            update = config.scale * up @ down
            weights[parameter][number] += update.T if turned else update
    for parameter, numbers in numbered(config, "sparse").items():
        module, _, key = parameter.rpartition(".")
        values = model.get_base_model().get_submodule(f"{module}.spt_delta_{key}.{adapter}").weight.detach()
        for number in numbers:
            places = config.support[f"{parameter}[{number}]"]
            weights[parameter][number].view(-1)[places] += values[: len(places)]
            values = values[len(places) :]
        assert not len(values)
    return weights


@contextmanager
def experts_of(model: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """The model's own expert parameters, set to these values and trained."""
    parameters = {name: model.get_parameter(name) for name in weights}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data, parameter.grad = weights[name], None
        parameter.requires_grad_(True)
    yield parameters
    for name, parameter in parameters.items():
        parameter.data = kept[name]


# Candidates, scores, allocation


@pytest.mark.parametrize("name", NAMES)
def test_candidates_scores_and_allocation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, turned = tiny(name), name == "gpt_oss"
    config = SPTConfig(budget=300, r=2, target_parameters=EXPERTS, target_modules=["q_proj"])
    taken: list[Any] = []
    original = SPTModel.take_scores.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        SPTModel, "take_scores", classmethod(lambda cls, c, m, s: (taken.append(s), original(cls, c, m, s)))
    )
    peft_ext.calibrate(model, config, batches(), progress=False)

    expected: dict[str, torch.Tensor] = {}
    wanted = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "q_proj.bias", *EXPERTS))]
    assert sum("experts" in n for n in wanted) == (2 if name == "qwen3_moe" else 4)
    for batch in batches():
        model.train().requires_grad_(True).zero_grad()
        model(**batch).loss.backward()
        for key in wanted:
            expected[key] = expected.get(key, 0) + model.get_parameter(key).grad.square()
    (scores,) = taken
    assert set(scores.sizes) == set(wanted)
    for key, values in expected.items():
        torch.testing.assert_close(scores.of(key), values.flatten(), rtol=1e-4, atol=1e-12)

    # every number of most sensitive weights is tried; the scores are those found, for ties and rounding
    matrices: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    for key in wanted:
        parameter = model.get_parameter(key)
        values = scores.of(key).view(parameter.shape)
        if parameter.ndim == 3:
            shape = parameter.shape[:0:-1] if turned else parameter.shape[1:]
            matrices |= {f"{key}[{e}]": (values[e].flatten(), tuple(shape)) for e in range(len(parameter))}
        else:
            matrices[key] = (values.flatten(), tuple(parameter.shape))
    owners = torch.cat([torch.full((len(v),), i) for i, (v, _) in enumerate(matrices.values())])
    everything = torch.cat([v for v, _ in matrices.values()])
    order = everything.argsort(descending=True)
    costs = {key: 2 * sum(shape) for key, (_, shape) in matrices.items() if len(shape) == 2}
    keys, count, best = list(matrices), dict.fromkeys(matrices, 0), {}
    for place in order[everything[order] > 0].tolist():
        count[keys[owners[place]]] += 1
        total, kinds = 0, {}
        for key, n in count.items():
            size = len(matrices[key][0])
            if key in costs and n >= costs[key] / 10 and costs[key] < size:
                kinds[key], price = "lora", costs[key]
            elif key not in costs and n >= size / 5:
                kinds[key], price = "whole", size
            else:
                price = n
            total += price
        if total > 300:
            break
        best = kinds
    assert {key: kind for key, kind in (config.kinds or {}).items() if kind != "sparse"} == best
    assert any("experts" in key for key in best)
    spent = sum((config.counts or {}).values()) + sum(costs[key] for key in config.ranks or {})
    assert spent == 300
    for key, places in (config.support or {}).items():
        values = matrices[key][0]
        assert (values > values[places].min()).sum() == len(places) - 1


@pytest.mark.parametrize("structured", ["lora", "dora", None])
@pytest.mark.parametrize("targets", [None, ["q_proj", "k_proj"], []])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_budget_is_met(name: str, structured: str | None, targets: list[str] | None) -> None:
    base = tiny(name)
    budget = 1200 if targets is None else 500
    config = calibrated(base, budget, structured=structured, target_modules=targets)
    before = base(**batches()[0]).logits
    model = get_peft_model(base, config).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == budget
    torch.testing.assert_close(model(**batches()[0]).logits, before, rtol=1e-5, atol=1e-6)
    on_experts = [m for m in model.modules() if isinstance(m, SPTParameters)]
    assert on_experts and (structured is None) == (not any(m.structures for m in on_experts))
    others = any(isinstance(m, peft_ext.tuners.spt.layer.SPTLinear) for m in model.modules())
    assert others == (targets != [])


def test_a_pool_of_scores_gives_the_same() -> None:
    """In the pool a parameter is written out again for each request, and its matrices are read from one copy."""
    config = SPTConfig(budget=100, r=2, target_parameters=EXPERTS, target_modules=[])
    other = copy.deepcopy(config)
    peft_ext.calibrate(tiny("mixtral"), config, batches(1), progress=False)
    peft_ext.calibrate(tiny("mixtral"), other, batches(1), progress=False, memory="pool")
    assert config.kinds and other.kinds
    assert len(config.kinds.keys() & other.kinds.keys()) >= 0.8 * len(config.kinds)


def test_a_router_is_one_matrix() -> None:
    base = tiny("mixtral")
    config = calibrated(base, budget=60, target_parameters=["mlp.gate.weight"], structured=None)
    assert set(config.kinds or {}) == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    model = get_peft_model(base, config).eval()
    fill(model)
    before = model(**batches()[0]).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**batches()[0]).logits, before)
    assert torch.equal(model.merge_and_unload()(**batches()[0]).logits, before)


# Forward, gradients


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_are_those_of_the_dense_weights(name: str) -> None:
    model, turned = adapted(name, torch.float64, lora_alpha=3), name == "gpt_oss"
    base = tiny(name, torch.float64)
    config, batch = model.peft_config["default"], batches()[0]
    assert numbered(config, "lora") and numbered(config, "sparse") and config.scale == 1.5
    loss = model(**batch).loss
    loss.backward()
    plain = base(**batch).loss.item()
    with experts_of(base, dense(model, base, turned)) as experts:
        reference = base(**batch).loss
        reference.backward()
    assert abs(loss.item() - reference.item()) < 1e-12 < abs(loss.item() - plain)
    checked = 0
    for parameter, numbers in numbered(config, "lora").items():
        module, _, key = parameter.rpartition(".")
        layer = model.get_base_model().get_submodule(module)
        down, up = (getattr(layer, f"spt_{leaf}_{key}")["default"].weight for leaf in ("down", "up"))
        for place, number in enumerate(numbers):
            grad = experts[parameter].grad[number]
            grad = 1.5 * (grad.T if turned else grad)
            torch.testing.assert_close(up.grad[place], grad @ down[place].T, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(down.grad[place], up[place].T @ grad, rtol=1e-9, atol=1e-14)
        checked += down.numel() + up.numel()
    for parameter, numbers in numbered(config, "sparse").items():
        module, _, key = parameter.rpartition(".")
        leaf = model.get_base_model().get_submodule(f"{module}.spt_delta_{key}.default").weight
        expected = [experts[parameter].grad[n].flatten()[config.support[f"{parameter}[{n}]"]] for n in numbers]
        torch.testing.assert_close(leaf.grad, torch.cat(expected), rtol=1e-9, atol=1e-14)
        checked += leaf.numel()
    assert checked == 500


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_of_magnitudes_and_directions(name: str) -> None:
    """DoRA: `m (W + B A) / |W + B A|`, row by row, whose norm is not differentiated."""
    model, turned = adapted(name, torch.float64, structured="dora", unstructured=False), name == "gpt_oss"
    base, batch = tiny(name, torch.float64), batches()[0]
    loss = model(**batch).loss
    loss.backward()
    weights = {n: p.detach().clone() for n, p in base.named_parameters() if "experts" in n}
    changed: list[tuple[str, int, torch.Tensor]] = []
    pairs = []
    for parameter, numbers in numbered(model.peft_config["default"], "dora").items():
        module, _, key = parameter.rpartition(".")
        layer = model.get_base_model().get_submodule(module)
        leaves = [getattr(layer, f"spt_{leaf}_{key}")["default"].weight for leaf in ("down", "up", "magnitude")]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        pairs += zip(leaves, copies, strict=True)
        for place, number in enumerate(numbers):
            down, up, magnitude = (leaf[place] for leaf in copies)
            weight = weights[parameter][number]
            direction = (weight.T if turned else weight) + up @ down
            product = (magnitude / direction.detach().norm(dim=1))[:, None] * direction
            changed.append((parameter, number, product.T if turned else product))
    for parameter, number, weight in changed:
        weights[parameter][number] = weight.detach()
    with experts_of(base, weights) as experts:
        reference = base(**batch).loss
        reference.backward()
    assert abs(loss.item() - reference.item()) < 1e-12
    sum((experts[parameter].grad[number] * weight).sum() for parameter, number, weight in changed).backward()
    for leaf, expected in pairs:
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-9, atol=1e-14)
    assert len(pairs) >= 6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = adapted("mixtral").train()
    model(**batches()[0]).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batches()[0]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts(implementation: str) -> None:
    model = adapted("mixtral")
    expected = model(**batches()[0]).logits
    model.get_base_model().set_experts_implementation(implementation)
    torch.testing.assert_close(model(**batches()[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_parameters_are_back_after_a_failure() -> None:
    model = adapted("mixtral")
    layer = next(m for m in model.modules() if isinstance(m, SPTParameters))
    base = layer.get_base_layer()
    before = {key: (id(p), p.detach().clone()) for key, p in base.named_parameters()}
    with pytest.raises(AttributeError):
        layer(torch.randn(4, 16), None, None)
    assert {key: id(p) for key, p in base.named_parameters()} == {key: i for key, (i, _) in before.items()}
    assert all(torch.equal(p, before[key][1]) for key, p in base.named_parameters())


def test_training_moves_every_leaf_and_nothing_else() -> None:
    base = tiny("qwen3_moe")
    model = get_peft_model(base, calibrated(base, target_modules=None))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = sum(model.train()(**batch).loss for batch in batches())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} and len(moved) > 8
    assert losses[-1] < losses[0]


# Merge


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("structured", ["lora", "dora"])
@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.float32) for n in NAMES), ("mixtral", torch.bfloat16)])
def test_merged_is_unmerged(name: str, dtype: torch.dtype, structured: str, safe_merge: bool) -> None:
    """Bit for bit: the merge writes what the forward computes."""
    model = adapted(name, dtype, structured=structured)
    expected = model(**batches()[0]).logits
    originals = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe_merge)
    changed = [key for key, p in model.named_parameters() if not torch.equal(p, originals[key])]
    assert changed and all("experts.base_layer" in key for key in changed)
    assert torch.equal(model(**batches()[0]).logits, expected)
    model.unmerge_adapter()
    assert all(torch.equal(p, originals[key]) for key, p in model.named_parameters())
    assert torch.equal(model(**batches()[0]).logits, expected)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, SPTParameters) for module in merged.modules())
    assert torch.equal(merged(**batches()[0]).logits, expected)


def test_what_is_not_finite_is_not_merged() -> None:
    model = adapted("mixtral")
    next(p for name, p in model.named_parameters() if "spt_up_" in name).data[0, 0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.isfinite().all())


def test_several_adapters() -> None:
    model, batch = adapted("mixtral", torch.float64), batches()[0]
    second = calibrated(tiny("mixtral"), budget=400, target_parameters=["experts.down_proj"])
    model.add_adapter("second", second)
    first_alone = model(**batch).logits
    model.set_adapter("second")
    fill(model, seed=3)
    model.double()
    second_alone = model(**batch).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(**batch).logits
    base = tiny("mixtral", torch.float64)
    weights = dense(model, base, False)
    with experts_of(base, weights):
        torch.testing.assert_close(first_alone, base(**batch).logits)
        more = dense(model, base, False, "second")  # on top of the first
        with experts_of(base, more):
            torch.testing.assert_close(both, base(**batch).logits)
    assert not torch.allclose(both, first_alone) and not torch.allclose(both, second_alone)
    model.merge_adapter()
    assert torch.equal(model(**batch).logits, both)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=0)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, second_alone)
    assert not any(".default" in name for name in model.state_dict())


def test_beside_another_method() -> None:
    base, batch = tiny("mixtral"), batches()[0]
    config = calibrated(base)
    model = peft_ext.PeftMixedModel(base, config, adapter_name="spt")
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    fill(model)
    model.set_adapter(["spt", "lora"])
    model.eval()
    expected = model(**batch).logits
    model.set_adapter(["lora"])
    assert not torch.allclose(model(**batch).logits, expected)
    model.set_adapter(["spt", "lora"])
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    other = get_peft_model(tiny("mixtral"), LoraConfig(target_parameters=EXPERTS, lora_dropout=0.0))
    with pytest.raises(ValueError, match="a module on which there is an adapter of another method"):
        SPTParameters(other.get_base_model().get_submodule("model.layers.0.mlp.experts"))


# Files


@pytest.mark.parametrize("structured", ["lora", "dora", None])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_back(name: str, structured: str | None, tmp_path: Path) -> None:
    model = adapted(name, structured=structured, target_modules=["q_proj"], budget=800)
    expected = model(**batches()[0]).logits
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_parameters"] and all("experts" in key for key in fields["target_parameters"])
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert torch.equal(loaded(**batches()[0]).logits, expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(**batches()[0]).logits, expected)


def test_a_calibrated_config_comes_back(tmp_path: Path) -> None:
    config = calibrated(tiny("mixtral"))
    config.save_pretrained(tmp_path)
    again = SPTConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, SPTConfig) and again.to_dict() == config.to_dict()
    assert again.support is not None and config.support is not None and again.support.keys() == config.support.keys()
    assert all(torch.equal(again.support[key], places) for key, places in config.support.items())
    (tmp_path / "calibration.safetensors").unlink()
    model = get_peft_model(tiny("mixtral"), SPTConfig.from_pretrained(str(tmp_path)))  # the JSON names no indices
    with pytest.raises(ValueError, match="no saved adapter was loaded"):
        model(**batches()[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [None, []])
def test_as_lora(name: str, targets: list[str] | None, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"unstructured": False, "vector_threshold": None, "target_modules": targets}
    fields["lora_alpha"] = 3
    fields["budget"] = 900 if targets is None else 500
    if name == "qwen3_moe" and targets is None:
        # of a mixture PEFT takes these for the experts of old adapters, also in a layer that is dense
        fields["exclude_modules"] = ["gate_proj", "up_proj", "mlp.down_proj"]
    model = adapted(name, **fields)
    config = peft_ext.save_as_lora(model, tmp_path)
    assert config.target_parameters and bool(config.target_modules) == (targets is None)
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    expected = model(**batches()[0]).logits
    torch.testing.assert_close(loaded(**batches()[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny(name)(**batches()[0]).logits, expected, rtol=1e-3, atol=1e-3)


def test_as_lora_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tuned single weights or vectors, which LoRA cannot hold"):
        peft_ext.save_as_lora(adapted("mixtral"), tmp_path)
    with pytest.raises(ValueError, match="a structure of the kind 'dora'"):
        peft_ext.save_as_lora(
            adapted("mixtral", unstructured=False, vector_threshold=None, structured="dora"), tmp_path
        )


def test_what_is_shown(tmp_path: Path) -> None:
    model = adapted("mixtral", lora_alpha=3)
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    found = inspection.describe(str(tmp_path))
    rows = {row["module"]: row for row in found["modules"]}
    adapter = inspection.read_adapter(str(tmp_path))
    low_rank, sparse = numbered(config, "lora"), numbered(config, "sparse")
    assert set(rows) == low_rank.keys() | sparse.keys()
    weights, base = dense(model, tiny("mixtral"), False), tiny("mixtral")
    table = {cell for row in allocation_rows(config) for cell in row.values()}
    for name, row in rows.items():
        parts = [f"{len(low_rank[name])} x lora 2"] if name in low_rank else []
        if name in sparse:
            parts.append(f"sparse {sum(config.counts[f'{name}[{number}]'] for number in sparse[name])}")
        assert row["gets"] == ", ".join(parts) and row["gets"] in table
        norm = (weights[name] - base.get_parameter(name)).norm().item()
        assert row["norm"] == pytest.approx(norm, rel=1e-4)
        _, updates = about_of("SPT").read(adapter, adapter.sites[name])
        for number in low_rank.get(name, ()):
            update: Any = updates[f"{name}[{number}]"]
            expected = weights[name][number] - base.get_parameter(name)[number]
            torch.testing.assert_close((update.scale * update.up @ update.down).float(), expected)
    assert {kind: entry["tensors"] for kind, entry in found["figures"].items()} == {
        "lora": sum(map(len, low_rank.values())),
        "sparse": sum(map(len, sparse.values())),
    }


# Bad input


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts.up_proj"], r"\['experts.up_proj'\] not found .* it has mlp.experts.down_proj, mlp.experts.gate_up"),
        ([*EXPERTS, "nothing"], r"\['nothing'\] not found in the base model, a MixtralForCausalLM"),
        (["input_layernorm.weight"], r"input_layernorm.weight': it has the shape \(16,\)"),
        (["q_proj.weight"], r"q_proj.weight': it belongs to a Linear, which `target_modules` can name"),
        (["embed_tokens.weight"], "it belongs to a Embedding"),
    ],
)
def test_names_that_cannot_be_taken(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(tiny("mixtral"), target_parameters=targets)


def test_experts_without_a_gradient() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    del experts.down_proj
    experts.down_proj = nn.Parameter(torch.zeros(4, 16, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts.down_proj': it is quantised \(torch.int8\)"):
        calibrated(model)


def test_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"`structured='adapter'` goes behind the output of a Linear"):
        SPTConfig(budget=10, target_parameters=EXPERTS, structured="adapter")
    for value in ("experts", [1]):
        with pytest.raises(TypeError, match="`target_parameters` must be a list of names"):
            SPTConfig(budget=10, target_parameters=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`target_modules` is empty"):
        calibrated(tiny("mixtral"), target_parameters=[])


def test_another_model() -> None:
    config = calibrated(tiny("mixtral"))
    with pytest.raises(ValueError, match=r"tunes 'model.layers.0.mlp.experts.\w+\[\d\]', which is no target of"):
        get_peft_model(tiny("qwen3_moe"), config)


def test_experts_are_not_left_out_without_a_word() -> None:
    with pytest.warns(UserWarning, match=r"experts.gate_up_proj: .* Name them in `target_parameters`"):
        calibrated(tiny("mixtral"), target_modules=None, target_parameters=None, budget=300)
    for targets in (None, "all-linear"):
        config = calibrated(tiny("mixtral"), target_modules=targets, target_parameters=[], budget=300)
        assert not any("experts" in name for name in config.kinds or {})
    with pytest.raises(TypeError, match="Its parameters gate_up_proj, down_proj go into `target_parameters`"):
        calibrated(tiny("mixtral"), target_modules=["experts"], target_parameters=None)


def test_layers_and_exclusions_hold_for_parameters_too() -> None:
    config = calibrated(tiny("mixtral"), target_modules=["q_proj"], layers_to_transform=[1], budget=300)
    assert config.kinds and all(".layers.1." in name for name in config.kinds)
    config = calibrated(tiny("mixtral"), exclude_modules=["layers.0.mlp.experts"])
    assert config.kinds and all(".layers.1." in name for name in config.kinds)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_offloaded_experts() -> None:
    from accelerate import cpu_offload

    model = adapted("mixtral")
    right, slopes = model(**batches()[0]).logits.detach(), gradients_of(model)
    layer = next(m for m in model.modules() if isinstance(m, SPTParameters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu_offload(layer.get_base_layer(), torch.device("cpu"))
    assert any(parameter.is_meta for parameter in layer.get_base_layer().parameters())
    torch.testing.assert_close(model(**batches()[0]).logits.detach(), right)
    found = gradients_of(model)
    assert found.keys() == slopes.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(found[key], slope, msg=key)


def test_names_of_matrices() -> None:
    assert matrices_of("a.b", torch.empty(2, 3, 4)) == ["a.b[0]", "a.b[1]"]
    assert matrices_of("a.b", torch.empty(3, 4)) == ["a.b"]
