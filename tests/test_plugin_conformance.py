"""The conformance kit on a method of another package, which knows `peft_ext.core` alone: `tests/plugin`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import references

from peft_ext.testing import Method, MethodConformance
from peft_ext.testing.sequences import SequenceTests


@pytest.fixture(scope="module", autouse=True)
def plugin(own_registry: None) -> None:
    """Registers the method for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "plugin")
        sys.modules.pop("peft_ext_gain", None)
        import peft_ext_gain  # noqa: F401


def gain_config(**fields: Any) -> Any:
    return sys.modules["peft_ext_gain"].GainConfig(**fields)


class TestGain(MethodConformance, SequenceTests):
    method = Method(
        prefix="gain_",
        config=gain_config,
        models=("mlp", "llama", "bert", "vit"),
        fields={"mlp": {"target_modules": ["fc1", "fc2"]}},
        reference=references.gain,
    )
    sequences = 30
