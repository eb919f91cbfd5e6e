"""What a user does with a method from another package, `tests/plugin`, installed beside `peft_ext`; see test_plugins.py.

Run in a process of its own, in a new directory: `python plugin_session.py`, with HF_ENDPOINT set.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_ext
told = [str(warning.message) for warning in caught if "brings methods for peft_ext" in str(warning.message)]
assert len(told) == 2, told
assert any("peft-ext-broken 1.0" in text and "ZeroDivisionError: division by zero" in text for text in told), told
assert any("peft-ext-function 1.0" in text and "must name a module" in text for text in told), told

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_ext.cards import push_card
from peft_ext.core import method_of, tuner_of
from peft_ext.testing.models import inputs, tiny
from peft_ext_cli import main


METHOD = method_of("GAIN")
assert METHOD is not None and "peft_ext_gain" in sys.modules  # imported by nobody here
GainConfig: Any = METHOD.config


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(name)).logits


def moved(model: Any) -> bool:
    values = [p for name, p in model.named_parameters() if "gain_vector" in name]
    return bool(values) and all(bool(p.detach().any()) for p in values)


def call(*arguments: str, status: int = 0) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(list(arguments)) == status, err.getvalue()
    return out.getvalue() or err.getvalue()


def train() -> Any:
    """Under `Trainer`: a classifier."""
    base = tiny("bert")
    base.save_pretrained("base")
    base = type(base).from_pretrained("base")
    batch = {key: value[:1].squeeze(0).tolist() for key, value in inputs("bert").items() if key != "labels"}
    rows = Dataset.from_list([batch | {"labels": index % 3} for index in range(8)])
    model = get_peft_model(base, GainConfig(task_type="SEQ_CLS"))
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    Trainer(model, TrainingArguments("runs", max_steps=3, learning_rate=0.1, **options), train_dataset=rows).train()
    assert moved(model)
    return model


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(20))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def train_with_sft() -> None:
    rows = Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = SFTTrainer(
        tiny("llama"),
        SFTConfig("runs", max_steps=2, learning_rate=0.1, max_length=16, **options),
        train_dataset=rows,
        peft_config=GainConfig(task_type="CAUSAL_LM"),
        processing_class=words(),
    )
    trainer.train()
    assert moved(trainer.model)


def to_the_hub_and_back(model: Any) -> None:
    expected = logits(model, "bert")
    model.push_to_hub("alice/gain")
    push_card("alice/gain")
    card = ModelCard.load("alice/gain").text
    assert "pip install peft-ext-gain" in card and "import peft_ext  # tells PEFT what Channel gains is" in card
    torch.testing.assert_close(logits(peft_ext.load("alice/gain"), "bert"), expected)
    loaded = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained("base"), "alice/gain")
    torch.testing.assert_close(logits(loaded, "bert"), expected)
    model.save_pretrained("adapter")


def on_the_command_line(model: Any) -> None:
    rows = {row["method"]: row for row in json.loads(call("methods", "--json"))}
    expected = {"config": "peft_ext_gain.GainConfig", "package": "peft-ext-gain", "version": "0.3.0", "merges": True}
    assert expected.items() <= rows["GAIN"].items() and rows["SSF"]["package"] == "peft-ext"
    assert "| Channel gains" in call("methods") and "peft-ext-gain 0.3.0" in call("methods")
    found = json.loads(call("inspect", "alice/gain", "--json"))
    assert found["name"] == "Channel gains" and found["parameters"]["method"] == found["totals"]["parameters"] > 0
    assert "g mean" in call("inspect", "alice/gain", "--modules")
    call("inspect", "adapter", "--figure", "figure.png")
    assert abs(json.loads(call("compare", "adapter", "alice/gain", "--json"))["cosine"]["all"] - 1) < 1e-6
    call("export", "adapter", "--to", "merged", "--output", "merged")
    merged = type(model.get_base_model()).from_pretrained("merged")
    torch.testing.assert_close(logits(merged, "bert"), logits(model, "bert"), rtol=1e-4, atol=1e-5)
    assert "has no masks that say what to cut" in call(
        "export", "adapter", "--to", "pruned", "--output", "x", status=2
    )
    (Path("adapter") / "README.md").unlink()
    call("card", "adapter")
    assert "pip install peft-ext-gain" in (Path("adapter") / "README.md").read_text()
    assert "Channel gains trains a gain for every output." in (Path("merged") / "README.md").read_text()


def with_others() -> None:
    model = peft_ext.PeftMixedModel(tiny("llama"), GainConfig(target_modules=["o_proj"]), adapter_name="gain")
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["gain", "lora"])
    expected = logits(model, "llama")
    torch.testing.assert_close(logits(model.merge_and_unload(), "llama"), expected, rtol=1e-4, atol=1e-5)
    try:
        tuner_of(GainConfig()).candidates(GainConfig(), tiny("llama"))
    except TypeError as error:
        assert "looks at no data" in str(error)
    else:
        raise AssertionError("a method that looks at no data was calibrated")


if __name__ == "__main__":
    trained = train()
    to_the_hub_and_back(trained)
    on_the_command_line(trained)
    train_with_sft()
    with_others()
    print("all of it works")
