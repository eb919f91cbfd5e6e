"""Whatever one gets wrong ends in an error that names the module and the remedy, and leaves the model as it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, logits, loss, tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

import peft_ext
from peft_ext import MaskLoraConfig, PeftMixedModel, SparseFTConfig, SSFConfig, VQTConfig
from peft_ext.core import layer as core_layer
from peft_ext.core import methods
from peft_ext.core import targets as core_targets
from peft_ext.tuners.ssf import SSFLayer


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """The module tree and everything in it, bit for bit."""
    tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
    tree = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    ties = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return tensors, tree, ties, getattr(getattr(model, "config", None), "to_dict", lambda: None)()


@contextmanager
def refused(model: nn.Module, *patterns: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """Expects an error whose message, notes included, matches all patterns, and the model unchanged by it."""
    before = _fingerprint(model)
    with pytest.raises(error) as caught:
        yield
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for pattern in patterns:
        assert re.search(pattern, message), (pattern, message)
    after = _fingerprint(model)
    assert list(after[0]) == list(before[0])
    for key, value in after[0].items():
        assert torch.equal(value.nan_to_num(7.25), before[0][key].nan_to_num(7.25)), key
    assert after[1:] == before[1:]


def adapted(name: str = "llama", **config: Any) -> PeftModel:
    return get_peft_model(tiny(name), SSFConfig(**config)).eval()


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("config", "patterns"),
    [
        ({"target_modules": ["q_prj"]}, [r"\['q_prj'\] not found", "LlamaForCausalLM", "q_proj"]),
        ({"target_modules": ["q_proj", "nope"]}, [r"\['nope'\] not found", "modules called .*down_proj"]),
        ({"target_modules": r"nope.*"}, [r"Target modules nope.* not found", "check the target modules"]),
        ({"target_modules": []}, ["`target_modules` is empty", "at least one module", "default targets"]),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            ["exclude_modules", "No modules were targeted"],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, ["q_proj", r"layers_to_transform'?: \[9\]"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            ["q_proj", "layers_pattern.*blocks"],
        ),
    ],
)
def test_targets_that_are_not_there(config: dict[str, Any], patterns: list[str]) -> None:
    model = tiny("llama")
    with refused(model, *patterns):
        get_peft_model(model, SSFConfig(**config))
    second = adapted()
    with refused(second, *patterns):
        second.add_adapter("second", SSFConfig(**config))
    assert list(second.peft_config) == ["default"]


@pytest.mark.parametrize("method", ["SSF", "SPARSE_FT", "MASK_PRUNING", "PASTA", "VQT", "UNIPT", "VPT"])
def test_no_layers(method: str) -> None:
    config = methods()[method].config(task_type="SEQ_CLS", layers_to_transform=[])
    model, mixed = tiny("bert"), PeftMixedModel(tiny("bert"), LoraConfig(target_modules=["query"]), "first")
    with refused(model, "`layers_to_transform` is (empty|\\[\\])|`target_modules` (is empty|names no module)"):
        get_peft_model(model, config)
    with refused(mixed, "`layers_to_transform` is (empty|\\[\\])|`target_modules` (is empty|names no module)"):
        mixed.add_adapter("second", config)


@pytest.mark.parametrize(
    ("target", "patterns"),
    [
        ("mlp", ["'model.layers.0.mlp'", "type LlamaMLP", "it adapts Linear", "exclude_modules"]),
        ("rotary_emb", ["'model.rotary_emb'", "type LlamaRotaryEmbedding", "Leave it out of `target_modules`"]),
    ],
)
def test_targets_of_an_unsupported_type(target: str, patterns: list[str]) -> None:
    model = tiny("llama")
    with refused(model, *patterns, error=TypeError):
        get_peft_model(model, SSFConfig(target_modules=["q_proj", target]))  # what comes before is not touched either
    second = adapted()
    with refused(second, *patterns, error=TypeError):
        second.add_adapter("second", SSFConfig(target_modules=["q_proj", target]))
    assert list(second.peft_config) == ["default"]
    mixed = PeftMixedModel(tiny("llama"), SSFConfig(), adapter_name="first")
    with refused(mixed, *patterns, error=TypeError):
        mixed.add_adapter("second", SSFConfig(target_modules=["q_proj", target]))
    assert list(mixed.peft_config) == ["first"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.attention(x, x, x)[0])


def _net(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


@pytest.mark.parametrize(
    ("model", "target", "patterns"),
    [
        (Attention, "out_proj", ["'attention.out_proj'", "never calls it", "exclude_modules"]),
        (Attention, "attention", ["'attention'", "MultiheadAttention", "Leave it out"]),
        (lambda: _net(op=nn.Embedding(4, 4, max_norm=1.0)), "op", ["'op'", "Embedding", "without max_norm"]),
        (lambda: _net(op=nn.EmbeddingBag(4, 4)), "op", ["'op'", "EmbeddingBag"]),
        (lambda: _net(op=nn.LSTM(4, 4)), "op", ["'op'", "LSTM"]),
        (lambda: _net(op=nn.InstanceNorm2d(4, affine=True)), "op", ["'op'", "InstanceNorm2d"]),
        (lambda: _net(op=nn.PReLU(4)), "op", ["'op'", "PReLU"]),
        (lambda: _net(op=nn.Bilinear(4, 4, 4)), "op", ["'op'", "Bilinear"]),
        (lambda: _net(op=nn.Identity()), "op", ["'op'", "Identity"]),
    ],
)
def test_modules_that_cannot_be_adapted(model: Callable[[], nn.Module], target: str, patterns: list[str]) -> None:
    net = model()
    with refused(net, *patterns, error=TypeError):
        get_peft_model(net, SSFConfig(target_modules=[target]))


def test_all_linear_leaves_out_what_is_not_called() -> None:
    model = get_peft_model(Attention(), SSFConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"fc"}


def test_model_that_is_not_of_transformers() -> None:
    model = tiny("mlp")
    with refused(model, "specify `target_modules`", "no default targets", "MLP", "no model of transformers"):
        get_peft_model(model, SSFConfig())
    assert type(get_peft_model(model, SSFConfig(target_modules=["fc1"])).merge_and_unload()) is type(model)


@pytest.mark.parametrize(
    ("config", "error", "pattern"),
    [
        ({"target_modules": 3}, TypeError, "`target_modules` must be a list of names or a string, got 3"),
        ({"target_modules": [3]}, TypeError, r"`target_modules` must be a list of names or a string, got \[3\]"),
        ({"exclude_modules": 3}, TypeError, "`exclude_modules` must be"),
        (
            {"target_modules": "layers.(0"},
            ValueError,
            r"`target_modules` is no valid regular expression: 'layers.\(0'",
        ),
        ({"modules_to_save": "classifier"}, TypeError, r"`modules_to_save`.*write \['classifier'\]"),
        ({"target_modules": ".*", "layers_to_transform": 1}, ValueError, "`layers_to_transform` has no effect"),
        ({"layers_pattern": "h"}, ValueError, "`layers_pattern` is set but `layers_to_transform` is not"),
        ({"shift": "all"}, ValueError, "`shift` must be None, True or False, got 'all'"),
        ({"recover": "no"}, ValueError, "`recover` must be True or False, got 'no'"),
        ({"task_type": "IMAGE_CLS"}, ValueError, "IMAGE_CLS.*SEQ_CLS"),
        ({"layers_to_transform": {"a": 1}}, TypeError, "`layers_to_transform` must be an index or a list"),
        ({"layers_to_transform": [1, "2"]}, TypeError, "`layers_to_transform` must be an index or a list"),
        ({"layers_to_transform": 10**40}, ValueError, "`layers_to_transform` must be a finite number"),
        ({"peft_ext_version": "latest"}, ValueError, "`peft_ext_version` is not a version: 'latest'"),
    ],
)
def test_config_fields(config: dict[str, Any], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        SSFConfig(**config)


@pytest.mark.parametrize("value", [1e308, float("inf"), float("nan")])
def test_numbers_that_no_tensor_holds(value: float) -> None:
    with pytest.raises(ValueError, match="`initial_logit` must be a finite number that float32 can hold"):
        MaskLoraConfig(initial_logit=value)


@pytest.mark.parametrize(
    ("name", "indices", "message"),
    [("vit", [1], r"no embedding of tokens \(ViT.*Leave it out"), ("bert", [3, 500], r"names the tokens \[500\]")],
)
def test_tokens_that_the_model_does_not_have(name: str, indices: list[int], message: str) -> None:
    model = tiny(name)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SSFConfig(task_type="SEQ_CLS", trainable_token_indices=indices))


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(path)
    return path


def _edited(saved: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(saved, target, dirs_exist_ok=True)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def test_shapes_of_another_model(saved: Path, tmp_path: Path) -> None:
    patterns = [r"size mismatch for \S+input_layernorm\S+: \(16,\) in the adapter, \(32,\) in the model", "base model"]
    for trainable in (False, True):
        model = tiny("llama", hidden_size=32)
        with refused(model, *patterns, error=RuntimeError):
            PeftModel.from_pretrained(model, saved, is_trainable=trainable)
        assert not hasattr(model, "peft_config")
        get_peft_model(model, SSFConfig())  # nothing is in the way of another attempt

    model = tiny("llama", hidden_size=32)
    with refused(model, *patterns, error=RuntimeError):
        peft_ext.load(saved, model)

    model = get_peft_model(tiny("llama", hidden_size=32), SSFConfig())
    output = logits(model.eval(), inputs("llama"))
    with refused(model, *patterns, error=RuntimeError):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    with refused(model, *patterns, error=RuntimeError):  # over one that was there: it stays
        model.load_adapter(saved, "default")
    assert torch.equal(logits(model, inputs("llama")), output)

    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), saved)
    with refused(model, "size mismatch", error=RuntimeError):  # nor one that was loaded before
        model.load_adapter(tmp_path, "default")


def test_adapter_of_another_architecture(saved: Path) -> None:
    model = tiny("gpt2")
    with refused(model, "Target modules .*q_proj.* not found in the base model", "check the target modules"):
        PeftModel.from_pretrained(model, saved)


def test_adapter_of_another_method(saved: Path, tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig
    model = adapted()
    with refused(model, "different peft types", "SSF", "LORA"):
        model.load_adapter(tmp_path, "second")
    with refused(model, "different peft types", "SSF", "LORA"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]


def test_config_of_an_unknown_method(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the method True, which neither .*pip install -U"):
        SSFConfig.from_pretrained(_edited(saved, tmp_path, peft_type=True))


def test_adapter_of_a_newer_version(saved: Path, tmp_path: Path) -> None:
    path = _edited(saved, tmp_path, peft_ext_version="99.1.0")
    with pytest.warns(UserWarning, match=r"written by peft_ext 99.1.0, .* `pip install -U peft-ext`"):
        model = PeftModel.from_pretrained(tiny("llama"), path)
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj, SSFLayer)
    model = tiny("llama")
    with refused(model, "`peft_ext_version` is not a version: 'tomorrow'"):
        PeftModel.from_pretrained(model, _edited(saved, tmp_path, peft_ext_version="tomorrow"))


def test_second_adapter_with_clashing_settings(saved: Path) -> None:
    model = adapted()
    with refused(model, "'default' already exists"):
        model.add_adapter("default", SSFConfig(shift=False))
    with refused(model, "Adapter second not found"):
        model.set_adapter("second")
    mixed = PeftMixedModel(tiny("llama"), SSFConfig(), adapter_name="first")
    with refused(mixed, "'first' already exists"):
        mixed.add_adapter("first", SSFConfig())


# ---------------------------------------------------------------- merging


def test_site_without_a_known_merge() -> None:
    model = adapted(target_modules=["q_proj", "input_layernorm"], shift=True)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, "'model.layers.0.input_layernorm'", "no place for a shift", "`shift=None`", "unmerged"):
            merge()
    model = adapted("mistral", target_modules=["q_proj"], shift=True)
    with refused(model, "'model.layers.0.self_attn.q_proj'", "MistralForCausalLM has no config flag", "`shift=None`"):
        model.merge_and_unload()


@pytest.mark.parametrize("old_style", [False, True])
def test_weight_that_is_computed(old_style: bool) -> None:
    """A merged weight would be overwritten, or would never be read."""
    model = tiny("mlp")
    if old_style:
        nn.utils.spectral_norm(model.fc1)
    else:
        nn.utils.parametrizations.weight_norm(model.fc1)
    model = get_peft_model(model, SSFConfig(target_modules=["fc1", "norm"])).eval()
    x = torch.randn(2, 6)
    layer = model.get_base_model().fc1
    scale, shift = layer.vectors(["default"])
    assert shift is not None
    torch.testing.assert_close(layer(x), scale * layer.base_layer(x) + shift)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, "'fc1'", "weight is computed", "unmerged", "remove_parametrizations"):
            merge()


class Quantised(nn.Module):
    """Stands for a kernel whose weight nobody can write."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) / 100).T


def test_quantised_layer_that_cannot_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = core_layer.resolve_quantization_backend

    def with_ours(layer: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Quantised) else resolve(layer, **kwargs)

    for module in (core_layer, core_targets):
        monkeypatch.setattr(module, "resolve_quantization_backend", with_ours)
    model = tiny("mlp")
    model.fc2 = Quantised(model.fc2)
    model = get_peft_model(model, SSFConfig(target_modules=["fc1", "norm", "fc2"])).train()
    model(torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, "'fc2'", "gptq has quantised", "unmerged", "not quantised"):
            merge()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = adapted()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.ssf_scale["default"].weight[2] = value
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, "NaNs detected", "adapter default", "'model.layers.1.self_attn.q_proj'"):
            merge(safe_merge=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's own, at injection
@pytest.mark.filterwarnings("ignore:Already unmerged")  # as PEFT says of each layer that a merge passed by
@pytest.mark.parametrize(("target", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_weights_tied_to_a_module_without_adapter(target: str, other: str) -> None:
    model = get_peft_model(
        tiny("llama", tie_word_embeddings=True), SSFConfig(target_modules=[target, "q_proj"])
    ).eval()
    patterns = [
        f"'(model.)?{target}'",
        f"tied to '{other}'",
        "unmerged",
        "exclude_modules",
        "tie_word_embeddings=False",
    ]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, *patterns):
            merge()
    model.add_adapter("second", SSFConfig(target_modules=["q_proj"]))
    model.merge_adapter(["second"])  # does not touch the tied weight
    model.unmerge_adapter()
    model.set_adapter("second")
    with refused(model, *patterns):  # although it is not the active one
        model.merge_adapter(["default"])


def test_mixed_model_merges_all_or_nothing() -> None:
    model = PeftMixedModel(tiny("mistral"), SSFConfig(target_modules=["q_proj"], shift=True), adapter_name="ssf")
    model.add_adapter("lora", LoraConfig(target_modules=["o_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter(["ssf", "lora"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, "'model.layers.0.self_attn.q_proj'", "no config flag", "`shift=None`"):
            merge()


# ---------------------------------------------------------------- training


def test_training_on_a_merged_model() -> None:
    model = adapted().train()
    model.merge_adapter()
    with refused(model, r"\['default'\] are merged", r"`unmerge_adapter\(\)` before training", r"`eval\(\)`"):
        loss(model, inputs("llama"))
    with torch.no_grad():
        logits(model, inputs("llama"))
    with refused(model, "while they are merged", "unmerge"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    loss(model, inputs("llama")).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapter_names_where_they_cannot_be() -> None:
    model = adapted()
    batch = inputs("llama")
    with refused(model, "non-existing adapter.*nope"):
        model(**batch, adapter_names=["default", "nope"])
    with refused(model, "adapter_names", "number of inputs"):
        model(**batch, adapter_names=["default"] * 3)
    model.merge_adapter()
    with refused(model, "merged adapters", "unmerge_adapter"):
        model(**batch, adapter_names=["default", "default"])
    model.unmerge_adapter()
    model.train()
    with refused(model, "adapter_names", "training mode"):
        model(**batch, adapter_names=["default", "default"])


MODEL_FIRST: dict[str, Any] = {
    "attention_maps": lambda model: peft_ext.attention_maps(model, **inputs("vit")),
    "select_features": lambda model: peft_ext.select_features(model, lambda _: None),
    "calibrate": lambda model: peft_ext.calibrate(model, MaskLoraConfig(init_logits="sensitivity"), [inputs("llama")]),
    "fix_masks": peft_ext.fix_masks,
    "keep_ratios": peft_ext.keep_ratios,
    "lt_sft": lambda model: peft_ext.lt_sft(model, SparseFTConfig(selection="lt-sft"), lambda _: None),
    "graft": lambda model: peft_ext.graft(model, {}, SparseFTConfig(selection="given")),
    "layer_confidence": lambda model: peft_ext.layer_confidence(model, **inputs("vit")),
    "prune_prompts": lambda model: peft_ext.prune_prompts(model, [inputs("vit")]),
    "attention_to_prompts": lambda model: peft_ext.attention_to_prompts(model, **inputs("vit")),
    "save_as_lora": lambda model: peft_ext.save_as_lora(model, "nowhere"),
    "FrozenPassCache.write": lambda model: peft_ext.FrozenPassCache.write(model, [inputs("vit")], "nowhere"),
}


@pytest.mark.parametrize("name", MODEL_FIRST)
def test_what_is_no_model_is_refused(name: str) -> None:
    """The function that was to return one has returned nothing."""
    argument = "base_model" if name == "graft" else "model"
    with pytest.raises(TypeError, match=f"`{argument}` must be a"):
        MODEL_FIRST[name](None)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: peft_ext.save_as_lora(tiny("bert"), "nowhere"), TypeError, "before `merge_and_unload`"),  # type: ignore[arg-type]
        (lambda: peft_ext.lt_sft(tiny("bert"), LoraConfig(), lambda _: None), TypeError, "a SparseFTConfig"),  # type: ignore[arg-type]
        (
            lambda: peft_ext.lt_sft(tiny("bert"), SparseFTConfig(selection="lt-sft"), lambda _: None),  # type: ignore[arg-type, return-value]
            TypeError,
            "`make_trainer` must return a Trainer",
        ),
        (lambda: peft_ext.graft(tiny("bert"), tiny("bert"), LoraConfig()), TypeError, "a SparseFTConfig"),  # type: ignore[arg-type]
        (lambda: peft_ext.fix_masks(tiny("bert")), ValueError, "no mask-pruning adapter"),
        (
            lambda: peft_ext.calibrate(tiny("llama"), SparseFTConfig(selection="sensitivity"), 3),  # type: ignore[arg-type]
            TypeError,
            "iterable of batches",
        ),
        (
            lambda: peft_ext.calibrate(tiny("llama"), SparseFTConfig(selection="sensitivity"), trainer=3),
            TypeError,
            "`trainer` must be a Trainer",
        ),
    ],
)
def test_plausible_mistakes(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16"])
def test_a_frozen_pass_is_kept_in_floating_point(dtype: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("vit"), VQTConfig(num_queries=2))
    with pytest.raises(TypeError, match="floating-point"):
        peft_ext.FrozenPassCache.write(model, [inputs("vit")], tmp_path, dtype=dtype)
    with pytest.raises(TypeError, match="one batch"):
        peft_ext.FrozenPassCache.write(model, inputs("vit"), tmp_path)  # type: ignore[arg-type]
