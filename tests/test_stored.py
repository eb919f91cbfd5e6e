"""What a file must have before it goes into an adapter; otherwise it is refused and the model is as it was."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import MLP, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import PeftMixedModel, SparseFTConfig, SSFConfig, VQTConfig


FOLDER = Path(__file__).parent / "fixtures" / "adapters-0.1"
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapters_0_1", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = _script()


def damaged(name: str, folder: Path, damage: Callable[[Tensors], None]) -> Path:
    shutil.copytree(FOLDER / name, folder / name)
    tensors = load_file(folder / name / WEIGHTS)
    damage(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name / WEIGHTS)
    return folder / name


def base_of(name: str) -> nn.Module:
    base, dtype, _ = MAKE.CASES[name]
    return MAKE.BASES[base](dtype)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    tensors = [(key, value.clone()) for key, value in model.state_dict().items()]
    flags = [(key, p.requires_grad) for key, p in model.named_parameters()]
    return tensors, flags, [(key, type(module), module.training) for key, module in model.named_modules()]


def assert_refused(model: nn.Module, load: Callable[[], Any], *parts: str) -> None:
    before = state_of(model)
    with pytest.raises(ValueError) as caught:
        load()
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))
    after = state_of(model)
    assert [key for key, _ in before[0]] == [key for key, _ in after[0]] and before[1:] == after[1:]
    assert all(torch.equal(value, again) for (_, value), (_, again) in zip(before[0], after[0], strict=True))


def own(tensors: Tensors, part: str = "") -> str:
    """The last key of the method's own tensors with `part` in it."""
    prefixes = ("ssf_", "vqt_", "spt_", "sparse_ft_", "mask_pruning_")
    return max(key for key in tensors if part in key and any(f".{prefix}" in key for prefix in prefixes))


def without(part: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[own(tensors, part)]

    return damage


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        key = own(tensors, part)
        tensors[key] = change(tensors[key].clone())

    return damage


def surplus(tensors: Tensors) -> None:
    key = own(tensors)
    tensors[key + "2"] = tensors[key].clone()


def fill_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def whole_head(tensors: Tensors) -> None:
    key = next(key for key in tensors if key.endswith("classifier.bias"))
    tensors[key] = tensors[key].int()


CASES: list[tuple[str, Callable[[Tensors], None], str]] = [
    *((name, without(""), "is missing") for name in MAKE.CASES),
    *((name, surplus, "belongs to nothing in the model") for name in MAKE.CASES),
    *((name, changed("weight", fill_first(float("nan"))), "not finite") for name in MAKE.CASES),
    *((name, changed("weight", fill_first(float("inf"))), "not finite") for name in ("ssf", "vqt")),
    *((name, changed("weight", lambda x: (x * 9).int()), "is of type torch.int32") for name in ("ssf", "spt")),
    ("sparse-spiel", whole_head, "classifier.modules_to_save.default.bias is of type torch.int32"),
    ("sparse-fixed", without("index"), "is missing"),
    ("spt", without("index"), "is missing"),
    ("sparse-spiel", changed("index", lambda x: x * 0), "damaged"),
    ("spt", changed("index", lambda x: x * 0 + 255), "damaged"),
    ("spt", changed("index", lambda x: x.float()), "is of type torch.float32"),
    ("masks", without("kept"), "is missing"),
    ("masks", changed("kept", fill_first(2)), "`kept` must be"),
    ("masks", changed("kept", fill_first(-1)), "`kept` must be"),
    ("masks", changed("progress", fill_first(-5)), "`progress`"),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{n}-{m}-{i}" for i, (n, _, m) in enumerate(CASES)])
def test_a_damaged_adapter_is_refused(case: int, tmp_path: Path) -> None:
    name, damage, message = CASES[case]
    path = damaged(name, tmp_path, damage)
    model = base_of(name)
    assert_refused(model, lambda: PeftModel.from_pretrained(model, path), message)
    assert not hasattr(model, "peft_config")
    PeftModel.from_pretrained(model, FOLDER / name)  # nothing is in the way of another attempt


@pytest.mark.parametrize("name", ["ssf", "sparse-fixed", "masks"])
def test_a_damaged_second_adapter_is_refused(name: str, tmp_path: Path) -> None:
    path = damaged(name, tmp_path, without(""))
    model = PeftModel.from_pretrained(base_of(name), FOLDER / name)
    assert_refused(model, lambda: model.load_adapter(path, "second"), "is missing")
    assert list(model.peft_config) == ["default"]
    assert_refused(model, lambda: model.load_adapter(path, "default"), "is missing")


def test_an_adapter_of_a_bare_encoder_is_no_adapter_of_a_model_with_a_head(tmp_path: Path) -> None:
    bare = MAKE.bert().bert
    model = get_peft_model(bare, SSFConfig())
    model.save_pretrained(tmp_path)
    whole = MAKE.bert()
    assert_refused(whole, lambda: PeftModel.from_pretrained(whole, tmp_path), "is missing")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:Some weights of")
def test_values_and_places_load_together_or_not_at_all(tmp_path: Path) -> None:
    """k values on a wider weight: the places have another size on disk, the values have not."""
    base = MAKE.llama()
    config = SparseFTConfig(selection="given", target_modules=["down_proj"]).use_support(
        {"model.layers.0.mlp.down_proj": torch.tensor([0, 5, 100, 383])}
    )
    model = get_peft_model(base, config)
    leaf = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.sparse_ft_delta.default")
    leaf.weight.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    sizes = {**MAKE.SIZES, "intermediate_size": 240}
    wide = MAKE.drawn(
        type(MAKE.llama())(type(MAKE.llama().config)(**{**MAKE.TEXT, **sizes}, num_key_value_heads=1, head_dim=8))
    )
    before = MAKE.outputs(wide, "llama")
    with pytest.warns(UserWarning, match="was not loaded either"):
        loaded = PeftModel.from_pretrained(wide, tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="not which they are"):
        MAKE.outputs(loaded, "llama")
    assert torch.equal(MAKE.outputs(loaded.unload(), "llama"), before)


# What adapters are called


@pytest.mark.parametrize("name", ["0", "fc1", "weight", "ssf_scale", "modules_to_save"])
def test_a_name_that_would_hide_modules_from_saving_is_refused(name: str) -> None:
    """PEFT leaves out of an adapter's file whatever holds the name of another adapter."""
    config = SSFConfig(target_modules=["fc1", "fc2"])
    model = get_peft_model(nn.ModuleList([MLP()]), config, adapter_name=name)  # alone it is saved in full
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"Adapter name '{name}' is also a part of the .*such as 'adapter_{name}'"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == [name]
    after = state_of(model)
    assert before[1:] == after[1:] and all(torch.equal(a[1], b[1]) for a, b in zip(before[0], after[0], strict=True))
    mixed = PeftMixedModel(nn.ModuleList([MLP()]), SSFConfig(target_modules=["fc1"]), adapter_name="task")
    with pytest.raises(ValueError, match="is also a part of the"):
        mixed.add_adapter(name, config)


def test_a_name_with_a_dot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.b' must have a character, and no dot"):
        get_peft_model(MLP(), SSFConfig(target_modules=["fc1"]), adapter_name="a.b")


@pytest.mark.filterwarnings("ignore:Adapter name 'vqt' should not be contained:UserWarning")
def test_a_name_like_that_of_a_reader() -> None:
    """The module of VQT is called `vqt`: beside an adapter of this name another one of VQT would not be saved."""
    model = get_peft_model(tiny("vit"), VQTConfig(), adapter_name="vqt")
    with pytest.raises(ValueError, match="Adapter name 'vqt' is also a part of"):
        model.add_adapter("second", VQTConfig())
    mixed = PeftMixedModel(tiny("vit"), VQTConfig(), adapter_name="vqt")
    mixed.add_adapter("ssf", SSFConfig())
    assert list(mixed.peft_config) == ["vqt", "ssf"]
