"""Layer sampling: who is trained when, what it costs, under the real trainers and in several processes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, tiny
from peft import LoraConfig, get_peft_model
from test_integrations import arguments, classification_data, run_processes, sft_trainer
from torch import nn
from transformers import Trainer, TrainerCallback

import peft_ext
from peft_ext.training.units import find_candidates


BLOCKS = 4
INERT = {f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(BLOCKS)}  # softmax knows no shift of keys


def model_of(name: str = "bert", **fields: Any) -> Any:
    """Four blocks."""
    return tiny(name, num_hidden_layers=BLOCKS, **fields).train()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])} - INERT


class Watch(TrainerCallback):
    """At each step: whose gradients there are, who has state, who moved."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = snapshot(model)
        self.gradients: list[set[str]] = []
        self.states: list[set[str]] = []
        self.moved: list[set[str]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append({name for name, p in self.model.named_parameters() if p.grad is not None} - INERT)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        owned = kwargs["optimizer"].state
        self.states.append({name for name, p in self.model.named_parameters() if len(owned.get(p, ()))} - INERT)
        self.moved.append(moved(self.model, self.before))
        self.before = snapshot(self.model)


def unread(model: nn.Module) -> set[str]:
    """What has no gradient even in full fine-tuning, or one of zero."""
    model = copy.deepcopy(model)
    name = "bert" if hasattr(model, "bert") else "llama"
    model(**inputs(name)).loss.backward()
    return INERT | {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize(
    "fields", [{}, {"gradient_accumulation_steps": 2}, {"optim": "sgd"}, {"activation_checkpointing": True}]
)
def test_exactly_the_drawn_blocks_are_trained(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = model_of()
    never = unread(model)
    sampling = peft_ext.layer_sampling(model, blocks=1, every=2, seed=8)
    watch = Watch(model)
    options = {"max_steps": 16, "weight_decay": 0.1, "save_strategy": "no", **fields}
    Trainer(model, arguments(tmp_path, **options), train_dataset=classification_data(), callbacks=[watch]).train()
    assert len(watch.moved) == 16 and sampling.step == 16
    for step in range(16):
        expected = set(sampling.parameters_at(step)) - never
        blocks = sampling.units_at(step)
        assert len(blocks) == 1 and sampling.units_at(step // 2 * 2) == blocks
        assert watch.gradients[step] == watch.moved[step] == expected
        assert {name for name in expected if ".layer." in name} == {n for n in expected if f"{blocks[0]}." in n}
        if "optim" not in fields:
            assert watch.states[step] == expected
    assert {name for step in range(16) for name in sampling.units_at(step)} == {
        f"bert.encoder.layer.{index}" for index in range(BLOCKS)
    }
    assert all(parameter.requires_grad for parameter in model.parameters())


def adam_reference(
    build: Callable[[], Any], trained: Callable[[int], list[str]], reset: bool, steps: int
) -> dict[str, torch.Tensor]:
    """Adam by hand on the drawn parameters, all gradients being computed; float64."""
    model = build()
    parameters = dict(model.named_parameters())
    state: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    for step in range(steps):
        model.zero_grad()
        model(**inputs("llama", seed=step)).loss.backward()
        names = trained(step)
        if reset:
            state = {name: kept for name, kept in state.items() if name in names}
        for name in names:
            p = parameters[name]
            first, second, count = state.get(name, (torch.zeros_like(p), torch.zeros_like(p), 0))
            first, second, count = 0.9 * first + 0.1 * p.grad, 0.999 * second + 0.001 * p.grad**2, count + 1
            state[name] = first, second, count
            with torch.no_grad():
                p -= 1e-2 * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    return snapshot(model)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_those_of_adam_on_the_drawn_parameters(reset: bool, fused: bool) -> None:
    def build() -> Any:
        return model_of("llama").double()

    model = build()
    sampling = peft_ext.layer_sampling(model, blocks=2, every=3, reset_state=reset)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
    for step in range(10):
        model(**inputs("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adam_reference(build, sampling.parameters_at, reset, 10)
    for name, value in snapshot(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_memory_is_that_of_what_is_trained() -> None:
    """Gradients and Adam's state, after all blocks had a turn."""
    model = model_of("llama")
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1, always=())
    optimizer = torch.optim.AdamW(model.parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for step in range(20):
        model(**inputs("llama")).loss.backward()
        trained = sum(sizes[name] for name in sampling.parameters_at(step))
        assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == trained
        optimizer.step()
        assert sum(value.numel() for state in optimizer.state.values() for value in state.values()) == sum(
            2 * sizes[name] + 1 for name in sampling.parameters_at(step)
        )
        optimizer.zero_grad()
    per_block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    assert trained == per_block
    assert not model.lm_head.weight.requires_grad  # frozen for good
    sampling.close()
    assert all(p.requires_grad for p in model.parameters())


def test_resumes_in_the_middle_of_an_interval(tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        model = model_of()
        peft_ext.layer_sampling(model, blocks=1, every=4)
        options = {"max_steps": 8, "save_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
        return Trainer(model, arguments(tmp_path / name, **options), train_dataset=classification_data())

    whole, half = trainer("whole"), trainer("half")
    whole.train()
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert moved(half.model, snapshot(whole.model)) == set()


def test_a_second_training_finds_all_parameters(tmp_path: Path) -> None:
    """The first one's optimizer is alive, and the blocks of its end are none of the second one's begin."""
    model = model_of()
    never = unread(model)
    sampling = peft_ext.layer_sampling(model, blocks=1, every=2, seed=8)
    options = {"max_steps": 7, "save_strategy": "no"}
    first = Trainer(model, arguments(tmp_path, **options), train_dataset=classification_data())
    first.train()
    watch = Watch(model)
    second = Trainer(model, arguments(tmp_path, **options), train_dataset=classification_data(), callbacks=[watch])
    second.train()
    assert sampling.units_at(7) != sampling.units_at(0)
    for step in range(7):  # the first by the draw that was next, as its forward has seen the first optimizer
        assert watch.moved[step] == set(sampling.parameters_at(step or 7)) - never
    assert sampling.step == 7 and first.optimizer is not second.optimizer


def test_a_forward_before_there_is_an_optimizer_freezes_nothing() -> None:
    model = model_of()
    sampling = peft_ext.layer_sampling(model, blocks=1)
    model(**inputs("bert")).loss.backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    optimizer.step()  # with the gradients of all, of which the drawn ones count
    before = snapshot(model)
    model.zero_grad()
    model(**inputs("bert")).loss.backward()
    optimizer.step()
    assert moved(model, before) <= set(sampling.parameters_at(0))


def test_gradients_left_from_an_accumulation_are_dropped_at_the_switch() -> None:
    model = model_of()
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1, seed=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sampling.units_at(0) != sampling.units_at(1)
    for step in range(2):  # gradients are never cleared
        before = snapshot(model)
        model(**inputs("bert")).loss.backward()
        optimizer.step()
        assert moved(model, before) <= set(sampling.parameters_at(step))


def test_two_optimizers_share_the_parameters() -> None:
    model = model_of()
    sampling = peft_ext.layer_sampling(model, blocks=1, every=2)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [torch.optim.AdamW(matrices), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)]
    never = unread(model)
    for step in range(8):
        before = snapshot(model)
        model(**inputs("bert")).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert moved(model, before) == set(sampling.parameters_at(step)) - never


@pytest.mark.parametrize("adapted", [False, True])
def test_sft_trainer(tmp_path: Path, adapted: bool) -> None:
    """Full fine-tuning, and the LoRA of a few blocks at a time."""
    model = model_of("llama")
    if adapted:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        )
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1)
    trainer = sft_trainer(tmp_path, model=model)
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    prefix = "base_model.model." if adapted else ""
    for step in range(3):
        assert watch.moved[step] == {prefix + name for name in sampling.parameters_at(step)}
        assert len({name.split("layers.")[1][0] for name in watch.moved[step] if "layers." in name}) == 1
    assert adapted == ("lm_head.weight" not in watch.moved[0])


@pytest.mark.parametrize("always", [("embeddings", "norm", "head"), ()])
@pytest.mark.parametrize("reference_first", [True, False])
def test_a_reference_without_the_adapter_under_checkpointing(reference_first: bool, always: tuple[str, ...]) -> None:
    """As DPO has it: PEFT makes the whole adapter trainable again, before blocks are computed anew in the backward."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model: Any = get_peft_model(model_of("llama"), config).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sampling = peft_ext.layer_sampling(model, blocks=1, every=2, always=always)
    batch = inputs("llama")
    for step in range(4):
        before = snapshot(model.get_base_model())
        losses = [] if reference_first else [model(**batch).loss]
        with torch.no_grad(), model.disable_adapter():
            losses.append(-model(**batch).loss)
        losses += [model(**batch).loss] if reference_first else []
        sum(losses).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        assert moved(model.get_base_model(), before) == set(sampling.parameters_at(step))


def test_half_fine_tuning_draws_half_of_each_kind_in_each_block() -> None:
    model = model_of("llama")
    sampling = peft_ext.layer_sampling(model, unit="matrix", share=0.5, every=1)
    seen = set()
    for step in range(12):
        names = sampling.units_at(step)
        seen |= set(names)
        counts = [
            [sum(f"layers.{block}.{part}" in name for name in names) for part in ("self_attn", "mlp")]
            for block in range(BLOCKS)
        ]
        assert counts == [[2, 1], [2, 2], [2, 1], [2, 2]]
        assert sum("layernorm" in name for name in names) == BLOCKS
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < set(sampling.parameters_at(step))
    assert len(seen) == BLOCKS * 9  # each has its turn


def test_draws_follow_from_the_seed() -> None:
    first, same, other = (peft_ext.layer_sampling(model_of(), blocks=2, seed=seed) for seed in (0, 0, 1))
    draws = [[sampling.units_at(20 * interval) for interval in range(12)] for sampling in (first, same, other)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][:2] == [["bert.encoder.layer.2", "bert.encoder.layer.3"]] * 2
    assert all(len(set(blocks)) == 2 for blocks in draws[0])


def test_two_processes_draw_the_same(tmp_path: Path) -> None:
    ranks = run_processes(
        tmp_path,
        """
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        torch.manual_seed(dist.get_rank())
        model = tiny("bert", num_hidden_layers=4).train()
        sampling = peft_ext.layer_sampling(model, blocks=1, every=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        drawn = []
        for step in range(6):
            wrapped(**inputs("bert", seed=10 * step + dist.get_rank())).loss.backward()
            drawn.append([n for n, p in model.bert.encoder.layer.named_children() if any(
                q.grad is not None for q in p.parameters())])
            optimizer.step()
            optimizer.zero_grad()
        values = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        result(drawn=drawn, expected=[[n[-1] for n in sampling.units_at(s)] for s in range(6)], norm=values.norm().item())
        dist.destroy_process_group()
        """,
    )
    assert ranks[0] == ranks[1]
    assert ranks[0]["drawn"] == ranks[0]["expected"]


def test_copies_are_not_sampled() -> None:
    model = model_of()
    sampling = peft_ext.layer_sampling(model, blocks=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        before = snapshot(other)
        other(**inputs("bert")).loss.backward()
        optimizer.step()
        assert moved(other, before) == set(before) - unread(model)
    assert sampling.step == 0
    sampling.close()
    peft_ext.layer_sampling(model, blocks=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 5}, "between 1 and 4"),
        ({"blocks": 0}, "between 1 and 4"),
        ({"every": 0}, "at least 1 step"),
        ({"unit": "layer"}, "'block' or 'matrix'"),
        ({"share": 0.5}, "is for `unit='matrix'`"),
        ({"unit": "matrix", "blocks": 2}, "is for `unit='block'`"),
        ({"unit": "matrix", "share": 0.0}, "above 0"),
        ({"unit": "matrix", "share": 1.5}, "at most 1"),
        ({"unit": "matrix", "share": 1e-3}, "less than one module"),
        ({"always": ("embedding",)}, "embeddings, norm, head"),
        ({"always": "norm"}, "must be a sequence"),
    ],
)
def test_bad_input(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft_ext.layer_sampling(model_of(), **fields)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="is not known"):
        peft_ext.layer_sampling(tiny("mlp"))
    with pytest.raises(ValueError, match="requires a gradient"):
        peft_ext.layer_sampling(model_of().requires_grad_(False))
    tied = model_of("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is embeddings and head at once"):
        peft_ext.layer_sampling(tied, always=("norm", "head"))
    peft_ext.layer_sampling(tied, always=("norm",))
    with pytest.raises(ValueError, match="sampled already"):
        peft_ext.layer_sampling(tied)


def test_parameters_that_no_optimizer_holds() -> None:
    """As if blocks had been frozen when the optimizer was built: they would never train."""
    model = model_of()
    optimizer = torch.optim.SGD(model.bert.encoder.layer[0].parameters(), lr=0.1)
    peft_ext.layer_sampling(model)
    with pytest.raises(ValueError, match=r"are in no optimizer, bert\.embeddings.* would never train"):
        model(**inputs("bert")).loss.backward()
    del optimizer
    late = model_of("llama")
    peft_ext.layer_sampling(late)
    adapted = get_peft_model(late, LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted.train()(**inputs("llama")).loss.backward()
    with pytest.raises(ValueError, match="call `layer_sampling` after that"):
        optimizer.step()


def adapted_twice() -> Any:
    model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train()


def test_another_adapter_is_not_trained_without_a_draw() -> None:
    model = adapted_twice()
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.1)
    for _ in range(2):
        model(**inputs("llama")).loss.backward()
        optimizer.step()
        model.set_adapter("second")
        with pytest.raises(ValueError, match=r"lora_A\.default\.weight is frozen\. After `set_adapter`"):
            model(**inputs("llama"))
        model.set_adapter("default")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"now model\.norm\.weight is trainable, too\."):
        model(**inputs("llama"))
    model.base_model.model.model.norm.weight.requires_grad_(False)
    sampling.close()
    model.set_adapter("second")
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1)
    before = snapshot(model)
    optimizer.zero_grad()
    model(**inputs("llama")).loss.backward()
    optimizer.step()
    prefix = "base_model.model."
    assert moved(model, before) == {prefix + name for name in sampling.parameters_at(2)}  # the optimizer counts on


@pytest.mark.parametrize("closes", [False, True])
def test_a_switch_between_forward_and_step_leaves_the_other_adapter_frozen(closes: bool) -> None:
    model = adapted_twice()
    sampling = peft_ext.layer_sampling(model, blocks=1, every=1)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.1)
    model(**inputs("llama")).loss.backward()
    model.set_adapter("second")
    if closes:
        sampling.close()
    else:
        optimizer.step()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default")
    optimizer.zero_grad()
    model(**inputs("llama")).loss.backward()
    assert all(p.requires_grad for name, p in model.named_parameters() if ".default." in name) == closes


def test_embeddings_of_a_second_stack_are_embeddings() -> None:
    outside = find_candidates(tiny("bart"), by_matrix=False).outside
    names = {place: {slot.name for slot in slots} for place, slots in outside.items()}
    assert {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")} < names["embeddings"]
    assert not any("embed_positions" in name for name in names["head"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 1.5}, "`blocks` must be a whole number, not 1.5"),
        ({"blocks": True}, "`blocks` must be a whole number, not True"),
        ({"every": 1.5}, "`every` must be a whole number, not 1.5"),
        ({"every": float("nan")}, "`every` must be a whole number, not nan"),
        ({"every": "3"}, "`every` must be a whole number, not '3'"),
        ({"seed": None}, "`seed` must be a whole number, not None"),
        ({"unit": "matrix", "share": "half"}, "`share` must be a number above 0 and at most 1, not 'half'"),
        ({"unit": "matrix", "share": True}, "`share` must be a number above 0 and at most 1, not True"),
        ({"always": None}, "`always` must be a sequence"),
        ({"always": [["norm"]]}, "`always` must be a sequence"),
        ({"model": None}, "`model` is a NoneType"),
    ],
)
def test_values_of_other_types(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        peft_ext.layer_sampling(**{"model": model_of(), **fields})


def test_always_may_be_read_once_only() -> None:
    sampling = peft_ext.layer_sampling(model_of("llama"), blocks=1, always=(name for name in ("norm",)))  # type: ignore[arg-type]
    assert "model.norm.weight" in sampling.parameters_at(0)
