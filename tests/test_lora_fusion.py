"""LoRAFusion against an independent dense reference, what it reads and refuses, and its conversions."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import two_loras, write_lora
from models import inputs, logits, tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_integrations import quantised_llama, run_processes
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import peft_ext
from peft_ext import LoraFusionConfig, WeGeFTConfig, inspection, plots
from peft_ext.testing import MergingTests, Method, SavingTests, TrainingTests
from peft_ext.tuners.lora_fusion import LoraFusionLinear
from peft_ext.tuners.lora_fusion.model import block_of


MODES = [("deltas", False), ("deltas", True), ("factors", False), ("factors", True)]
CLOSE = {"atol": 1e-10, "rtol": 0.0}


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    """Two LoRAs of equal shapes on Llama in float64, with unequal scales in the second module."""
    common: dict[str, Any] = {"dtype": torch.float64, "target_modules": ["q_proj", "down_proj"]}
    return [
        write_lora(tmp_path / "first", "llama", seed=1, lora_alpha=3, **common),
        write_lora(tmp_path / "second", "llama", seed=2, lora_alpha=3, alpha_pattern={"down_proj": 5}, **common),
    ]


def scale(directory: str, name: str) -> float:
    return 2.5 if directory.endswith("second") and "down_proj" in name else 1.5


def fused(loras: list[str], **fields: Any) -> Any:
    """Llama in float64, with coefficients at random, some of them below zero, and magnitudes."""
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama").double(), LoraFusionConfig(adapters=loras, **fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "coefficients" in key:
                parameter.copy_(torch.randn(len(loras)))
            elif "magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model.eval()


def batch_of(name: str = "llama") -> dict[str, torch.Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs(name).items()}


def coefficients(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in model.named_parameters() if "fused_low_rank_coefficients" in key}


def dense(model: Any, loras: list[str], mode: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The base with the weights of the equations, and the coefficients they are made of, by block."""
    base = tiny("llama").double()
    files = [load_file(Path(lora, "adapter_model.safetensors")) for lora in loras]
    own = {key.replace("-", "."): p.detach().clone().requires_grad_() for key, p in coefficients(model).items()}
    state = get_peft_model_state_dict(model)
    found = {}
    for name, module in list(base.named_modules()):
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" not in files[0]:
            continue
        w = next(own[k] for k in own if name.startswith(k.split("coefficients.", 1)[1].split(".fused")[0] + "."))
        pairs = [(f[f"{key}.lora_A.weight"], f[f"{key}.lora_B.weight"]) for f in files]
        scales = [scale(lora, name) for lora in loras]
        weight: Any = module.weight
        if mode == "deltas":
            change = sum(w[i] * scales[i] * b @ a for i, (a, b) in enumerate(pairs))
        else:
            down = sum(w[i] * scales[i] ** 0.5 * a for i, (a, _) in enumerate(pairs))
            change = sum(w[i] * scales[i] ** 0.5 * b for i, (_, b) in enumerate(pairs)) @ down
        changed = weight.detach() + change
        length = state.get(f"{key}.fused_low_rank_magnitude.weight")
        if length is not None:
            changed = changed * (length.double() / changed.norm(dim=1))[:, None]
        del module._parameters["weight"]
        module.weight = changed
        found[name] = w
    return base.eval(), own


@pytest.mark.parametrize(("mode", "magnitude"), MODES)
def test_the_equations_and_their_gradients(mode: str, magnitude: bool, loras: list[str]) -> None:
    """Of the coefficients also below zero, where the published code goes uphill; merged and unmerged."""
    model, batch = fused(loras, mode=mode, magnitude=magnitude), batch_of()
    base, own = dense(model, loras, mode)
    expected = base(**batch)
    torch.testing.assert_close(logits(model, batch), expected.logits, **CLOSE)
    expected.loss.backward()
    model(**batch).loss.backward()
    for key, parameter in coefficients(model).items():
        torch.testing.assert_close(parameter.grad, own[key.replace("-", ".")].grad, **CLOSE)
    assert len(own) == 2 and any(bool((w < 0).any()) for w in own.values())
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected.logits.detach(), **CLOSE)


def test_the_gradient_of_factors_is_the_sum_of_inner_products(loras: list[str]) -> None:
    """<dL/dA, A_i> + <dL/dB, B_i>, once and not twice."""
    model, batch = fused(loras, mode="factors", share="none"), batch_of()
    layer = next(module for module in model.modules() if isinstance(module, LoraFusionLinear))
    factors: Any = layer.fused_low_rank_factors["default"]
    made = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output:
            tensor.retain_grad()
        made.append(output)

    handle = factors.register_forward_hook(keep)
    model(**batch).loss.backward()
    handle.remove()
    (down, up), (scale, _) = made[0], factors.scales
    found = layer.fused_low_rank_coefficients["default"].weight.grad
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        expected = (down.grad * factors.down[rows]).sum() + (up.grad * factors.up[:, rows]).sum()
        torch.testing.assert_close(found[i], expected * scale.sqrt(), **CLOSE)


@pytest.mark.parametrize("mode", ["deltas", "factors"])
def test_one_hot_coefficients_are_that_adapter(mode: str, loras: list[str]) -> None:
    model, batch = fused(loras, mode=mode), batch_of()
    for i, lora in enumerate(loras):
        with torch.no_grad():
            for parameter in coefficients(model).values():
                parameter.copy_(torch.eye(2)[i])
        alone = PeftModel.from_pretrained(tiny("llama").double(), lora, autocast_adapter_dtype=False).eval()
        torch.testing.assert_close(logits(model, batch), logits(alone, batch), **CLOSE)


def test_factors_are_what_peft_makes_of_the_squared_weights(loras: list[str]) -> None:
    """PEFT's "linear" multiplies A and B of an adapter by the root of its weight."""
    theirs: Any = PeftModel.from_pretrained(tiny("llama").double(), loras[0], "a", autocast_adapter_dtype=False)
    theirs.load_adapter(loras[1], "b", autocast_adapter_dtype=False)
    theirs.add_weighted_adapter(["a", "b"], [0.49, 0.09], "both", combination_type="linear")
    theirs.set_adapter("both")
    ours = fused(loras, mode="factors", share="all")
    with torch.no_grad():
        next(iter(coefficients(ours).values())).copy_(torch.tensor([0.7, 0.3]))
    ours, theirs = ours.eval(), theirs.eval()
    torch.testing.assert_close(logits(ours, batch_of()), logits(theirs, batch_of()), atol=1e-6, rtol=0.0)


def test_starts(loras: list[str]) -> None:
    base = logits(tiny("llama").double(), batch_of())

    def started(**fields: Any) -> Any:
        return get_peft_model(tiny("llama").double(), LoraFusionConfig(adapters=loras, **fields)).eval()

    plain = started()
    assert all(parameter.tolist() == [0.5, 0.5] for parameter in coefficients(plain).values())
    # magnitudes change nothing before they are trained
    torch.testing.assert_close(logits(started(magnitude=True), batch_of()), logits(plain, batch_of()), **CLOSE)
    assert torch.equal(logits(started(init_weights="zero"), batch_of()), base)
    torch.manual_seed(0)
    drawn = torch.stack(list(coefficients(started(init_weights="xavier", share="none")).values()))
    assert drawn.shape == (4, 2) and 0.5 < drawn.abs().max() <= 1.0 and bool((drawn < 0).any())  # sqrt(6 / (2 + 4))
    with pytest.raises(ValueError, match="cannot be trained with `mode='factors'`"):
        LoraFusionConfig(adapters=loras, init_weights="zero", mode="factors")


def test_sharing(loras: list[str]) -> None:
    for share, count in (("block", 2), ("all", 1), ("none", 4)):
        model = fused(loras, share=share)
        assert len(coefficients(model)) == count and model.get_nb_trainable_parameters()[0] == 2 * count
        base = model.unload()
        assert [*base.state_dict()] == [*tiny("llama").state_dict()]
    blocks = {
        "model.layers.3.self_attn.q_proj": "model.layers.3",
        "decoder.block.2.layer.1.EncDecAttention.q": "decoder.block.2",
        "swin.layers.1.blocks.0.mlp.fc1": "swin.layers.1.blocks.0",
        "layers.12.fc1": "layers.12",
        "fc1": None,
        "0": None,
    }
    assert {name: block_of(name) for name in blocks} == blocks


def test_the_published_count(tmp_path: Path) -> None:
    """Flan-T5-large: 20 LoRAs of rank 16 on q and v, 48 blocks, and magnitudes of 144 modules of 1,024 outputs."""
    with torch.device("meta"):
        base = T5ForConditionalGeneration(
            T5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
        )
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"]))
    assert lora.get_nb_trainable_parameters()[0] == 4_718_592
    names = [name for name, _ in base.named_modules() if name.endswith((".q", ".v"))]
    config = LoraFusionConfig(
        adapters=[f"lora-{i}" for i in range(20)], magnitude=True, target_modules=names, ranks=[1] * 20
    )
    model = get_peft_model(base, config)
    assert model.get_nb_trainable_parameters()[0] == 148_416
    assert sum(parameter.numel() for parameter in coefficients(model).values()) == 960


def test_any_ranks_and_modules(tmp_path: Path) -> None:
    """rslora, rank and alpha by module, and modules that only one LoRA adapts; also with tuples of scales."""
    first = write_lora(
        tmp_path / "a", "llama", seed=1, dtype=torch.float64, target_modules=["q_proj", "v_proj"], use_rslora=True, r=4
    )
    second = write_lora(
        tmp_path / "b",
        "llama",
        seed=2,
        dtype=torch.float64,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 3},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 7},
    )
    model, batch = fused([first, second], share="all"), batch_of()
    config = model.peft_config["default"]
    ranks = {name: config.ranks_at(name) for name in config.target_modules}
    assert ranks["model.layers.0.self_attn.q_proj"] == [4, 2] and ranks["model.layers.1.self_attn.q_proj"] == [4, 3]
    assert ranks["model.layers.0.mlp.down_proj"] == [0, 2] and ranks["model.layers.1.self_attn.v_proj"] == [4, 0]
    for i, lora in enumerate((first, second)):
        with torch.no_grad():
            next(iter(coefficients(model).values())).copy_(torch.eye(2)[i])
        alone = PeftModel.from_pretrained(tiny("llama").double(), lora, autocast_adapter_dtype=False).eval()
        torch.testing.assert_close(logits(model, batch), logits(alone, batch), **CLOSE)
    with torch.no_grad():
        next(iter(coefficients(model).values())).copy_(torch.tensor([0.3, -0.8]))
    model.save_pretrained(str(tmp_path / "fused"))
    loaded = PeftModel.from_pretrained(tiny("llama").double(), str(tmp_path / "fused")).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    peft_ext.save_as_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny("llama").double(), tmp_path / "lora", autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), **CLOSE)


@pytest.mark.parametrize(("mode", "magnitude"), MODES)
@pytest.mark.capability("conversion to LoRA", "fused_low_rank")
def test_as_lora(mode: str, magnitude: bool, loras: list[str], tmp_path: Path) -> None:
    model, batch = fused(loras, mode=mode, magnitude=magnitude), batch_of()
    lora = peft_ext.save_as_lora(model, tmp_path / "lora")
    assert lora.r == (4 if mode == "deltas" else 2) and lora.use_dora is magnitude
    loaded = PeftModel.from_pretrained(tiny("llama").double(), tmp_path / "lora", autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), **CLOSE)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_as_lora_of_conv1d(tmp_path: Path) -> None:
    for magnitude in (False, True):
        model = get_peft_model(tiny("gpt2"), LoraFusionConfig(adapters=two_loras("gpt2"), magnitude=magnitude)).eval()
        peft_ext.save_as_lora(model, tmp_path)
        loaded = PeftModel.from_pretrained(tiny("gpt2"), tmp_path).eval()
        torch.testing.assert_close(logits(loaded, inputs("gpt2")), logits(model, inputs("gpt2")), atol=1e-5, rtol=1e-4)


def test_a_saved_adapter_is_complete(tmp_path: Path) -> None:
    """The given LoRAs may be gone; a copy under another name, as TRL makes its reference, has all, too."""
    for i in (1, 2):
        write_lora(tmp_path / f"lora{i}", "llama", seed=i)
    config = LoraFusionConfig(adapters=[str(tmp_path / f"lora{i}") for i in (1, 2)], task_type="CAUSAL_LM")
    model, batch = get_peft_model(tiny("llama"), config).eval(), inputs("llama")
    expected = logits(model, batch)
    model.save_pretrained(str(tmp_path / "fused"))
    for i in (1, 2):
        shutil.rmtree(tmp_path / f"lora{i}")
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "fused"), is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded, batch), expected)
    loaded.add_adapter("ref", loaded.peft_config["default"])
    for key, parameter in list(loaded.named_parameters()):
        if ".default." in key:
            loaded.get_parameter(key.replace(".default.", ".ref.")).data.copy_(parameter)
    loaded.set_adapter("ref")
    torch.testing.assert_close(logits(loaded, batch), expected)
    assert loaded.peft_config["ref"].given is None
    with pytest.raises(ValueError, match="no factors yet"):
        logits(get_peft_model(tiny("llama"), PeftConfig.from_pretrained(str(tmp_path / "fused"))), batch)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_a_lora_on_the_model_and_the_new_adapter_have_two_names() -> None:
    first, second = two_loras("llama")
    model: Any = tiny("llama")
    model.load_adapter(first)  # as "default"
    with (
        pytest.raises(ValueError, match=r"'default', a LoRA on this model, and the new adapter has the same name"),
    ):
        get_peft_model(model, LoraFusionConfig(adapters=["default", second]))
    fused = get_peft_model(model, LoraFusionConfig(adapters=["default", second]), adapter_name="fusion")
    expected = get_peft_model(tiny("llama"), LoraFusionConfig(adapters=[first, second]))
    torch.testing.assert_close(logits(fused.eval(), inputs("llama")), logits(expected.eval(), inputs("llama")))


@pytest.mark.parametrize("mixed", [True, False])
def test_loras_on_the_model(mixed: bool) -> None:
    """By name: through transformers, or in a mixed model; one of them beside one from a directory."""
    first, second = two_loras("llama")
    expected = get_peft_model(tiny("llama"), LoraFusionConfig(adapters=[first, second])).eval()
    config = LoraFusionConfig(adapters=["one", second])
    if mixed:
        model: Any = peft_ext.PeftMixedModel.from_pretrained(tiny("llama"), first, "one")
        model.add_adapter("fused", config)
        model.set_adapter("fused")
    else:
        model = tiny("llama")
        model.load_adapter(first, adapter_name="one")
        with pytest.warns(UserWarning, match="Already found a `peft_config`"):
            model.add_adapter(config, adapter_name="fused")
    batch = inputs("llama")
    torch.testing.assert_close(logits(model.eval(), batch), logits(expected, batch), atol=1e-5, rtol=1e-4)


def rewritten(lora: str, to: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> str:
    """A copy of a LoRA with other fields, and tensors besides (a dot is written as two underscores)."""
    shutil.copytree(lora, to)
    fields = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**fields, **(config or {})}))
    if tensors:
        file = to / "adapter_model.safetensors"
        own = load_file(file)
        save_file(own | {key.replace("__", "."): tensor for key, tensor in tensors.items()}, file)
    return str(to)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "started with 'pissa_niter_4'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"peft_type": "WEGEFT"}, "method WEGEFT: fusion takes LoRAs"),
    ],
)
def test_loras_of_other_kinds(fields: dict[str, Any], found: str, tmp_path: Path) -> None:
    first, second = two_loras("llama")
    if "peft_type" in fields:
        other = str(tmp_path)
        get_peft_model(tiny("llama"), WeGeFTConfig()).save_pretrained(other)
    else:
        other = rewritten(second, tmp_path / "other", fields)
    with pytest.raises(TypeError, match=found):
        get_peft_model(tiny("llama"), LoraFusionConfig(adapters=[first, other]))


def test_bad_input(tmp_path: Path) -> None:
    first, second = two_loras("llama")

    def refused(error: type[Exception], match: str, *adapters: str, **fields: Any) -> None:
        model = tiny("llama")
        with pytest.raises(error, match=match):
            get_peft_model(model, LoraFusionConfig(adapters=list(adapters), **fields))
        assert not any(isinstance(module, LoraFusionLinear) for module in model.modules())

    refused(ValueError, "`adapters` is empty")
    refused(ValueError, "names one of them twice", first, first)
    refused(TypeError, "must be a list of names", 3)  # type: ignore[arg-type]
    refused(ValueError, r"'nowhere', which is no LoRA on this model, no directory", first, "nowhere")
    refused(ValueError, r"first' has rank 2, and \S+second' rank 3.*mode='deltas'", first, second, mode="factors")
    refused(ValueError, "`mode` must be", first, mode="sum")
    refused(ValueError, "`share` must be", first, share="layer")
    refused(ValueError, "`magnitude` must be", first, magnitude="yes")
    refused(ValueError, "a rank for each of the 2 adapters", first, second, ranks=[1])
    refused(ValueError, "'lm_head', which none of the LoRAs adapts", first, target_modules=["q_proj", "lm_head"])
    other_base = [
        rewritten(lora, tmp_path / f"base{i}", {"base_model_name_or_path": f"base-{i}"})
        for i, lora in enumerate((first, second))
    ]
    refused(ValueError, r"different bases: .*base0' of 'base-0', .*base1' of 'base-1'.*one base", *other_base)
    wide = write_lora(tmp_path / "bert", "bert", seed=1)
    refused(ValueError, r"bert' adapts 'bert\.encoder.*, which this LlamaForCausalLM does not have", first, wide)
    key = "base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight"
    odd = rewritten(second, tmp_path / "odd", **{key: torch.zeros(3, 5)})
    refused(
        ValueError, r"odd' does not fit this model.*\(3, 5\) and \(16, 3\), and the module has 16 inputs", first, odd
    )
    broken = rewritten(second, tmp_path / "broken", **{key: torch.full((3, 16), torch.nan)})
    refused(ValueError, "no A and B of .* matrices of finite values", broken)
    embedding = rewritten(second, tmp_path / "emb", base_model__model__x__lora_embedding_A=torch.zeros(1))
    refused(TypeError, "lora_embedding_A'; fusion takes", embedding)
    Path(rewritten(second, tmp_path / "damaged"), "adapter_model.safetensors").write_bytes(b"x")
    refused(ValueError, "cannot be read", str(tmp_path / "damaged"))


def test_what_else_a_lora_has_trained_is_left_out_with_a_warning(tmp_path: Path) -> None:
    first, _ = two_loras("llama")
    headed = rewritten(first, tmp_path / "headed", base_model__model__lm_head__weight=torch.zeros(40, 16))
    with pytest.warns(UserWarning, match=r"has trained more than its factors, such as 'lm_head\.weight'"):
        get_peft_model(tiny("llama"), LoraFusionConfig(adapters=[headed]))


def test_a_module_that_is_trained_in_full_is_not_fused() -> None:
    config = LoraFusionConfig(adapters=two_loras("mlp"), modules_to_save=["fc2"])
    model = get_peft_model(tiny("mlp"), config)
    assert model.base_model.targeted_module_names == ["fc1"]
    model.add_adapter("second", LoraFusionConfig(adapters=two_loras("mlp"), modules_to_save=["fc2"]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"ranks": [2, 10**9]}, r"`ranks` of adapter_config\.json says 1000000002, and no tensor"),
        ({"ranks": None}, r"`ranks` is missing from adapter_config\.json"),  # and nothing is fetched
        ({"ranks": [0, 0]}, "must have a rank for each of the 2 adapters"),
        ({"adapters": [], "ranks": []}, "must have a rank for each of the 0 adapters"),
        ({"other_ranks": {"model.layers.0.self_attn.q_proj": [1]}}, "must have a rank for each"),
    ],
)
def test_a_damaged_config(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraFusionConfig(adapters=two_loras("llama"))).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))


def test_a_damaged_file(tmp_path: Path) -> None:
    config = LoraFusionConfig(adapters=[write_lora(tmp_path / "lora", "llama", seed=1)], mode="factors")
    get_peft_model(tiny("llama"), config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: -t if key.endswith("scales") else t for key, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded into this model.*`scales` are below zero"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))


def test_shared_coefficients_under_fsdp_and_ddp(tmp_path: Path) -> None:
    """With PEFT's policy, with blocks alone as units, and under DDP: the step of one process."""
    paths = two_loras("llama")
    ranks = run_processes(
        tmp_path,
        f"""
        import functools
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
        from torch.nn.parallel import DistributedDataParallel
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        dist.init_process_group("gloo")

        def step(model, parameters):
            optimizer = torch.optim.SGD(parameters, lr=0.02)
            for _ in range(2):
                model(**inputs("llama")).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return model(**inputs("llama")).loss.item()

        def build():
            config = peft_ext.LoraFusionConfig(adapters={paths!r}, magnitude=True)
            return get_peft_model(tiny("llama"), config).train()

        def trained(model):
            return [p for p in model.parameters() if p.requires_grad]

        def leaf(module):  # as peft.utils.other.fsdp_auto_wrap_policy
            has_weight = getattr(module, "weight", None) is not None and module.weight.requires_grad
            return not list(module.named_children()) and has_weight

        plain = build()
        before = plain(**inputs("llama")).loss.item()
        expected = step(plain, trained(plain))
        leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=leaf)
        blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={{LlamaDecoderLayer}})
        both, cpu = functools.partial(_or_policy, policies=[leaves, blocks]), torch.device("cpu")
        model = FSDP(build(), auto_wrap_policy=both, device_id=cpu)
        got = {{"leaves": step(model, model.parameters())}}
        model = FSDP(build(), auto_wrap_policy=blocks, device_id=cpu, use_orig_params=True)
        got["blocks"] = step(model, trained(model))
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


def test_inspection_and_figure(tmp_path: Path, loras: list[str]) -> None:
    """The norms are those of the updates, by the file alone; of both modes."""
    for mode in ("deltas", "factors"):
        model = fused(loras, mode=mode)
        model.save_pretrained(str(tmp_path / mode))
        found = inspection.describe(str(tmp_path / mode))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraFusionLinear)}
        rows = {row["module"]: row for row in found["modules"]}
        for name, layer in layers.items():
            down, up = layer.low_rank("default")
            row = rows[name.removeprefix("base_model.model.")]
            assert row["norm"] == pytest.approx((up @ down).norm().item()) and row["parameters"] == 0
        shared = [(row["layer"], row["parameters"]) for row in found["modules"] if row["type"] == "coefficients"]
        assert sorted(shared) == [(0, 2), (1, 2)] and sum(row["parameters"] for row in found["modules"]) == 4
    plots.plot(model)


@pytest.mark.capability("4-bit base", "fused_low_rank")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
@pytest.mark.parametrize("magnitude", [False, True])
def test_4bit_base(magnitude: bool) -> None:
    """Also where bitsandbytes has reordered weights for the CPU, as a forward without gradients makes it do."""
    base, batch = quantised_llama(), inputs("llama")
    names = [name for name, module in base.named_modules() if name.endswith("q_proj")]
    config = LoraFusionConfig(adapters=["a", "b"], magnitude=magnitude, target_modules=names, ranks=[2, 1])
    model = get_peft_model(base, config)
    layers = [module for module in model.modules() if isinstance(module, LoraFusionLinear)]
    torch.manual_seed(0)
    for layer in layers:
        for tensor in layer.fused_low_rank_factors["default"].buffers():
            tensor.normal_(std=0.3)
        if magnitude:
            layer.fused_low_rank_magnitude["default"].weight.data.fill_(1.0)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    weights = [layer.get_base_weight().clone() for layer in layers]
    with torch.no_grad():
        expected = logits(model.eval(), batch)
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.get_base_weight().float(), weight.float(), atol=2e-3, rtol=1e-2)
    model.merge_adapter()  # requantises to 4 bits
    assert (logits(model, batch) - expected).abs().max() < 0.5 * expected.abs().max()
    assert all(not torch.equal(layer.get_base_weight(), w) for layer, w in zip(layers, weights, strict=True))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=0.05, rtol=0.05)


class TestMagnitudes(SavingTests, MergingTests, TrainingTests):
    method = Method(
        prefix="fused_low_rank_",
        config=lambda **fields: LoraFusionConfig(magnitude=True, **fields),
        models=("mlp", "gpt2"),
        fields={
            "mlp": {"adapters": two_loras("mlp"), "target_modules": ["fc1", "fc2"]},
            "gpt2": {"adapters": two_loras("gpt2"), "target_modules": None},
        },
        mixes_batches=True,
        keeps_fp32=r".*",
    )


@pytest.mark.parametrize("share", ["block", "all", "none"])
@pytest.mark.parametrize("init", [True, "xavier", "zero"])
def test_magnitudes_change_nothing_at_the_start(loras: list[str], share: str, init: bool | str) -> None:
    config = LoraFusionConfig(adapters=loras, magnitude=True, init_weights=init, share=share)
    model = get_peft_model(tiny("llama").double(), config)
    layers = [module for module in model.modules() if isinstance(module, LoraFusionLinear)]
    assert layers
    for layer in layers:
        gain = layer.gain("default", *layer.low_rank("default"))
        torch.testing.assert_close(gain, torch.ones_like(gain))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_loras_on_the_model_act_no_longer_once_they_are_fused(tmp_path: Path) -> None:
    """Put on by transformers; else one would go on, be trained, and not be saved."""
    base, batch = tiny("llama"), batch_of()
    for name in ("p", "q"):
        base.add_adapter(LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), name)
    model = get_peft_model(base, LoraFusionConfig(adapters=["p", "q"])).eval()
    model.set_adapter("default")
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in name]
    found = logits(model, batch)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), batch), found)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), found)


def test_loras_of_another_base_are_told(loras: list[str]) -> None:
    for lora in loras:
        file = Path(lora, "adapter_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base-a"}))
    model = tiny("llama").double()
    model.name_or_path = "org/base-b"
    with pytest.warns(UserWarning, match=r"trained on 'org/base-a', and the model is 'org/base-b'"):
        get_peft_model(model, LoraFusionConfig(adapters=loras))
