"""The command line, on adapters that were really saved: what it says of them, what it makes of them, what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hub_server import File, HubServer, Repo
from huggingface_hub import ModelCard
from models import inputs, logits, tiny
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_integrations import tokenizer
from torch import nn

import peft_ext
from peft_ext import MaskLoraConfig, SparseFTConfig, SPTConfig, SSFConfig, VQTConfig
from peft_ext.cli import main
from peft_ext.tuners.mask_pruning import gates_of
from peft_ext.tuners.vqt import layer_shares
from peft_ext.tuners.vqt.layer import layer_of
from peft_ext.tuners.vqt.selection import count_by_source


@dataclass
class Saved:
    """An adapter on disk, the model that it was saved from, and its base's directory."""

    path: Path
    model: Any
    name: str

    @property
    def base(self) -> Path:
        return self.path.parent / f"base-{self.name}"

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return logits(self.model, inputs(self.name))


# adapter: base, config; "spt-" is low-rank alone
ADAPTERS: dict[str, tuple[str, Any]] = {
    "ssf": ("bert", lambda: SSFConfig(task_type="SEQ_CLS")),
    "vqt": ("vit", lambda: VQTConfig(num_queries=2)),
    "sparse": ("llama", lambda: SparseFTConfig(density=0.1, selection="random", task_type="CAUSAL_LM")),
    "sparse-2": ("llama", lambda: SparseFTConfig(density=0.2, selection="random", seed=1, task_type="CAUSAL_LM")),
    "spt": ("llama", lambda: SPTConfig(budget=900, r=2, lora_alpha=6, task_type="CAUSAL_LM")),
    "spt-lora": (
        "llama",
        lambda: SPTConfig(budget=600, r=2, unstructured=False, vector_threshold=None, task_type="CAUSAL_LM"),
    ),
    "mask": ("llama", lambda: MaskLoraConfig(total_steps=10, target_sparsity=0.4, r=2, task_type="CAUSAL_LM")),
    "undecided": ("llama", lambda: MaskLoraConfig(total_steps=10, target_sparsity=0.4, r=2, task_type="CAUSAL_LM")),
    "lora": ("llama", lambda: LoraConfig(r=2, alpha_pattern={"layers.1.self_attn.q_proj": 32}, task_type="CAUSAL_LM")),
    "lora-2": ("llama", lambda: LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "o_proj"])),
    "dora": ("llama", lambda: LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM")),
    "ia3": ("llama", lambda: IA3Config(task_type="CAUSAL_LM")),
    "prompt": ("llama", lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}
OURS = ("ssf", "vqt", "sparse", "spt", "mask")


def adapted(name: str, base: nn.Module, base_name: str, config: Any) -> Any:
    if isinstance(config, SPTConfig):
        config = peft_ext.calibrate(base, config, [inputs(base_name)])
    torch.manual_seed(0)
    model: Any = get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "mask_pruning_gate" not in key:
            nn.init.normal_(parameter, std=0.1)
    gates = gates_of(model, "default")
    for gate in gates.values():
        nn.init.normal_(gate.weight, std=0.05)
        if name == "mask":
            gate.fix(torch.arange(gate.group.units) % 3 != 1)
    if name == "vqt":
        layer = layer_of(model)
        layer.select_columns("default", torch.arange(0, 60, 2))
    return model.eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, (base_name, make) in ADAPTERS.items():
        base = tiny(base_name)
        base.save_pretrained(folder / f"base-{base_name}")
        base = type(base).from_pretrained(folder / f"base-{base_name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = adapted(name, base, base_name, make())
            model.save_pretrained(folder / name)
        found[name] = Saved(folder / name, model, base_name)
    tokenizer().save_pretrained(folder / "base-llama")
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line that works; returns what it printed."""

    def call(*arguments: Any) -> str:
        status = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert status == 0, output.err
        assert output.err == ""
        return output.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line that does not; returns the one line on stderr."""

    def call(*arguments: Any) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("peft-ext: ")
        return output.err

    return call


def changes(saved: Saved) -> dict[str, torch.Tensor]:
    """What merging changes, by parameter, in fp64."""
    before = dict(copy.deepcopy(saved.model).unload().named_parameters())
    after = copy.deepcopy(saved.model).merge_and_unload().named_parameters()
    return {
        key: (value - before[key]).double().flatten() for key, value in after if not torch.equal(value, before[key])
    }


# inspect


@pytest.mark.parametrize("name", ADAPTERS)
def test_counts_and_sizes(name: str, adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters[name]
    found = json.loads(run("inspect", saved.path, "--json"))
    config = saved.model.peft_config["default"]
    assert found["method"] == config.peft_type.value and found["base_model"] == str(saved.base)
    assert found["task"] == (config.task_type and str(getattr(config.task_type, "value", config.task_type)))
    file = saved.path / "adapter_model.safetensors"
    assert found["file_bytes"] == file.stat().st_size
    trained = sum(parameter.numel() for parameter in saved.model.parameters() if parameter.requires_grad)
    assert found["parameters"]["all"] == trained and found["dtypes"] == ["float32"]
    assert found["bytes_per_parameter"] == pytest.approx(file.stat().st_size / trained)
    rows = found["modules"]
    if rows:
        assert sum(row["parameters"] for row in rows) == found["parameters"]["method"] == found["totals"]["parameters"]
    assert found["totals"]["sites"] == len(rows) == sum(group["sites"] for group in found["by_type"].values())
    if name == "ssf":
        assert found["parameters"]["saved_whole"] == 51 and found["saved_whole"]["classifier.weight"] == [3, 16]
    if name in ("ssf", "lora", "sparse"):
        assert set(found["by_layer"]) == {"0", "1"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_tables(name: str, adapters: dict[str, Saved], run: Any) -> None:
    text = run("inspect", adapters[name].path, "--modules")
    found = json.loads(run("inspect", adapters[name].path, "--json"))
    assert text.isascii() and "..." not in text
    lines = text.splitlines()
    for row in found["modules"]:
        line = next(line for line in lines if line.startswith(f"| {row['module']} "))
        assert f" {row['parameters']:,} |" in line
    assert f"{found['parameters']['all']:,}" in next(line for line in lines if line.startswith("parameters"))
    assert all(str(value) in text for key, value in found["settings"].items() if isinstance(value, str))
    assert f"{found['file_bytes']:,} bytes" in text


def cells_of(text: str, title: str) -> list[list[str]]:
    """The rows of a table, the headings first."""
    lines = text.split(f"{title}\n")[1].strip().splitlines()
    rows = [line for line in lines[: lines.index("") if "" in lines else None] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows if "--" not in line]


@pytest.mark.parametrize("name", OURS)
def test_a_summary_fits_a_screen_and_says_nothing_twice(name: str, adapters: dict[str, Saved], run: Any) -> None:
    path = adapters[name].path
    short, usual, full = (run("inspect", path, *options) for options in (["--summary"], [], ["--modules"]))
    assert "By module" in full and "By module" not in usual and "By layer" in usual and "By layer" not in short
    assert len(usual.splitlines()) < 60
    headings, *rows = cells_of(short, "By type")
    assert rows[-1][0] == "all" and "" not in rows[-1]
    columns = list(zip(*rows, strict=True))
    assert len(set(columns)) == len(columns) == len(headings)
    with pytest.raises(SystemExit):
        main(["inspect", str(path), "--summary", "--modules"])


def test_layers_of_a_deep_model_share_rows(run: Any, tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=1
    )
    model = get_peft_model(tf.LlamaForCausalLM(config), SSFConfig(target_modules=["o_proj"]))
    model.save_pretrained(tmp_path)
    _, *rows = cells_of(run("inspect", tmp_path), "By layer")
    assert [row[0] for row in rows] == [f"{start}-{min(start + 2, 29)}" for start in range(0, 30, 3)]
    assert [row[1] for row in rows] == ["3"] * 10


@pytest.mark.parametrize("name", ["sparse", "spt", "spt-lora", "lora", "lora-2"])
def test_norms_are_those_of_what_merging_changes(name: str, adapters: dict[str, Saved], run: Any) -> None:
    changed = changes(adapters[name])
    rows = json.loads(run("inspect", adapters[name].path, "--json"))["modules"]
    assert {f"{row['module']}.weight" for row in rows} == set(changed)
    for row in rows:
        assert row["norm"] == pytest.approx(changed[f"{row['module']}.weight"].norm().item(), rel=1e-4)


def test_the_norm_of_masked_lora_leaves_out_what_is_masked(adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters["mask"]
    rows = {row["module"]: row for row in json.loads(run("inspect", saved.path, "--json"))["modules"]}
    layer = saved.model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    down, up = layer.mask_pruning_down["default"].weight, layer.mask_pruning_up["default"].weight
    mask = layer.mask_pruning_gate["default"].hard()
    assert 0 < mask.sum() < len(mask)
    assert rows["model.layers.0.mlp.down_proj"]["norm"] == pytest.approx(
        (8 * up @ (down * mask)).norm().item(), rel=1e-4
    )


def test_what_cannot_be_told_from_the_files_is_left_out(adapters: dict[str, Saved], run: Any) -> None:
    rows = json.loads(run("inspect", adapters["dora"].path, "--json"))["modules"]
    assert rows and all(row["rank"] == 2 and "norm" not in row for row in rows)


def test_ssf_shows_the_spread(adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters["ssf"]
    found = json.loads(run("inspect", saved.path, "--json"))
    name = "bert.encoder.layer.1.output.dense"
    scale, shift = saved.model.get_base_model().get_submodule(name).vectors(["default"])
    row = next(row for row in found["modules"] if row["module"] == name)
    assert row["scale_mean"] == pytest.approx((scale - 1).mean().item(), abs=1e-6)
    assert row["shift_std"] == pytest.approx(shift.std(correction=0).item(), abs=1e-6)
    assert row["norm"] == pytest.approx(torch.cat([scale - 1, shift]).norm().item(), rel=1e-4)
    assert found["figures"]["scale"]["min"] <= row["scale_mean"] <= found["figures"]["scale"]["max"]


def test_sparse_shows_the_density_of_each_module(adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters["sparse-2"]
    found = json.loads(run("inspect", saved.path, "--json"))
    assert found["settings"]["density"] == 0.2 and found["settings"]["selection"] == "random"
    base = saved.model.get_base_model()
    for row in found["modules"]:
        layer = base.get_submodule(row["module"])
        size, tuned = layer.base_layer.weight.numel(), layer.deltas["default"].weight.numel()
        assert row["tuned"] == tuned and row["density"] == pytest.approx(tuned / size, rel=8 / tuned)
    assert found["totals"]["tuned"] == saved.model.get_nb_trainable_parameters()[0]


def test_spt_shows_the_allocation(adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters["spt"]
    found = json.loads(run("inspect", saved.path, "--json"))
    config = saved.model.peft_config["default"]
    kinds = list(config.kinds.values())
    assert {kind: entry["tensors"] for kind, entry in found["figures"].items()} == {
        kind: kinds.count(kind) for kind in set(kinds)
    }
    assert set(kinds) == {"lora", "sparse", "whole"}  # else this shows little
    assert sum(entry["parameters"] for entry in found["figures"].values()) == found["parameters"]["all"]
    for row in found["modules"]:
        key = f"{row['module']}.weight"
        amount = {"lora": 2, "sparse": config.counts.get(key), "whole": ""}[config.kinds[key]]
        assert row["gets"] == f"{config.kinds[key]} {amount}".strip()


@pytest.mark.parametrize("name", ["mask", "undecided"])
def test_mask_pruning_shows_what_is_kept(name: str, adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters[name]
    found = json.loads(run("inspect", saved.path, "--json"))
    ratios = peft_ext.keep_ratios(saved.model)
    shown = {row["module"]: row["keep_ratio"] for row in found["modules"] if "keep_ratio" in row}
    assert shown == pytest.approx(ratios, abs=1e-3)
    assert found["by_type"]["mlp.down_proj"]["units"] == 48 and "units" not in found["totals"]
    assert found["figures"]["decided"] == (name == "mask") and found["settings"]["target_sparsity"] == 0.4


def test_vqt_shows_queries_and_kept_features(adapters: dict[str, Saved], run: Any) -> None:
    saved = adapters["vqt"]
    found = json.loads(run("inspect", saved.path, "--json"))
    rows = {row["module"].replace(" ", "_"): row for row in found["modules"]}
    layer = layer_of(saved.model)
    assert {name: rows[name]["kept_features"] for name in ("class_token", "layer_0", "layer_1")} == count_by_source(
        layer, "default", torch.arange(0, 60, 2)
    )
    assert {name: row["head_share"] for name, row in rows.items() if "head_share" in row} == pytest.approx(
        layer_shares(saved.model)
    )
    assert rows["layer_1"]["queries"] == 2 and found["totals"]["features"] == 16 + 2 * 2 * 16


def test_methods_of_peft_that_are_not_known_in_detail(adapters: dict[str, Saved], run: Any) -> None:
    rows = json.loads(run("inspect", adapters["ia3"].path, "--json"))["modules"]
    assert {row["type"] for row in rows} == {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}
    found = json.loads(run("inspect", adapters["prompt"].path, "--json"))
    assert found["modules"] == [] and found["saved_whole"] == {"prompt_embeddings": [3, 16]}


@pytest.mark.parametrize("uniform", [False, True])
def test_a_pruned_model(uniform: bool, adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(adapters["mask"].model)
    for gate, kept in zip(gates_of(model, "default").values(), (1, 6, 1, 9), strict=True):
        gate.fix(torch.arange(gate.group.units) < kept)
    pruned: Any = peft_ext.prune_and_unload(model, uniform=uniform)
    peft_ext.save_pruned(pruned, tmp_path)
    found = json.loads(run("inspect", tmp_path, "--json"))
    kept = {row["module"]: row["kept"] for row in found["modules"] if row["kind"] == "ffn"}
    widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
    assert list(kept.values()) == widths and set(kept) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert found["parameters"] == {
        "before": sum(p.numel() for p in tiny("llama").parameters()),
        "now": sum(p.numel() for p in pruned.parameters()),
    }
    assert ("load_pruned" in found["loads_with"]) == (not uniform)
    text = run("inspect", tmp_path, "--modules")
    assert f"{widths[0]}" in text and text.isascii()
    run("inspect", tmp_path, "--figure", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_base_model_is_not_needed(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    for name in OURS:
        path = shutil.copytree(adapters[name].path, tmp_path / name)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing"}))
        assert json.loads(run("inspect", path, "--json"))["base_model"] == "nobody/nothing"
        run("compare", path, path)


@pytest.mark.parametrize("name", [*OURS, "lora"])
def test_figures(name: str, adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    run("inspect", adapters[name].path, "--figure", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_figures_that_cannot_be(
    adapters: dict[str, Saved], refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figure.png"
    assert "no figure for the method IA3" in refused("inspect", adapters["ia3"].path, "--figure", file)
    assert "figure.xyz" in refused("inspect", adapters["ssf"].path, "--figure", tmp_path / "figure.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "peft-ext[plots]"' in refused("inspect", adapters["ssf"].path, "--figure", file)
    assert not file.exists()


# compare


def test_two_sparse_adapters(adapters: dict[str, Saved], run: Any) -> None:
    first, second = adapters["sparse"], adapters["sparse-2"]
    found = json.loads(run("compare", first.path, second.path, "--json"))
    assert found["config"]["density"] == [0.1, 0.2] and found["config"]["seed"] == [0, 1]
    assert "save_dtype" not in found["config"]
    model = PeftModel.from_pretrained(tiny("llama"), first.path)
    model.load_adapter(second.path, "second")
    expected = peft_ext.overlap(model, "default", "second")
    assert expected[""].shared > 0
    for module, overlap in expected.items():
        assert found["overlap"][module] == {**vars(overlap), "jaccard": overlap.jaccard}
    text = run("compare", first.path, second.path)
    assert f"{expected[''].shared:,} of {expected[''].first:,}" in text and "Sites in common: 14" in text


@pytest.mark.parametrize("pair", [("sparse", "sparse-2"), ("lora", "lora-2"), ("spt-lora", "spt-lora")])
def test_the_cosine_of_two_updates(pair: tuple[str, str], adapters: dict[str, Saved], run: Any) -> None:
    first, second = (changes(adapters[name]) for name in pair)
    found = json.loads(run("compare", *(adapters[name].path for name in pair), "--json"))
    dot = sum((first[key] @ second[key]).item() for key in first.keys() & second.keys())
    norms = [math.hypot(*(value.norm().item() for value in part.values())) for part in (first, second)]
    assert found["cosine"]["all"] == pytest.approx(dot / norms[0] / norms[1], rel=1e-3, abs=1e-6)
    assert set(found["cosine"]["modules"]) == {key.removesuffix(".weight") for key in first.keys() & second.keys()}
    for key, value in found["cosine"]["modules"].items():
        ours, theirs = first[f"{key}.weight"], second[f"{key}.weight"]
        assert value == pytest.approx((ours @ theirs / ours.norm() / theirs.norm()).item(), rel=1e-3, abs=1e-5)


def test_ssf_with_itself_turned_round(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    path = shutil.copytree(adapters["ssf"].path, tmp_path / "turned")
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({key: -value for key, value in tensors.items()}, path / "adapter_model.safetensors")
    found = json.loads(run("compare", adapters["ssf"].path, path, "--json"))
    assert found["cosine"]["all"] == pytest.approx(-1) and found["config"] == {} and found["overlap"] is None


def test_adapters_of_different_methods(adapters: dict[str, Saved], run: Any) -> None:
    found = json.loads(run("compare", adapters["ssf"].path, adapters["lora"].path, "--json"))
    assert found["cosine"] is None and found["overlap"] is None and found["sites"]["common"] == []
    assert found["config"]["peft_type"] == ["SSF", "LORA"] and len(found["sites"]["only_second"]) == 4
    assert "Only in the second: model.layers.0.self_attn.q_proj, " in run(
        "compare", adapters["ssf"].path, adapters["lora"].path
    )
    assert json.loads(run("compare", adapters["sparse"].path, adapters["spt"].path, "--json"))["overlap"][""]["first"]


# export


@pytest.mark.parametrize("name", ["ssf", "sparse", "spt", "lora", "ia3"])
def test_a_merged_model_has_the_adapters_logits(
    name: str, adapters: dict[str, Saved], run: Any, tmp_path: Path
) -> None:
    saved, output = adapters[name], tmp_path / "merged"
    text = run("export", saved.path, "--to", "merged", "--output", output)
    assert text.startswith(f"Wrote {output}: ") and "model.safetensors" in text
    merged = type(saved.model.get_base_model()).from_pretrained(output)
    torch.testing.assert_close(logits(merged, inputs(saved.name)), saved.logits(), rtol=0, atol=1e-5)
    if saved.name == "llama":
        assert tf.AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer().get_vocab()
    card = output / "README.md"
    assert card.is_file() == (name not in ("lora", "ia3"))
    if card.is_file():
        assert ModelCard.load(card).data.library_name == "transformers"


@pytest.mark.parametrize("form", ["compressed", "binarized"])
@pytest.mark.parametrize("name", ["ssf", "sparse", "lora"])
def test_every_command_reads_packed_adapters(
    name: str, form: str, adapters: dict[str, Saved], run: Any, tmp_path: Path
) -> None:
    saved, packed = adapters[name], tmp_path / "packed"
    assert "`peft_ext.load` reads it" in run("export", saved.path, "--to", form, "--output", packed)
    size = (packed / "adapter_packed.safetensors").stat().st_size
    assert json.loads(run("inspect", packed, "--json"))["file_bytes"] == size
    assert "Sites in common" in run("compare", packed, saved.path)
    run("export", packed, "--to", "merged", "--output", tmp_path / "merged")
    model_class = type(saved.model.get_base_model())
    merged = model_class.from_pretrained(tmp_path / "merged")
    loaded = peft_ext.load(packed, model_class.from_pretrained(saved.base)).eval()
    torch.testing.assert_close(logits(merged, inputs(saved.name)), logits(loaded, inputs(saved.name)))


def test_export_to_another_precision_and_base(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    saved = adapters["lora"]
    base = shutil.copytree(saved.base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({k: 2 * v for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    run("export", saved.path, "--to", "merged", "--output", tmp_path / "out", "--base", base, "--dtype", "bfloat16")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    torch.testing.assert_close(merged["model.norm.weight"], 2 * weights["model.norm.weight"].bfloat16())


def test_a_head_of_another_size_comes_with_the_adapter(run: Any, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    base = tf.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, SSFConfig(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", "--to", "merged", "--output", tmp_path / "out")
    merged = tf.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, inputs("bert")), logits(model, inputs("bert")), rtol=0, atol=1e-5)
    assert merged.config.num_labels == 5


def test_a_pruned_model_has_the_masked_ones_logits(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    saved = adapters["mask"]
    run("export", saved.path, "--to", "pruned", "--output", tmp_path / "pruned")
    pruned = peft_ext.load_pruned(tmp_path / "pruned")
    torch.testing.assert_close(logits(pruned, inputs("llama")), saved.logits(), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in tiny("llama").parameters())
    assert (tmp_path / "pruned" / "tokenizer.json").is_file() and (tmp_path / "pruned" / "README.md").is_file()
    assert json.loads(run("inspect", tmp_path / "pruned", "--json"))["left"] < 1


def test_an_adapter_on_a_pruned_model(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(adapters["mask"].model)
    for gate, kept in zip(gates_of(model, "default").values(), (1, 6, 1, 9), strict=True):
        gate.fix(torch.arange(gate.group.units) < kept)
    peft_ext.save_pruned(peft_ext.prune_and_unload(model), tmp_path / "pruned")  # type: ignore[arg-type]
    base = peft_ext.load_pruned(tmp_path / "pruned")
    assert hasattr(base.config, "pruned")
    lora: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path / "lora")
    run("export", tmp_path / "lora", "--to", "merged", "--output", tmp_path / "merged", "--base", tmp_path / "pruned")
    merged = peft_ext.load_pruned(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, inputs("llama")), logits(lora, inputs("llama")), rtol=0, atol=1e-5)


def test_lora_of_spt_in_plain_peft(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    saved = adapters["spt-lora"]
    run("export", saved.path, "--to", "lora", "--output", tmp_path / "lora")
    base = tf.LlamaForCausalLM.from_pretrained(saved.base)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert type(lora.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(lora, inputs("llama")), saved.logits(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("vqt", "merged", "`peft_ext.load`"),
        ("prompt", "merged", "PROMPT_TUNING cannot be merged"),
        ("sparse", "pruned", "only MASK_PRUNING has"),
        ("undecided", "pruned", "fix_masks"),
        ("lora", "lora", "a LoRA adapter already"),
        ("mask", "lora", "`--to pruned`"),
        ("ssf", "lora", "`--to merged`"),
        ("sparse", "lora", "`--to merged`"),
        ("vqt", "lora", "`peft_ext.load`"),
        ("spt", "lora", "unstructured=False"),
    ],
)
def test_what_cannot_be_made(
    name: str, to: str, message: str, adapters: dict[str, Saved], refused: Any, tmp_path: Path
) -> None:
    assert message in refused("export", adapters[name].path, "--to", to, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(adapters: dict[str, Saved], run: Any, refused: Any, tmp_path: Path) -> None:
    saved = adapters["lora"]
    (tmp_path / "mine.txt").write_text("mine")
    command = ("export", saved.path, "--to", "merged", "--output")
    assert "not empty" in refused(*command, tmp_path) and "a file" in refused(*command, tmp_path / "mine.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    run(*command, tmp_path, "--overwrite")
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "mine.txt").read_text() == "mine"
    for source in (saved.path, saved.base):
        before = {file: file.read_bytes() for file in source.iterdir()}
        assert "read from" in refused(*command, source, "--overwrite")
        assert {file: file.read_bytes() for file in source.iterdir()} == before


def test_bases_that_do_not_fit(adapters: dict[str, Saved], refused: Any, tmp_path: Path) -> None:
    def export(name: str, *arguments: Any) -> str:
        return refused("export", adapters[name].path, "--to", "merged", "--output", tmp_path / "out", *arguments)

    assert "nobody/nothing does not load" in export("lora", "--base", "nobody/nothing")
    assert "has no weights that fit" in export("ssf", "--base", adapters["lora"].base)  # of another architecture
    tiny("llama", hidden_size=32).save_pretrained(tmp_path / "wide")
    assert "does not fit" in export("lora", "--base", tmp_path / "wide")
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    assert "does not fit" in export("sparse", "--base", tmp_path / "short")
    assert "no place for 'model.layers.1.self_attn.o_proj' and 1 more" in export(
        "lora-2", "--base", tmp_path / "short"
    )
    tiny("llama", num_hidden_layers=3).save_pretrained(tmp_path / "tall")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so that it is not the tests' own filter that refuses
        assert "missing adapter keys" in export("lora", "--base", tmp_path / "tall")
    base = shutil.copytree(adapters["lora"].base, tmp_path / "pickled")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "pickled does not load" in export("lora", "--base", base)  # weights that are not in safetensors
    nameless = shutil.copytree(adapters["lora"].path, tmp_path / "nameless")
    edit(nameless, base_model_name_or_path=None)
    assert "--base" in refused("export", nameless, "--to", "merged", "--output", tmp_path / "out")
    foreign = shutil.copytree(adapters["ssf"].path, tmp_path / "foreign")
    edit(foreign, auto_mapping={"parent_library": "os", "base_model_class": "system"})
    assert "not of transformers" in refused("export", foreign, "--to", "merged", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# bad input


def edit(path: Path, **fields: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PEFT_EXT_BOMB"],)


def test_pickles_are_refused_unread(
    adapters: dict[str, Saved], refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_EXT_BOMB", str(tmp_path / "exploded"))
    path = shutil.copytree(adapters["lora"].path, tmp_path / "adapter")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    for command in (
        ("inspect", path),
        ("compare", adapters["lora"].path, path),
        ("export", path, "--to", "merged", "--output", tmp_path / "out"),
        ("inspect", path / "adapter_model.bin"),
    ):
        assert "adapter_model.bin" in (line := refused(*command)) and "Only safetensors" in line
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_adapter(adapters: dict[str, Saved], refused: Any, tmp_path: Path) -> None:
    for command in ("inspect", "card"):
        assert "does not exist" in refused(command, tmp_path / "missing")
        assert "no repository of that name" in refused(command, "nobody/nothing")
    assert "is a file" in refused("inspect", adapters["ssf"].path / "adapter_model.safetensors")
    assert "it is empty" in refused("inspect", tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in refused("inspect", tmp_path)
    assert "a whole model and was not pruned" in refused("inspect", adapters["ssf"].base)
    assert "lora-2, mask" in refused("inspect", adapters["ssf"].path.parent)  # those below it are named


@pytest.mark.parametrize("name", [*OURS, "lora"])
def test_config_and_file_of_two_adapters(name: str, adapters: dict[str, Saved], refused: Any, tmp_path: Path) -> None:
    path = shutil.copytree(adapters[name].path, tmp_path / "adapter")
    shutil.copy(adapters["ssf" if name == "lora" else "lora"].path / "adapter_model.safetensors", path)
    assert "has no tensor of that method" in refused("inspect", path)


def damaged(case: str, path: Path) -> str:
    """Breaks an adapter; returns what the message has to say."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    if case == "method":
        edit(path, peft_type="NEW_METHOD")
        return "'NEW_METHOD', which neither the installed peft nor peft_ext has"
    if case == "no method":
        edit(path, peft_type=None)
        return "of the method None"
    if case == "method of another type":
        edit(path, peft_type=["SSF"])
        return "of the method ['SSF']"
    if case == "json":
        (path / "adapter_config.json").write_text("{")
        return "is no JSON"
    if case == "list":
        (path / "adapter_config.json").write_text("[]")
        return "but a list"
    if case == "no file":
        file.unlink()
        return "has no adapter_model.safetensors"
    if case == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
        return "git lfs pull"
    if case == "short":
        file.write_bytes(file.read_bytes()[:-10])
        return "no safetensors file"
    if case == "index":
        key = next(key for key in tensors if key.endswith(".index"))
        tensors[key] = torch.full_like(tensors[key], 255)
        save_file(tensors, file)
        return "does not name 10 indices" if len(tensors[key.replace("index", "weight")]) == 10 else "is damaged"
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case", ["method", "no method", "method of another type", "json", "list", "no file", "pointer", "short", "index"]
)
def test_damaged_adapters(case: str, adapters: dict[str, Saved], refused: Any, tmp_path: Path) -> None:
    path = shutil.copytree(adapters["sparse"].path, tmp_path / "adapter")
    message = damaged(case, path)
    assert message in refused("inspect", path)
    assert message in refused("compare", adapters["lora"].path, path)
    assert message in refused("export", path, "--to", "merged", "--output", tmp_path / "out")


def test_files_that_do_not_fit_their_config(adapters: dict[str, Saved], refused: Any, tmp_path: Path) -> None:
    spt = shutil.copytree(adapters["spt"].path, tmp_path / "spt")
    edit(spt, kinds={})
    assert "of which adapter_config.json says nothing" in refused("inspect", spt)
    edit(spt, kinds=dict.fromkeys(adapters["spt"].model.peft_config["default"].kinds, "lora"))
    assert "does not fit its adapter_config.json" in refused("inspect", spt)
    edit(spt, kinds=adapters["spt"].model.peft_config["default"].kinds, lora_alpha=1.0, r=0)
    assert "does not fit its adapter_config.json" in refused("inspect", spt)
    vqt = shutil.copytree(adapters["vqt"].path, tmp_path / "vqt")
    tensors = load_file(vqt / "adapter_model.safetensors")
    tensors.pop("base_model.model.vqt.vqt_head.columns")
    save_file(tensors, vqt / "adapter_model.safetensors")
    assert "does not fit a VQT adapter" in refused("inspect", vqt)
    pruned = tmp_path / "pruned"
    run_config = {"model_type": "llama", "architectures": ["LlamaForNothing"], "pruned": {}}
    pruned.mkdir()
    (pruned / "config.json").write_text(json.dumps(run_config))
    assert "does not describe a pruned model" in refused("inspect", pruned)


def test_a_diverged_adapter_is_still_json(adapters: dict[str, Saved], run: Any, tmp_path: Path) -> None:
    path = shutil.copytree(adapters["lora"].path, tmp_path / "adapter")
    tensors = {
        key: torch.full_like(value, float("nan"))
        for key, value in load_file(path / "adapter_model.safetensors").items()
    }
    save_file(tensors, path / "adapter_model.safetensors")
    text = run("inspect", path, "--json")
    assert "NaN" not in text and json.loads(text)["totals"]["norm"] is None


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["export", "x"], ["export", "x", "--to", "merged", "--output", "y", "--dtype", "int8"]],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: peft-ext" in capsys.readouterr().err


# card


def test_card(adapters: dict[str, Saved], run: Any, refused: Any, tmp_path: Path) -> None:
    path = shutil.copytree(adapters["ssf"].path, tmp_path / "adapter")
    (path / "README.md").unlink()
    result = {"task_type": "text-classification", "dataset_type": "org/news", "dataset_name": "News"}
    result |= {"metric_type": "accuracy", "metric_value": 0.75}
    (tmp_path / "results.json").write_text(json.dumps([result]))
    (tmp_path / "eval_results.json").write_text(json.dumps({"eval_loss": 0.125, "epoch": 3.0, "note": "x"}))
    metrics = (tmp_path / "results.json", tmp_path / "eval_results.json")
    assert run("card", path, "--metrics", *metrics) == f"Wrote {path / 'README.md'}\n"
    card = ModelCard.load(path / "README.md")
    assert card.data.eval_results[0].metric_value == 0.75 and "| eval_results | 0.125 | 3 |" in card.text
    assert "import peft_ext" in card.text
    (path / "README.md").write_text(card.content.replace("# SSF adapter", "# SSF adapter\n\nMy words."))
    run("card", path)
    assert "My words." in (path / "README.md").read_text()

    bad = tmp_path / "bad.json"
    for content, message in (
        ("{", "could be read"),
        ('{"a": "b"}', "no numbers"),
        (json.dumps(result | {"colour": 1}), "colour"),
        ('{"metric_value": 1}', "could be read"),
        ("[1]", "could be read"),
    ):
        bad.write_text(content)
        assert message in refused("card", path, "--metrics", bad)
    assert "could be read" in refused("card", path, "--metrics", tmp_path / "missing.json")
    assert "LORA is not a method of peft_ext" in refused("card", adapters["lora"].path)


# the Hub, and a process of its own


@pytest.fixture
def hub(adapters: dict[str, Saved]) -> Iterator[HubServer]:
    """A Hub with the SSF adapter, and a repository that has only a pickle."""
    with HubServer() as server:
        for repo_id, source in (("alice/news", adapters["ssf"].path), ("alice/pickled", None)):
            files = {"adapter_model.bin": File(b"", True), "adapter_config.json": File(b'{"peft_type": "SSF"}', False)}
            if source is not None:
                files = {f.name: File(f.read_bytes(), f.suffix == ".safetensors") for f in source.iterdir()}
                files["checkpoint/adapter_model.safetensors"] = File(b"large", True)
            server.repos[repo_id] = Repo(repo_id, private=False)
            server.repos[repo_id].commit("main", "first", files)
            server.lfs |= {file.oid: file.data for file in files.values() if file.lfs}
        yield server


def test_a_repository_of_the_hub(hub: HubServer, adapters: dict[str, Saved], tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_alice", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}

    def call(*command: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, *command], env=environment | settings, capture_output=True, text=True, check=True
        )
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    output, _ = call("-m", "peft_ext", "inspect", "alice/news", "--json")
    found = json.loads(output)
    assert found["method"] == "SSF" and found["totals"]["sites"] == 17
    assert found["file_bytes"] == (adapters["ssf"].path / "adapter_model.safetensors").stat().st_size
    assert not list(tmp_path.rglob("checkpoint"))  # what is not read is not fetched

    (tmp_path / "loss.json").write_text('{"loss": 0.5}')
    lines = [
        "inspect alice/pickled",
        "inspect alice/missing",
        "card alice/news",
        f"card alice/news --push alice/news --metrics {tmp_path / 'loss.json'}",
        "card alice/missing --push alice/missing",
    ]
    code = f"from peft_ext.cli import main\nprint([main(line.split()) for line in {lines}])"
    output, error = call("-c", code)
    pushed, statuses = output.splitlines()
    assert statuses == "[2, 2, 2, 0, 2]" and pushed.startswith(f"Pushed {hub.url}")
    errors = [line for line in error.splitlines() if line.startswith("peft-ext: ")]
    parts = ["no adapter_model.safetensors", "no repository of that name", "--push alice/news", "alice/missing"]
    assert len(errors) == 4 and all(part in line for part, line in zip(parts, errors, strict=True))
    card = hub.read("alice/news", "README.md").decode()
    assert "| loss | 0.5 |" in card and '"alice/news"' in card
