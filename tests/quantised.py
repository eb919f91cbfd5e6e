"""Every method on every kind of quantised base that is installed: what works, and what is refused.

    python tests/quantised.py                                    # print the table
    python tests/quantised.py --write docs/quantised.md          # between <!-- quantised --> and <!-- /quantised -->
    python tests/quantised.py --methods ssf spt --kinds bnb-4bit

A cell is a life of an adapter on a tiny model: calibrate (where the method looks at data), train three steps, in bf16 too
as TRL casts it, save, load on another quantised base, merge and unmerge, dequantise the base under the adapter, merge and
prune that. Each stage is "works", "refused" with the error of this package, or "failed".
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


TESTS = Path(__file__).resolve().parent
for directory in (TESTS, TESTS.parent):  # as a script, only the first is there
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

import conftest  # noqa: F401  no network
import torch
import transformers as tf
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from test_conformance import METHODS as CONFORMING
from torch import nn

import peft_ext
from peft_ext import MaskLoraConfig, S2FTConfig, SparseFTConfig
from peft_ext.core import dequantised
from peft_ext.testing import Method


SIZES = {"hidden_size": 64, "intermediate_size": 64}  # blocks of 64 weights share a scale
BLOCK = re.compile(r"(<!-- quantised -->\n).*?(<!-- /quantised -->)", re.DOTALL)
STAGES = (
    "calibrate",
    "train",
    "train after evaluation",
    "train in bf16",
    "save and load",
    "merge",
    "dequantise",
    "prune",
)
STEPS = 3
MERGED = 0.8  # share by which an output may be off where tiny weights are rounded to 4 bits again
HEADS = ["lm_head", "classifier", "pooler"]  # which are not quantised


# Kinds of quantised bases


def bnb(bits: int) -> Any:
    if bits == 8:
        return tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=HEADS,
    )


def torchao(bits: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if bits == 8:
        return tf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEADS)
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return tf.TorchAoConfig(int4, modules_to_not_convert=HEADS)


def hqq(model: nn.Module) -> nn.Module:
    """transformers loads HQQ on a GPU only; its modules run anywhere."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not any(head in name for head in HEADS):
            config = BaseQuantizeConfig(nbits=4, group_size=64)
            quantised = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, quantised)
    return model


@dataclass(frozen=True)
class Kind:
    """A way to quantise: a config for `from_pretrained`, or what changes a loaded model."""

    title: str
    package: str
    config: Callable[[], Any] | None = None
    change: Callable[[nn.Module], nn.Module] | None = None

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


KINDS = {
    "bnb-4bit": Kind("bitsandbytes 4-bit", "bitsandbytes", partial(bnb, 4)),
    "bnb-8bit": Kind("bitsandbytes 8-bit", "bitsandbytes", partial(bnb, 8)),
    "torchao-int8": Kind("torchao int8", "torchao", partial(torchao, 8)),
    "torchao-int4": Kind("torchao int4", "torchao", partial(torchao, 4)),
    "hqq-4bit": Kind("HQQ 4-bit", "hqq", change=hqq),
}


@functools.cache
def dense_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="quantised-"))
    sizes = SIZES | ({"head_dim": 32} if name == "llama" else {})
    tiny(name, **sizes).save_pretrained(folder)
    return folder


def load_base(name: str, kind: str) -> Any:
    """A tiny model with quantised blocks, in eval mode."""
    folder, chosen = dense_folder(name), KINDS[kind]
    model_class: Any = type(tiny(name))
    if chosen.config is None:
        assert chosen.change is not None
        return chosen.change(model_class.from_pretrained(folder)).eval()
    return model_class.from_pretrained(folder, quantization_config=chosen.config(), device_map="cpu").eval()


def dense_copy(name: str, base: nn.Module) -> Any:
    """A plain model whose weights are what those of `base` stand for."""
    model = type(tiny(name)).from_pretrained(dense_folder(name)).eval()
    with torch.no_grad():
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(dequantised(key, base.get_submodule(key)))
    return model


# Methods


@functools.cache
def loras() -> list[str]:
    """Two on the tiny llama of these sizes."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = Path(tempfile.mkdtemp(prefix="quantised-"))
        base = tf.LlamaForCausalLM.from_pretrained(dense_folder("llama"))
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(str(folder))
        found.append(str(folder))
    return found


@dataclass(frozen=True)
class Case:
    """What is put on the base."""

    method: Method
    model: str

    @property
    def looks_at_data(self) -> bool:
        return self.method.looks_at_data

    def fields(self) -> dict[str, Any]:
        if self.method.prefix == "fused_low_rank_":
            return {"adapters": loras(), "target_modules": None}
        return dict(self.method.fields.get(self.model, {}))

    def config(self, base: nn.Module) -> Any:
        config = self.method.config(**self.fields())
        if self.looks_at_data:
            peft_ext.calibrate(base, config, [inputs(self.model)], progress=False)
        return config


def case_of(method: Method) -> Case:
    return Case(method, next(name for name in ("llama", "bert", "vit") if name in method.models))


CASES: dict[str, Case] = {
    "lora": Case(Method("lora_", partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"]), ("llama",)), "llama"),
    **{name: case_of(case.method) for name, case in CONFORMING.items()},
    "sparse_ft-sensitivity": Case(
        Method(
            "sparse_ft_",
            partial(SparseFTConfig, selection="sensitivity", num_tunable_weights=256),
            ("llama",),
            looks_at_data=True,
        ),
        "llama",
    ),
    "sparse_ft-spiel-ag": Case(
        Method(
            "sparse_ft_",
            partial(
                SparseFTConfig,
                selection="spiel-ag",
                num_tunable_weights=256,
                reselection_steps=2,
                accumulation_steps=1,
                total_steps=STEPS,
            ),
            ("llama",),
        ),
        "llama",
    ),
    "mask_pruning-sensitivity": Case(
        Method(
            "mask_pruning_",
            partial(MaskLoraConfig, r=2, total_steps=STEPS, init_logits="sensitivity"),
            ("llama",),
            looks_at_data=True,
        ),
        "llama",
    ),
    "s2ft-gradient": Case(
        Method("s2ft_", partial(S2FTConfig, ratios=0.25, selection="gradient"), ("llama",), looks_at_data=True),
        "llama",
    ),
    "s2ft-product": Case(
        Method("s2ft_", partial(S2FTConfig, ratios=0.25, selection="product"), ("llama",), looks_at_data=True), "llama"
    ),
}


# Stages


class Wrong(AssertionError):
    """A stage ended without an error, and did not do what it should."""


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise Wrong(what)


def near(found: torch.Tensor, right: torch.Tensor, of: torch.Tensor | float, share: float, what: str) -> None:
    """Whether two outputs differ by no more than a share of the size of `of`."""
    size = of if isinstance(of, float) else float(of.norm())
    off = float((found - right).norm()) / max(size, 1e-9)
    expect(off < share, f"{what}: off by {off:.2g}")


class Life:
    """One adapter on one kind of base."""

    def __init__(self, name: str, kind: str) -> None:
        self.case, self.kind = CASES[name], kind
        self.batch = inputs(self.case.model)
        self.plain = self.logits(self.fresh())
        self.config: Any = None
        self.model: Any = None
        self.trained = self.plain

    def fresh(self, evaluated: bool = False) -> Any:
        base = load_base(self.case.model, self.kind)
        if evaluated:
            self.logits(base)
        return base

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return logits(model, self.batch)

    def calibrate(self) -> None:
        base = self.fresh()
        self.config = self.case.config(base)
        near(self.logits(base), self.plain, self.plain, 1e-6, "the base after calibrating")

    def train(self, base: Any, dtype: torch.dtype | None = None) -> PeftModel:
        torch.manual_seed(0)
        model: Any = get_peft_model(base, copy.deepcopy(self.config))
        if dtype is not None:  # as TRL does
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        trained = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        model.train()
        for _ in range(STEPS):
            found = loss(model, self.batch)
            expect(bool(found.isfinite()), "the loss is not finite")
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        still = [k for k, p in model.named_parameters() if k in trained and torch.equal(p.detach(), trained[k])]
        still = [key for key in still if not re.fullmatch(self.case.method.inert, key)]
        expect(not still, f"did not move: {still[:3]}")
        found = self.logits(model)
        expect(not torch.allclose(found, self.plain.to(found.dtype), atol=1e-5), "training has changed no output")
        return model

    def save_and_load(self, folder: Path) -> None:
        right = self.trained = self.logits(self.model)
        self.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(self.fresh(), folder).eval()
        near(self.logits(loaded), right, right, 1e-4, "loaded")

    def merge(self) -> None:
        right = self.logits(self.model)
        self.model.merge_adapter()
        merged = self.logits(self.model)
        self.model.unmerge_adapter()
        exact = self.case.method.prefix != "lora_" and self.kind in (
            "bnb-4bit",
            "torchao-int8",
            "torchao-int4",
        )  # the others are quantised again
        near(self.logits(self.model), right, right, 1e-4 if exact else 0.2, "unmerged")
        near(merged, right, right, MERGED, "merged")

    def dequantise(self, folder: Path) -> None:
        """The same adapter on the base dequantised in place where that can be, and on a dense copy; merged there."""
        fresh = self.fresh()
        dense = dense_copy(self.case.model, fresh)
        plain = self.logits(dense)
        model: Any = PeftModel.from_pretrained(dense, folder).eval()
        right = self.logits(model)
        noise = float((self.plain - plain).norm())  # 8-bit products quantise the inputs, too
        change = self.trained - self.plain
        near(right - plain, change, 0.3 * float(change.norm()) + 2 * noise, 1.0, "another effect on a dense base")
        if hasattr(fresh, "hf_quantizer") and hasattr(fresh.hf_quantizer, "_dequantize"):
            with_quantised = PeftModel.from_pretrained(fresh, folder).eval()
            try:
                with_quantised.base_model.model.dequantize()
            except NotImplementedError:  # of the quantiser
                pass
            else:
                near(self.logits(with_quantised), right, right, 1e-3, "dequantised with the adapter on")
                model = with_quantised
        if self.case.method.merges:
            merged = model.merge_and_unload()
            near(self.logits(merged), right, right, 1e-3, "merged after dequantising")

    def prune(self, folder: Path) -> None:
        dense = dense_copy(self.case.model, self.fresh())
        model: Any = PeftModel.from_pretrained(dense, folder, is_trainable=True).eval()
        peft_ext.fix_masks(model)
        right = self.logits(model)
        cut = peft_ext.prune_and_unload(model)
        near(self.logits(cut), right, right, 1e-3, "cut")


@contextmanager
def noted(stages: dict[str, str], stage: str) -> Iterator[None]:
    """Runs a stage, and writes down what became of it."""
    try:
        yield
        stages[stage] = "works"
    except Exception as error:  # noqa: BLE001  whatever it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = isinstance(error, (ValueError, TypeError)) and "/peft_ext/" in last.filename
        stages[stage] = f"{'refused' if is_ours else 'failed'}: {type(error).__name__}: {error}"
        if not is_ours:
            stages[stage] += f"\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}"


def life(name: str, kind: str) -> dict[str, str]:
    """What became of each stage that concerns the method."""
    stages: dict[str, str] = {}
    case = CASES[name]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        it = Life(name, kind)
        with noted(stages, "calibrate"):
            it.calibrate()
        if stages["calibrate"] != "works":
            it.config = case.config(dense_copy(case.model, it.fresh()))
        elif not case.looks_at_data:
            del stages["calibrate"]
        with noted(stages, "train"):
            it.model = it.train(it.fresh())
        if stages["train"] != "works":
            return stages
        with noted(stages, "train after evaluation"):
            it.train(it.fresh(evaluated=True))
        with noted(stages, "train in bf16"):
            it.train(it.fresh(), torch.bfloat16)
        with noted(stages, "save and load"):
            it.save_and_load(folder)
        if case.method.merges:
            with noted(stages, "merge"):
                it.merge()
        with noted(stages, "dequantise"):
            it.dequantise(folder)
        if case.method.prefix == "mask_pruning_":
            with noted(stages, "prune"):
                it.prune(folder)
    return stages


# The table


def without_names(text: str) -> str:
    """The first two sentences of a refusal, with dots for the names of adapters and modules."""
    text = text.removeprefix("refused: ").partition(": ")[2].splitlines()[0]
    sentences = re.split(r"(?<=[.;]) ", re.sub(r"'[\w.]+'", "…", text))
    return " ".join(sentences[:2]).rstrip(".;")


def table(found: dict[tuple[str, str], dict[str, str]], names: list[str], kinds: list[str]) -> str:
    """A row for each method, a column for each kind of base; reasons below."""
    reasons: dict[str, int] = {}
    lines = [f"| method | {' | '.join(KINDS[kind].title for kind in kinds)} |", "|---|" + "---|" * len(kinds)]
    for name in names:
        cells = []
        for kind in kinds:
            parts = []
            for stage, outcome in found[name, kind].items():
                if outcome.startswith("refused"):
                    number = reasons.setdefault(without_names(outcome), len(reasons) + 1)
                    parts.append(f"{stage}: refused ({number})")
                elif outcome != "works":
                    parts.append(f"{stage}: fails")
            cells.append(
                "; ".join(["works", *parts])
                if "train" not in "".join(p.split(":")[0] for p in parts)
                else "; ".join(parts)
            )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}." for reason, number in reasons.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if missing := [kind for kind in options.kinds if not KINDS[kind].is_installed]:
        parser.error(f"{', '.join(missing)}: install {', '.join({KINDS[kind].package for kind in missing})}")
    torch.set_num_threads(1)
    found = {}
    for kind in options.kinds:
        for name in options.methods:
            found[name, kind] = life(name, kind)
            for stage, outcome in found[name, kind].items():
                if outcome != "works":
                    print(f"{kind} {name} {stage}: {outcome}", flush=True)
    text = table(found, options.methods, options.kinds)
    print(text)
    if options.write:
        page = options.write.read_text()
        options.write.write_text(BLOCK.sub(lambda match: match[1] + text + match[2], page))


if __name__ == "__main__":
    main()
