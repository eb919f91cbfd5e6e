"""Linear probing: the head that is written against scikit-learn's own decision function and against the optimum."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from models import CLASSES, MLP, VOCABULARY, inputs, tiny
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.utils.data import DataLoader, Dataset

import peft_ext
from peft_ext import VQTConfig


GRID = (1e-3, 0.1, 1.0)  # weak regularisation takes many steps


def batches(name: str, number: int = 6, size: int = 8, labels: Any = None) -> list[dict[str, Any]]:
    """Batches of a tiny model, with labels of a class at random."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        if name == "vit":
            one: dict[str, Any] = {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
        else:
            tokens = torch.randint(3, VOCABULARY, (size, 7), generator=generator)
            lengths = torch.randint(3, 8, (size, 1), generator=generator)
            mask = (torch.arange(7) < lengths).long()
            one = {"input_ids": torch.where(mask.bool(), tokens, 0), "attention_mask": mask}
        one["labels"] = torch.randint(CLASSES, (size,), generator=generator) if labels is None else labels(generator)
        found.append(one)
    return found


@torch.no_grad()
def logits_of(model: Any, data: list[dict[str, Any]]) -> np.ndarray:
    training = model.training
    model.eval()
    found = [model(**{key: value for key, value in one.items() if key != "labels"}).logits for one in data]
    model.train(training)
    return torch.cat(found).double().numpy()


def labels_of(data: list[dict[str, Any]]) -> np.ndarray:
    return torch.cat([one["labels"] for one in data]).numpy()


def features_of(model: Any, head: nn.Module, data: list[dict[str, Any]]) -> np.ndarray:
    """`(N, F)`, seen by a hook of its own; of a model that pools its logits, the last token that is no padding."""
    found: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    logits_of(model, data)
    handle.remove()
    if found[0].ndim == 3:
        found = [x[range(len(x)), one["attention_mask"].sum(1) - 1] for x, one in zip(found, data, strict=True)]
    return torch.cat(found).double().numpy()


def model_of(kind: str) -> tuple[Any, nn.Module, str]:
    """A model, the Linear that makes its logits, and the inputs that it takes."""
    torch.manual_seed(0)
    if kind in ("bert", "roberta", "vit", "llama"):
        config = {"bert": tf.BertConfig, "roberta": tf.RobertaConfig, "vit": tf.ViTConfig, "llama": tf.LlamaConfig}[
            kind
        ]
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 24, "num_labels": CLASSES, "pad_token_id": 0, "vocab_size": VOCABULARY}
        if kind == "vit":
            del sizes["vocab_size"]
            sizes |= {"image_size": 16, "patch_size": 8}
        auto: Any = tf.AutoModelForImageClassification if kind == "vit" else tf.AutoModelForSequenceClassification
        model = auto.from_config(config(**sizes)).double()
        head = {"roberta": "classifier.out_proj", "llama": "score"}.get(kind, "classifier")
        return model, model.get_submodule(head), "vit" if kind == "vit" else "text"
    raise AssertionError(kind)


def in_double(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v.double() if k == "pixel_values" else v for k, v in one.items()} for one in data]


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "llama"])
def test_head_is_that_of_scikit_learn(kind: str) -> None:
    model, head, takes = model_of(kind)
    data = in_double(batches(takes))
    model.train()
    features, labels = features_of(model, head, data), labels_of(data)
    before = {name: p.clone() for name, p in model.named_parameters()}

    found = peft_ext.linear_probe(model, data[:4], data[4:], grid=GRID)

    assert model.training and all(module.training for module in model.modules())
    mean = features[:32].mean() if head.bias is not None else 0.0
    spread = np.sqrt(np.square(features[:32] - mean).mean())
    standard = (features - mean) / spread
    reference = LogisticRegression(C=found.C, fit_intercept=head.bias is not None, tol=1e-8, max_iter=3000).fit(
        standard[:32], labels[:32]
    )
    np.testing.assert_allclose(logits_of(model, data), reference.decision_function(standard), atol=2e-4)
    assert found.converged and found.samples == 32 and found.kind == "single_label_classification"
    assert found.score == found.scores[found.C] == max(found.scores.values())
    assert min(c for c, score in found.scores.items() if score == found.score) == found.C
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {model.get_parameter(name) for name in changed} == set(head.parameters())
    assert model.get_submodule(found.head) is head


def test_gradient_at_the_optimum_is_the_regularisation_alone() -> None:
    """d/dW of the mean loss is - W s^2 / (C N), so that nothing much flows into the model below."""
    model, head, takes = model_of("bert")
    data = batches(takes)
    features = features_of(model, head, data)
    found = peft_ext.linear_probe(model, data, data, grid=[0.1])
    model.eval()
    joined = {key: torch.cat([one[key] for one in data]) for key in data[0]}
    model(**joined).loss.backward()
    spread = features.std()
    weight = head.weight.detach().numpy()
    expected = -weight * spread**2 / (found.C * len(features))
    np.testing.assert_allclose(
        head.weight.grad.numpy() - features.mean() * head.bias.grad.numpy()[:, None], expected, atol=1e-6
    )
    assert head.bias.grad.abs().max() < 1e-6


def test_two_classes_share_the_logit() -> None:
    model, _, takes = model_of("bert")
    small = tf.AutoModelForSequenceClassification.from_config(copy.deepcopy(model.config)).double()
    small.config.num_labels, small.num_labels = 2, 2
    small.classifier = nn.Linear(16, 2).double()
    data = batches(takes, labels=lambda g: torch.randint(2, (8,), generator=g))
    found = peft_ext.linear_probe(small, data, grid=GRID)
    assert torch.allclose(small.classifier.weight[0], -small.classifier.weight[1])
    assert torch.allclose(small.classifier.bias[0], -small.classifier.bias[1])
    features = features_of(small, small.classifier, data)
    standard = (features - features.mean()) / features.std()
    reference = LogisticRegression(C=found.C, tol=1e-8, max_iter=3000).fit(standard, labels_of(data))
    margin = logits_of(small, data) @ [-1, 1]
    np.testing.assert_allclose(margin, reference.decision_function(standard), atol=2e-4)


def test_class_without_samples_gets_zeros() -> None:
    model, head, takes = model_of("bert")
    data = batches(takes, labels=lambda g: torch.randint(2, (8,), generator=g) * 2)
    with pytest.warns(UserWarning, match="No sample has the label 1"):
        found = peft_ext.linear_probe(model, data, grid=GRID)
    assert found.missing == (1,) and not head.weight[1].any() and not head.bias[1].any()
    assert torch.allclose(head.weight[0], -head.weight[2]) and head.weight[0].any()


def test_regression_and_several_labels() -> None:
    model, head, takes = model_of("bert")
    model.config.problem_type = "regression"
    data = batches(takes, labels=lambda g: torch.randn(8, CLASSES, generator=g).double())
    found = peft_ext.linear_probe(model, data, grid=GRID)
    features, labels = features_of(model, head, data), labels_of(data)
    standard = (features - features.mean()) / features.std()
    reference = Ridge(alpha=1 / found.C).fit(standard, labels)
    np.testing.assert_allclose(logits_of(model, data), reference.predict(standard), atol=1e-5)
    assert found.kind == "regression"

    model.config.problem_type = None
    data = batches(takes, labels=lambda g: torch.randint(2, (8, CLASSES), generator=g).float())
    found = peft_ext.linear_probe(model, data, grid=GRID)
    assert found.kind == "multi_label_classification"
    features = features_of(model, head, data)
    standard = (features - features.mean()) / features.std()
    for place in range(CLASSES):
        reference = LogisticRegression(C=found.C, tol=1e-8, max_iter=3000).fit(standard, labels_of(data)[:, place])
        np.testing.assert_allclose(logits_of(model, data)[:, place], reference.decision_function(standard), atol=2e-4)


def test_tokens_with_labels() -> None:
    model = tf.AutoModelForTokenClassification.from_config(model_of("bert")[0].config).double()
    data = batches("text")
    for one in data:
        one["labels"] = torch.where(one["attention_mask"].bool(), one["input_ids"] % CLASSES, -100)
    found = peft_ext.linear_probe(model, data, grid=GRID, held_out=0.3)
    assert found.samples == sum(int(one["attention_mask"].sum()) for one in data)
    labels = labels_of(data)
    hits = logits_of(model, data).argmax(-1)[labels != -100] == labels[labels != -100]
    assert hits.mean() > 0.5


def test_copies_in_modules_to_save_and_adapters() -> None:
    model, head, takes = model_of("bert")
    data = batches(takes)
    adapted: Any = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    wrapper = adapted.base_model.model.classifier
    original = copy.deepcopy(wrapper.original_module.state_dict())
    found = peft_ext.linear_probe(adapted, data, grid=GRID)
    assert found.head == "classifier"
    assert all(torch.equal(value, original[key]) for key, value in wrapper.original_module.state_dict().items())
    peft_ext.linear_probe(model, data, grid=GRID)
    assert torch.allclose(wrapper.modules_to_save["default"].weight, head.weight, atol=1e-5)
    assert wrapper.modules_to_save["default"].weight.requires_grad

    lora: Any = get_peft_model(model_of("bert")[0], LoraConfig(target_modules=["query", "classifier"]))
    with pytest.raises(ValueError, match="'classifier' has an adapter on it"):
        peft_ext.linear_probe(lora, data, grid=GRID)


def test_head_of_an_adapter_of_its_own() -> None:
    model, _, takes = model_of("vit")
    adapted: Any = get_peft_model(model, VQTConfig(num_queries=2))
    data = in_double(batches(takes))
    found = peft_ext.linear_probe(adapted, data, grid=GRID)
    head = adapted.base_model.model.vqt.vqt_head["default"]
    assert found.head == "vqt.vqt_head.default"
    features = features_of(adapted, head, data)
    assert features.shape[1] == head.weight.shape[1]
    standard = (features - features.mean()) / features.std()
    reference = LogisticRegression(C=found.C, tol=1e-8, max_iter=3000).fit(standard, labels_of(data))
    np.testing.assert_allclose(logits_of(adapted, data), reference.decision_function(standard), atol=2e-4)


class Samples(Dataset):
    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.rows = [{key: value[i] for key, value in one.items()} for one in data for i in range(len(one["labels"]))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_samples_batches_and_cache_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, head, takes = model_of("bert")
    data = batches(takes)
    first = peft_ext.linear_probe(model, data, grid=GRID, cache=tmp_path / "features")
    weight = head.weight.detach().clone()
    second = peft_ext.linear_probe(model, DataLoader(Samples(data), 8), grid=GRID, cache=tmp_path / "features")
    assert torch.equal(head.weight, weight) and second == first
    assert len(list((tmp_path / "features").iterdir())) == 1
    third = peft_ext.linear_probe(model, Samples(data), grid=GRID, batch_size=16)
    assert torch.allclose(head.weight, weight, atol=1e-4) and third.samples == first.samples

    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        peft_ext.linear_probe(model, Samples(data), grid=GRID, batch_size=8, cache=tmp_path / "features")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] += 1  # another model
    peft_ext.linear_probe(model, data, grid=GRID, cache=tmp_path / "features")
    paths = list((tmp_path / "features").iterdir())
    assert len(paths) == 2
    for path in paths:
        damaged = bytearray(path.read_bytes())
        damaged[-5] ^= 1
        path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="are damaged"):
        peft_ext.linear_probe(model, data, grid=GRID, cache=tmp_path / "features")


def test_module_of_any_kind_with_a_named_head() -> None:
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(60, 6)
    data = [{"x": x, "labels": (x[:, 0] > 0).long() + (x[:, 0] > 1).long()}]
    assert peft_ext.linear_probe(model, data, grid=GRID, head="head").head == "head"
    with pytest.raises(ValueError, match="fc1' alone"):
        peft_ext.linear_probe(model, data, head="fc1")


def bad(change: str) -> tuple[Any, Any, dict[str, Any]]:
    model, _, takes = model_of("bert")
    data: Any = batches(takes, number=2)
    options: dict[str, Any] = {}
    if change == "no head":
        model = tiny("llama")
        data = [inputs("llama")]
    elif change == "no labels":
        del data[1]["labels"]
    elif change == "many classes":
        data[0]["labels"][0] = CLASSES
    elif change == "no mapping":
        data = [(1, 2)]
    elif change == "empty":
        data = iter([])
    elif change == "one class":
        data[0]["labels"][:] = data[1]["labels"][:] = 1
    elif change == "nan":
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.bias[0] = float("nan")
    elif change == "grid":
        options["grid"] = [0.0, 1.0]
    elif change == "held_out":
        options["held_out"] = 1.0
    elif change == "name":
        options["head"] = "clasifier"
    elif change == "width":
        model.config.problem_type = "multi_label_classification"
    elif change == "backbone":
        model = model.bert
    return model, data, options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no head", "No Linear of LlamaForCausalLM makes logits of 3 labels"),
        ("backbone", "No Linear of BertModel makes logits of 3 labels"),
        ("no labels", "no labels: add `labels`"),
        ("many classes", "head 'classifier' has 3 classes"),
        ("no mapping", "must be a mapping"),
        ("empty", "fewer than two samples"),
        ("one class", "nothing to tell apart"),
        ("nan", "not all finite"),
        ("grid", "give positive numbers"),
        ("held_out", "`held_out` is 1.0"),
        ("name", "no module 'clasifier'"),
        ("width", "has 3 outputs, and the labels have the shape"),
    ],
)
def test_bad_input(change: str, message: str) -> None:
    model, data, options = bad(change)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        peft_ext.linear_probe(model, data, **options)


def test_scikit_learn_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    model, data, _ = bad("")
    with pytest.raises(ImportError, match=re.escape("pip install 'peft-ext[probe]'")):
        peft_ext.linear_probe(model, data, grid=GRID)


def scaled(alpha: float, **fields: Any) -> Any:
    """LoRA whose tensors are the same for each `alpha`."""
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=alpha, target_modules=["query", "value"], **fields)  # type: ignore[arg-type]
    model = get_peft_model(model_of("bert")[0], config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_cache_knows_what_adapters_are_told_besides_tensors(tmp_path: Path) -> None:
    data = batches("text")

    def fitted(model: Any, cache: Path | None) -> torch.Tensor:
        peft_ext.linear_probe(model, data, grid=GRID, cache=cache)
        return model.base_model.model.classifier.modules_to_save["default"].weight.detach().clone()

    found = fitted(scaled(4), tmp_path)
    assert torch.equal(fitted(scaled(4), tmp_path), found) and len(list(tmp_path.iterdir())) == 1
    larger = scaled(400)
    assert torch.equal(fitted(larger, tmp_path), fitted(scaled(400), None)) and len(list(tmp_path.iterdir())) == 2
    changed = scaled(4)
    for module in changed.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(100.0)  # no config tells
    assert torch.allclose(fitted(changed, tmp_path), fitted(larger, None)) and len(list(tmp_path.iterdir())) == 3
    assert not torch.allclose(found, fitted(changed, None))


@pytest.mark.parametrize("tied", [False, True])
def test_heads_of_language_models_are_refused(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'lm_head' of LlamaForCausalLM predicts the next token"):
        peft_ext.linear_probe(model, [inputs("llama")], head="lm_head")
    masked = tf.BertForMaskedLM(model_of("bert")[0].config)
    with pytest.raises(ValueError, match=r"'cls\.predictions\.decoder' shares its weight with '.*word_embeddings'"):
        peft_ext.linear_probe(masked, [inputs("bert")], head="cls.predictions.decoder")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def worse(change: str) -> tuple[Any, Any, dict[str, Any]]:
    """Like `bad`, of a kind that ended in an error of Python's own."""
    model, _, takes = model_of("bert")
    data: Any = batches(takes, number=2)
    options: dict[str, Any] = {}
    if change == "held_out":
        data, options["held_out"] = batches(takes, number=1, size=4), 0.95
    elif change == "held_out text":
        options["held_out"] = "0.5"
    elif change == "samples":
        data = Samples(data).rows
    elif change == "words":
        data[0]["labels"] = ["good"] * 8
    elif change == "answers":
        model = tf.BertForQuestionAnswering(model.config)
    elif change == "columns":
        data = data[0]
    elif change == "none":
        data = None
    elif change == "bool":
        data = [{**one, "labels": one["labels"] > 0} for one in data]
    elif change == "nan label":
        model.config.problem_type = "regression"
        data = batches(takes, number=2, labels=lambda g: torch.full((8, CLASSES), float("nan")))
    elif change == "grid text":
        options["grid"] = "abc"
    elif change == "grid nan":
        options["grid"] = [float("nan")]
    return model, data, options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("held_out", "`held_out` is 0.95, which leaves none of 4 samples"),
        ("held_out text", "`held_out` is '0.5': it must lie between"),
        ("samples", "as of a sample: give batches, or the samples as `DataLoader("),
        ("words", "The `labels` of a batch are ['good'"),
        ("answers", "logits are not the output of 'qa_outputs' alone"),
        ("columns", "`dataset` is a mapping with 'input_ids', 'attention_mask', 'labels': give one batch as a list"),
        ("none", "`dataset` is a NoneType: give a `Dataset`"),
        ("bool", "The labels are true or false, one a sample, and the head 'classifier' has 3 outputs"),
        ("nan label", "The labels are not all finite"),
        ("grid text", "`grid` is 'abc': give positive numbers"),
        ("grid nan", "`grid` is [nan]: give positive numbers"),
    ],
)
def test_bad_input_is_named(change: str, message: str) -> None:
    model, data, options = worse(change)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        peft_ext.linear_probe(model, data, **options)


def test_true_and_false_for_several_labels() -> None:
    model, _, takes = model_of("bert")
    data = batches(takes, labels=lambda g: torch.randint(2, (8, CLASSES), generator=g).bool())
    assert peft_ext.linear_probe(model, data, grid=GRID).kind == "multi_label_classification"
