"""The cost benchmark on models small enough for a test: what it counts, what it writes; never what it times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ViTConfig,
)

from peft_ext import VPTConfig
from peft_ext.core import methods


BENCHMARK = Path(__file__).parent.parent / "examples" / "benchmark"
sys.path.insert(0, str(BENCHMARK))
import cost
import cost_methods
import cost_tables
import workloads
from methods import COST_NAMES
from methods import PROMPTS as PROMPT_METHODS


VQT, PASTA, UNIPT = (COST_NAMES[name] for name in ("vqt", "pasta", "unipt"))
UNMERGED = {  # as it is by default
    COST_NAMES[name.lower()] for name, m in methods().items() if not m.about.merges_with(vars(m.config()))
}
SETTINGS = cost.Settings(rounds=2, warmup=1, threads=1)
ONE_ROUND = cost.Settings(rounds=1, warmup=0, threads=1)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEAD = 64 * 3 + 3


def _vit() -> nn.Module:
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
    return AutoModelForImageClassification.from_config(
        ViTConfig(**shape, image_size=64, patch_size=8, num_labels=3, **NO_DROPOUT)
    )


def _llama() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, vocab_size=50, intermediate_size=64, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config)


def _bert() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return AutoModelForSequenceClassification.from_config(BertConfig(**shape, vocab_size=50, **NO_DROPOUT))


VIT = workloads.Workload("tiny-vit", _vit, "image", 2, image_size=64, about="ViT")
LLAMA = workloads.Workload("tiny-llama", _llama, "causal", 2, length=6, about="Llama")
BERT = workloads.Workload("tiny-bert", _bert, "text", 2, length=6, about="BERT")
PROMPTS = [COST_NAMES[name] for name in PROMPT_METHODS]  # for encoders, and not merged
AS_ROWS = "VPT, 50 prompts as rows"  # for images
MASKS = "mask-pruning LoRA r=8"  # needs to know the architecture
STACK = workloads.Workload("stack", lambda: workloads.Stack(3, 16), "stack", 4, length=16, about="Linears")


@pytest.fixture(scope="module")
def vit() -> dict[str, Any]:
    return cost.measure(VIT, settings=SETTINGS, quiet=True)


def test_every_method_has_a_row_with_one_time_a_round(vit: dict[str, Any]) -> None:
    assert tuple(vit["rows"]) == cost_methods.METHODS and not vit["skipped"]
    assert len(vit["base_seconds"]) == SETTINGS.rounds
    for method, row in vit["rows"].items():
        forwards = {"unmerged", "merged"} if method in cost_methods.ADAPTERS else set()
        forwards -= {"merged"} if method in {*UNMERGED, *PROMPTS} else set()
        assert set(row["seconds"]) == {"step", "forward", "backward", "optimizer"} | forwards
        assert all(len(times) == SETTINGS.rounds for times in row["seconds"].values())
        assert all(time > 0 for times in row["seconds"].values() for time in times)
        assert row["trainable_with_head"] - row["trainable"] == (
            0 if method in (VQT, UNIPT) else HEAD  # which have their own
        )
    assert vit["machine"]["torch"] == torch.__version__
    assert vit["machine"]["threads"] == 1


def test_trainable_parameters(vit: dict[str, Any]) -> None:
    trainable = {method: row["trainable"] for method, row in vit["rows"].items()}
    assert trainable[cost_methods.FROZEN] == trainable["linear probe"] == 0
    assert trainable["full fine-tuning"] == vit["parameters"] - HEAD
    # 4 layers of width 64, MLP 256; SSF: patches and last norm, then two norms, q, k, v, o, fc1 and fc2
    assert trainable["SSF"] == trainable["SSF, recover=False"] == 2 * (2 * 64 + 4 * (2 * 64 + 4 * 64 + 256 + 64))
    assert trainable[cost_methods.LORA] == trainable["SHiRA r=8"] == 8 * 4 * (4 * 128 + 2 * 320)
    assert trainable["IA3"] == 4 * (64 + 64 + 256)
    assert trainable["LN-tuning"] == 2 * 64 * (2 * 4 + 1)


def test_bytes_saved_for_backward(vit: dict[str, Any]) -> None:
    saved = {method: row["saved_bytes"] for method, row in vit["rows"].items()}
    assert saved["SSF"] <= 1.1 * saved[cost_methods.FROZEN]
    assert saved["linear probe"] < 0.05 * saved[cost_methods.FROZEN]
    assert saved["SSF"] < saved[cost_methods.LORA] < saved["SSF, recover=False"]
    assert saved[cost_methods.FROZEN] < saved["full fine-tuning"]


def test_saved_bytes_are_the_storages_that_autograd_keeps() -> None:
    """A stack that only passes gradients through keeps what its loss needs; in full each layer keeps its input."""
    rows = cost.measure(STACK, ["full fine-tuning"], ONE_ROUND, quiet=True)["rows"]
    features = 4 * 16 * 4  # batch, width, bytes
    assert rows[cost_methods.FROZEN]["saved_bytes"] == features
    assert rows["full fine-tuning"]["saved_bytes"] == 4 * features
    assert rows[cost_methods.FROZEN]["trainable"] == 0


def test_file_bytes_are_those_of_the_trained_tensors(vit: dict[str, Any]) -> None:
    for method, row in vit["rows"].items():
        tensors = 4 * row["trainable_with_head"]
        if method == "SHiRA r=8":
            tensors += 2 * 4 * row["trainable"]  # where the values go
        elif method in ("LoRA-XS", "LoRAFusion"):
            tensors = row["file_bytes"] - 1  # its factors are in the file, too
        elif method.startswith("Bi-"):
            assert row["file_bytes"] < tensors  # codes of a few bits
            continue
        elif method in ("Super-Tuning", "SpIEL-AG"):
            tensors += int((4 if method == "Super-Tuning" else 0.5) * row["trainable"])
        assert tensors < row["file_bytes"] < tensors + 20_000, method


@pytest.mark.parametrize("workload", [LLAMA, BERT, STACK], ids=lambda workload: workload.name)
def test_other_kinds_of_model(workload: Any) -> None:
    results = cost.measure(workload, settings=ONE_ROUND, quiet=True)
    without = {
        "tiny-llama": {"linear probe", VQT, UNIPT, AS_ROWS, *PROMPTS},
        "stack": {
            "linear probe",
            "LN-tuning",
            MASKS,
            PASTA,
            AS_ROWS,
            *(COST_NAMES[name] for name in cost_methods.COMPARED),
        },
    }.get(workload.name, {AS_ROWS})
    assert set(results["skipped"]) == without
    assert set(results["rows"]) == set(cost_methods.METHODS) - without
    assert cost_methods.FROZEN in cost_tables.table(results)


def test_prompts_as_rows_are_those_of_vpt() -> None:
    """The yardstick computes what it is compared with."""
    torch.manual_seed(0)
    base, rows = _vit().eval(), cost_methods.prompts_as_rows(_vit().eval())
    rows.load_state_dict(base.state_dict(), strict=False)
    model = get_peft_model(base, VPTConfig(num_tokens=cost_methods.INSERTED, modules_to_save=["classifier"])).eval()
    own = [parameter for name, parameter in model.named_parameters() if "vpt_prompts" in name]
    theirs = [parameter for name, parameter in rows.named_parameters() if "prompt_rows" in name]
    assert [p.shape for p in own] == [p.shape for p in theirs] == 4 * [torch.Size([50, 64])]
    with torch.no_grad():
        for parameter, other in zip(own, theirs, strict=True):
            parameter.copy_(other)
        inputs = VIT.inputs(base.config)
        torch.testing.assert_close(model(**inputs).logits, rows(**inputs).logits, rtol=0, atol=1e-5)


def test_jobs_share_frozen_weights_and_own_trained_ones() -> None:
    base = _vit().train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    inputs = VIT.inputs(base.config)
    for method in cost_methods.METHODS:
        with cost.no_foreign_warnings():
            job = cost.Job(method, base, inputs, VIT, SETTINGS, share=True)
            job.step()
            job.merged()
        frozen = cost.storages(p for p in job.model.parameters() if not p.requires_grad)
        # AdaLoRA has a frozen count of ranks in each layer
        assert frozen <= cost.storages(base.parameters()) or method in ("SHiRA r=8", "AdaLoRA", "Super-Tuning")
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_the_methods_that_ratios_refer_to_are_always_run() -> None:
    results = cost.measure(STACK, ["SSF"], ONE_ROUND, quiet=True)
    assert set(results["rows"]) == {cost_methods.FROZEN, cost_methods.LORA, "SSF"}


def test_table_is_written_between_its_markers(vit: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cost-tiny-vit-cpu.json").write_text(json.dumps(vit))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- cost:tiny-vit -->\nold\n<!-- /cost:tiny-vit -->\nafter\n")
    assert cost_tables.write_tables(readme, tmp_path) == ["tiny-vit"]
    once = readme.read_text()
    assert once.startswith("before\n<!-- cost:tiny-vit -->\nViT (") and once.endswith(
        "<!-- /cost:tiny-vit -->\nafter\n"
    )
    assert "old" not in once and f"| {cost_methods.LORA} | 36,864 |" in once
    cost_tables.write_tables(readme, tmp_path)
    assert readme.read_text() == once


def test_a_file_without_markers_or_results_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match=r"has no line `<!-- cost:NAME -->`"):
        cost_tables.write_tables(readme, tmp_path)
    readme.write_text("<!-- cost:unknown -->\n<!-- /cost:unknown -->\n")
    with pytest.raises(ValueError, match="there are no results"):
        cost_tables.write_tables(readme, tmp_path)


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(workloads.PRESETS, "stack", STACK)
    options = ["--methods", "SSF", "--rounds", "1", "--warmup", "0", "--threads", "1", "--device", "cpu"]
    cost.main(["stack", *options, "--json", str(tmp_path), "--table"])
    results = json.loads((tmp_path / "cost-stack-cpu.json").read_text())
    assert results["settings"]["rounds"] == 1
    assert cost_tables.table(results) in capsys.readouterr().out
    _vit().save_pretrained(tmp_path / "model")
    cost.main([str(tmp_path / "model"), *options, "--batch", "1", "--json", str(tmp_path / "hub.json")])
    results = json.loads((tmp_path / "hub.json").read_text())
    assert results["workload"]["size"] == "1 images of 64 x 64"
