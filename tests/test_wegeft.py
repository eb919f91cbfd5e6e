"""WeGeFT against an independent dense reference, its shared maps, and its conversions."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, inputs, logits, tiny
from peft import (
    LoraConfig,
    PeanutConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from test_integrations import quantised_llama, run_processes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import peft_ext
from peft_ext import WeGeFTConfig, inspection, plots
from peft_ext.core import about_of
from peft_ext.tuners.wegeft import WeGeFTLinear


def adapted(name: str, adapters: tuple[str, ...] = ("default",), **fields: Any) -> Any:
    """A tiny model in float64 with random maps."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(name).double(), WeGeFTConfig(r=3, **fields), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, WeGeFTConfig(r=3, **fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "wegeft" in key:
                parameter.normal_(std=0.2)
    return model.eval()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}


def dense(model: Any, name: str, adapters: tuple[str, ...], maps: str, target: str) -> nn.Module:
    """The base with W (I + sum of P^T Q^T) in it, the maps being those that the file calls `maps`."""
    base = tiny(name).double()
    for path, module in base.named_modules():
        if not re.search(rf"(^|\.){target}$", path):
            continue
        identity: Any = torch.eye(module.weight.shape[0 if name == "gpt2" else 1], dtype=torch.float64)
        for adapter in adapters:
            state = get_peft_model_state_dict(model, adapter_name=adapter)
            kind, width = path.rsplit(".", 1)[1], len(identity) if maps else 0
            key = f"base_model.model.shared_maps.{maps.format(kind)}-{width}" if maps else f"base_model.model.{path}"
            q, p = state[f"{key}.wegeft_down.weight"].T, state[f"{key}.wegeft_up.weight"].T
            identity = identity + p.T @ q.T
        weight: Any = module.weight
        weight.data = identity.T @ weight.data if name == "gpt2" else weight.data @ identity
    return base.eval()


SITES = {
    ("llama", "target"): ("model-layers-self_attn-{}", "(q|v)_proj"),
    ("llama", "all"): ("all", "(q|v)_proj"),
    ("llama", "none"): ("", "(q|v)_proj"),
    ("gpt2", "target"): ("transformer-h-attn-{}", "c_attn"),
    ("bert", "target"): ("bert-encoder-layer-attention-self-{}", "query|value"),
    ("vit", "target"): ("vit-layers-attention-{}", "o_proj"),
}


@pytest.mark.parametrize(("name", "share"), SITES)
def test_the_input_edit_is_the_edit_of_the_weight(name: str, share: str) -> None:
    """Also of two adapters, active or merged, which add in I + D_1 + D_2 and are no product."""
    maps, target = SITES[name, share]
    model, batch = adapted(name, ("default", "second"), share=share), batch_of(name)
    close = {"atol": 1e-10, "rtol": 0.0}
    for adapters in (("default",), ("second",), ("default", "second")):
        model.base_model.set_adapter(list(adapters))
        reference = logits(dense(model, name, adapters, maps, target), batch)
        torch.testing.assert_close(logits(model, batch), reference, **close)
        assert not torch.allclose(reference, logits(tiny(name).double().eval(), batch), atol=1e-3)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model, batch), reference, **close)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), reference, **close)


def test_the_start_is_the_base_and_only_q_has_a_gradient() -> None:
    model, batch = get_peft_model(tiny("llama").double(), WeGeFTConfig(r=3)), batch_of("llama")
    assert torch.equal(logits(model.eval(), batch), logits(tiny("llama").double().eval(), batch))
    model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        if "wegeft" in key:
            gradient: Any = parameter.grad
            assert bool(gradient.any()) == ("wegeft_down" in key)
    up = next(p for key, p in model.named_parameters() if "wegeft_up" in key)  # P of `nn.Linear(16, 3)`
    assert up.abs().max() <= 16**-0.5 and up.abs().max() > 0.5 * 16**-0.5


def test_names_that_differ_by_a_dash_alone_are_two_groups() -> None:
    model = nn.Module()
    for outer, inner in (("a-b", "c"), ("a", "b-c")):
        model.add_module(outer, nn.Module())
        model.get_submodule(outer).add_module(inner, nn.Linear(4, 4))
    model = get_peft_model(model, WeGeFTConfig(r=2, share="target", target_modules=["c", "b-c"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 4 * 2


def test_shared_maps_are_one_leaf_with_the_sum_of_the_gradients(tmp_path: Path) -> None:
    shared, batch = adapted("llama"), batch_of("llama")
    apart = adapted("llama", share="none")
    state = get_peft_model_state_dict(shared)
    assert len(state) == 4 and sum(p.requires_grad for p in shared.parameters()) == 4
    for key, parameter in apart.named_parameters():
        if (match := re.search(r"(self_attn\.[qv]_proj)\.(wegeft_\w+)\.", key)) is not None:
            kind = match[1].replace(".", "-")
            parameter.data = state[f"base_model.model.shared_maps.model-layers-{kind}-16.{match[2]}.weight"].clone()
    sums: dict[tuple[str, str], Any] = {}
    for model in (shared, apart):
        model(**batch).loss.backward()
    for key, parameter in apart.named_parameters():
        if (match := re.search(r"([qv]_proj)\.(wegeft_\w+)\.", key)) is not None:
            sums[match[1], match[2]] = sums.get((match[1], match[2]), 0) + parameter.grad
    for key, parameter in shared.named_parameters():
        if (match := re.search(r"([qv]_proj)-16\.(wegeft_\w+)\.", key)) is not None:
            torch.testing.assert_close(parameter.grad, sums[match[1], match[2]], atol=1e-12, rtol=1e-9)
    shared.save_pretrained(str(tmp_path))
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(state)
    assert sum("wegeft" in key for key in shared.state_dict()) == 4


def test_a_file_does_not_say_where_shared_maps_act_and_the_config_does() -> None:
    source = adapted("llama")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
    model = inject_adapter_in_model(WeGeFTConfig(r=3), tiny("llama"), state_dict=state)
    assert sum(isinstance(module, WeGeFTLinear) for module in model.modules()) == 4


def test_adapters_come_and_go() -> None:
    """Maps that no adapter uses any more go, those of the others stay, and a name can be used again."""
    model, batch = adapted("llama", ("default", "second")), batch_of("llama")
    before = logits(model, batch)
    model.delete_adapter("second")
    assert not any("second" in key for key in model.state_dict())
    model.add_adapter(
        "second", WeGeFTConfig(r=5, share="all", target_modules="all-linear", exclude_modules=["down_proj"])
    )
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".second." in key)
    assert torch.equal(logits(model, batch), before)
    model.set_adapter("second")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.shared_maps.all-16.wegeft_{leaf}.second.weight" for leaf in ("down", "up")
    }
    base = model.unload()
    assert not hasattr(base, "shared_maps") and [*base.state_dict()] == [*tiny("llama").state_dict()]


def test_dropout_is_for_training() -> None:
    model, batch = adapted("bert", dropout=0.5), batch_of("bert")
    expected = logits(model, batch)
    assert torch.equal(logits(model, batch), expected)
    model.train()
    assert not torch.allclose(model(**batch).logits, expected)


def test_sharing_by_name_follows_the_width() -> None:
    """The stages of Swin are of different widths."""
    model = get_peft_model(tiny("swin"), WeGeFTConfig(r=2))
    groups = {key.split(".")[3] for key in get_peft_model_state_dict(model)}
    widths = {module.in_features for module in model.modules() if isinstance(module, WeGeFTLinear)}
    assert len(groups) == len(widths) > 1
    with pytest.raises(ValueError, match=r"share='all'.*unequal width: \d+ \(such as 'swin\..*Use `share='target'`"):
        get_peft_model(tiny("swin"), WeGeFTConfig(share="all"))


def test_published_counts() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=64,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )
        vit = ViTModel(ViTConfig())
    for model, fields, count in ((llama, {}, 1_048_576), (vit, {"r": 16}, 24_576)):
        assert get_peft_model(model, WeGeFTConfig(**fields)).get_nb_trainable_parameters()[0] == count


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.capability("conversion to LoRA", "wegeft")
def test_as_lora(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name, task_type="CAUSAL_LM", trainable_token_indices=[3, 5]), batch_of(name)
    for merged in (False, True):  # W in the product is that before the merge
        if merged:
            model.merge_adapter()
        lora = peft_ext.save_as_lora(model, tmp_path)
        assert isinstance(lora, LoraConfig) and json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
        loaded = PeftModel.from_pretrained(tiny(name).double(), tmp_path, autocast_adapter_dtype=False).eval()
        torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-10, rtol=0.0)


def test_the_mirror_image_of_peanut() -> None:
    """PEFT's PEANuT without depth makes B A W; on transposed weights that is ours."""
    torch.manual_seed(0)
    ours = get_peft_model(
        nn.Sequential(nn.Linear(5, 7)).double(), WeGeFTConfig(r=2, share="none", target_modules=["0"])
    )
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(7, 5)).double(), PeanutConfig(r=2, depth=0, act_fn="linear", target_modules=["0"])
    )
    layer: Any = ours.base_model.model[0]
    mirrored: Any = theirs.base_model.model[0]
    nn.init.normal_(layer.wegeft_down["default"].weight)
    mirrored.base_layer.weight.data = layer.base_layer.weight.data.T.clone()
    mirrored.peanut_A["default"].weight.data = layer.wegeft_up["default"].weight.data.T.double()
    mirrored.peanut_B["default"].weight.data = layer.wegeft_down["default"].weight.data.T.double()
    ours.merge_adapter(), theirs.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, mirrored.base_layer.weight.T, atol=1e-6, rtol=1e-5)


@pytest.mark.capability("4-bit base", "wegeft")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base() -> None:
    model, batch = get_peft_model(quantised_llama(), WeGeFTConfig(r=2)), inputs("llama")
    model.add_adapter("second", WeGeFTConfig(r=2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "wegeft" in key:
                parameter.normal_(std=0.2)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model, batch)
    layers = [module for module in model.modules() if isinstance(module, WeGeFTLinear)]
    weights = [layer.get_base_weight().clone() for layer in layers]
    factors = [layer.factors("second") for layer in layers]
    model.merge_adapter()
    for layer, weight, factor in zip(layers, weights, factors, strict=True):
        assert torch.equal(layer.unmerged_weight(), weight) and not torch.equal(layer.get_base_weight(), weight)
        assert all(torch.equal(now, then) for now, then in zip(layer.factors("second"), factor, strict=True))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-3)
    model.merge_adapter()  # requantises to 4 bits
    assert (logits(model, batch) - expected).abs().max() < 0.5 * expected.abs().max()


def test_shared_maps_under_fsdp_and_ddp(tmp_path: Path) -> None:
    """With PEFT's policy, with blocks alone as units (FSDP1 and FSDP2), and under DDP: the step of one process."""
    ranks = run_processes(
        tmp_path,
        """
        import functools
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
        from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
        from torch.nn.parallel import DistributedDataParallel
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        dist.init_process_group("gloo")

        def step(model, parameters):
            optimizer = torch.optim.SGD(parameters, lr=0.5)
            for _ in range(2):  # the first moves Q alone
                model(**inputs("llama")).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return model(**inputs("llama")).loss.item()

        def build():
            torch.manual_seed(0)
            return get_peft_model(tiny("llama"), peft_ext.WeGeFTConfig(r=2)).train()

        def trained(model):
            return [p for p in model.parameters() if p.requires_grad]

        def leaf(module):  # as peft.utils.other.fsdp_auto_wrap_policy
            has_weight = getattr(module, "weight", None) is not None and module.weight.requires_grad
            return not list(module.named_children()) and has_weight

        plain = build()
        before = plain(**inputs("llama")).loss.item()
        expected = step(plain, trained(plain))
        got = {}
        leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=leaf)
        blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        cpu = torch.device("cpu")
        model = FSDP(build(), auto_wrap_policy=functools.partial(_or_policy, policies=[leaves, blocks]), device_id=cpu)
        got["leaves"] = step(model, model.parameters())
        model = FSDP(build(), auto_wrap_policy=blocks, device_id=cpu, use_orig_params=True)
        got["blocks"] = step(model, trained(model))
        model = build()
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
        got["fsdp2"] = step(model, trained(model))
        model = DistributedDataParallel(build())
        got["ddp"] = step(model, trained(model))
        result(before=before, expected=expected, got=got)
        dist.destroy_process_group()
        """,
    )
    for rank in ranks:
        assert abs(rank["before"] - rank["expected"]) > 1e-3
        for how, loss in rank["got"].items():
            assert loss == pytest.approx(rank["expected"], abs=1e-5), how


def test_what_is_shown(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(str(tmp_path))
    rows = inspection.describe(str(tmp_path))["modules"]
    state = get_peft_model_state_dict(model)
    assert [row["module"] for row in rows] == [f"shared_maps.model-layers-self_attn-{kind}_proj-16" for kind in "qv"]
    for row in rows:
        key = f"base_model.model.{row['module']}.wegeft_"
        edit = state[f"{key}up.weight"] @ state[f"{key}down.weight"]
        assert row["rank"] == 3 and row["parameters"] == 96 and row["norm"] == pytest.approx(edit.norm().item())
    figure = plots.plot(model)
    assert len(figure.axes[0].get_yticklabels()) and "weight" in str(figure.axes[0].get_title())
    with pytest.raises(ValueError, match="no WeGeFT adapter named 'other'"):
        about_of("WEGEFT").pictures(model, "other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"`r` must be a whole number of at least 1, got 0"),
        ({"r": 2.0}, r"`r` must be a whole number"),
        ({"share": "layer"}, r"`share` must be 'target', 'all' or 'none', got 'layer'"),
        ({"dropout": 1.0}, r"`dropout` must be at least 0 and below 1, got 1\.0"),
        ({"dropout": True}, r"`dropout` must be"),
        ({"init_weights": "zero"}, r"`init_weights` must be True or False for WEGEFT"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeGeFTConfig(**fields)


def test_bad_targets() -> None:
    with pytest.raises(TypeError, match=r"'norm': WeGeFT edits what Linear modules.*not a LayerNorm"):
        get_peft_model(MLP(), WeGeFTConfig(target_modules=["fc1", "norm"]))
    with pytest.raises(ValueError, match=r"does not know models of type.*Name them in `target_modules`"):
        get_peft_model(MLP(), WeGeFTConfig())


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    adapted("llama").save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4}))
    with pytest.raises(ValueError, match=r"`r` of adapter_config\.json says 4"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))


def test_a_copy_shares_its_own_maps() -> None:
    model, batch = adapted("llama"), batch_of("llama")
    expected, copied = logits(model, batch), copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "wegeft" in key:
                parameter.zero_()
    assert torch.equal(logits(copied, batch), expected)


def test_a_sequential_base_with_shared_maps() -> None:
    """It runs all of its children, among which the shared maps are."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 8)
    before = base(x)
    model = get_peft_model(base, WeGeFTConfig(r=2, target_modules=["0"], init_weights=False))
    after = model(x)
    assert after.shape == before.shape and not torch.allclose(after, before)
    torch.testing.assert_close(model.merge_and_unload()(x), after)
