"""UniPT against a loop over tokens and layers, and what it promises about its start, cost, saving and company."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import inputs, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import peft_ext
from peft_ext import FrozenPassCache, UniPTConfig, VQTConfig, layer_confidence
from peft_ext.reading import reader_of, recomputed
from peft_ext.training.toys import saved_bytes
from peft_ext.tuners.unipt import UniPTLayer


IMAGES = ["vit", "deit", "dinov2", "dinov2_with_registers", "beit", "clip_image", "siglip_image"]
TEXTS = ["bert", "roberta", "distilbert", "xlm-roberta"]
ALL = [*IMAGES, "ast", *TEXTS]
BLOCKS = dict.fromkeys(["vit"], "vit.layers") | {
    "deit": "deit.layers",
    "dinov2": "dinov2.encoder.layer",
    "dinov2_with_registers": "dinov2_with_registers.encoder.layer",
    "beit": "beit.layers",
    "clip_image": "vision_model.encoder.layers",
    "siglip_image": "vision_model.encoder.layers",
    "ast": "audio_spectrogram_transformer.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "xlm-roberta": "roberta.encoder.layer",
}
VARIANTS = [
    {"identity": "attention"},
    {"identity": "states"},
    {"identity": "attention", "residual": False, "init_weights": "published", "reduction_factor": 4},
    {"identity": "states", "reduction_factor": 1, "init_weights": "published"},
]

# what PEFT says to every second adapter that comes in through transformers
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def unipt(
    name: str, dtype: torch.dtype = torch.float32, overrides: dict[str, Any] | None = None, **fields: Any
) -> Any:
    """A tiny model with an adapter that is far from its start."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(name, **overrides or {}).to(dtype), UniPTConfig(**fields)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "unipt_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def layer_of(model: nn.Module) -> UniPTLayer:
    return reader_of(model)[0]


def batch_of(name: str, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    found = inputs(name, batch, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


@contextmanager
def quiet() -> Iterator[None]:
    """transformers 5.23 warns that the method Trainer itself calls has got another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


# A straightforward implementation: one token, one layer and one sample after the other, in float64


def side_reference(
    config: UniPTConfig, side: dict[str, torch.Tensor], states: list[torch.Tensor], mask: torch.Tensor, first_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """O `(N, D)` and c `(L,)` of one sample, from its states `(N, D)`; `mask` `(N,)` bool."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return side[f"{name}.weight"] @ x + side[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * side[f"{name}.weight"] + side[f"{name}.bias"]

    retrieval = config.identity == "attention"

    def down(place: int) -> torch.Tensor:
        rows = []
        for row in states[place]:
            if retrieval:
                rows.append(norm(f"norm.{place}", linear(f"down.{place}", row)))
            else:
                rows.append(linear(f"down.{place}", row.clamp(min=0)))
        return torch.stack(rows)

    anchor = down(len(states) - 1)
    tokens, gates, merged = range(len(anchor)), [], []
    for place in range(len(states) - 1):
        target = down(place)
        mean = target[mask].mean(0)
        row = anchor[mask].mean(0) if retrieval or not first_row else anchor[0]
        gates.append((side["gate.weight"] @ (row * mean))[0])
        result = []
        for i in tokens:
            scores = [max((anchor[i] @ target[j]).item(), 0.0) if mask[j] else 0.0 for j in tokens]
            total = sum(scores) + 1e-8 if retrieval else max(sum(scores), 1e-6)
            read = sum((scores[j] / total * target[j] for j in tokens), torch.zeros_like(target[0]))
            own = target[i] if retrieval else target[0] if first_row else mean
            result.append(read + own)
        merged.append(torch.stack(result))
    weights = torch.stack(gates).exp()
    weights = weights / weights.sum()
    total = sum(weight * part for weight, part in zip(weights, merged, strict=True))
    rows = []
    for i in tokens:
        row = total[i]
        if retrieval:
            row = anchor[i] + norm("proj_norm", linear("proj", row))
        made = linear("up", row.clamp(min=0))
        rows.append(states[-1][i] + made if config.residual else made)
    return torch.stack(rows), weights


@torch.no_grad()
def reference(name: str, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and confidence of the adapted `model`, on a plain copy of its base."""
    config, layer = model.peft_config["default"], layer_of(model)
    side: dict[str, torch.Tensor] = {}
    for part, leaf in layer.side_leaves("default").items():
        for key, value in leaf.state_dict().items():
            if part in ("down", "norm"):
                side |= {f"{part}.{place}.{key}": one.double() for place, one in enumerate(value)}
            else:
                side[f"{part}.{key}"] = value.double().squeeze(0) if part == "proj_norm" else value.double()
    head = layer.unipt_head["default"]
    plain = tiny(name).double().eval()
    plain.load_state_dict({k: v for k, v in model.base_model.model.state_dict().items() if "unipt" not in k})
    blocks: Any = plain.get_submodule(BLOCKS[name])
    found: dict[int, torch.Tensor] = {}
    features: list[torch.Tensor] = []
    confidence: list[torch.Tensor] = []
    chosen = config.layers_to_transform
    places = range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)

    def replace(block: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        mask = batch.get("attention_mask", torch.ones(output.shape[:2])).bool()
        samples = []
        for row in range(len(output)):
            states = [*(found[place][row] for place in places), output[row]]
            made, weights = side_reference(config, side, states, mask[row], name != "siglip_image")
            samples.append(made)
            confidence.append(weights)
        return torch.stack(samples)

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda m, args, index=index: found.update({index: args[0]}))
    blocks[-1].register_forward_hook(replace)
    before = {"roberta": "classifier", "xlm-roberta": "classifier", "distilbert": "pre_classifier"}
    stock = plain.get_submodule(before.get(name, "classifier"))
    stock.register_forward_pre_hook(lambda m, args: features.append(args[0]))
    plain(**{key: value for key, value in batch.items() if key != "labels"})
    x = features[0][:, 0] if features[0].ndim == 3 else features[0]
    return x @ head.weight.double().T + head.bias.double(), torch.stack(confidence)


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("name", ["vit", "siglip_image", "bert"])
def test_equals_a_loop_over_tokens(name: str, fields: dict[str, Any]) -> None:
    model, batch = unipt(name, torch.float64, **fields), batch_of(name, torch.float64)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 4:] = 0
    expected, confidence = reference(name, model, batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    del batch["labels"]
    found = torch.stack(list(layer_confidence(model, **batch).values()), dim=1)
    torch.testing.assert_close(found, confidence, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("vit", "siglip_image", "bert")])
def test_every_architecture_equals_a_loop_over_tokens(name: str) -> None:
    model, batch = unipt(name, torch.float64), batch_of(name, torch.float64)
    torch.testing.assert_close(logits(model, batch), reference(name, model, batch)[0], rtol=0, atol=1e-10)


@pytest.mark.capability("`layers_to_transform`", "unipt")
@pytest.mark.parametrize("layers", [0, [1]])
def test_layers_to_transform(layers: Any) -> None:
    model, batch = unipt("vit", torch.float64, layers_to_transform=layers), batch_of("vit", torch.float64)
    assert len(layer_of(model).unipt_down["default"].weight) == 2
    torch.testing.assert_close(logits(model, batch), reference("vit", model, batch)[0], rtol=0, atol=1e-10)
    base = tiny("vit")
    with pytest.raises(ValueError, match=r"layer 5.*layers 0 to 1"):
        get_peft_model(base, UniPTConfig(layers_to_transform=[5]))
    assert not base._forward_pre_hooks and "forward" not in vars(base)


def test_layers_named_twice_and_none(tmp_path: Path) -> None:
    from peft_ext.inspection import describe

    model = unipt("vit", layers_to_transform=[1, 0, 1])
    assert len(layer_of(model).unipt_down["default"].weight) == 3
    model.save_pretrained(tmp_path)
    assert [row["module"] for row in describe(str(tmp_path))["modules"][:2]] == ["layer 0", "layer 1"]
    with pytest.raises(ValueError, match="`layers_to_transform` is empty"):
        unipt("vit", layers_to_transform=[])


def test_a_model_of_one_layer() -> None:
    model, batch = unipt("vit", overrides={"num_hidden_layers": 1}), batch_of("vit")
    assert [value.tolist() for value in layer_confidence(model, pixel_values=batch["pixel_values"]).values()] == [
        [1, 1]
    ]
    model.train()(**batch).loss.backward()
    still = {key for key, grad in gradients(model).items() if not grad.abs().max()}
    assert still == {"base_model.model.unipt.unipt_gate.default.weight"}


def numerical(model: nn.Module, batch: dict[str, Any], parameter: torch.Tensor, at: int) -> torch.Tensor:
    losses = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.view(-1)[at] += step
            losses.append(model(**batch).loss)
        parameter.view(-1)[at] += 1e-6
    return (losses[0] - losses[1]) / 2e-6


@pytest.mark.capability("gradient checkpointing", "unipt")
@pytest.mark.parametrize("identity", ["attention", "states"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_gradients_are_derivatives_and_exist_in_the_side_network_alone(name: str, identity: str) -> None:
    model, batch = unipt(name, torch.float64, identity=identity), batch_of(name, torch.float64)
    model.train()(**batch).loss.backward()
    grads = gradients(model)
    assert all("unipt_" in key for key in grads) and grads.keys() == {
        key for key, p in model.named_parameters() if p.requires_grad
    }
    for key, parameter in model.named_parameters():
        if key in grads:
            at = int(grads[key].abs().argmax())
            expected = numerical(model, batch, parameter, at)
            torch.testing.assert_close(grads[key].view(-1)[at], expected, rtol=1e-4, atol=1e-8, msg=key)
    model.zero_grad()
    with quiet():
        model.base_model.model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    again = gradients(model)
    assert again.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(again[key], grad, rtol=0, atol=1e-12, msg=key)


def test_recomputed_is_what_autograd_would_do() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    third = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: recomputed(lambda x, y, z: torch.relu(x @ y.T) @ z, a, b, third), (first, second)
    )


# The start


@pytest.mark.parametrize("identity", ["attention", "states"])
@pytest.mark.parametrize("name", ALL)
def test_the_start_is_the_model_itself(name: str, identity: str) -> None:
    torch.manual_seed(0)
    base, batch = tiny(name), batch_of(name)
    expected = logits(base, batch)
    model = get_peft_model(base, UniPTConfig(identity=identity)).eval()
    seen: list[torch.Tensor] = []
    handle = base.classifier.register_forward_hook(lambda module, args, output: seen.append(output))
    found = logits(model, batch)
    handle.remove()
    torch.testing.assert_close(seen[0], expected)  # the stock head reads what it did
    if type(base.classifier) is nn.Linear and name != "distilbert":
        torch.testing.assert_close(found, expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0)


def test_published_start() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("vit", hidden_size=64), UniPTConfig(init_weights="published", residual=False))
    side = layer_of(model).side("default")
    for leaf in (side.up, side.down, side.proj, side.gate):
        bound = 1 / math.sqrt(leaf.weight.shape[-1])
        assert leaf.weight.abs().max() <= bound and leaf.weight.std() > bound / 3
        assert leaf is side.gate or leaf.bias.abs().max() <= bound
    assert torch.equal(side.norm.weight, torch.ones(3, 32)) and not side.proj_norm.bias.any()
    head = layer_of(model).unipt_head["default"]
    assert not head.bias.any() and not torch.equal(head.weight, model.base_model.model.classifier.weight)


def test_another_number_of_classes_gets_a_head_of_its_own() -> None:
    model = get_peft_model(tiny("vit"), UniPTConfig(id2label={0: "ant", 1: "bee"}))
    assert (
        model(pixel_values=batch_of("vit")["pixel_values"]).logits.shape == (2, 2)
        and model.base_model.model.num_labels == 2
    )
    assert layer_of(model).unipt_head["default"].weight.std() < 0.1


@pytest.mark.parametrize(
    ("fields", "count"), [({}, 4_293_504), ({"identity": "states", "reduction_factor": 1}, 8_269_056)]
)
def test_counts_on_vit_base(fields: dict[str, Any], count: int) -> None:
    """A Linear of 768 to d, and its norm, for each of 13 states, then gate, projection and back."""
    with torch.device("meta"):
        base = tf.ViTForImageClassification(tf.ViTConfig(num_labels=10))
        model = get_peft_model(base, UniPTConfig(**fields))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "unipt_head" not in name)
    assert trained == count


# What it reads


@pytest.mark.parametrize("identity", ["attention", "states"])
def test_padding_is_not_read_and_samples_are_independent(identity: str) -> None:
    model, batch = unipt("bert", torch.float64, identity=identity), batch_of("bert", batch=3)
    del batch["labels"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 3:] = 0
    expected = logits(model, batch)
    order = [2, 0, 1]
    turned = logits(model, {key: value[order] for key, value in batch.items()})
    torch.testing.assert_close(turned, expected[order], rtol=0, atol=1e-12)
    short = logits(model, {key: value[1:2, :3] for key, value in batch.items()})
    torch.testing.assert_close(short, expected[1:2], rtol=0, atol=1e-10)
    batch["input_ids"][1, 3:] = 5
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    square = batch["attention_mask"][:, None, None, :].expand(-1, 1, 7, -1).bool()
    with pytest.raises(ValueError, match=r"shape \(3, 1, 7, 7\).*\(samples, tokens\)"):
        model(input_ids=batch["input_ids"], attention_mask=square)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_recorded_states_are_the_tokens(name: str, checkpointing: bool) -> None:
    batch, kept = batch_of(name), {"output_hidden_states": True, "output_attentions": True}
    plain = tiny(name, attn_implementation="eager").requires_grad_(False)(**batch, **kept)
    model = unipt(name, overrides={"attn_implementation": "eager"})
    if checkpointing:
        with quiet():
            model.base_model.model.gradient_checkpointing_enable()
    expected = logits(model, batch)
    output = model.train()(**batch, **kept)
    torch.testing.assert_close(output.logits, expected)
    output.loss.backward()
    assert len(output.hidden_states) == len(plain.hidden_states)
    for first, second in zip(output.hidden_states[:-1], plain.hidden_states, strict=False):
        assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(output.attentions, plain.attentions, strict=True))


def test_the_backbone_builds_no_graph_and_stays_in_eval_mode() -> None:
    model, batch = unipt("vit", overrides={"hidden_dropout_prob": 0.5}).train(), batch_of("vit")
    model.base_model.model.enable_input_require_grads()  # as Trainer does for gradient checkpointing
    seen: list[bool] = []
    first = model.base_model.model.vit.layers[0]
    first.register_forward_hook(lambda m, a, output: seen.append(output.requires_grad))
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert seen == [False, False] and torch.is_grad_enabled()
    with torch.no_grad():
        assert not model(**batch).logits.requires_grad
    assert not any(module.training for module in model.base_model.model.vit.modules())


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    model, batch = unipt("vit"), batch_of("vit")
    base, expected = model.base_model.model, logits(model, batch)

    class Stop(BaseException):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    handle = base.vit.layernorm.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(**batch)
    handle.remove()
    assert torch.is_grad_enabled() and not base.vit.layers[-1]._forward_hooks
    assert torch.equal(logits(model, batch), expected)


def test_bytes_saved_for_backward() -> None:
    """Next to VQT's, and what gradient checkpointing leaves of them."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = tf.ViTForImageClassification(tf.ViTConfig(**sizes, **dropout, num_labels=10))
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.randint(0, 10, (2,))}
    queries = saved_bytes(get_peft_model(copy.deepcopy(base), VQTConfig(num_queries=10)).train(), batch)
    for fields in ({}, {"identity": "states"}):
        model = get_peft_model(copy.deepcopy(base), UniPTConfig(**fields)).train()
        whole = saved_bytes(model, batch)
        with quiet():
            model.base_model.model.gradient_checkpointing_enable()
        again = saved_bytes(model, batch)
        print(f"{fields}: {whole / queries:.3f} of VQT's bytes, {again / queries:.3f} with gradient checkpointing")
        assert whole <= 1.5 * queries and again <= 0.4 * queries


# Saving, loading, several adapters


def train(model: nn.Module, batch: dict[str, Any], steps: int = 5, rate: float = 0.03) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.capability("save and load", "unipt")
@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "distilbert"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, batch = unipt(name, identity="states", layers_to_transform=[1]), batch_of(name)
    train(model, batch)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert not any(p.requires_grad for p in again.parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(model).unipt_up["default"].weight.zero_()
    assert torch.equal(logits(twin, batch), expected) and not torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(twin)), batch), expected)


@pytest.mark.capability("transformers' `add_adapter`", "unipt")
def test_two_readers_in_one_model(tmp_path: Path) -> None:
    model, batch = tiny("vit"), batch_of("vit")
    stock, labels = logits(model, batch), dict(enumerate(["ant", "bee", "cat", "dog"]))
    model.add_adapter(VQTConfig(num_queries=2, dropout=0.0, id2label=labels), "vqt")
    queries = logits(model, batch)
    model.add_adapter(UniPTConfig(), "unipt")
    assert model.config.id2label[0] == "LABEL_0" and model.num_labels == 3
    torch.testing.assert_close(logits(model, batch), stock)  # its start
    for _ in range(2):
        model.set_adapter("vqt")
        assert torch.equal(logits(model, batch), queries) and model.config.id2label == labels
        model.set_adapter("unipt")
        assert model.num_labels == 3
    model.set_adapter(["vqt", "unipt"])
    with pytest.raises(ValueError, match=r"UniPT and VQT adapters .* are active together.*set_adapter"):
        model(**batch)
    model.set_adapter("unipt")
    train(model, batch)
    own = logits(model, batch)
    model.save_pretrained(tmp_path)
    model.delete_adapter("vqt")
    assert torch.equal(logits(model, batch), own) and model.num_labels == 3
    again = tiny("vit")
    again.load_adapter(tmp_path, "again")
    assert torch.equal(logits(again.eval(), batch), own)
    model.delete_adapter("unipt")
    torch.testing.assert_close(logits(model, batch), stock, rtol=0, atol=0)


@pytest.mark.capability("several active adapters", "unipt", refused=True)
def test_two_adapters_with_different_heads(tmp_path: Path) -> None:
    model, batch = unipt("bert"), batch_of("bert")
    first = logits(model, batch)
    model.add_adapter("score", UniPTConfig(id2label={0: "score"}, reduction_factor=4))
    model.set_adapter("score")
    model.train()(**{**batch, "labels": torch.randn(2)}).loss.backward()
    assert model.config.problem_type == "regression"
    model.set_adapter("default")
    model(**batch).loss.backward()
    assert model.config.problem_type == "single_label_classification"
    assert torch.equal(logits(model.eval(), batch), first)
    model.base_model.set_adapter(["default", "score"])
    with pytest.raises(ValueError, match=r"head of its own.*set_adapter"):
        model(**batch)


def test_several_labels() -> None:
    model, batch = unipt("vit", overrides={"problem_type": "multi_label_classification"}), batch_of("vit")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    output = model(pixel_values=batch["pixel_values"], labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


class Samples(torch.utils.data.Dataset):
    def __init__(self, name: str, count: int = 8) -> None:
        self.rows = batch_of(name, batch=count)

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def arguments(directory: Path, **fields: Any) -> TrainingArguments:
    common = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.02, "report_to": [], "seed": 0}
    common |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(output_dir=str(directory), **{**common, **fields})


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "checkpointing"), [("vit", False), ("bert", True)])
def test_trainer_and_resume(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model, samples = unipt(name, task_type="SEQ_CLS" if name == "bert" else None), Samples(name)
    start = copy.deepcopy(model)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "unipt_" not in key}
    before = model(**samples.rows).loss.item()
    fields = {"gradient_checkpointing": checkpointing}
    saving = arguments(tmp_path, save_strategy="steps", save_steps=3, **fields)
    Trainer(model, saving, train_dataset=samples).train()
    after = model.eval()(**samples.rows)
    assert after.loss.item() < before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    resumed = Trainer(start, arguments(tmp_path, **fields), train_dataset=samples)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(start.eval()(**samples.rows).logits, after.logits)


# On top of another adapter


@pytest.mark.capability("beside LoRA in one model", "unipt")
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_joint_training_reaches_the_other_adapter(use_reentrant: bool | None) -> None:
    batch = batch_of("vit", torch.float64)
    torch.manual_seed(0)
    model = tiny("vit").double()
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2), "lora")
    model.add_adapter(UniPTConfig(init_weights=False), "unipt")
    model.double().set_adapter(["lora", "unipt"])
    if use_reentrant is not None:
        with quiet():
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
    model.train()
    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            model(**batch)
        return
    model(**batch).loss.backward()
    grads = gradients(model)
    inner = {key: grad for key, grad in grads.items() if "lora_" in key}
    assert inner and any("unipt_down" in key for key in grads)
    for key, grad in inner.items():
        at = int(grad.abs().argmax())
        expected = numerical(model, batch, dict(model.named_parameters())[key], at)
        torch.testing.assert_close(grad.flatten()[at], expected, rtol=1e-4, atol=1e-8, msg=key)


# The cache


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2_with_registers", "clip_image", "bert", "distilbert", "ast"])
def test_cache_gives_the_same_loss_and_gradients(name: str, tmp_path: Path) -> None:
    model, samples = unipt(name), Samples(name)
    if "input_ids" in samples.rows:
        samples.rows["attention_mask"] = torch.ones_like(samples.rows["input_ids"])
        samples.rows["attention_mask"][1, 4:] = 0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cache = FrozenPassCache.write(model, DataLoader(samples, 3), tmp_path / "cache")
    assert "MiB a sample" in said.getvalue() and len(cache) == 8
    batch = {key: value[[5, 1, 2]] for key, value in samples.rows.items()}
    expected = model.train()(**batch)
    expected.loss.backward()
    grads = gradients(model)
    model.zero_grad()
    runs: list[int] = []
    attention = next(m for n, m in model.named_modules() if n.endswith(("attention", "self_attn", "attention.self")))
    attention.register_forward_pre_hook(lambda m, args: runs.append(1))
    with FrozenPassCache(tmp_path / "cache").use(model):
        output = model(**batch)
        output.loss.backward()
        assert not runs
        other = {**batch, **batch_of(name, batch=3, seed=9)}
        with pytest.raises(ValueError, match="not in the frozen pass"):
            model(**other)
        model.eval()(**other)
        assert runs
    torch.testing.assert_close(output.logits, expected.logits)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[key])


def test_a_cache_of_another_reader_is_refused(tmp_path: Path) -> None:
    model, batch = unipt("vit"), batch_of("vit")
    with contextlib.redirect_stdout(io.StringIO()):
        cache = FrozenPassCache.write(model, [batch], tmp_path)
    torch.manual_seed(0)
    with (
        pytest.raises(ValueError, match=r"holds hidden states.*what is read"),
        cache.use(get_peft_model(tiny("vit"), VQTConfig())),
    ):
        pass


# Precision, compiler, bad input


@pytest.mark.capability("fp16 and bf16 base", "unipt")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    model, batch = unipt("vit", dtype).train(), batch_of("vit", dtype)
    assert layer_of(model).unipt_up["default"].weight.dtype == torch.float32
    output = model(**batch)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    torch.testing.assert_close(output.logits.float(), unipt("vit")(**batch_of("vit")).logits, rtol=0, atol=0.2)


@pytest.mark.capability("fp16 and bf16 autocast", "unipt")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(checkpointing: bool) -> None:
    model, batch = unipt("vit"), batch_of("vit")
    expected = logits(model, batch)
    if checkpointing:
        with quiet():
            model.base_model.model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits.float(), expected, rtol=0, atol=0.2)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_compile() -> None:
    model, batch = unipt("vit").train(), batch_of("vit")
    expected = model(**batch)
    expected.loss.backward()
    grads = gradients(model)
    model.zero_grad()
    output = torch.compile(model, backend="eager")(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits)
    assert all(torch.allclose(grad, grads[key], atol=1e-6) for key, grad in gradients(model).items())
    plain = model.unload()
    assert "forward" not in vars(plain) and not plain._forward_hooks and not hasattr(plain, "unipt")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"reduction_factor": 0}, ValueError, "`reduction_factor` must be at least 1"),
        ({"reduction_factor": 2.0}, TypeError, "`reduction_factor` must be an integer"),
        ({"identity": "both"}, ValueError, "`identity` must be one of 'attention', 'states'"),
        ({"residual": None}, TypeError, "`residual`"),
        ({"residual": False}, ValueError, '`init_weights="published"`'),
        ({"init_weights": "zero"}, ValueError, "init_weights"),
        ({"modules_to_save": ["classifier"]}, ValueError, "unipt_head"),
        ({"task_type": "CAUSAL_LM"}, ValueError, "only classifies"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UniPTConfig(**fields)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("swin"), "UniPT does not support .*shifted windows"),
        (lambda: tiny("convnext"), "no tokens"),
        (lambda: tiny("llama"), "generates"),
        (lambda: tiny("deberta-v2"), "UniPT does not know models of type 'deberta-v2'"),
        (lambda: tiny("t5"), "generates"),
        (lambda: tiny("vit").vit, "UniPT replaces the classification head of a ViTForImageClassification"),
        (lambda: tiny("bert", is_decoder=True), "UniPT reads encoders"),
    ],
)
def test_models_that_unipt_cannot_read(model: Any, message: str) -> None:
    built = model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(built, UniPTConfig())
    assert not built._forward_pre_hooks


@pytest.mark.capability("merge", "unipt", refused=True)
def test_what_is_refused(tmp_path: Path) -> None:
    model = unipt("vit")
    with pytest.raises(ValueError, match=r"Cannot merge.*save_pretrained"):
        model.merge_and_unload()
    base = tiny("vit")
    with pytest.raises(ValueError, match=r"`reduction_factor` is 5.*width 16"):
        get_peft_model(base, UniPTConfig(reduction_factor=5))
    assert not base._forward_pre_hooks
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"unipt_down"):
        PeftModel.from_pretrained(tiny("vit", hidden_size=24), tmp_path)


@pytest.mark.capability("several adapters in one batch", "unipt", refused=True)
def test_mixed_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="`adapter_names`: each adapter has a head"):
        unipt("vit")(**batch_of("vit"), adapter_names=["default", "default"])


def test_its_head_can_be_fitted_first() -> None:
    model, batch = unipt("vit"), batch_of("vit", batch=6)
    before = model(**batch).loss
    found = peft_ext.linear_probe(model, [batch], [batch], grid=(1e-2,))
    assert found.head == "unipt.unipt_head.default" and model(**batch).loss < before


# Inspection


def test_inspection_and_figures(tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from peft_ext.inspection import describe
    from peft_ext.plots import plot

    model, batch = unipt("vit"), batch_of("vit")
    plot(model).savefig(tmp_path / "norms.png")
    plot(model, pixel_values=batch["pixel_values"]).savefig(tmp_path / "confidence.png")
    model.save_pretrained(tmp_path / "adapter")
    found = describe(str(tmp_path / "adapter"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = found["modules"]
    assert sum(row["parameters"] for row in rows) == trained
    assert [row["module"] for row in rows] == ["layer 0", "layer 1", "side network", "head"]
    with pytest.raises(ValueError, match="adapter_name"):
        layer_confidence(model, "other", pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="no adapter of UniPT"):
        layer_confidence(get_peft_model(tiny("vit"), VQTConfig()), pixel_values=batch["pixel_values"])
    assert peft_ext.load(tmp_path / "adapter", tiny("vit")) is not None
