"""S2FT: against dense training with masked gradients in fp64, published counts, the choice of channels, bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import MLP, inputs, logits, loss, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_integrations import check_training_and_merging_in_4_bit
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import peft_ext
from peft_ext import S2FTConfig, SparseFTConfig
from peft_ext.core import Adapter, about_of
from peft_ext.inspection.reading import by_site
from peft_ext.tuners.s2ft import ChannelBlock, S2FTLinear


ALL = {"down": 0.25, "up": 0.25, "o": 0.5, "v": 0.5}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def layers(model: nn.Module) -> dict[str, S2FTLinear]:
    """The adapted modules by their name in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, S2FTLinear)
    }


def blocks(model: nn.Module, adapter: str = "default") -> dict[str, ChannelBlock]:
    return {name: layer.block(adapter) for name, layer in layers(model).items() if adapter in layer.s2ft_block}


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the weight of each module is trained, written out in the shape in which the base stores it."""
    found = {}
    for name, block in blocks(model).items():
        weight = layers(model)[name].get_base_layer().weight
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        stored_as_inputs_first = type(layers(model)[name].get_base_layer()).__name__ == "Conv1D"
        if (block.side == "inputs") != stored_as_inputs_first:
            mask[:, block.indices.long()] = True
        else:
            mask[block.indices.long()] = True
        found[name] = mask
    return found


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def deltas(model: nn.Module, base: nn.Module) -> dict[str, torch.Tensor]:
    """How the merged weights differ from those of the base."""
    merged = copy.deepcopy(model).merge_and_unload()
    before = dict(base.named_parameters())
    return {
        name: (p - before[name]).detach() for name, p in merged.named_parameters() if not torch.equal(p, before[name])
    }


# Maths


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_training_is_dense_training_with_masked_gradients(name: str) -> None:
    """Six steps of AdamW, against the base with all but the chosen channels' gradients set to zero, in fp64."""
    overrides = GROUPED if name == "llama" else {}
    ratios = {"down": 0.25, "v": 0.5} if name == "gpt2" else ALL
    base, batch = tiny(name, **overrides).double(), doubled(inputs(name))
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=ratios))
    dense, where = copy.deepcopy(base), masks(model)
    assert len(where) >= 3
    trained = {f"{key}.weight": mask for key, mask in where.items()}
    for key, parameter in dense.named_parameters():
        parameter.requires_grad_(key in trained)
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(6):
        losses = [loss(model, batch), loss(dense, batch)]
        torch.testing.assert_close(*losses, atol=1e-10, rtol=1e-10)
        for value in losses:
            value.backward()
        for key, parameter in dense.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= trained[key]
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), atol=1e-10, rtol=1e-10)
    merged = model.merge_and_unload()
    for key, parameter in dense.named_parameters():
        torch.testing.assert_close(merged.get_parameter(key), parameter, atol=1e-10, rtol=1e-10)


def test_training_is_that_of_the_same_weights_as_a_sparse_adapter() -> None:
    base, batch = tiny("llama", **GROUPED).double(), inputs("llama")
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=ALL))
    support = {name: mask.flatten().nonzero().flatten() for name, mask in masks(model).items()}
    config = SparseFTConfig(selection="given", target_modules=list(support)).use_support(support)
    sparse = get_peft_model(copy.deepcopy(base), config)
    optimizers = [
        torch.optim.AdamW([p for p in side.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for side in (model, sparse)
    ]
    assert model.get_nb_trainable_parameters()[0] == sparse.get_nb_trainable_parameters()[0]
    for _ in range(4):
        values = [loss(side, batch) for side in (model, sparse)]
        torch.testing.assert_close(*values, atol=1e-10, rtol=1e-10)
        for value, optimizer in zip(values, optimizers, strict=True):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(model, batch), logits(sparse, batch), atol=1e-10, rtol=1e-10)


def test_it_is_the_published_form_with_permuted_channels() -> None:
    """The published code puts the chosen channels first in up, gate and down, and slices; here they are gathered."""
    base, batch = tiny("llama").double(), inputs("llama")
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios={"down": 0.25}, scope="per_layer"))
    for block in blocks(model).values():
        nn.init.normal_(block.weight)
    for name, block in blocks(model).items():
        mlp: Any = base.get_submodule(name.rpartition(".")[0])
        chosen = block.indices.long()
        rest = torch.tensor([c for c in range(block.size) if c not in chosen.tolist()])
        order = torch.cat([chosen, rest])
        for rows in (mlp.up_proj, mlp.gate_proj):
            rows.weight.data = rows.weight.data[order]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
        mlp.down_proj.weight.data[:, : len(chosen)] += block.weight.data
    torch.testing.assert_close(logits(model, batch), logits(base, batch), atol=1e-10, rtol=1e-10)


def test_the_backward_keeps_the_chosen_channels_of_the_input_alone() -> None:
    layer = get_peft_model(nn.Sequential(nn.Linear(64, 32)), S2FTConfig(ratios=0.125, target_modules=["0"]))
    x = torch.randn(10, 64, requires_grad=True)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    assert sorted(kept.values()) == [10 * 8, 32 * 8]  # x[c] `(10, 8)`, and the block as the leaf returned it `(32, 8)`


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_of_other_channels_add_up(name: str) -> None:
    base, batch = tiny(name).double(), inputs(name)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios={"down": 0.5}, seed=0)).eval()
    taken = {key: set(block.indices.tolist()) for key, block in blocks(model).items()}
    others = {
        key: torch.tensor([c for c in range(block.size) if c not in taken[key]], dtype=torch.int32)
        for key, block in blocks(model).items()
    }
    config = S2FTConfig(ratios={"down": 0.5})
    config.support = others
    model.add_adapter("second", config)
    for adapter in ("default", "second"):
        for block in blocks(model, adapter).values():
            nn.init.normal_(block.weight, std=0.1)
    found = []
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        found.append(deltas(model, base))
    model.base_model.set_adapter(["default", "second"])
    both = deltas(model, base)
    assert not any((found[0][key] * found[1][key]).any() for key in both)
    for key, delta in both.items():
        torch.testing.assert_close(delta, found[0][key] + found[1][key], atol=1e-12, rtol=0)
    expected = logits(model, batch)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, atol=1e-10, rtol=1e-10)


# Which channels


def on_meta(config: tf.PreTrainedConfig, ratios: dict[str, float]) -> int:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    return get_peft_model(model, S2FTConfig(ratios=ratios)).get_nb_trainable_parameters()[0]


def test_published_counts() -> None:
    shape: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    llama_3 = tf.LlamaConfig(**shape, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
    assert on_meta(llama_3, {"down": 0.03}) == 13_762 * 4096 == 56_369_152
    llama_2 = tf.LlamaConfig(**shape, intermediate_size=11008, vocab_size=32000)
    assert on_meta(llama_2, {"o": 0.052, "down": 0.02}) == 56_643_584


def test_heads_of_grouped_queries_go_together() -> None:
    """Four query heads of width 4 on two key-value heads: a unit is 4 rows of v, and the 8 columns of o that read it."""
    model = get_peft_model(tiny("llama", **GROUPED), S2FTConfig(ratios={"o": 0.5, "v": 0.5}, scope="per_layer"))
    for name, block in blocks(model).items():
        width = 8 if name.endswith("o_proj") else 4
        first = int(block.indices[0])
        assert first % width == 0 and block.indices.tolist() == list(range(first, first + width))
        assert block.side == ("inputs" if width == 8 else "outputs")


@pytest.mark.parametrize(
    ("name", "module", "ratio", "rows"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", {"v": 1.0}, range(32, 48)),  # queries, keys, values of 16 each
        ("phi3", "model.layers.0.self_attn.qkv_proj", {"v": 1.0}, range(24, 32)),  # 16 queries, 8 keys, 8 values
        ("phi3", "model.layers.0.mlp.gate_up_proj", {"up": 1.0}, range(24, 48)),  # 24 gates first
    ],
)
def test_values_and_channels_of_fused_projections(
    name: str, module: str, ratio: dict[str, float], rows: range
) -> None:
    block = blocks(get_peft_model(tiny(name), S2FTConfig(ratios=ratio)))[module]
    assert block.side == "outputs" and block.indices.tolist() == list(rows)


def test_at_random_over_all_layers_or_in_each() -> None:
    counts = {"global": set(), "per_layer": set()}  # type: dict[str, set[int]]
    for scope, found in counts.items():
        for seed in range(4):
            model = get_peft_model(tiny("llama"), S2FTConfig(ratios={"down": 0.25}, scope=scope, seed=seed))
            own = [len(block.indices) for block in blocks(model).values()]
            assert sum(own) == 12  # a quarter of 2 x 24
            found.update(own)
    assert counts["per_layer"] == {6} and len(counts["global"]) > 1
    again = [
        {
            name: block.indices.tolist()
            for name, block in blocks(
                get_peft_model(tiny("llama"), S2FTConfig(ratios=ALL | {"o": 1.0, "v": 1.0}, seed=seed))
            ).items()
        }
        for seed in (0, 0, 1)
    ]
    assert again[0] == again[1] != again[2]


def columns(chosen: Callable[[str], torch.Tensor], names: list[str], k: int, largest: bool) -> dict[str, list[int]]:
    """The k channels of all modules together with the smallest or largest scores, by module."""
    scores = [(float(value), name, c) for name in names for c, value in enumerate(chosen(name))]
    best = sorted(scores, key=lambda entry: -entry[0] if largest else entry[0])[:k]
    return {name: sorted(c for _, n, c in best if n == name) for name in names}


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
def test_selections_against_a_plain_computation(selection: str, largest: bool) -> None:
    model = tiny("bert")
    names = [f"bert.encoder.layer.{layer}.output.dense" for layer in range(2)]
    data = [inputs("bert", batch=3, seed=seed) for seed in (3, 4)]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    plain = copy.deepcopy(model)
    for name in names:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    for batch in data:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name in names:
            gradients[name].append(plain.get_submodule(name).weight.grad.clone())
            seen[name][-1] = seen[name][-1].detach()[batch["attention_mask"].bool()]  # without padding

    def score(name: str) -> torch.Tensor:
        weight = plain.get_submodule(name).weight.detach().double().norm(dim=0)
        activation = torch.cat(seen[name]).double().norm(dim=0)
        gradient = torch.stack(gradients[name]).double().norm(dim=(0, 1))
        return {"weight": weight, "activation": activation, "product": weight * activation, "gradient": gradient}[
            selection
        ]

    config = S2FTConfig(ratios={"down": 0.25}, selection=selection, largest=largest, task_type="SEQ_CLS")
    if selection == "weight":
        with pytest.raises(ValueError, match="looks at no data"):
            peft_ext.calibrate(model, config, data)
    else:
        with pytest.raises(ValueError, match=r"(?s)looks at data first.*config = peft_ext\.calibrate\(model, config"):
            get_peft_model(tiny("bert"), config)
        assert peft_ext.calibrate(model, config, data, progress=False) is config
    adapted = get_peft_model(model, config)
    found = {name: block.indices.tolist() for name, block in blocks(adapted).items()}
    assert found == {name: chosen for name, chosen in columns(score, names, 12, largest).items() if chosen}


def test_a_calibrated_config_on_disk_and_an_adapter_that_loads_without_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = S2FTConfig(ratios=ALL | {"o": 1.0, "v": 1.0}, selection="gradient", task_type="CAUSAL_LM")
    peft_ext.calibrate(tiny("llama"), config, [inputs("llama")])
    assert "down_proj" in capsys.readouterr().out
    config.save_pretrained(str(tmp_path / "config"))
    again = S2FTConfig.from_pretrained(str(tmp_path / "config"))
    model, batch = get_peft_model(tiny("llama"), again).eval(), inputs("llama")
    assert config.support is not None
    assert {n: b.indices.tolist() for n, b in blocks(model).items()} == {
        n: indices.tolist() for n, indices in config.support.items()
    }
    for block in blocks(model).values():
        nn.init.normal_(block.weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "calibration.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
    tensors = load_file(tmp_path / "config" / "calibration.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "config" / "calibration.safetensors")
    with pytest.raises(ValueError, match="is damaged: it has"):
        S2FTConfig.from_pretrained(str(tmp_path / "config"))
    # the adapter's JSON alone does not say which channels
    (tmp_path / "config" / "calibration.safetensors").unlink()
    unloaded = get_peft_model(tiny("llama"), S2FTConfig.from_pretrained(str(tmp_path / "config")))
    with pytest.raises(ValueError, match=r"(?s)no saved adapter was loaded.*peft_ext\.calibrate"):
        unloaded(**batch)


def test_an_adapter_file_of_other_channels_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), S2FTConfig(task_type="CAUSAL_LM", ratios=ALL | {"o": 1.0, "v": 1.0}))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "down_proj" in key and key.endswith("indices"))
    save_file(tensors | {key: tensors[key] + 1000}, file)
    with pytest.raises(ValueError, match=r"`indices` are not distinct, sorted and below 24"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["num_channels_per_module"][key.split(".s2ft")[0].removeprefix("base_model.model.")] = 7777
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no tensor in .* has such a size"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))


# What becomes of an adapter


@pytest.mark.capability("conversion to LoRA", "s2ft")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_lora(name: str, tmp_path: Path) -> None:
    ratios = {"down": 0.25} if name == "gpt2" else ALL | {"o": 1.0, "v": 1.0}
    model, batch = get_peft_model(tiny(name), S2FTConfig(ratios=ratios, task_type="CAUSAL_LM")).eval(), inputs(name)
    for block in blocks(model).values():
        nn.init.normal_(block.weight, std=0.1)
    peft_ext.save_as_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_one_batch_of_several_adapters_on_both_sides() -> None:
    model = get_peft_model(tiny("llama", **GROUPED), S2FTConfig(ratios=ALL)).eval()
    model.add_adapter("second", S2FTConfig(ratios={"down": 0.5}, seed=3))
    for adapter in ("default", "second"):
        for block in blocks(model, adapter).values():
            nn.init.normal_(block.weight, std=0.2)
    batch = inputs("llama", batch=4)
    names = ["second", "__base__", "default", "second"]
    mixed = model(**batch, adapter_names=names).logits
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        rows = [row for row, name in enumerate(names) if name == adapter]
        torch.testing.assert_close(mixed[rows], model(**batch).logits[rows], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(**batch).logits[1], atol=1e-5, rtol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratios": {"down": 0.0}}, r"`ratios` must be in \(0, 1\]"),
        ({"ratios": 1.5}, r"`ratios` must be in \(0, 1\]"),
        ({"ratios": {}}, r"`ratios` must be in \(0, 1\]"),
        ({"selection": "best"}, "`selection` must be one of random, weight"),
        ({"largest": True}, "`largest=True` has no effect"),
        ({"largest": "yes", "selection": "weight"}, "`largest` must be True or False"),
        ({"ratios": {1: 0.5}}, "`ratios` must be by names or kinds"),
        ({"num_channels_per_module": {}}, "`num_channels_per_module` must map names"),
        ({"sides_per_module": {"a": "left"}}, "`sides_per_module` must map names"),
        ({"scope": "layer"}, "`scope` must be 'global' or 'per_layer'"),
        ({"num_channels_per_module": {"fc1": 0}}, "`num_channels_per_module` must map"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2FTConfig(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"ratios": {"down": 0.01}}, r"leaves none of the 48 .* of 2 modules: give it 0\.021 or more"),
        ("llama", {"ratios": {"down": 0.03}, "scope": "per_layer"}, r"none of the 24 .* of 'model\.layers\.0\.mlp"),
        ("llama", {"ratios": {"fc9": 0.5}}, "`ratios` names 'fc9', .* it has down, gate, k, o, q, up, v"),
        (
            "llama",
            {"target_modules": ["q_proj"]},
            r"says nothing about the target 'model\.layers\.0\.self_attn\.q_proj'",
        ),
        ("gpt2", {"ratios": {"q": 0.5, "v": 0.5}}, "is one module for q and v"),
        ("bloom", {"ratios": {"v": 0.5}}, ""),
        ("mlp", {}, "`ratios` names 'down', .* no kinds that are known"),
        ("llama", {"num_channels_per_module": {"lm_head": 3}}, "names 'lm_head', which is not among the target"),
        ("llama", {"num_channels_per_module": {"model.layers.0.mlp.down_proj": 25}}, "which has 24 channels"),
        (
            "llama",
            {"ratios": {"o": 1.0}, "num_channels_per_module": {"model.layers.0.self_attn.o_proj": 3}},
            "no whole heads of 16 channels",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(name: str, fields: dict[str, Any], message: str) -> None:
    if name == "bloom":
        shape = {"vocab_size": 16, "hidden_size": 16, "n_layer": 1, "n_head": 2}
        block = blocks(get_peft_model(tf.BloomForCausalLM(tf.BloomConfig(**shape)), S2FTConfig(ratios={"v": 1.0})))
        assert [b.indices.tolist() for b in block.values()] == [[*range(16, 24), *range(40, 48)]]  # head by head
        return
    model = tiny(name)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, S2FTConfig(**fields))
    assert not layers(model)


def test_heads_that_do_not_divide_and_unknown_orders_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.head_dim = 5
    with pytest.raises(ValueError, match="no whole heads of 5: leave 'o' and 'v' out"):
        get_peft_model(model, S2FTConfig(ratios={"o": 1.0}))
    shape = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 2}
    with pytest.raises(ValueError, match="in an order of its own"):
        get_peft_model(tf.CodeGenForCausalLM(tf.CodeGenConfig(**shape)), S2FTConfig(ratios={"v": 0.5}))
    with pytest.raises(TypeError, match="this is a LayerNorm"):
        get_peft_model(MLP(), S2FTConfig(ratios=0.5, target_modules=["norm"]))


@pytest.mark.capability("4-bit base", "s2ft")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base() -> None:
    check_training_and_merging_in_4_bit(S2FTConfig(ratios={"down": 0.1, "o": 0.5}), "s2ft_")


def calibrated(config: S2FTConfig, **options: Any) -> S2FTConfig:
    return peft_ext.calibrate(tiny("llama"), config, [inputs("llama")], progress=False, **options)


def test_numbers_given_by_hand_hold_in_a_calibration() -> None:
    counts = {"model.layers.0.mlp.down_proj": 3}
    config = calibrated(S2FTConfig(selection="activation", ratios={"down": 0.5}, num_channels_per_module=counts))
    assert config.num_channels_per_module == counts
    anew = calibrated(calibrated(S2FTConfig(selection="activation", ratios={"down": 0.5})))
    assert sum((anew.num_channels_per_module or {}).values()) > 3  # what was worked out is no such number


def test_a_choice_by_gradient_takes_no_signed_sums() -> None:
    with pytest.raises(ValueError, match="`kind='gradient'` is not what this S2FTConfig goes by"):
        calibrated(S2FTConfig(selection="gradient", ratios={"down": 0.5}), kind="gradient")


def test_a_config_is_calibrated_on_a_model_with_adapters() -> None:
    model = get_peft_model(tiny("llama"), S2FTConfig(ratios={"down": 0.2}), adapter_name="first")
    config = S2FTConfig(selection="activation", ratios={"down": 0.2})
    model.add_adapter("second", peft_ext.calibrate(model, config, [inputs("llama")], progress=False))
    assert all(name.startswith("model.layers.") for name in config.support or ["none"])


def test_an_adapter_saved_where_a_calibration_lay(tmp_path: Path) -> None:
    calibrated(S2FTConfig(selection="activation", ratios={"down": 0.5})).save_pretrained(str(tmp_path))
    assert (tmp_path / "calibration.safetensors").exists()
    model = get_peft_model(tiny("llama"), S2FTConfig(ratios={"down": 0.2}, init_weights=False))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    torch.testing.assert_close(logits(loaded, inputs("llama")), logits(model, inputs("llama")))


def test_a_square_block_of_outputs_is_read_as_one(tmp_path: Path) -> None:
    base = tiny("llama", hidden_size=32, intermediate_size=64)
    model = get_peft_model(base, S2FTConfig(ratios={"up": 0.5}, scope="per_layer", init_weights=False))
    model.save_pretrained(str(tmp_path))
    assert {tuple(block.weight.shape) for block in blocks(model).values()} == {(32, 32)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    about, (sites, _) = about_of("S2FT"), by_site(tensors, "S2FT")
    adapter = Adapter(str(tmp_path), tmp_path, config, {}, {})
    assert {about.read(adapter, site)[1]["weight"].side for site in sites.values()} == {"outputs"}


def test_heads_and_channels_are_compared_by_the_mean_of_their_channels() -> None:
    """BERT's `dense` is the output of the attention, by heads, and of the feed-forward part, by channels."""
    model = get_peft_model(
        tiny("bert"), S2FTConfig(ratios={"dense": 0.9}, selection="weight", target_modules=["output.dense"])
    )
    names = [name for name, layer in layers(model).items() if blocks(model)[name].indices.numel()]
    assert any("attention" in name for name in names) and any("attention" not in name for name in names)
