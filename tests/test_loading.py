"""`peft_ext.load`: the right base model for an adapter, and nothing else that a file asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, logits, tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_ext
from peft_ext import MaskLoraConfig, SPTConfig, SSFConfig, VQTConfig
from peft_ext.tuners.mask_pruning import gates_of


def saved(tmp_path: Path, config: PeftConfig, labels: int = 5) -> tuple[Path, torch.Tensor]:
    """An adapter with a head of its own size on a base that has another one on disk."""
    tiny("bert").save_pretrained(tmp_path / "base")
    base = type(tiny("bert")).from_pretrained(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, inputs("bert"))


@pytest.mark.parametrize("config", [SSFConfig(task_type="SEQ_CLS"), VQTConfig(num_queries=2)])
def test_the_base_model_has_as_many_labels_as_the_adapter(config: PeftConfig, tmp_path: Path) -> None:
    path, expected = saved(tmp_path, config)
    model = peft_ext.load(path)
    torch.testing.assert_close(logits(model, inputs("bert")), expected)
    low = peft_ext.load(path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(low, inputs("bert")), expected)


@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize("labels", [3, 5])
def test_the_base_may_be_a_pruned_model(method: str, labels: int, tmp_path: Path) -> None:
    masked = get_peft_model(tiny("bert"), MaskLoraConfig(task_type="SEQ_CLS", total_steps=4, target_sparsity=0.3))
    with torch.no_grad():
        for number, gate in enumerate(gates_of(masked, "default").values()):
            gate.weight.add_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(number)))
    peft_ext.fix_masks(masked)
    peft_ext.save_pruned(peft_ext.prune_and_unload(masked), tmp_path / "base")
    base = peft_ext.load_pruned(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    config = SSFConfig(task_type="SEQ_CLS", init_weights=False) if method == "ssf" else lora
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, inputs("bert"))
    torch.testing.assert_close(logits(peft_ext.load(tmp_path / "adapter").eval(), inputs("bert")), expected)
    if method == "ssf":  # PEFT itself writes the card of LoRA
        card = (tmp_path / "adapter" / "README.md").read_text()
        code = card.split("```python")[1].split("```")[0]
        assert "peft_ext.load_pruned(" in code
        code = code.replace("path/to/base", f"{tmp_path}/base").replace("path/to/adapter", f"{tmp_path}/adapter")
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102
        actual = logits(names["model"].eval(), inputs("bert"))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)  # merged


def test_options_go_where_they_belong(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, SSFConfig(task_type="SEQ_CLS"), labels=3)
    model = peft_ext.load(path, tiny("bert"), low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(model, inputs("bert")), expected)
    with pytest.raises(ValueError, match=r"dtype: no options of an adapter.*low_cpu_mem_usage"):
        peft_ext.load(path, tiny("bert"), dtype=torch.float32)


@pytest.mark.parametrize(
    "mapping",
    [
        1,
        {},
        {"base_model_class": "BertForSequenceClassification", "parent_library": "os"},
        {"base_model_class": "BertTokenizer", "parent_library": "transformers.models.bert.tokenization_bert"},
        {"base_model_class": "gone", "parent_library": "transformers.models.bert.modeling_bert"},
        {"base_model_class": "Bert", "parent_library": "transformers.models.no_such"},
        {"base_model_class": "pipeline", "parent_library": "transformers.pipelines"},
    ],
)
def test_only_model_classes_of_transformers_are_loaded(mapping: Any, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, SSFConfig(task_type="SEQ_CLS"))
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_mapping": mapping}))
    with pytest.raises(ValueError, match="does not say which class of transformers"):
        peft_ext.load(path)


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    config = SPTConfig(budget=300, structured=None, target_modules=["query", "LayerNorm"])
    config = peft_ext.calibrate(tiny("bert"), config, [inputs("bert")], progress=False)
    config.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "calibration.safetensors")
    name = max(tensors, key=lambda key: len(tensors[key]))
    places = tensors[name]
    damages = {
        "is missing": {key: value for key, value in tensors.items() if key != name},
        "not sparse": {**tensors, "more": places.clone()},
        "integers": {**tensors, name: places[:-1].clone()},
        "of torch.float32": {**tensors, name: places.float()},
        "distinct, sorted": {**tensors, name: places.flip(0).contiguous()},
        "from zero": {**tensors, name: places - places[0] - 1},
    }
    for message, changed in damages.items():
        save_file(changed, tmp_path / "whole" / "calibration.safetensors")
        with pytest.raises(ValueError, match=message):
            SPTConfig.from_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "calibration.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        SPTConfig.from_pretrained(tmp_path / "whole")
    # a place beyond the weight is found where the weight is known
    save_file({**tensors, name: places + 10**6}, tmp_path / "whole" / "calibration.safetensors")
    with pytest.raises(ValueError, match="is smaller here"):
        get_peft_model(tiny("bert"), SPTConfig.from_pretrained(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")


@pytest.mark.parametrize(
    "fields",
    [{"kinds": {"a": 3}}, {"kinds": {"a": "odd"}}, {"counts": {"a": -1}}, {"counts": {"a": "x"}}, {"ranks": 3}],
)
def test_an_allocation_of_wrong_types_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must map names"):
        SPTConfig(**{"budget": 10, **fields})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vqt", {"num_queries": 10**9}),
        ("masks", {"r": 10**9}),
        ("spt", {"ranks": {"bert.encoder.layer.0.attention.self.query.weight": 10**9}}),
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_made(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    shutil.copytree(Path(__file__).parent / "fixtures" / "adapters-0.1" / name, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    base = tiny("vit" if name == "vqt" else "bert")
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` of adapter_config.json says 1000000000"):
        PeftModel.from_pretrained(base, path)
    (path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be read"):
        PeftModel.from_pretrained(base, path)
