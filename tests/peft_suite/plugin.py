"""A pytest plugin: PEFT's tests, parametrised with the configs of `cases.py` instead of PEFT's own.

The lists are recognised by identity (`mark.args[1] is module.TEST_CASES`), so that tests which PEFT adds later are taken
along as long as they use the same lists. Whatever is not parametrised over configs is deselected.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest


TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
LAYER_FIELDS = {"layers_to_transform", "layers_pattern"}
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")

_lists: dict[str, list[Any]] = {}  # by the name that PEFT's test modules give to them
_parametrised: set[str] = set()  # node ids, without parameters, of the tests that run over our configs


class _AlwaysSeen(dict[str, int]):
    """For `hub_online_once`: every model was fetched before, so the tests never go online."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


class _Processor:
    """In place of `AutoImageProcessor`, which needs torchvision and a download."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Callable[..., dict[str, Any]]:
        import torch

        generator = torch.Generator().manual_seed(0)
        return lambda *args, **kwargs: {"pixel_values": torch.randn(1, 3, 40, 40, generator=generator)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regression", action="store_true", default=False, help="asked for by PEFT's own tests")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    for marker in ("regression", "single_gpu_tests"):
        config.addinivalue_line("markers", f"{marker}: of PEFT")
    _provide_packages()
    sys.path.insert(0, str(Path(os.environ["PEFT_SUITE_TESTS"]).parent))
    utilities: Any = importlib.import_module("tests.testing_utils")
    utilities._HUB_MODEL_ACCESSES = _AlwaysSeen()
    utilities.load_cat_image = lambda: None
    utilities.load_dataset_english_quotes = _quotes
    _replace_lists_of_classes()
    _fill_lists()


def _provide_packages() -> None:
    """What PEFT's tests import and we do not need."""
    sys.path.append(os.environ["PEFT_SUITE_PACKAGES"])
    if importlib.util.find_spec("diffusers") is None:
        module: Any = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


def _quotes() -> Any:
    import datasets

    quotes = [f"quote number {i} about nothing much" for i in range(40)]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": quotes, "author": ["a"] * 40}))


def _replace_lists_of_classes() -> None:
    """PEFT's tests name the classes of built-in methods where they skip; `cases.py` declares the same of ours."""
    common: Any = importlib.import_module("tests.testing_common")
    if cases.SUPPORTS_MIXED_BATCHES:  # the test says: `if config_cls not in (LoraConfig, RoadConfig): skip`
        is_one = {"__eq__": lambda _, other: other in cases.SUPPORTS_MIXED_BATCHES, "__hash__": object.__hash__}
        common.RoadConfig = type("SupportsMixedBatches", (), is_one)()
    skips_conv1d, skips_merging = common._skip_if_conv1d_not_supported, common._skip_if_merging_not_supported

    def skip_if_conv1d_not_supported(model_id: str, config_cls: type, kwargs: dict[str, Any]) -> None:
        if config_cls not in cases.SUPPORTS_CONV1D:
            skips_conv1d(model_id, config_cls, kwargs)

    def skip_if_merging_not_supported(model_id: str, config_cls: type, kwargs: dict[str, Any]) -> None:
        if config_cls in cases.CANNOT_MERGE:
            pytest.skip("the method does not merge")
        skips_merging(model_id, config_cls, kwargs)

    common._skip_if_conv1d_not_supported = skip_if_conv1d_not_supported
    common._skip_if_merging_not_supported = skip_if_merging_not_supported


def _fill_lists() -> None:
    classes = list(
        dict.fromkeys([row[2] for row in cases.CUSTOM_CASES] + [row[0] for row in cases.TRANSFORMERS_CASES])
    )
    _lists.update(
        TEST_CASES=cases.CUSTOM_CASES,
        ALL_PEFT_CONFIG_CLASSES=list(dict.fromkeys(row[2] for row in cases.CUSTOM_CASES)),
        MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES=cases.MULTI_ADAPTER_CASES,
        MIXED_ADAPTER_TEST_CASES=cases.MIXED_BATCH_CASES,
        ALL_CONFIG_CLASSES=[(cls, {}) for cls in classes],
        LAYER_INDEXING_CONFIG_CLASSES=[
            (cls, {}) for cls in classes if set(inspect.signature(cls).parameters) >= LAYER_FIELDS
        ],
    )


def _replacement(module: Any, names: list[str], values: Any) -> list[Any] | None:
    """What a test is parametrised with instead of `values`; `None` if they are no list of configs."""
    for name, ours in _lists.items():
        if values is getattr(module, name, None):
            return ours
    suite = module.__name__.rpartition(".")[2]
    if suite == "test_vision_models" and names == ["config"]:
        return cases.VISION_CASES
    if names != ["config_cls", "config_kwargs"]:
        return None
    task = TASKS.get(suite) if values is getattr(module, "ALL_CONFIGS", None) else None
    if suite == "test_token_classification_qa":
        task = "TOKEN_CLS" if values is module.TOKEN_CLS_CONFIGS else "QUESTION_ANS"
    if task is None:
        return None
    taking_part = [case for case in cases.TRANSFORMERS_CASES if task in cases.TASKS.get(case[0], (task,))]
    return [(cls, {"task_type": task, **fields}) for cls, fields in taking_part]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = mark.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs.get("argvalues")
        ours = _replacement(metafunc.module, names, values)
        if ours is not None:
            ids = [_id(value) for value in ours]
            marks[i] = pytest.mark.parametrize(names if len(names) > 1 else names[0], ours, ids=ids).mark
            _parametrised.add(metafunc.definition.nodeid)


def _id(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    shown = [
        part if isinstance(part, str) else part.__name__ if isinstance(part, type) else type(part).__name__
        for part in parts
        if not isinstance(part, dict)
    ]
    return "-".join(shown).replace(" ", "_")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    taken, left = [], []
    for item in items:
        is_ours = item.nodeid.partition("[")[0] in _parametrised and hasattr(item, "callspec")
        (taken if is_ours else left).append(item)
    for item in taken:
        module: Any = item.getparent(pytest.Module).obj  # type: ignore[union-attr]
        if module.__name__.endswith("test_vision_models"):
            module.AutoImageProcessor = _Processor
        # In PEFT 0.21.2 it asks `isinstance(config_cls, BeftConfig)` of a class, so that the merge tests of every method
        # pass over Llama and Gemma 3 and adapt `fc_out` of GPT-J. It is meant for BEFT alone.
        if hasattr(module, "check_beft_config"):
            module.check_beft_config = lambda *args: None
        for pattern, reason in cases.NOT_APPLICABLE:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
        for pattern, reason in cases.EXPECTED_FAILURES:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    items[:] = taken
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each suite."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            if getattr(report, "nodeid", None) and (outcome != "passed" or report.when == "call"):
                counts[report.nodeid.partition("::")[0].rpartition("/")[2]][outcome] += 1
    terminalreporter.section("PEFT's tests over the methods of peft_ext")
    for suite, found in sorted(counts.items()):
        terminalreporter.write_line(f"{suite:40} " + ", ".join(f"{n} {outcome}" for outcome, n in found.items()))
