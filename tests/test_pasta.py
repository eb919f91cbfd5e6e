"""PASTA: the equation against a dense reference, counts, which tokens are special, and bad input."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from models import inputs, tiny
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import PASTAConfig
from peft_ext.plots import plot
from peft_ext.testing.models import logits


CLS, SEP, PAD = 1, 2, 0  # of the tiny models


def pairs() -> dict[str, torch.Tensor]:
    """A pair of sentences and, padded, a single one."""
    ids = torch.tensor([[CLS, 7, 8, SEP, 9, 4, SEP], [CLS, 5, 6, SEP, PAD, PAD, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor([0, 1])}


def adapted(name: str, **fields: Any) -> PeftModel:
    """In float64, with vectors of ordinary size."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(name), PASTAConfig(**{"init_weights": False, "dropout": 0.0, **fields}))
    return model.double().eval()


def vectors_of(model: nn.Module) -> list[torch.Tensor]:
    """By layer, `(m, D)`."""
    return [p for key, p in model.named_parameters() if ".pasta_vectors." in key]


def reference(name: str, batch: dict[str, Any], places: list[list[tuple[int, int]]], vectors: Any) -> torch.Tensor:
    """The logits of the base model if each of its blocks is called with the vectors added, sample by sample.

    Args:
        places: Of each sample, pairs of a row and the vector that it gets.
    """
    base = tiny(name).double()
    owner = getattr(base, base.base_model_prefix)
    blocks = next(module for module in owner.modules() if isinstance(module, nn.ModuleList))
    for block, own in zip(blocks, vectors, strict=True):
        plain = block.forward

        def forward(hidden: torch.Tensor, *args: Any, plain: Any = plain, own: Any = own, **kwargs: Any) -> Any:
            rows = [list(sample) for sample in hidden]
            for sample, pairs_of in zip(rows, places, strict=True):
                for row, vector in pairs_of:
                    sample[row] = sample[row] + own[vector]
            return plain(torch.stack([torch.stack(sample) for sample in rows]), *args, **kwargs)

        block.forward = forward
    return logits(base, batch)


IN_ORDER = [[(0, 0), (3, 1), (6, 2)], [(0, 0), (3, 1)]]
BY_TOKEN = [[(0, 0), (3, 1), (6, 1)], [(0, 0), (3, 1)]]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("by_token", [False, True])
def test_encoders_match_the_dense_reference(name: str, by_token: bool) -> None:
    model = adapted(name, **({"by_token": True} if by_token else {"num_vectors": 3}))
    batch, vectors = pairs(), vectors_of(model)
    dense = [vector.detach().clone().requires_grad_() for vector in vectors]
    expected = reference(name, batch, BY_TOKEN if by_token else IN_ORDER, dense)
    found = logits(model, batch)
    assert (found - expected).abs().max() < 1e-10
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for ours, theirs in zip(vectors, dense, strict=True):
        assert ours.grad is not None and (ours.grad - theirs.grad).abs().max() < 1e-10
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(tiny(name).double(), batch))


@pytest.mark.parametrize(("name", "rows"), [("vit", 1), ("deit", 2), ("dinov2", 1), ("beit", 1), ("ast", 2)])
def test_images_get_their_vectors_by_row(name: str, rows: int) -> None:
    model = adapted(name)
    assert model.peft_config["default"].num_vectors == rows
    places = [[(row, row) for row in range(rows)]] * 2
    batch = {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}
    expected = reference(name, batch, places, vectors_of(model))
    assert (logits(model, batch) - expected).abs().max() < 1e-10


def test_registers_get_vectors() -> None:
    config = tf.Dinov2WithRegistersConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    model = get_peft_model(tf.Dinov2WithRegistersModel(config), PASTAConfig())
    assert vectors_of(model)[0].shape == (1 + config.num_register_tokens, 16)


def test_generation_by_token_is_the_same_with_and_without_a_cache() -> None:
    model = adapted("llama", special_tokens=[CLS, 5, SEP], task_type="CAUSAL_LM")
    ids = torch.tensor([[CLS, 5, 7, 5], [PAD, CLS, 8, 5]])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "max_new_tokens": 6, "do_sample": False}
    batch["suppress_tokens"] = [token for token in range(40) if token not in (5, 9, 11)]  # specials among what comes
    assert torch.equal(model.generate(**batch, use_cache=True), model.generate(**batch, use_cache=False))
    whole = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    places = [[(0, 0), (1, 1), (3, 1)], [(1, 0), (3, 1)]]
    plain = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    assert (whole - reference("llama", plain, places, vectors_of(model))).abs().max() < 1e-10


def test_padding_with_the_id_of_the_end_is_not_special() -> None:
    model = adapted("llama", special_tokens=[CLS, SEP])
    ids = torch.tensor([[CLS, 7, SEP]])
    padded = torch.tensor([[SEP, SEP, CLS, 7, SEP]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    position_ids = torch.tensor([[0, 0, 0, 1, 2]])
    found = model(input_ids=padded, attention_mask=mask, position_ids=position_ids).logits[:, 2:]
    assert (found - model(input_ids=ids).logits).abs().max() < 1e-10


def test_samples_of_a_batch_are_independent() -> None:
    """Which was not so where vectors were counted modulo the number of special tokens of the first sample."""
    model, batch = adapted("bert", num_vectors=3), pairs()
    together = logits(model, batch)
    for index in (0, 1):
        length = int(batch["attention_mask"][index].sum())
        alone = {key: batch[key][index : index + 1, :length] for key in ("input_ids", "attention_mask")}
        assert (model(**alone).logits - together[index]).abs().max() < 1e-10


def test_the_third_vector_learns_nothing_from_single_sentences() -> None:
    model, batch = adapted("bert", num_vectors=3), pairs()
    model(**{key: value[1:] for key, value in batch.items()}).loss.backward()
    for vector in vectors_of(model):
        assert vector.grad is not None and vector.grad[:2].any() and not vector.grad[2].any()


def test_only_special_rows_differ_at_the_first_layer() -> None:
    model, batch = adapted("bert", num_vectors=3, layers_to_transform=1), pairs()
    assert [key for key, _ in model.named_parameters() if "pasta_" in key and ".layer.1." not in key] == []
    seen: list[torch.Tensor] = []
    block = model.get_submodule("base_model.model.bert.encoder.layer.1")
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    with model.disable_adapter():
        model(**batch)
    differs = (seen[0] != seen[1]).any(-1)
    assert differs.nonzero().tolist() == [[0, 0], [0, 3], [0, 6], [1, 0], [1, 3]]


@pytest.mark.parametrize(("vectors", "expected"), [(2, 49_152), (3, 73_728), (4, 98_304)])
def test_published_counts(vectors: int, expected: int) -> None:
    config = tf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        base = tf.BertModel(config)
        model = get_peft_model(base, PASTAConfig(special_tokens=[101, 102], num_vectors=vectors))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_starts() -> None:
    batch = pairs()
    zero = adapted("bert", num_vectors=3, init_weights=True)
    assert torch.equal(logits(zero, batch), logits(tiny("bert").double(), batch))
    normal = adapted("bert", num_vectors=100, init_weights="normal")
    values = torch.cat([vector.flatten() for vector in vectors_of(normal)])
    assert abs(values.std() - 0.02) < 2e-3 and abs(values.mean()) < 2e-3


def test_many_layers_and_a_part_of_them(tmp_path: Any) -> None:
    """PEFT condenses lists of 20 targets and more."""
    base = tf.BertModel(
        tf.BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=22, num_attention_heads=1, intermediate_size=8)
    ).eval()
    config = PASTAConfig(special_tokens=[CLS, SEP], layers_to_transform=list(range(1, 22)), init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert len(vectors_of(model)) == 21
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[CLS, 5, SEP]])
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_dropout_acts_in_training_only() -> None:
    model, batch = adapted("bert", num_vectors=3, dropout=0.5), pairs()
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Two forwards with other tokens before the backward: each must be recomputed with its own."""
    first = pairs()
    second = {
        **first,
        "input_ids": first["input_ids"].roll(1, 0),
        "attention_mask": first["attention_mask"].roll(1, 0),
    }

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = adapted("bert", num_vectors=3)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        (model(**first).loss + model(**second).loss).backward()
        return [vector.grad for vector in vectors_of(model) if vector.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert (plain - again).abs().max() < 1e-10


def test_compiled() -> None:
    config = PASTAConfig(init_weights=False, dropout=0.0, num_vectors=3)
    model, batch = get_peft_model(tiny("bert", num_hidden_layers=1), config).double().eval(), pairs()
    expected = model(**batch).loss
    expected.backward()
    gradients = [vector.grad.clone() for vector in vectors_of(model) if vector.grad is not None]
    model.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(model.base_model, backend="eager", fullgraph=True)(**batch).loss
    found.backward()
    torch._dynamo.reset()
    assert abs(found - expected) < 1e-10
    for vector, gradient in zip(vectors_of(model), gradients, strict=True):
        assert vector.grad is not None and (vector.grad - gradient).abs().max() < 1e-10


def test_figure() -> None:
    assert plot(adapted("bert", num_vectors=3)).axes


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"special_tokens": "cls"}, "`special_tokens` must be a list"),
        ({"special_tokens": []}, "at least one id"),
        ({"special_tokens": [3, 3]}, "each once"),
        ({"num_vectors": 0}, "`num_vectors` must be at least 1"),
        ({"num_vectors": 2.0}, "`num_vectors` must be an integer"),
        ({"by_token": "yes"}, "`by_token` must be"),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"exclude_modules": ["x"]}, "`exclude_modules` has no use"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PASTAConfig(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert", {"special_tokens": [40]}, r"holds \[40\], and the model has 40 tokens"),
        ("bert", {"by_token": True, "num_vectors": 3}, "one vector for each of the 2"),
        ("bert", {"target_modules": ["query"]}, "adapts whole blocks, those of 'bert.encoder.layer'"),
        ("bert", {"layers_to_transform": [2]}, "names layer 2"),
        ("llama", {"by_token": False}, "one token at a time"),
        ("vit", {"special_tokens": [1]}, "`special_tokens` has no use"),
        ("vit", {"num_vectors": 2}, "there are 1 rows"),
        ("siglip_image", {}, "no class token"),
        ("swin", {}, "does not support models of type 'swin'"),
        ("clip", {}, "several lists of blocks"),
        ("bart", {}, "several lists of blocks"),
        ("mlp", {}, "does not support models of type None"),
    ],
)
def test_models_that_do_not_fit(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny(name), PASTAConfig(**fields))


def test_special_tokens_that_the_config_does_not_name() -> None:
    model = tiny("bert", bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match=r"names no special tokens.*PASTAConfig\(special_tokens="):
        get_peft_model(model, PASTAConfig())


def test_more_special_tokens_than_vectors() -> None:
    with pytest.raises(ValueError, match=r"A sample has 3 special tokens, and `num_vectors` is 2"):
        adapted("bert")(**pairs())


@pytest.mark.capability("several adapters in one batch", "pasta")
def test_only_the_samples_of_an_adapter_have_to_fit_it() -> None:
    model = get_peft_model(tiny("bert"), PASTAConfig(special_tokens=[1, 2], num_vectors=2))
    model.add_adapter("pairs", PASTAConfig(special_tokens=[1, 2], num_vectors=3))
    ids = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 5, 2, 7, 8, 2], [1, 5, 6, 7, 8, 2]])
    names = ["default", "pairs", "__base__"]
    mixed = logits(model.eval(), {"input_ids": ids, "adapter_names": names})
    for i, name in enumerate(names):
        alone = logits(model, {"input_ids": ids[i : i + 1], "adapter_names": [name]})
        torch.testing.assert_close(mixed[i : i + 1], alone)
    with pytest.raises(ValueError, match="A sample has 3 special tokens"):
        model(input_ids=ids, adapter_names=["default", "default", "pairs"])


def test_embeddings_without_ids() -> None:
    model = adapted("bert", num_vectors=3)
    embeddings = torch.zeros(1, 3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="`inputs_embeds` and no `input_ids`"):
        model(inputs_embeds=embeddings)
    with model.disable_adapter():
        model(inputs_embeds=embeddings)


def test_a_block_outside_its_model() -> None:
    model = adapted("bert", num_vectors=3)
    model(**pairs())
    with pytest.raises(ValueError, match="outside its model's forward"):
        model.get_submodule("base_model.model.bert.encoder.layer.0")(torch.zeros(1, 3, 16, dtype=torch.float64))


@pytest.mark.capability("merge", "pasta", refused=True)
def test_merging_and_unloading() -> None:
    model, batch = adapted("bert", num_vectors=3), pairs()
    with pytest.raises(ValueError, match="Cannot merge adapter 'default'"):
        model.merge_and_unload()
    base = model.unload()
    assert torch.equal(logits(base, batch), logits(tiny("bert").double(), batch))
    assert not [key for key, module in base.named_modules() if "special_tokens" in key]
    assert not base.bert._forward_pre_hooks and not base.bert.encoder.layer[0]._forward_pre_hooks


def test_a_training_batch_without_special_tokens_is_told_of() -> None:
    model = get_peft_model(tiny("bert"), PASTAConfig(special_tokens=[38, 39])).train()
    batch = inputs("bert")
    batch["input_ids"] = batch["input_ids"].clamp(max=30)
    with pytest.warns(UserWarning, match=r"none of the special tokens \[38, 39\]"):
        model(**batch).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch).loss.backward()  # once
        model.eval()(**batch)
