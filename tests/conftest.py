"""Settings for all tests: one thread per process (pytest-xdist runs several), and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def own_registry() -> Iterator[None]:
    """What a test file registers with PEFT is forgotten at its end; other files list all methods."""
    from peft import mapping

    from peft_ext.core import registry

    names = [name for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_")]
    registries = [registry._methods, *(getattr(mapping, name) for name in names)]
    before = [dict(kept) for kept in registries]
    yield
    for kept, content in zip(registries, before, strict=True):
        kept.clear()
        kept.update(content)
