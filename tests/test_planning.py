"""What a step needs: predictions from toys against models that are really run at other sizes; what is sorted, what refused."""

from __future__ import annotations

import json
import random
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

import peft_ext
from peft_ext import BinaryAdapterConfig, LoraSBConfig, SSFConfig
from peft_ext.cli import main
from peft_ext.core import methods
from peft_ext.training.planning import FULL
from peft_ext.training.toys import _told, costs_of, sizes_of


SMALL: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 200}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=32, vocab_size=300, pad_token_id=0),
    "vit": lambda: tf.ViTConfig(**SMALL, image_size=64, patch_size=8),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    auto: Any = tf.AutoModelForCausalLM if name == "llama" else tf.AutoModelForImageClassification
    return auto.from_config(CONFIGS[name]()).train()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.zeros(4, dtype=torch.long)}
    ids = torch.randint(1, 300, (4, 65))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measured(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes, counted independently: of each kept storage once, of gradients, and of the state of a real AdamW."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    return {
        "activations": sum(storage.nbytes() for address, storage in kept.items() if address not in own),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer": sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")),
        "trainable": sum(p.numel() for p in trained),
    }


@pytest.fixture(
    scope="module",
    params=[("llama", 4, ["LOW_RANK_CORE", "SPT"]), ("vit", 1, ["BINARY_ADAPTER"])],
    ids=["llama", "vit"],
)
def planned(request: pytest.FixtureRequest) -> tuple[str, int, peft_ext.Plan]:
    """With more rows than the modules have channels, and with fewer, where SSF takes another way."""
    name, batch, others = request.param
    kind = {"vit": "image"}.get(name)
    return name, batch, peft_ext.recommend(CONFIGS[name](), (batch, 65), kind=kind, chosen=["SSF", *others])


def test_prediction_is_what_is_measured(planned: tuple[str, int, peft_ext.Plan]) -> None:
    name, batch, plan = planned
    task = "CAUSAL_LM" if name == "llama" else "SEQ_CLS"
    adapts: dict[str, Any] = {
        "full fine-tuning": lambda model: model,
        "LORA": lambda model: get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type=task)),
        "SSF": lambda model: get_peft_model(model, SSFConfig(task_type=task)),
        # whose rank is above the widths of small toys
        "LOW_RANK_CORE": lambda model: get_peft_model(
            model, peft_ext.calibrate(model, LoraSBConfig(task_type=task), [batch_of(name)], progress=False)
        ),
        "BINARY_ADAPTER": lambda model: get_peft_model(model, BinaryAdapterConfig(task_type=task)),
    }
    other = "BINARY_ADAPTER" if name == "llama" else "LOW_RANK_CORE"
    assert {row.method for row in plan.rows} == set(adapts) - {other}
    assert list(plan.left_out) == (["SPT"] if name == "llama" else [])
    for row in plan.rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = {key: value[:batch].clone() for key, value in batch_of(name).items()}
            true = measured(adapts[row.method](built(name)), inputs)
        assert row.trainable == true["trainable"]
        assert (row.gradients, row.optimizer) == (true["gradients"], true["optimizer"])
        # SSF keeps what it cannot recover, too, whose amount depends on the data
        rel = 0.05 if row.method == "SSF" else 0.002
        assert row.activations == pytest.approx(true["activations"], rel=rel), row.method
        assert row.checkpointed < row.activations and row.error < 0.1 * row.activations
    assert plan.parameters == sum(p.numel() for p in built(name).parameters())


@pytest.mark.parametrize(("name", "head"), [("albert", []), ("distilbert", ["pre_classifier"])])
def test_layers_that_share_weights_and_heads_of_several_modules(name: str, head: list[str]) -> None:
    fields = {"albert": SMALL, "distilbert": {"dim": 96, "n_layers": 5, "n_heads": 4, "hidden_dim": 200}}[name]
    config: Any = tf.AutoConfig.for_model(name, **fields)
    plan = peft_ext.recommend(config, (2, 64), chosen=[])
    full, low_rank = (next(row for row in plan.rows if row.method == method) for method in (FULL, "LORA"))
    model: Any = tf.AutoModelForSequenceClassification.from_config(config)
    assert full.trainable == plan.parameters == sum(p.numel() for p in model.parameters())
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear", exclude_modules=head)
    assert low_rank.trainable == get_peft_model(model, lora).get_nb_trainable_parameters()[0]


def test_what_no_sizes_tell_is_refused() -> None:
    """A method that trains modules at random, so that what is kept is a matter of chance."""
    rng = random.Random(0)
    config = CONFIGS["vit"]()

    def adapt(model: Any, batches: Any) -> Any:
        for parameter in model.vit.parameters():
            parameter.requires_grad_(rng.random() < 0.05)
        return model

    build = tf.ViTForImageClassification._from_config
    with pytest.raises(
        ValueError, match=r"depends on the data.*standard error of [1-9]\d+%|no function of the model's sizes"
    ):
        costs_of(adapt, build, config, sizes_of(config, 4, 65), "image", torch.float32)


def test_the_error_is_that_of_least_squares() -> None:
    """Against the formula, from noise of known size: told at twice the largest toy."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1.0, float(n)) for n in range(1, 21)]
    noise = torch.randn(20, generator=generator, dtype=torch.float64) * 100
    values = [1000 * n + float(e) for (_, n), e in zip(sizes, noise, strict=True)]
    told, error = _told(sizes, values, (1.0, 40.0))
    table = torch.tensor(sizes, dtype=torch.float64)
    inverse = torch.linalg.inv(table.T @ table)
    solution = inverse @ table.T @ torch.tensor(values, dtype=torch.float64)
    at = torch.tensor([1.0, 40.0], dtype=torch.float64)
    spread = (torch.tensor(values, dtype=torch.float64) - table @ solution).square().sum() / 18
    assert told == pytest.approx(float(at @ solution), abs=1)
    assert error == pytest.approx(float((spread * (at @ inverse @ at)).sqrt()), abs=1)
    assert _told(sizes, [1000 * n for _, n in sizes], (1.0, 40.0)) == (40_000, 0)


def test_table_and_json(planned: tuple[str, int, peft_ext.Plan]) -> None:
    *_, plan = planned
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(plan.rows) and len({line.count("|") for line in lines}) == 1
    totals = [row.total for row in plan.rows]
    assert totals == sorted(totals) and plan.rows[-1].method == "full fine-tuning"


def test_budget_and_goals() -> None:
    config = CONFIGS["llama"]()
    free = peft_ext.recommend(config, (4, 65), chosen=[])
    by_name = {row.method: row for row in free.rows}
    lora, full = by_name["LORA"], by_name["full fine-tuning"]
    assert lora.total_checkpointed < lora.total < full.total and full.total_checkpointed < lora.total
    batch = {"input_ids": torch.ones(4, 65, dtype=torch.long)}
    limit = full.total_checkpointed - 1
    plan = peft_ext.recommend(built("llama"), [batch], chosen=[], memory=limit, goal="parameters")
    assert [(row.method, row.fits) for row in plan.rows] == [
        ("LORA", "with gradient checkpointing"),
        ("full fine-tuning", "no"),
    ]
    assert {row.method: row.total for row in plan.rows} == {row.method: row.total for row in free.rows}


def test_shape_of_llama_70b() -> None:
    """Counts by hand; nothing of that size is made."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    plan = peft_ext.recommend(config, (1, 64), chosen=[])
    assert plan.parameters == 70_553_706_496 and plan.dtype == "bfloat16"
    lora = next(row for row in plan.rows if row.method == "LORA")
    per_layer = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert lora.trainable == 80 * 8 * per_layer and lora.gradients == 4 * lora.trainable  # PEFT keeps adapters in fp32
    assert lora.weights == 2 * plan.parameters + 4 * lora.trainable


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("llama", (4, 65)), {"goal": "best"}, ValueError, "`goal` is 'best'; there are memory"),
        (("llama", (4, 65)), {"memory": "much"}, ValueError, "`memory` is 'much'"),
        (("llama", (4, 65)), {"memory": -1}, ValueError, "must be positive"),
        (("llama", (4, 0)), {}, ValueError, "both at least 1"),
        (("llama", 4), {}, ValueError, r"give \(batch, tokens\)"),
        (("llama", "big"), {}, TypeError, "`size` is a str"),
        (("llama", {"labels": torch.zeros(4)}), {}, ValueError, "`input_ids` or `pixel_values`"),
        (("llama", (4, 65)), {"kind": "audio"}, ValueError, "`kind` is 'audio'"),
        (("llama", (4, 65)), {"chosen": ["SFF"]}, ValueError, "no methods"),
        ((None, (4, 65)), {}, TypeError, "`model` is a Linear"),
    ],
)
def test_bad_input(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = torch.nn.Linear(1, 1) if arguments[0] is None else CONFIGS[arguments[0]]()
    with pytest.raises(error, match=message):
        peft_ext.recommend(model, arguments[1], **options)


def test_sizes_that_a_config_does_not_say() -> None:
    with pytest.raises(ValueError, match="'swin' cannot be planned for"):
        peft_ext.recommend(tf.SwinConfig(), 1, chosen=[])


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    built("llama").save_pretrained(tmp_path / "base")
    command = [
        "plan",
        str(tmp_path / "base"),
        "--batch",
        "2",
        "--length",
        "16",
        "--memory",
        "1GB",
        "--methods",
        "VQT",
        "--json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in found["rows"]} == {"full fine-tuning", "LORA"} and len(found["left_out"]) == 1
    assert [row["fits"] for row in found["rows"]] == ["yes", "yes"]
    assert main(["plan", str(tmp_path / "nowhere")]) == 2
    assert "No plan for" in capsys.readouterr().err


def test_measured_ratios_are_those_of_known_methods() -> None:
    from peft_ext.training.planning import _measured

    assert set(_measured()) <= {"full fine-tuning", "LORA", *methods()}


TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
KINDS: dict[str, tuple[Any, Any, str]] = {
    # sizes under other names, of which each is equal to one of the usual, or computed from them
    "electra": (tf.ElectraConfig, tf.ElectraForSequenceClassification, "text"),
    "opt": (tf.OPTConfig, tf.OPTForCausalLM, "causal"),
    "deberta": (tf.DebertaV2Config, tf.DebertaV2ForSequenceClassification, "text"),
    "falcon": (tf.FalconConfig, tf.FalconForCausalLM, "causal"),
    "t5": (tf.T5Config, tf.T5ForSequenceClassification, "text"),
    "bart": (tf.BartConfig, tf.BartForSequenceClassification, "text"),
}


@pytest.mark.parametrize("name", KINDS)
def test_sizes_under_other_names(name: str) -> None:
    """Trainable parameters exactly, and activations, of architectures whose toys once kept sizes of the model."""
    config_class, model_class, kind = KINDS[name]
    more = {"electra": {"embedding_size": 64}, "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128}}.get(name, {})
    config = config_class(**TINY, **more)
    if name in ("t5", "bart"):
        config.num_labels = 2
        for field in ("decoder_layers", "num_decoder_layers", "decoder_attention_heads"):
            if hasattr(config, field):
                setattr(config, field, 4 if field.endswith("heads") else 2)
    plan = peft_ext.recommend(config, (2, 24), kind=kind, chosen=[])
    assert {row.method for row in plan.rows} == {"LORA", "full fine-tuning"}, plan.left_out
    lora = next(row for row in plan.rows if row.method == "LORA")
    task = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
    small = LoraConfig(r=8, target_modules="all-linear", task_type=task)  # type: ignore[arg-type]
    model = get_peft_model(model_class(config), small).train()
    assert lora.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = torch.randint(3, 50, (2, 24))
    if name in ("t5", "bart"):
        ids[:, -1] = config.eos_token_id
        config.decoder_start_token_id = getattr(config, "decoder_start_token_id", None) or 0
    labels = ids if kind == "causal" else torch.zeros(2, dtype=torch.long)
    true = measured(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    assert lora.activations == pytest.approx(true["activations"], rel=0.03)


def test_kinds_of_layers_and_fewer_of_them_than_a_toy_has() -> None:
    config = tf.Qwen3Config(**TINY, num_key_value_heads=2, intermediate_size=96, head_dim=16)
    plan = peft_ext.recommend(config, (2, 24), kind="causal", chosen=[])
    assert {row.method for row in plan.rows} == {"LORA", "full fine-tuning"}, plan.left_out


def test_a_model_whose_decoder_has_an_input_of_its_own_is_refused() -> None:
    config = tf.T5Config(vocab_size=40, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"decoder has an input of its own\. Give the config"):
        peft_ext.recommend(tf.T5ForConditionalGeneration(config), (2, 24), chosen=[])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_disabled(context: Any) -> None:
    expected = peft_ext.recommend(CONFIGS["vit"](), 4, chosen=[])
    with context():
        found = peft_ext.recommend(CONFIGS["vit"](), 4, chosen=[])
    assert found.rows == expected.rows and all(row.activations for row in found.rows)


def test_names_of_types_and_patches_of_two_sides() -> None:
    config = tf.ViTConfig(**SMALL, image_size=64, patch_size=8)
    expected = peft_ext.recommend(config, 4, chosen=[], dtype=torch.bfloat16)
    config.image_size, config.patch_size = (64, 64), (8, 8)
    assert peft_ext.recommend(config, 4, chosen=[], dtype="bfloat16").rows == expected.rows


@pytest.mark.parametrize(
    ("model", "size", "options", "message"),
    [
        (lambda: tf.MobileNetV2Config(), 4, {}, "`patch_size` of the config is None"),
        (lambda: tf.ViTConfig(patch_size=(16, 8)), 4, {}, r"`patch_size` of the config is \(16, 8\)"),
        (lambda: tf.ViTConfig(image_size=(224, 112)), 4, {}, r"`image_size` of the config is \(224, 112\)"),
        (lambda: tf.DeiTConfig(), 4, {}, "No model can be made of this DeiTConfig"),
        (lambda: tf.CLIPVisionConfig(), 4, {}, "No model can be made of this CLIPVisionConfig .*Unrecognized"),
        (CONFIGS["vit"], 4, {"memory": float("inf")}, "`memory` is inf: it must be positive and finite"),
        (CONFIGS["vit"], 4, {"memory": "inf"}, "`memory` is inf"),
        (CONFIGS["vit"], 4, {"memory": [1]}, r"`memory` is \[1\]: give bytes"),
        (CONFIGS["vit"], 4, {"memory": True}, "`memory` is True: give bytes"),
        (CONFIGS["vit"], 4, {"dtype": "float23"}, "`dtype` is 'float23': give one of weights"),
        (CONFIGS["vit"], 4, {"dtype": torch.int8}, "`dtype` is torch.int8: give one of weights"),
        (CONFIGS["vit"], 4, {"chosen": "SSF"}, "`chosen` is 'SSF': give a list"),
        (CONFIGS["llama"], (True, True), {}, r"`size` is \(True, True\)"),
        (
            lambda: tf.LlamaConfig(
                **SMALL, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
            ),
            (2, 16),
            {},
            r"is quantised \(`quantization_config`\)",
        ),
        (lambda: tf.BertModel(tf.BertConfig(**TINY)), (2, 16), {}, "this bert as kind 'text': .* output has no loss"),
        (
            lambda: tf.BertForTokenClassification(tf.BertConfig(**TINY)),
            (2, 16),
            {},
            r"kind 'text': a small model of its kind cannot be run \(ValueError: Expected input batch_size",
        ),
        (
            lambda: tf.BertForMaskedLM(tf.BertConfig(**TINY)),
            (2, 16),
            {},
            "kind 'text': a small .* Give a model of classes",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(model: Any, size: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        peft_ext.recommend(model(), size, **{"chosen": [], **options})
