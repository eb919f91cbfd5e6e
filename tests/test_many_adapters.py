"""Many adapters on one model: mixed batches, switching and deleting, and exchanging one in place."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import test_spt_parameters as experts
import torch
from models import inputs, logits, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from test_comparison import BENCHMARK
from test_conformance import METHODS
from torch import nn

import peft_ext
from peft_ext import SparseFTConfig, SSFConfig, WeGeFTConfig
from peft_ext.testing.method import close, differ


sys.path[:0] = [str(BENCHMARK), str(BENCHMARK.parent)]
from many import held


MANY = 20
MODELS = {name: "vit" if "vit" in case.method.models else "llama" for name, case in METHODS.items()}
MODELS |= {"sparse_ft": "llama", "spt": "llama", "mask_pruning": "bert"}


def small(method: str) -> nn.Module:
    """With one layer, where the adapter does not come with a number of layers of its own."""
    return tiny(MODELS[method], **({} if method == "fused_low_rank" else {"num_hidden_layers": 1}))


def with_two(method: str, name: str, **fields: Any) -> PeftModel:
    case = METHODS[method].method
    model = case.adapted(name, **fields)
    model.add_adapter("second", case.config_for(name, **fields))
    case.randomize(model, "second", seed=1)
    return model


# Mixed batches; the kit has the rest


@pytest.mark.parametrize("structured", ["lora", "dora", "adapter"])
def test_structures_in_mixed_batches(structured: str) -> None:
    model, batch = with_two("spt", "llama", structured=structured), inputs("llama", batch=3)
    names = ["second", "default", "__base__"]
    mixed = logits(model, {**batch, "adapter_names": names})
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        close(mixed[row], logits(model, batch)[row])


@pytest.mark.parametrize("method", ["sparse_ft", "spt", "mask_pruning"])
def test_gradients_in_mixed_batches(method: str) -> None:
    """Each adapter gets the gradient of its own samples."""
    model, batch = with_two(method, "bert").double(), inputs("bert", batch=3)
    model.set_adapter("default")
    model.set_requires_grad(["default", "second"])
    names = ["second", "default", "second"]
    trained = {
        key: p for key, p in model.named_parameters() if p.requires_grad and METHODS[method].method.prefix in key
    }
    logits(model, {**batch, "adapter_names": names}).sin().sum().backward()
    found = {key: p.grad for key, p in trained.items() if p.grad is not None}
    assert found
    for adapter in ("default", "second"):
        model.zero_grad()
        model.set_adapter(adapter)
        rows = [row for row, name in enumerate(names) if name == adapter]
        logits(model, {key: value[rows] for key, value in batch.items()}).sin().sum().backward()
        own = {key: p.grad for key, p in trained.items() if f".{adapter}." in key and p.grad is not None}
        assert own
        for key, gradient in own.items():
            torch.testing.assert_close(found[key], gradient)


def test_experts_refuse_mixed_batches() -> None:
    """What a module with adapted parameters is given are tokens, in an order that nothing is known of."""
    model = experts.adapted("mixtral")
    model.add_adapter("second", experts.calibrated(experts.tiny("mixtral")))
    batch = {"input_ids": experts.batches()[0]["input_ids"]}
    with pytest.raises(ValueError, match=r"cannot run a batch of several adapters \(default, second\).*set_adapter"):
        model(**batch, adapter_names=["default", "second", "default"])
    with torch.no_grad():
        close(model(**batch, adapter_names=["default"] * 3).logits, model(**batch).logits)
        with model.disable_adapter():
            base = model(**batch).logits
        close(model(**batch, adapter_names=["__base__"] * 3).logits, base)


# Many adapters


@pytest.mark.parametrize("method", sorted(METHODS))
def test_many_adapters(method: str) -> None:
    """Each costs what the first costs, a switch gives its outputs again, and deleting it gives its memory back."""
    name = MODELS[method]
    case = METHODS[method].method
    base = small(method)
    batch, empty = inputs(name), held(base)
    names = [f"task{number}" for number in range(MANY)]
    model = get_peft_model(base, case.config_for(name, base), adapter_name=names[0]).eval()
    with torch.no_grad():
        logits(model, batch)
    one = held(model)
    for number, adapter in enumerate(names):
        if number:
            model.add_adapter(adapter, copy.deepcopy(model.peft_config[names[0]]))
        case.randomize(model, adapter, seed=number)

    def output(adapter: str) -> torch.Tensor:
        model.set_adapter(adapter)
        with torch.no_grad():
            return logits(model, batch)

    some = (names[0], names[7], names[-1])
    first = [output(adapter) for adapter in some]
    assert differ(first[0], first[1]) and differ(first[1], first[2])
    for adapter, before in zip(reversed(some), reversed(first), strict=True):
        close(output(adapter), before)
    assert held(model) - one <= (MANY - 1) * (one - empty) * 1.05 + 1024
    for adapter in names[1:]:
        model.delete_adapter(adapter)
    close(output(names[0]), first[0])
    assert held(model) <= one * 1.01 + 1024


# Exchanging one in place


@pytest.mark.capability("exchange of an adapter in place")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_hotswap(method: str, tmp_path: Path) -> None:
    """What was saved takes the place of what was there, in the very tensors that were there, indices included."""
    name = MODELS[method]
    case = METHODS[method].method
    batch = inputs(name)
    for seed in (1, 2):
        base = small(method)
        # of the methods that draw a support, each has another one
        fields = {"seed": seed} if method == "sparse_ft" else {}
        model = get_peft_model(base, case.config_for(name, base, **fields))
        case.randomize(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(small(method), tmp_path / "1")
    other = PeftModel.from_pretrained(small(method), tmp_path / "2")
    with torch.no_grad():
        before, expected = logits(model, batch), logits(other, batch)
        assert differ(before, expected)
        places = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
        peft_ext.hotswap_adapter(model, tmp_path / "2")
        close(logits(model, batch), expected)
        assert places == {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
        peft_ext.hotswap_adapter(model, str(tmp_path / "1"))
        close(logits(model, batch), before)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(small(method), tmp_path / "again")
    with torch.no_grad():
        close(logits(again, batch), before)


def sparse(path: Path, seed: int, **fields: Any) -> PeftModel:
    config = SparseFTConfig(**{"selection": "random", "num_tunable_weights": 40, "seed": seed, **fields})
    model = get_peft_model(tiny("llama"), config)
    METHODS["sparse_ft"].method.randomize(model, seed=seed)
    model.save_pretrained(path)
    return model.eval()


def test_hotswap_without_recompilation(tmp_path: Path) -> None:
    sparse(tmp_path / "1", 1, layers_to_transform=[0])
    other = sparse(tmp_path / "2", 2, layers_to_transform=[0])
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "1")
    batch = inputs("llama")
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits(compiled, batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            peft_ext.hotswap_adapter(compiled, tmp_path / "2")
            close(logits(compiled, batch), logits(other, batch))
    torch.compiler.reset()


def test_hotswap_refuses_what_it_would_get_wrong(tmp_path: Path) -> None:
    model, batch = sparse(tmp_path / "sparse", 1), inputs("llama")
    with torch.no_grad():
        before = logits(model, batch)
    sparse(tmp_path / "larger", 1, num_tunable_weights=60)
    sparse(tmp_path / "fewer", 1, target_modules=["q_proj"])
    get_peft_model(tiny("llama"), SSFConfig()).save_pretrained(tmp_path / "ssf")
    swap = peft_ext.hotswap_adapter
    with pytest.raises(ValueError, match=r"no adapter 'other'"):
        swap(model, tmp_path / "sparse", "other")
    with pytest.raises(ValueError, match=r"no adapter 'default'.*PeftModel"):
        swap(tiny("llama"), tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"method SSF.*SPARSE_FT"):
        swap(model, tmp_path / "ssf")
    for folder in ("larger", "fewer"):
        with pytest.raises(ValueError, match=r"`num_weights_per_module`.*load_adapter"):
            swap(model, tmp_path / folder)
    with pytest.raises(TypeError, match="adapter: no options"):
        swap(model, tmp_path / "sparse", adapter="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged.*unmerge_adapter"):
        swap(model, tmp_path / "sparse")
    model.unmerge_adapter()
    with torch.no_grad():
        assert torch.equal(logits(model, batch), before)
    wide = get_peft_model(tiny("llama", hidden_size=32), SSFConfig())
    with pytest.raises(RuntimeError, match="does not fit this model"):
        swap(wide, tmp_path / "ssf")


def test_tensors_that_modules_share_are_not_exchanged_for_those_of_others(tmp_path: Path) -> None:
    for folder, fields in (
        ("all", {}),
        ("first", {"layers_to_transform": [0]}),
        ("again", {"layers_to_transform": 0}),
    ):
        config = WeGeFTConfig(r=4, init_weights=False, **fields)
        get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / folder)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "first").eval()
    before = logits(model, inputs("llama"))
    with pytest.raises(ValueError, match=r"on different modules .*layers\.1.* share tensors"):
        peft_ext.hotswap_adapter(model, tmp_path / "all")
    assert torch.equal(logits(model, inputs("llama")), before)
    peft_ext.hotswap_adapter(model, tmp_path / "again")
    expected = PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
    torch.testing.assert_close(logits(model, inputs("llama")), logits(expected, inputs("llama")))


@pytest.mark.parametrize("head", [None, ["classifier"]])
def test_hotswap_with_the_head_of_a_task(head: list[str] | None, tmp_path: Path) -> None:
    """PEFT's classes of tasks add the names of heads to a config whenever they see it."""
    expected = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = SSFConfig(task_type="SEQ_CLS", init_weights=False, modules_to_save=head if seed == 2 else None)
        model = get_peft_model(tiny("bert"), config).eval()
        nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path / str(seed))
        expected.append(logits(model, inputs("bert")))
    model = PeftModel.from_pretrained(tiny("bert"), tmp_path / "1").eval()
    for seed in (2, 1):
        peft_ext.hotswap_adapter(model, tmp_path / str(seed))
        torch.testing.assert_close(logits(model, inputs("bert")), expected[seed - 1])
    with pytest.raises(TypeError, match="PeftMixedModel"):
        peft_ext.hotswap_adapter(peft_ext.PeftMixedModel(tiny("bert"), SSFConfig()), tmp_path / "1")


def test_hotswap_of_lora_is_that_of_peft(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(tiny("llama"), LoraConfig(init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path / str(seed))
    first = PeftModel.from_pretrained(tiny("llama"), tmp_path / "1")
    peft_ext.hotswap_adapter(first, tmp_path / "2", torch_device="cpu")
    with torch.no_grad():
        close(logits(first, inputs("llama")), logits(model, inputs("llama")))


def test_every_method_is_here() -> None:
    assert {peft_type.lower() for peft_type in peft_ext.METHODS} == set(METHODS)


@pytest.mark.parametrize(
    ("method", "decoder"),
    [("sparse_ft", "delta.decode"), ("spt", "delta.decode"), ("binary_low_rank", "low_bit.leaf.decode")],
)
def test_loading_decodes_no_other_adapter(
    method: str, decoder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, case = MODELS[method], METHODS[method].method
    module, function = f"peft_ext.{decoder}".rsplit(".", 1)
    decode, counts = getattr(importlib.import_module(module), function), []
    for others in (1, 4):
        base = small(method)
        model = get_peft_model(base, case.config_for(name, base), adapter_name="task0")
        for number in range(1, others + 1):
            model.add_adapter(f"task{number}", copy.deepcopy(model.peft_config["task0"]))
        model.save_pretrained(str(tmp_path), selected_adapters=["task1"])
        for number in range(1, others + 1):
            peft_ext.hotswap_adapter(model, str(tmp_path / "task1"), f"task{number}")
        calls: list[None] = []
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{function}", lambda *args, calls=calls: calls.append(None) or decode(*args))
            peft_ext.hotswap_adapter(model, str(tmp_path / "task1"), "task0")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


# Large models


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"vpt", "fused_low_rank"}))
def test_injection_is_linear_in_depth(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer looks through the whole model: four times as many layers take about four times as many looks.

    VPT describes the model for each of its blocks, which are few; fused LoRAs come with a number of layers.
    """
    looks = []
    for depth in (4, 16):
        base = tiny(MODELS[method], num_hidden_layers=depth)
        config = METHODS[method].method.config_for(MODELS[method], base)
        seen, walk = [0], nn.Module.named_modules

        def counted(self: nn.Module, *args: Any, seen: list[int] = seen, walk: Any = walk, **kwargs: Any) -> Any:
            for found in walk(self, *args, **kwargs):
                seen[0] += 1
                yield found

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted)
            get_peft_model(base, config)
        looks.append(seen[0])
    assert looks[1] < 4.5 * looks[0]
