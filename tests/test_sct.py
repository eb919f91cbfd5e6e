"""SCT: its maps against edits of the activations and of dense weights, the choice of channels, bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from models import inputs, logits, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from test_integrations import quantised_llama
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import peft_ext
from peft_ext import SCTConfig, SSFConfig, inspection
from peft_ext.architectures import ARCHITECTURES, describe
from peft_ext.cli import main
from peft_ext.core import about_of, tuner_of, unadapted_modules
from peft_ext.testing.method import random_scores
from peft_ext.tuners.sct import SCTLayer
from peft_ext.tuners.sct.places import streams


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def batch_of(name: str, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    return doubled(inputs(name, batch=batch, seed=seed))


def chosen(model: nn.Module, **fields: Any) -> SCTConfig:
    """A config with channels that a random measurement has chosen."""
    config = SCTConfig(**{"num_channels": 4, **fields})
    tuner_of(config).take_scores(config, model, random_scores(config, model))
    return config


@torch.no_grad()
def randomize(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The leaves of an adapter, far from the identity, by the names of their modules."""
    leaves = {
        key.removeprefix("base_model.model."): module.sct_map[adapter]
        for key, module in model.named_modules()
        if isinstance(module, SCTLayer)
    }
    for leaf in leaves.values():
        for parameter in leaf.parameters():
            parameter.normal_(std=0.3)
    return leaves


def edited(leaf: Any, x: torch.Tensor) -> torch.Tensor:
    """x + E (M E^T x + c), with E written out."""
    select = torch.eye(x.shape[-1], dtype=x.dtype)[leaf.indices.long()]
    shift = 0.0 if leaf.bias is None else leaf.bias
    return x + (x @ select.T @ leaf.weight.T + shift) @ select


WITH_STREAMS = [
    name
    for name in zoo.ZOO
    if name in ARCHITECTURES and any(attention.stream for attention in ARCHITECTURES[name].attention)
]


@pytest.mark.filterwarnings("ignore:The head 'classifier' looks freshly initialised")
@pytest.mark.parametrize("name", WITH_STREAMS)
def test_on_the_stream_of_every_architecture_that_has_one(name: str) -> None:
    """As published: the stream is overwritten where the next norm has got it, so that the skip connection has it, too."""
    base, other = zoo.build(name).double(), zoo.build(name).double()
    adapted = get_peft_model(base, chosen(base)).eval()
    leaves, places = randomize(adapted), streams(other)
    assert leaves.keys() == places.keys() and len(leaves) >= 2
    batch = doubled(zoo.inputs(other))
    if name == "vit_mae":  # which hides patches at random
        batch["noise"] = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))

    def overwrite(leaf: Any, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].copy_(edited(leaf, args[0]))

    def replace(leaf: Any, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return edited(leaf, output)

    with torch.no_grad():
        before = output_of(other, batch)
        for key, place in places.items():
            module = other.get_submodule(place.seen.module)
            if place.seen.side == "inputs":
                module.register_forward_pre_hook(partial(overwrite, leaves[key]))
            else:
                module.register_forward_hook(partial(replace, leaves[key]))
        expected = output_of(other, batch)
        assert not torch.allclose(before, expected, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(output_of(adapted, batch), expected, atol=1e-10, rtol=0.0)
    with pytest.raises(ValueError, match=r"(?s)at `site='attn'`.*skip connection.*site='mlp'` or `site='qkv'`"):
        adapted.merge_and_unload()  # type: ignore[operator]


def output_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    output = model(**batch)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if key in output:
            return output[key]
    raise AssertionError(f"nothing to compare in {list(output)}")


@pytest.mark.parametrize("site", ["mlp", "qkv"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "bert", "llama", "mistral", "gpt2"])
def test_output_gradient_and_merge_against_dense_weights(name: str, site: str) -> None:
    """W + E M E^T W and b + E M E^T b + E c; DINOv2 has a LayerScale behind the module, GPT-2 keeps W transposed."""
    if (name, site) == ("gpt2", "qkv"):
        return  # one module for all three, which is refused below
    base, dense = tiny(name).double(), tiny(name).double().eval()
    adapted = get_peft_model(base, chosen(base, site=site)).eval()
    leaves, batch = randomize(adapted), batch_of(name)
    modules: dict[str, Any] = {key: dense.get_submodule(key) for key in leaves}
    assert {key.rpartition(".")[2] for key in leaves} <= {*MLP_NAMES} if site == "mlp" else len(leaves) % 2 == 0
    targets: list[torch.Tensor] = []
    for key, leaf in leaves.items():
        module = modules[key]
        weight, bias = module.weight.detach(), module.bias
        matrix = leaf.weight.detach().clone().requires_grad_()
        shift = None if leaf.bias is None else leaf.bias.detach().clone().requires_grad_()
        targets += [matrix] if shift is None else [matrix, shift]
        select = torch.eye(weight.shape[1] if name == "gpt2" else len(weight), dtype=torch.float64)[
            leaf.indices.long()
        ]
        change = select.T @ matrix @ select
        old = torch.zeros(len(change), dtype=torch.float64) if bias is None else bias.detach()
        del module.weight, module.bias
        module.weight = weight + (weight @ change.T if name == "gpt2" else change @ weight)
        module.bias = None if bias is None and shift is None else old + change @ old
        module.bias = module.bias if shift is None else module.bias + shift @ select
    assert name != "mistral" or len(targets) == len(leaves)  # it has no flag that would give a Linear a bias
    torch.testing.assert_close(logits(adapted, batch), logits(dense, batch), atol=1e-10, rtol=0.0)
    for each in (adapted, dense):
        logits(each, batch).sin().sum().backward()
    found = [parameter.grad for leaf in leaves.values() for parameter in leaf.parameters()]
    for mine, theirs in zip(found, targets, strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-10, rtol=0.0)
    expected = logits(dense, batch)
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-10, rtol=0.0)


MLP_NAMES = ("fc2", "dense", "down_proj", "c_proj")


def test_a_merged_llama_loads_in_the_stock_class(tmp_path: Path) -> None:
    """Llama has a config flag for biases of its feed-forward parts, so that the maps have vectors there."""
    base = tiny("llama")
    adapted = get_peft_model(base, chosen(base, site="mlp")).eval()
    assert all(leaf.bias is not None for leaf in randomize(adapted).values())
    expected = logits(adapted, inputs("llama"))
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(stock, inputs("llama")), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("site", "count"), [("attn", 111_744), ("mlp", 111_744), ("qkv", 223_488)])
def test_published_counts(site: str, count: int) -> None:
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=2))
    config = SCTConfig(site=site, modules_to_save=["classifier"])
    tuner_of(config).take_scores(config, vit, random_scores(config, vit))
    model = get_peft_model(vit, config)
    assert sum(p.numel() for key, p in model.named_parameters() if "sct_" in key) == count


# The choice of channels


def by_hand(name: str, images: torch.Tensor, labels: torch.Tensor, module: str, site: str) -> torch.Tensor:
    """The channels with the largest norms: over all patches of the images of a class, in the mean over the classes."""
    model: Any = tiny(name).double()
    seen: list[torch.Tensor] = []
    hook = lambda module, args, output=None: seen.append(args[0] if output is None else output)
    part = model.get_submodule(module)
    part.register_forward_pre_hook(hook) if site == "attn" else part.register_forward_hook(hook)
    with torch.no_grad():
        model(pixel_values=images)
    patches = seen[0][:, 1:]
    norms = [patches[labels == label].flatten(0, 1).norm(dim=0) for label in labels.unique()]
    return torch.stack(norms).mean(0).topk(4).indices.sort().values


@pytest.mark.parametrize(
    ("site", "target", "module"),
    [
        ("attn", "vit.layers.1.attention.o_proj", "vit.layers.1.layernorm_after"),
        ("mlp", "vit.layers.1.mlp.fc2", "vit.layers.1.mlp.fc2"),
        ("qkv", "vit.layers.0.attention.v_proj", "vit.layers.0.attention.v_proj"),
    ],
)
def test_channels_by_class_in_any_batches(site: str, target: str, module: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1] * 4 + [2])
    expected = by_hand("vit", images, labels, module, site)
    for size, order in ((12, torch.arange(12)), (5, torch.randperm(12, generator=generator))):
        batches = [{"pixel_values": images[rows], "labels": labels[rows]} for rows in order.split(size)]
        config = SCTConfig(num_channels=4, site=site)
        peft_ext.calibrate(tiny("vit").double(), config, batches, progress=False)
        assert config.support is not None and torch.equal(config.support[target].long(), expected)
        assert config.support[target].dtype == torch.int32
    one = peft_ext.calibrate(
        tiny("vit").double(), SCTConfig(num_channels=4, site=site), [{"pixel_values": images}], progress=False
    )
    assert torch.equal(one.support[target].long(), by_hand("vit", images, torch.zeros(12), module, site))


def test_padding_does_not_count() -> None:
    ids = inputs("bert")["input_ids"][:1]
    padded = {"input_ids": torch.cat([ids, torch.full((1, 9), 7)], 1)}
    padded["attention_mask"] = (torch.arange(16) < 7).long()[None]
    config, other = (SCTConfig(num_channels=4) for _ in range(2))
    peft_ext.calibrate(tiny("bert").double(), config, [padded], progress=False)
    peft_ext.calibrate(tiny("bert").double(), other, [{"input_ids": ids}], progress=False)
    assert config.support is not None and other.support is not None
    for key, indices in other.support.items():
        assert torch.equal(config.support[key], indices)


def test_ties_go_to_the_first() -> None:
    model = tiny("vit")
    config = SCTConfig(num_channels=4, site="mlp")
    scores = random_scores(config, model)
    for sums in scores.sums.values():
        sums[0].fill_(1.0)
    tuner_of(config).take_scores(config, model, scores)
    assert config.support is not None
    assert all(indices.tolist() == [0, 1, 2, 3] for indices in config.support.values())


# What goes with it


@pytest.mark.parametrize("site", ["attn", "mlp", "qkv"])
def test_the_identity_start_is_the_base_model(site: str) -> None:
    base = tiny("vit")
    model = get_peft_model(base, chosen(base, site=site, init_weights="identity")).eval()
    assert torch.equal(logits(model, inputs("vit")), logits(tiny("vit"), inputs("vit")))
    published = get_peft_model(tiny("vit"), chosen(tiny("vit"), site=site)).eval()
    assert not torch.allclose(logits(published, inputs("vit")), logits(tiny("vit"), inputs("vit")), atol=1e-5)


@pytest.mark.parametrize("ssf_first", [True, False])
def test_beside_an_adapter_on_the_norm_before(ssf_first: bool) -> None:
    """What the norm reads is known although there is another adapter's layer around it, or will be."""
    configs = [SSFConfig(target_modules=["layernorm_before"], init_weights="identity"), chosen(tiny("vit"))]
    names = ["ssf", "sct"] if ssf_first else ["sct", "ssf"]
    by_name = dict(zip(("ssf", "sct"), configs, strict=True))
    model: Any = peft_ext.PeftMixedModel(tiny("vit"), by_name[names[0]], adapter_name=names[0])
    model.add_adapter(names[1], by_name[names[1]])
    model.set_adapter(names)
    plain: Any = get_peft_model(tiny("vit"), configs[1]).eval()
    for mine, theirs in zip(randomize(model, "sct").values(), randomize(plain).values(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits(model.eval(), inputs("vit")), logits(plain, inputs("vit")))


def test_layers_to_transform_and_an_own_linear() -> None:
    base = tiny("llama")
    model = get_peft_model(base, chosen(base, layers_to_transform=[1]))
    assert [key for key, m in model.named_modules() if isinstance(m, SCTLayer)] == [
        "base_model.model.model.layers.1.self_attn.o_proj"
    ]
    base = tiny("gpt2")
    model = get_peft_model(base, chosen(base, site="qkv", target_modules=["c_attn"], num_channels=None))
    leaves = randomize(model)
    assert {len(leaf.indices) for leaf in leaves.values()} == {48 // 8}


@pytest.mark.capability("4-bit base", "sct")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_4bit_base(site: str) -> None:
    config = SCTConfig(num_channels=4, site=site)
    peft_ext.calibrate(quantised_llama(), config, [inputs("llama")], progress=False)
    adapted = get_peft_model(quantised_llama(), config)
    adapted(**inputs("llama")).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and bool(p.grad.any()) for p in trained)


def test_the_calibrated_config_on_disk(tmp_path: Path) -> None:
    base = tiny("vit")
    config = chosen(base)
    config.save_pretrained(str(tmp_path))
    loaded = SCTConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(tiny("vit"), loaded)
    for key, leaf in randomize(model).items():
        assert config.support is not None and torch.equal(leaf.indices, config.support[key])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_channels": 5}))
    with pytest.raises(ValueError, match=r"(?s)calibration in .* is damaged:.*no 5 distinct"):
        SCTConfig.from_pretrained(str(tmp_path))


def test_an_adapter_on_disk(tmp_path: Path) -> None:
    base = tiny("bert")
    adapted = get_peft_model(base, chosen(base)).eval()
    leaves = randomize(adapted)
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("bert"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, inputs("bert")), logits(adapted, inputs("bert")))
    rows = {row["module"]: row for row in inspection.describe(str(tmp_path))["modules"]}
    assert rows.keys() == leaves.keys()
    for key, leaf in leaves.items():
        assert rows[key]["channels"] == 4 and rows[key]["norm"] == pytest.approx(leaf.weight.norm().item(), rel=1e-5)
    assert about_of("SCT").pictures(adapted, "default")
    with pytest.raises(ValueError, match="no SCT adapter named 'other'"):
        about_of("SCT").pictures(adapted, "other")
    empty = get_peft_model(tiny("bert"), PeftConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match="not which they are"):
        empty(**inputs("bert"))


def test_registers_and_class_tokens_do_not_count() -> None:
    for name, rows in (("vit", 1), ("deit", 2), ("dinov2_with_registers", 5), ("siglip", 0), ("bert", 0)):
        model = zoo.build(name)
        assert {place.seen.skip for place in streams(model).values()} == {rows}, name
    clip = streams(zoo.build("clip"))
    assert {(key.split(".")[0], place.seen.skip) for key, place in clip.items()} == {
        ("text_model", 0),
        ("vision_model", 1),
    }


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 0}, "`num_channels` must be a whole number of at least 1, got 0"),
        ({"num_channels": 1.5}, "`num_channels` must be a whole number"),
        ({"site": "ffn"}, "`site` must be one of 'attn', 'mlp', 'qkv', got 'ffn'"),
        ({"calibrated": "yes"}, "`calibrated` must be True or False"),
        ({"init_weights": "zero"}, "`init_weights` must be True, False or 'identity'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCTConfig(**fields)


def test_what_does_not_fit_is_refused_before_the_model_changes() -> None:
    vit, batch = tiny("vit"), [inputs("vit")]
    with pytest.raises(ValueError, match=r"peft_ext\.calibrate\(model, config, dataloader\)"):
        get_peft_model(vit, SCTConfig())
    with pytest.raises(ValueError, match=r"`num_channels` is 17, and 'vit\.layers\.0.*' has 16 channels"):
        peft_ext.calibrate(vit, SCTConfig(num_channels=17), batch, progress=False)
    with pytest.raises(ValueError, match=r"another `site` or `num_channels`: there are no 4 for 'vit\.layers"):
        config = chosen(vit)
        config.site = "mlp"
        get_peft_model(vit, config)
    with pytest.raises(ValueError, match=r"(?s)'vit\.layers\.0\.mlp\.fc1' is no such module; '.*o_proj' is\..*Leave"):
        peft_ext.calibrate(vit, SCTConfig(target_modules=["fc1"]), batch, progress=False)
    with pytest.raises(TypeError, match=r"'vit\.layers\.0\.layernorm_before'.*Linear modules.*this is a LayerNorm"):
        peft_ext.calibrate(vit, SCTConfig(site="mlp", target_modules=["layernorm_before"]), batch, progress=False)
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn' makes queries, keys and values in one"):
        peft_ext.calibrate(tiny("gpt2"), SCTConfig(site="qkv"), [inputs("gpt2")], progress=False)
    for name in ("swin", "gemma2", "beit", "t5"):
        with pytest.raises(ValueError, match=r"not known where attention joins.*use `site='mlp'`"):
            peft_ext.calibrate(tiny(name), SCTConfig(), [inputs(name)], progress=False)
    assert not any(isinstance(module, SCTLayer) for module in vit.modules())


def test_a_module_outside_its_block() -> None:
    base = tiny("vit")
    model = get_peft_model(base, chosen(base)).eval()
    layer = next(module for _, module in model.named_modules() if isinstance(module, SCTLayer))
    with pytest.raises(ValueError, match=r"without the norm before it.*outside its block"):
        layer(torch.randn(1, 3, 16))
    logits(model, inputs("vit"))
    assert all(module._stream is None for module in model.modules() if isinstance(module, SCTLayer))


def test_unloading_takes_the_hooks_off() -> None:
    base = tiny("vit")
    model: Any = get_peft_model(base, chosen(base))
    unloaded = model.unload()
    assert not any(module._forward_pre_hooks for _, module in unadapted_modules(unloaded))
    assert describe(unloaded).blocks


@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_what_is_said_of_merging(site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card and the command line, of a method of which only some adapters can be merged."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, chosen(base, site=site, task_type="CAUSAL_LM"))
    randomize(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert ("merge_and_unload" in (tmp_path / "adapter" / "README.md").read_text()) == (site == "mlp")
    command = ["export", str(tmp_path / "adapter"), "--to", "merged", "--output", str(tmp_path / "out")]
    if site == "mlp":
        assert not main(command)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(merged, inputs("llama")), logits(adapted.eval(), inputs("llama")))
    else:
        assert main(command) and "no weight makes the residual stream" in " ".join(capsys.readouterr().err.split())
