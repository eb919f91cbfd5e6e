"""Random sequences of what users do with adapters, for every method; `tests/sequences.py` draws many more."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import references
from test_conformance import METHODS as CONFORMING

from peft_ext import BinaryAdapterConfig, BinaryLoraConfig, MaskLoraConfig, SparseFTConfig
from peft_ext.testing import Method
from peft_ext.testing.method import NOTHING
from peft_ext.testing.sequences import SequenceTests


def of(name: str, **changes: Any) -> Method:
    return replace(CONFORMING[name].method, **changes)


METHODS = {
    "ssf": of("ssf", reference=references.ssf),
    "sparse_ft": of("sparse_ft", reference=references.sparse_ft),
    "spt": of("spt", reference=references.spt),
    # masks are not drawn before the warmup is over, so that forwards can be compared
    "mask_pruning": of(
        "mask_pruning",
        config=partial(MaskLoraConfig, r=2, lora_alpha=4, total_steps=1000, warmup_ratio=0.5, penalty=1.0, seed=4),
        reference=references.mask_pruning,
    ),
    "vqt": of("vqt"),
    "unipt": of("unipt"),
    "wegeft": of("wegeft"),
    "low_rank_core": of("low_rank_core", reference=references.low_rank_core),
    "s2ft": of("s2ft", reference=references.s2ft),
    "binary_adapter": of(
        "binary_adapter", config=partial(BinaryAdapterConfig, r=2, bits=32, dropout=0.0), estimated=NOTHING
    ),
    "pasta": of("pasta"),
    "vpt": of("vpt"),
    "sct": of("sct", reference=references.sct),
    "snell": of("snell", reference=references.snell, estimated=NOTHING),
    "fused_low_rank": of("fused_low_rank", reference=references.fused_low_rank),
    "binary_low_rank": of(
        "binary_low_rank",
        config=partial(BinaryLoraConfig, r=2, bits=32, dropout=0.0),
        reference=references.binary_low_rank,
        estimated=NOTHING,
    ),
    "spiel": of(
        "sparse_ft",
        config=partial(
            SparseFTConfig,
            selection="spiel-ag",
            num_tunable_weights=64,
            reselection_steps=2,
            accumulation_steps=1,
            total_steps=100,
        ),
        fields={"mlp": {"target_modules": ["fc1", "fc2"]}},
        reference=references.sparse_ft,
    ),
}


class TestSSF(SequenceTests):
    method = METHODS["ssf"]


class TestSparseFT(SequenceTests):
    method = METHODS["sparse_ft"]


class TestSPT(SequenceTests):
    method = METHODS["spt"]


class TestMaskPruning(SequenceTests):
    method = METHODS["mask_pruning"]


class TestVQT(SequenceTests):
    method = METHODS["vqt"]
    sequences = 60  # on real architectures, several times slower


class TestUniPT(SequenceTests):
    method = METHODS["unipt"]
    sequences = 60  # on real architectures, several times slower


class TestBinaryLora(SequenceTests):
    method = METHODS["binary_low_rank"]


class TestSpiel(SequenceTests):
    method = METHODS["spiel"]
    sequences = 60  # the optimizer of each model is looked for among all live objects


class TestWeGeFT(SequenceTests):
    method = METHODS["wegeft"]


class TestLoraSB(SequenceTests):
    method = METHODS["low_rank_core"]


class TestS2FT(SequenceTests):
    method = METHODS["s2ft"]


class TestBinaryAdapter(SequenceTests):
    method = METHODS["binary_adapter"]


class TestPASTA(SequenceTests):
    method = METHODS["pasta"]
    sequences = 60  # on real architectures, several times slower


class TestVPT(SequenceTests):
    method = METHODS["vpt"]
    sequences = 60  # on real architectures, several times slower


class TestSCT(SequenceTests):
    method = METHODS["sct"]


class TestSNELL(SequenceTests):
    method = METHODS["snell"]


class TestLoraFusion(SequenceTests):
    method = METHODS["fused_low_rank"]
    sequences = 60  # on real architectures, several times slower
