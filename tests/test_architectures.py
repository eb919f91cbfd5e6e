"""The table of architectures against the classes of the installed transformers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from models import randomize
from peft import get_peft_model
from torch import nn

from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    ExtConfig,
    LoraSBConfig,
    MaskLoraConfig,
    S2FTConfig,
    SparseFTConfig,
    SPTConfig,
    SSFConfig,
    VQTConfig,
    WeGeFTConfig,
)
from peft_ext.architectures import ARCHITECTURES, architecture_of, describe
from peft_ext.core import linear_features
from peft_ext.core.uncalled import uncalled_modules
from peft_ext.export import cut
from peft_ext.groups import find_groups
from peft_ext.tuners.mask_pruning import model as mask_model
from peft_ext.tuners.ssf.model import SSFModel
from peft_ext.tuners.vqt.layer import layer_of


REMOTE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}  # of repositories with code of their own
ONLY_EXPERTS = {"gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen3_moe"}  # without an expert for all tokens
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


def test_every_entry_has_a_model() -> None:
    in_zoo = {
        next(name for name, entry in ARCHITECTURES.items() if entry is architecture_of(kind)) for kind in zoo.ZOO
    }
    entries = {id(entry) for name, entry in ARCHITECTURES.items() if name not in REMOTE}
    assert {id(ARCHITECTURES[name]) for name in in_zoo} == entries
    assert all(architecture_of(kind) is not None for kind in zoo.ZOO)
    types = {kind.removesuffix("_text") for kind in zoo.ZOO}
    assert set(ARCHITECTURES) - REMOTE == types


def features(model: nn.Module, name: str) -> tuple[int, int]:
    found = linear_features(model.get_submodule(name))
    assert found is not None, name
    return found


@pytest.mark.parametrize("kind", zoo.ZOO)
def test_names_and_sizes(kind: str) -> None:
    model = zoo.build(kind, "meta")
    found = describe(model)
    architecture = found.architecture
    assert (
        architecture is not None and found.blocks and found.embeddings and found.model_type == model.config.model_type
    )
    assert bool(architecture.attention) == any(block.attention for block in found.blocks)
    assert any(block.ffn for block in found.blocks) == (bool(architecture.ffn) and kind not in ONLY_EXPERTS)
    assert all(block.norms for block in found.blocks) or kind == "olmo"  # whose norms have no weights
    assert all(
        model.get_submodule(block.stack)[block.index] is model.get_submodule(block.name) for block in found.blocks
    )
    assert set(found.norms) & set(uncalled_modules(model)) == set()
    for attention in (attention for block in found.blocks for attention in block.attention):
        holder: Any = model.get_submodule(attention.module)
        head_size = getattr(holder, attention.names.head_size)
        columns = features(model, attention.o)[0]
        assert columns % head_size == 0
        if attention.names.order:
            assert (
                attention.q == attention.k == attention.v
                and features(model, attention.q)[1] >= columns + 2 * head_size
            )
        else:
            sizes = [features(model, name)[1] for name in (attention.q, attention.k, attention.v)]
            assert sizes[0] == columns and sizes[1] == sizes[2] and columns % sizes[1] == 0
            parts = (attention.q, attention.k, attention.v, attention.o)
            assert [found.role_of(name)[0] for name in parts] == ["q", "k", "v", "o"]
    for part in (part for block in found.blocks for part in block.ffn):
        channels, outputs = features(model, part.down)
        rows = features(model, part.up)
        assert rows == (outputs, channels * (2 if part.gate == part.up else 1))
        assert part.gate is None or features(model, part.gate) == rows
    classifier = architecture.classifier
    if classifier is not None and hasattr(model, "num_labels") and "Classification" in type(model).__name__:
        assert any(base.__name__ == classifier.model for base in type(model).__mro__)
        backbone = model.get_submodule(classifier.backbone)
        assert any(hasattr(backbone, blocks.partition(".")[0]) for blocks in classifier.blocks)
        assert isinstance(model.get_submodule(classifier.class_token or classifier.head), nn.Module)
        assert any(name == classifier.head or name.startswith(f"{classifier.head}.") for name in found.head)


@pytest.mark.parametrize("kind", zoo.ZOO)
def test_what_is_described_is_called(kind: str) -> None:
    """Queries, keys, values and the rest are modules that a forward runs, as often as there are blocks."""
    model = zoo.build(kind)
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        model(**zoo.inputs(model))
    found = describe(model)
    missed = {name for name in found.roles if name not in called} - set(uncalled_modules(model))
    # tables tied to another one, projections and poolers that only some heads read
    missed -= {name for name in found.head if name not in called}
    missed -= {name for name in found.embeddings if name.rpartition(".")[2] == "shared"}
    assert not missed


def output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)  # for the random masks of ViTMAE
    found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.get("logits_per_image", found.get("last_hidden_state"))


FIXED_FFN = {kind for kind in zoo.ZOO if not architecture_of(kind).prunable}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", sorted(set(zoo.ZOO) - FIXED_FFN))
def test_what_is_masked_can_be_cut(kind: str) -> None:
    """Zeros in the columns of a unit are the same as its absence, in float64, for each group that the table gives."""
    dtype = (
        torch.float32 if kind in ONLY_EXPERTS | {"llama4_text", "qwen2_moe"} else torch.float64
    )  # of grouped products
    model = zoo.build(kind).to(dtype)
    randomize(model)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in zoo.inputs(model).items()}
    groups = find_groups(model)
    assert {group.kind for group in groups.values()} == set(architecture_of(kind).prunable)  # type: ignore[union-attr]
    kept = {name: torch.arange(group.units // 2) for name, group in groups.items()}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, group in groups.items():
            module: Any = masked.get_submodule(name)
            columns = module.weight if isinstance(module, tf.pytorch_utils.Conv1D) else module.weight.T
            columns[len(kept[name]) * group.width :] = 0
        expected = output(masked, batch)
        assert not torch.allclose(expected, output(model, batch), atol=1e-6)
        cut(model, groups, kept)
        torch.testing.assert_close(
            output(model, batch), expected, **({} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10})
        )


def test_reasons_of_what_cannot_be_cut() -> None:
    for kind, asked, reason in [
        ("resnet", None, "residual connections"),
        ("t5", ["heads"], "position bias"),
        ("mixtral", ["ffn"], "three dimensions"),
        ("olmo2", ["heads"], "over all heads at once"),
    ]:
        with pytest.raises(ValueError, match=reason):
            find_groups(zoo.build(kind, "meta"), asked)
    normed = zoo.build("cohere", "meta", use_qk_norm=True)
    assert {group.kind for group in find_groups(normed).values()} == {"ffn"}
    with pytest.raises(ValueError, match=r"q_norm has parameters for all heads together"):
        find_groups(normed, ["heads"])


def test_default_of_masks_is_what_the_architecture_has() -> None:
    model = get_peft_model(zoo.build("t5"), MaskLoraConfig(target_sparsity=0.2, total_steps=10))
    assert model.peft_config["default"].target_modules
    with pytest.raises(ValueError, match="residual connections"):
        get_peft_model(zoo.build("resnet"), MaskLoraConfig(target_sparsity=0.2, total_steps=10))


def test_masks_find_their_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injecting is linear in the number of layers: the groups are looked for as often in 2 layers as in 8."""
    calls: list[Any] = []
    monkeypatch.setattr(mask_model, "find_groups", lambda *args: calls.append(args) or find_groups(*args))
    counts = []
    for layers in (2, 8):
        calls.clear()
        get_peft_model(
            zoo.build("llama", num_hidden_layers=layers), MaskLoraConfig(target_sparsity=0.2, total_steps=9)
        )
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 3


# What methods make of it


@pytest.mark.parametrize("kind", zoo.ZOO)
def test_default_targets_of_ssf(kind: str) -> None:
    """All of them act: whatever is a target is called, and gets a gradient."""
    model = zoo.build(kind)
    names = SSFModel.default_modules(SSFConfig(), model)
    found = describe(model)
    in_blocks = {name for name, own in found.roles.items() if not {"embedding", "head"} & set(own)}
    left_out = set(uncalled_modules(model)) | {"decoder"}
    unread = {name for name in in_blocks - names if not set(name.split(".")) & left_out and name not in left_out}
    assert all(any(part in name for part in ("vision", "head", "pooler")) for name in unread)
    assert not names & set(found.head)


def test_default_targets_of_a_type_that_is_not_known() -> None:
    fields = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    model = tf.FNetForSequenceClassification(tf.FNetConfig(**fields))
    assert architecture_of(model.config.model_type) is None and not describe(model).blocks
    names = SSFModel.default_modules(SSFConfig(), model)
    assert {"fnet.embeddings.projection", "fnet.encoder.layer.0.intermediate.dense"} < names
    assert "classifier" not in names and not any("word_embeddings" in name for name in names)
    with pytest.raises(ValueError, match=r"does not know models of type 'fnet'"):
        describe(model).modules(["q"])
    with pytest.raises(ValueError, match=r"There are no roles \['query'\]"):
        describe(model).modules(["query"])
    with pytest.raises(ValueError, match=r"this Sequential, which is no model of transformers"):
        get_peft_model(nn.Sequential(nn.ReLU()), SSFConfig())


def test_default_targets_of_convolutional_models() -> None:
    for kind in ("resnet", "mobilenet_v2", "efficientnet"):
        sparse = get_peft_model(zoo.build(kind), SparseFTConfig(density=0.1, selection="random"))
        assert any("conv" in name for name in sparse.peft_config["default"].target_modules)
        with pytest.raises(ValueError, match="it tunes Linear modules"):
            get_peft_model(zoo.build(kind), SPTConfig(budget=100))


def test_layers_to_transform_with_default_targets() -> None:
    model = get_peft_model(zoo.build("llama"), SSFConfig(layers_to_transform=[1])).get_base_model()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    assert adapted and all(name.startswith("model.layers.1.") for name in adapted)
    with pytest.raises(ValueError, match=r"`layers_to_transform` is \[7\], which leaves none"):
        get_peft_model(zoo.build("llama"), SSFConfig(layers_to_transform=[7]))


def test_asking_for_roles() -> None:
    model = zoo.build("bert", "meta")
    found = describe(model)
    assert found.modules(["q"]) == [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
    assert found.modules(["up", "v"])[:2] == [
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.0.intermediate.dense",
    ]
    assert list(found.stacks) == ["bert.encoder.layer"] and found.head == ("classifier",)
    adapted = get_peft_model(model, SSFConfig(target_modules=["query"])).get_base_model()
    assert describe(adapted) == found  # adapters do not show
    seq2seq = describe(zoo.build("bart", "meta"))
    assert [attention.names.is_cross for attention in seq2seq.blocks[-1].attention] == [False, True]
    with pytest.raises(ValueError, match=r"no modules with the roles q; it has .*norm"):
        describe(zoo.build("resnet", "meta")).modules(["q"])


def test_parameters_of_three_dimensions_that_are_no_experts() -> None:
    config = SparseFTConfig(density=0.1, selection="random")
    sizes = {"vocab_size": 40, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mixture-of-experts")
        xlnet = tf.XLNetModel(tf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24))
        get_peft_model(xlnet, copy.copy(config))
        get_peft_model(tf.FunnelBaseModel(tf.FunnelConfig(**sizes)), copy.copy(config))
        get_peft_model(zoo.build("swinv2"), copy.copy(config))
    for kind in ("mixtral", "gpt_oss", "granitemoe", "llama4_text"):
        with pytest.warns(UserWarning, match="mixture-of-experts"):
            get_peft_model(zoo.build(kind), copy.copy(config))


@pytest.mark.parametrize(
    "config",
    [
        WeGeFTConfig(r=2),
        BinaryLoraConfig(r=2),
        LoraSBConfig(r=2, init_weights="weights"),
        S2FTConfig(ratios={"o": 0.5}),
        SSFConfig(),
        MaskLoraConfig(total_steps=10),
    ],
    ids=lambda config: config.METHOD,
)
def test_methods_without_target_parameters_say_that_experts_are_left_out(config: ExtConfig) -> None:
    with pytest.warns(UserWarning, match=f"{config.METHOD} leaves out the mixture-of-experts weights"):
        get_peft_model(zoo.build("mixtral"), copy.copy(config))
    with pytest.raises(TypeError, match="target_parameters"):
        type(config)(target_parameters=["experts.gate_up_proj"])  # type: ignore[call-arg]


def test_bottlenecks_have_no_place_beside_experts() -> None:
    with pytest.raises(ValueError, match=r"no modules with the roles down.*`target_modules`"):
        get_peft_model(zoo.build("mixtral"), BinaryAdapterConfig(r=2))


@pytest.mark.parametrize(
    ("kind", "twin"),
    [("camembert", "roberta"), ("data2vec-text", "roberta"), ("vit_msn", "vit")],
)
def test_vqt_reads_relatives_alike(kind: str, twin: str) -> None:
    """With the weights of a relative, whose outputs another test compares with an independent reference."""
    model, other = (zoo.build(name, layer_norm_eps=1e-6) for name in (kind, twin))
    randomize(other)
    ours, theirs = f"{model.base_model_prefix}.", f"{other.base_model_prefix}."
    state = {key.replace(theirs, ours, 1): value for key, value in other.state_dict().items()}
    model.load_state_dict(state)
    batch = zoo.inputs(model)
    torch.testing.assert_close(output(model, batch), output(other, batch))
    adapted = [get_peft_model(base, VQTConfig(num_queries=3)).eval() for base in (model, other)]
    layers = [layer_of(base) for base in adapted]
    layers[0].vqt_head["default"].load_state_dict(layers[1].vqt_head["default"].state_dict())
    layers[0].vqt_queries["default"].load_state_dict(layers[1].vqt_queries["default"].state_dict())
    with torch.no_grad():
        layers[1].vqt_head["default"].weight.normal_()
        layers[0].vqt_head["default"].weight.copy_(layers[1].vqt_head["default"].weight)
        torch.testing.assert_close(output(adapted[0], batch), output(adapted[1], batch))


@pytest.mark.parametrize(
    "kind", ["albert", "modernbert", "mpnet", "data2vec-vision", "dinov3_vit", "gpt2", "resnet", "swin"]
)
def test_vqt_says_why_not(kind: str) -> None:
    reasons = "several times|depend on their positions|generates|convolutional|windows"
    with pytest.raises(ValueError, match=f"VQT does not support models of type '{kind}': .*({reasons})"):
        get_peft_model(zoo.build(kind, "meta"), VQTConfig())
