"""Adapters and a pruned model that an earlier version wrote: they load today and have the outputs that they had."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peft_ext


FOLDER = Path(__file__).parent / "fixtures" / "adapters-0.1"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapters_0_1", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = _script()
EXPECTED = load_file(FOLDER / "expected.safetensors")


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", MAKE.CASES)
def test_an_adapter_of_version_0_1(name: str, is_trainable: bool) -> None:
    base, dtype, _ = MAKE.CASES[name]
    plain = MAKE.BASES[base](dtype)
    before = MAKE.outputs(plain, base)
    model = PeftModel.from_pretrained(plain, FOLDER / name, is_trainable=is_trainable)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(MAKE.outputs(model, base), EXPECTED[name], atol=tolerance, rtol=tolerance)
    assert (EXPECTED[name] - before).abs().max() > 10 * tolerance


def test_a_pruned_model_of_version_0_1() -> None:
    model = peft_ext.load_pruned(FOLDER / "pruned")
    torch.testing.assert_close(MAKE.outputs(model, "bert"), EXPECTED["pruned"], atol=1e-5, rtol=1e-5)
