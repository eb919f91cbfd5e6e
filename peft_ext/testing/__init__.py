"""The conformance kit: what PEFT tests for its own tuners, as classes that the tests of any method can inherit.

    from peft_ext.testing import Method, MethodConformance

    class TestMine(MethodConformance):
        method = Method(prefix="mine_", config=MineConfig, models=("mlp", "llama", "vit"))

Needs the extra `testing` (pytest and hypothesis).
"""

import pytest


# pytest shows both sides of an assertion only in modules of which it was told before they are imported
pytest.register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("configs", "merging", "method", "saving", "switching", "together", "training"))
)

from .configs import ConfigTests
from .merging import MergingTests
from .method import ConformanceTests, Method, models_of
from .models import inputs, logits, loss, tiny
from .saving import SavingTests
from .switching import SwitchingTests
from .together import TogetherTests
from .training import TrainingTests


class MethodConformance(SavingTests, MergingTests, SwitchingTests, TrainingTests, ConfigTests, TogetherTests):
    """All tests of the kit; a subclass sets `method`. Single groups can be inherited alone."""


__all__ = [
    "ConfigTests",
    "ConformanceTests",
    "MergingTests",
    "Method",
    "MethodConformance",
    "SavingTests",
    "SwitchingTests",
    "TogetherTests",
    "TrainingTests",
    "inputs",
    "logits",
    "loss",
    "models_of",
    "tiny",
]
