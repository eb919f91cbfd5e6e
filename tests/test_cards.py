"""Model cards on disk: what is written, what is kept, and that the code in a card loads the adapter."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import card_errors
from huggingface_hub import EvalResult, ModelCard
from models import MLP, inputs, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_ext import METHODS, SparseFTConfig, SSFConfig
from peft_ext.cards import CardInfo, add_usage, model_card, update_card
from peft_ext.core import about_of


ACCURACY = EvalResult(
    task_type="text-classification",
    dataset_type="org/news",
    dataset_name="News",
    metric_type="accuracy",
    metric_value=0.5,
)
INFO = CardInfo(
    repo_id="me/news-ssf",
    base_model="org/base",
    license="mit",
    datasets=["org/news"],
    training={"learning rate": 1e-2, "epochs": 3},
    results=[ACCURACY],
    comparison=[{"Method": "base", "Accuracy": 0.1}, {"Method": "LoRA", "Accuracy": 0.4, "Bytes": 10}],
    limits=["English only."],
)
CLASSIFIER = {"peft_type": "SSF", "task_type": "SEQ_CLS", "base_model_name_or_path": "org/base"}


def save_config(folder: Path, **fields: Any) -> Path:
    """An adapter's directory as far as a card needs it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CLASSIFIER | fields))
    return folder


def saved_adapter(folder: Path, config: Any = None) -> tuple[PeftModel, Path]:
    """A tiny BERT classifier with an adapter, both saved; returns the model and the adapter's directory."""
    tiny("bert").save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = get_peft_model(base, config or SSFConfig(task_type="SEQ_CLS")).eval()
    model.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("peft_type", METHODS)
def test_every_method_says_what_it_is(peft_type: str) -> None:
    method = about_of(peft_type)
    assert method.idea.endswith(".")
    assert re.fullmatch(
        r"https://(arxiv\.org/abs/\d{4}\.\d{5}|doi\.org/10\.[\d./]+|par\.nsf\.gov/biblio/\d+)", method.paper
    )
    assert method.paper in method.bibtex
    assert method.bibtex.count("{") == method.bibtex.count("}")


def test_saved_adapter_tells_how_to_load_it(tmp_path: Path) -> None:
    model, folder = saved_adapter(tmp_path)
    text = read(folder)
    assert "[More Information Needed]" not in text
    assert "Model ID" not in text
    assert "- PEFT" in text
    assert code_blocks(text)[0].startswith("import peft_ext")
    data = ModelCard(text).data
    assert {"ssf", "peft-ext", "transformers"} <= set(data.tags)
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")

    model.save_pretrained(folder)
    assert read(folder) == text


def test_code_in_the_card_loads_the_adapter(tmp_path: Path) -> None:
    model, folder = saved_adapter(tmp_path)
    code = code_blocks(read(folder))[0]
    assert "num_labels=3" in code
    code = code.replace("path/to/base", str(tmp_path / "base")).replace("path/to/adapter", str(folder))
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    assert type(names["model"]) is type(model.get_base_model())
    batch = inputs("bert")
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_local_base_model_is_not_written_as_a_hub_id(tmp_path: Path) -> None:
    lora, _ = saved_adapter(tmp_path / "lora", LoraConfig(task_type="SEQ_CLS"))
    assert card_errors(read(tmp_path / "lora" / "adapter"))[0]  # what the Hub refuses is written by PEFT itself
    assert lora is not None

    _, folder = saved_adapter(tmp_path)
    text = read(folder)
    assert card_errors(text) == ([], [])
    assert str(tmp_path) not in text
    assert "`base`, was a local directory" in text
    data = ModelCard(text).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert not [tag for tag in data.tags if tag.startswith("base_model:")]

    card = update_card(folder, CardInfo(base_model="org/base"))
    assert (card.data.base_model, card.data["base_model_relation"]) == ("org/base", "adapter")
    assert 'from_pretrained("org/base"' in code_blocks(card.text)[0]


@pytest.mark.parametrize("name", ["", None, "/tmp/x", "./out", "a/b/c", "~/model"])
def test_names_that_are_no_hub_ids(tmp_path: Path, name: str | None) -> None:
    card = model_card(save_config(tmp_path, base_model_name_or_path=name))
    assert card.data.base_model is None
    assert '"path/to/base"' in card.text
    assert card_errors(str(card)) == ([], [])


def test_relative_directory_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    adapter = save_config(tmp_path / "adapter")
    assert model_card(adapter).data.base_model == "org/base"
    monkeypatch.chdir(tmp_path)
    assert model_card(adapter).data.base_model is None


def test_full_card(tmp_path: Path) -> None:
    model, folder = saved_adapter(tmp_path)
    trainable = model.get_nb_trainable_parameters()[0]
    card = update_card(folder, replace(INFO, trainable_parameters=trainable))
    assert read(folder) == str(card)
    assert card_errors(str(card)) == ([], [])
    expected = {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "license": "mit",
        "datasets": ["org/news"],
        "metrics": ["accuracy"],
    }
    data = card.data.to_dict()
    assert {key: data[key] for key in expected} == expected
    assert data["model-index"][0]["name"] == "news-ssf"
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.5}]
    size = (folder / "adapter_model.safetensors").stat().st_size
    for part in (
        "# news-ssf\n",
        "| learning rate | 0.01 |",
        f"{trainable:,} trainable parameters; the adapter file has {size:,} bytes",
        "| News |  | accuracy | 0.5 |",
        "| Method | Accuracy | Bytes |\n| --- | --- | --- |\n| base | 0.1 |  |\n| LoRA | 0.4 | 10 |",
        "- English only.",
        "2210.08823",
        "@inproceedings{",
    ):
        assert part in card.text, part
    assert code_blocks(card.text)[0].startswith("import peft_ext")
    assert '"me/news-ssf"' in code_blocks(card.text)[0]
    assert str(model_card(folder, INFO)).count("@inproceedings") == 1


def test_second_call_replaces_only_its_own(tmp_path: Path) -> None:
    model, folder = saved_adapter(tmp_path)
    update_card(folder, INFO)
    text = read(folder)
    update_card(folder, INFO)
    assert read(folder) == text
    model.save_pretrained(folder)  # PEFT writes its keys and tags anew; what was said about the training stays
    assert read(folder) == text

    (folder / "README.md").write_text(text.replace("### Framework", "Mine.\n\n### Framework"))
    newer = replace(ACCURACY, metric_value=np.float32(0.75))
    other = replace(ACCURACY, metric_type="f1")
    card = update_card(folder, CardInfo(results=[newer, other], datasets=["org/more"], limits=["Short texts only."]))
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", 0.75), ("f1", 0.5)]
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.datasets == ["org/news", "org/more"]
    assert card.data.license == "mit"
    assert '"me/news-ssf"' in card.text
    assert "Short texts only." in card.text
    assert "English only." not in card.text
    assert "\nMine.\n" in card.text


USERS_CARD = """---
license: cc-by-4.0
language: en
tags: [mine]
datasets: org/mine
base_model: [org/base, org/other]
pipeline_tag: sentence-similarity
widget:
- text: Hello
---
Badge.

# My model

My words. $\\alpha$ \\1

## Limits

Mine.

```python
# not a heading
```
"""


def test_card_of_the_user_is_kept(tmp_path: Path) -> None:
    (save_config(tmp_path) / "README.md").write_text(USERS_CARD)
    card = update_card(tmp_path, CardInfo(datasets=["org/news"], results=[ACCURACY]))
    old = ModelCard(USERS_CARD)
    assert [line for line in old.text.splitlines() if line not in card.text.splitlines()] == []
    data = card.data.to_dict()
    for key in ("license", "language", "base_model", "pipeline_tag", "widget"):
        assert data[key] == old.data.to_dict()[key]
    assert data["tags"] == ["mine", "ssf", "peft-ext"]
    assert data["datasets"] == ["org/mine", "org/news"]
    assert card.text.index("# My model") < card.text.index("import peft_ext") < card.text.index("My words.")
    assert card.text.index("# not a heading") < card.text.index("## Citation")
    assert str(update_card(tmp_path, CardInfo(results=[ACCURACY]))) == str(card)


@pytest.mark.parametrize("text", ["Only words.\n", "```sh\n# a comment\n```\n", ""])
def test_card_without_title(tmp_path: Path, text: str) -> None:
    (save_config(tmp_path) / "README.md").write_text(text)
    card = update_card(tmp_path)
    assert card.text.startswith("\n# SSF adapter\n")
    assert code_blocks(card.text)[0].startswith("import peft_ext")
    assert text in card.text


def test_filled_in_parts_of_the_template_are_kept(tmp_path: Path) -> None:
    model, folder = saved_adapter(tmp_path)
    template = ModelCard.from_template(
        ModelCard("---\nlibrary_name: peft\n---\n").data,
        model_summary="Mine.",
        developers="Me",
        hardware_requirements="One core",
    )
    template.save(folder / "README.md")
    model.save_pretrained(folder)
    text = read(folder)
    assert "Mine." in text
    assert "- **Developed by:** Me" in text
    assert "## Hardware\n\nOne core" in text
    assert "Environmental Impact" not in text
    assert text.index("import peft_ext") < text.index("Mine.")


def test_only_cards_of_adapters_are_touched(tmp_path: Path) -> None:
    add_usage(save_config(tmp_path))
    assert not (tmp_path / "README.md").exists()
    for text in ("# A project\n", "---\nlibrary_name: timm\n---\n# Another\n"):
        (tmp_path / "README.md").write_text(text)
        add_usage(tmp_path)
        add_usage(save_config(tmp_path / "below"))
        assert read(tmp_path) == text


def test_named_adapter_lies_below_its_card(tmp_path: Path) -> None:
    config = SSFConfig(task_type="SEQ_CLS")
    get_peft_model(tiny("bert"), config, adapter_name="other").save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_config.json").is_file()
    assert '"path/to/adapter", subfolder="other")' in code_blocks(read(tmp_path))[0]

    model = get_peft_model(tiny("bert"), config)
    model.add_adapter("other", config)
    model.save_pretrained(tmp_path)  # with a default adapter beside it, the card is that one's
    assert '"path/to/adapter")' in code_blocks(read(tmp_path))[0]


@pytest.mark.parametrize(
    "damage", ["---\nlibrary_name: peft\ntags: [\n---\n", "---\na: 1\nlibrary_name: peft\n---\n\xe9"]
)
def test_damaged_card_does_not_fail_the_save(tmp_path: Path, damage: str) -> None:
    (save_config(tmp_path) / "README.md").write_bytes(damage.encode("latin-1"))
    with pytest.warns(UserWarning, match="does not tell how to load the adapter"):
        SSFConfig(task_type="SEQ_CLS").save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == damage.encode("latin-1")


@pytest.mark.parametrize("weights", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_weights_that_are_not_there(tmp_path: Path, weights: bytes) -> None:
    (save_config(tmp_path) / "adapter_model.safetensors").write_bytes(weights)
    assert "parameters" not in model_card(tmp_path).text


@pytest.mark.parametrize(
    ("fields", "base_class", "task"),
    [
        ({"task_type": "CAUSAL_LM"}, "AutoModelForCausalLM", "text-generation"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "AutoModelForSeq2SeqLM", None),
        ({"task_type": "TOKEN_CLS"}, "AutoModelForTokenClassification", "token-classification"),
        ({"task_type": "QUESTION_ANS"}, "AutoModelForQuestionAnswering", "question-answering"),
        ({"task_type": "FEATURE_EXTRACTION"}, "AutoModel", "feature-extraction"),
    ],
)
def test_class_by_task_type(tmp_path: Path, fields: dict[str, str], base_class: str, task: str | None) -> None:
    card = model_card(save_config(tmp_path, **fields))
    assert f"from transformers import {base_class}\n" in card.text
    assert f'base = {base_class}.from_pretrained("org/base")' in card.text
    assert card.data.pipeline_tag == task


def test_class_without_task_type(tmp_path: Path) -> None:
    get_peft_model(tiny("vit"), SSFConfig(modules_to_save=["classifier"])).save_pretrained(tmp_path / "vit")
    code = code_blocks(read(tmp_path / "vit"))[0]
    assert 'base = ViTForImageClassification.from_pretrained("path/to/base", num_labels=3,' in code
    assert ModelCard.load(tmp_path / "vit" / "README.md").data.pipeline_tag == "image-classification"
    get_peft_model(MLP(), SSFConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "mlp")
    code = code_blocks(read(tmp_path / "mlp"))[0]
    assert "transformers" not in code
    assert "base = ...  # the MLP that the adapter was trained on" in code
    card = model_card(tmp_path / "vit", CardInfo(base_class="AutoModelForImageClassification", task="image-to-image"))
    assert "import AutoModelForImageClassification\n" in card.text
    assert card.data.pipeline_tag == "image-to-image"


def test_revision_of_the_base_model(tmp_path: Path) -> None:
    card = model_card(save_config(tmp_path, revision="v2"))
    assert '("org/base", revision="v2")' in card.text


def test_merged_model(tmp_path: Path) -> None:
    model, _ = saved_adapter(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"no adapter_config\.json .*CardInfo\(method="):
        update_card(tmp_path / "merged")
    info = replace(INFO, relation="finetune", method="SSF", repo_id=str(tmp_path / "merged"))
    card = update_card(tmp_path / "merged", info)
    assert (card.data.library_name, card.data["base_model_relation"]) == ("transformers", "finetune")
    assert {"ssf", "peft-ext"} <= set(card.data.tags)
    assert card_errors(str(card)) == ([], [])
    code = code_blocks(card.text)[0]
    assert "peft" not in code.replace(str(tmp_path), "")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    assert type(names["model"]) is type(merged)


def test_method_of_another_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LORA is not a method of peft_ext"):
        update_card(save_config(tmp_path, peft_type="LORA"))


def test_indices_are_no_parameters(tmp_path: Path) -> None:
    config = SparseFTConfig(num_tunable_weights=100, task_type="SEQ_CLS", selection="random", modules_to_save=[])
    _, folder = saved_adapter(tmp_path, config)
    stored = load_file(folder / "adapter_model.safetensors").values()
    floats = sum(tensor.numel() for tensor in stored if tensor.is_floating_point())
    assert floats < sum(tensor.numel() for tensor in stored)
    assert f"\n{floats:,} stored parameters;" in model_card(folder).text


def test_cells_of_tables_stay_in_their_cell(tmp_path: Path) -> None:
    rows = [{"a|b": "x|y\nz", "n": torch.tensor(0.123456789)}]
    text = model_card(save_config(tmp_path), CardInfo(comparison=rows)).text
    assert "| a\\|b | n |" in text
    assert "| x\\|y z | 0.12346 |" in text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_stay(tmp_path: Path, newline: str) -> None:
    get_peft_model(tiny("llama"), SSFConfig()).save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_bytes(("---\nlicense: mit\n---\n# Mine\n\nProse.\n").replace("\n", newline).encode())
    update_card(tmp_path)
    once = path.read_bytes()
    assert once.count(b"\n") == once.count(newline.encode()) and b"\r\r" not in once
    update_card(tmp_path)
    assert path.read_bytes() == once
