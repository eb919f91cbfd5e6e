"""`compress` and `binarize`: what is kept, what is on disk, how it loads."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import inputs, logits, tiny
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

import peft_ext
from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    LoraFusionConfig,
    LoraSBConfig,
    MaskLoraConfig,
    PeftMixedModel,
    S2FTConfig,
    SNELLConfig,
    SparseFTConfig,
    SSFConfig,
    VQTConfig,
    WeGeFTConfig,
)
from peft_ext.core import BadInput
from peft_ext.export import binarize, compress
from peft_ext.export.packing import SCALES
from peft_ext.inspection import read_adapter
from peft_ext.low_bit import used_values
from peft_ext.packed_files import PACKED, read_packed
from peft_ext_cli import main


def trained(config: Any, name: str = "llama") -> PeftModel:
    model = get_peft_model(tiny(name), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "default" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def lora(**fields: Any) -> PeftModel:
    return trained(LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], **fields))


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", ["std", 2.5])
def test_what_is_kept(keep: float, scale: Any) -> None:
    """The largest values of all tensors together, as signs times alpha std, against a sort of all of them."""
    model = lora()
    before = vector(get_peft_model_state_dict(model))
    after = vector(compress(model, keep, scale).tensors())
    k = round(keep * len(before))
    kept = before.abs().argsort(descending=True, stable=True)[:k]
    expected = torch.zeros_like(before)
    expected[kept] = before[kept].sign() * before.std() * (1.0 if scale == "std" else scale)
    assert (after - expected).abs().max() < 1e-7
    assert len(after.unique()) == (3 if keep < 1 else 2)


def test_the_size_on_disk(tmp_path: Path) -> None:
    """Indices in the code of Elias and Fano and a bit for each sign: within half a bit an index of the entropy."""
    model = lora()
    packed = compress(model, 0.1)
    n = len(vector(get_peft_model_state_dict(model)))
    entropy = n * -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) + 0.1 * n
    assert entropy < 8 * packed.nbytes < entropy + 0.1 * n + 8 * 64
    assert packed.original_nbytes == 4 * n > 15 * packed.nbytes
    packed.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert sum(t.numel() * t.element_size() for t in load_file(tmp_path / PACKED).values()) == packed.nbytes


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(r=8, target_modules="all-linear"), "llama"),
        (LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM"), "gpt2"),
        (SSFConfig(task_type="SEQ_CLS"), "bert"),
        (SparseFTConfig(selection="random", num_tunable_weights=500), "llama"),
        (WeGeFTConfig(r=4), "llama"),
        (S2FTConfig(ratios=0.25), "llama"),
        (LoraSBConfig(r=8, init_weights="weights"), "llama"),
    ],
)
def test_it_loads_as_an_adapter_of_its_method(config: Any, name: str, tmp_path: Path) -> None:
    model = trained(config, name)
    for form, make in (("compressed", compress), ("binarized", binarize)):
        packed = make(model)
        packed.save_pretrained(tmp_path / form)
        loaded = peft_ext.load(tmp_path / form, tiny(name)).eval()
        assert type(loaded.peft_config["default"]) is type(config)
        again, unpacked = get_peft_model_state_dict(loaded), packed.tensors()
        assert again.keys() == unpacked.keys() and all(torch.equal(again[key], t) for key, t in unpacked.items())
        heads = [key for key in unpacked if "classifier" in key]
        own = get_peft_model_state_dict(model)
        assert all(torch.equal(unpacked[key], own[key]) for key in heads) and bool(heads) == (name == "bert")
        adapter = read_adapter(str(tmp_path / form))
        assert adapter.sites.keys() == {s for s in adapter.sites if adapter.sites[s].leaves}
    loaded.save_pretrained(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"There is an adapter in .* already"):
        packed.save_pretrained(tmp_path / "whole")


def test_what_is_frozen_stays_as_it_is() -> None:
    """LoRA-SB's factors are floating point, and no parameters: rounded, they would not be orthonormal."""
    model = trained(LoraSBConfig(r=8, init_weights="weights"))
    own = get_peft_model_state_dict(model)
    for packed in (compress(model, 0.5), binarize(model)):
        found = packed.tensors()
        assert all(torch.equal(found[key], own[key]) == (not key.endswith("matrix.weight")) for key in own)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_are_those_of_training_in_few_bits(bits: int, tmp_path: Path) -> None:
    """Each tensor as a trained low-bit matrix with these latents would act; 8 bits are nearly exact."""
    model = lora()
    packed = binarize(model, bits)
    own = get_peft_model_state_dict(model)
    for key, tensor in packed.tensors().items():
        assert torch.equal(tensor, used_values(own[key], bits))
        error = (tensor - own[key]).square().mean().sqrt() / own[key].std()
        assert error < {1: 0.7, 2: 0.4, 4: 0.25, 8: 0.1}[bits]
    assert packed.nbytes == sum(-(-t.numel() * bits // 8) + 8 for t in own.values())


def test_compressing_again_changes_nothing(tmp_path: Path) -> None:
    first = compress(lora(), 0.1, 3.0)
    tensors = first.tensors()
    std = vector(tensors).std().item()
    magnitude = vector(tensors).abs().max().item()
    model = lora()
    set_peft_model_state_dict(model, tensors)
    again = compress(model, 0.1, magnitude / std).tensors()
    assert all(torch.allclose(again[key], tensor, atol=1e-7) for key, tensor in tensors.items())


def test_the_scale_is_tuned() -> None:
    """The one whose output is nearest to the whole adapter's; the model is left as it was."""
    model = lora()
    expected, before = logits(model, inputs("llama")), get_peft_model_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    seen: list[float] = []

    def evaluate(candidate: PeftModel) -> float:
        seen.append(-(logits(candidate, inputs("llama")) - expected).square().sum().item())
        return seen[-1]

    packed = compress(model, 0.3, "tune", evaluate=evaluate)
    assert len(seen) == len(SCALES) and packed.scale == SCALES[seen.index(max(seen))]
    assert all(torch.equal(get_peft_model_state_dict(model)[key], tensor) for key, tensor in before.items())


def seeded(
    seed: int = 7, dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """LoRA that was made after `torch.manual_seed(seed)` and then moved a little, and its tensors at the start."""
    base = tiny("llama").to(dtype)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**{"r": 8, "target_modules": "all-linear", **fields}))
    start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.eval(), start


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": torch.bfloat16},
        {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}},
        {"init_lora_weights": "orthogonal", "target_modules": ["v_proj", "up_proj"]},
    ],
    ids=["default", "bfloat16", "ranks", "orthogonal"],
)
def test_what_is_kept_of_the_change_since_the_start(fields: dict[str, Any], tmp_path: Path) -> None:
    """The start as PEFT drew it, plus the largest changes; loading needs neither the seed nor the base's weights."""
    model, start = seeded(**fields)
    own = get_peft_model_state_dict(model)
    change = vector({key: own[key] - start[key] for key in own})
    random_state = torch.get_rng_state()
    packed = compress(model, 0.1, seed=7)
    assert torch.equal(torch.get_rng_state(), random_state)
    kept = change.abs().argsort(descending=True, stable=True)[: round(0.1 * len(change))]
    expected = vector(start)
    expected[kept] += change[kept].sign() * change.std()
    assert (vector(packed.tensors()) - expected).abs().max() < 1e-6
    assert abs(packed.nbytes - compress(model, 0.1).nbytes) <= 2
    packed.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = get_peft_model_state_dict(peft_ext.load(tmp_path, tiny("llama")))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in packed.tensors().items())
    assert packed.original_nbytes == sum(tensor.nbytes for tensor in own.values())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_start_that_is_not_the_adapters() -> None:
    model, _ = seeded()
    with pytest.raises(ValueError, match="did not start from seed 8: it is no nearer"):
        compress(model, seed=8)
    with pytest.raises(ValueError, match="`seed` must be an integer of at least 0, got -1"):
        compress(model, seed=-1)
    with pytest.raises(ValueError, match="`seed` needs the model with the adapter"):
        compress("somewhere", seed=7)
    with pytest.raises(ValueError, match="`init_lora_weights` is 'pissa'"):
        compress(seeded(init_lora_weights="pissa")[0], seed=7)
    with pytest.raises(ValueError, match=r"for LoRA on Linear modules, and '.*embed_tokens' is none"):
        compress(seeded(target_modules=["embed_tokens", "q_proj"])[0], seed=7)
    with pytest.raises(ValueError, match="`seed` is for LoRA, whose start is random; the adapter is of SSF"):
        compress(trained(SSFConfig()), seed=7)


def test_a_start_that_is_drawn_otherwise(tmp_path: Path) -> None:
    """As with another version of torch: the file says so, and nothing else is loaded in its place."""
    model, _ = seeded()
    compress(model, seed=7).save_pretrained(tmp_path)
    file = tmp_path / PACKED
    header, good = read_packed(file), load_file(file)
    assert header.start is not None

    def write(**changes: Any) -> None:
        fields = {"version": 2, "kind": "ternary", "bits": 0, "shapes": header.shapes, "dtypes": header.dtypes}
        start = {**vars(header.start), **changes}
        save_file(good, file, metadata={"peft_ext_packed": json.dumps({**fields, "start": start})})

    write()
    read_packed(file).unpacked()
    write(seed=8)
    with pytest.raises(BadInput, match=r"start of seed 8.* is no longer drawn as it was"):
        read_packed(file).unpacked()
    name, (rank, inputs_, outputs, dtype) = next(iter(header.start.modules.items()))
    for changes, message in (
        ({"init": "pissa"}, "is damaged"),
        ({"modules": {}}, "is damaged"),
        ({"modules": {name: [rank, inputs_, dtype]}}, "is damaged"),
        ({"modules": {name: [rank, inputs_, outputs, "int8"]}}, "is damaged"),
        ({"modules": {name: [rank + 1, inputs_, outputs, dtype]}}, "parts do not fit together"),
    ):
        write(**changes)
        with pytest.raises(BadInput, match=message):
            read_packed(file).unpacked()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: compress(model, 0.0), "`keep` is a share above 0 and up to 1, got 0.0"),
        (lambda model: compress(model, 10), "`keep` is a share above 0 and up to 1, got 10"),
        (lambda model: compress(model, 0.1, "best"), "`scale` must be 'std', 'tune' or a number above 0, got 'best'"),
        (lambda model: compress(model, 0.1, -1.0), "`scale` must be 'std', 'tune' or a number above 0"),
        (lambda model: compress(model, 0.1, "tune"), "`scale='tune'` and `evaluate` go together"),
        (lambda model: compress("somewhere", 0.1, "tune", evaluate=lambda _: 0.0), "needs the model with the adapter"),
        (lambda model: compress(model, adapter_name="other"), "no adapter 'other' on this model, only"),
        (lambda model: binarize(model, 16), "`bits` must be 1 to 8, got 16"),
    ],
)
def test_bad_values(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lora())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BinaryLoraConfig(r=2), "BINARY_LOW_RANK, and is not made compressed: its weights are packed already"),
        (MaskLoraConfig(r=2), "MASK_PRUNING, which is not thinned out: a value of zero.* Adapters of .*LORA"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3, which is not thinned out"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "lora_magnitude_vector.* may not be thinned out"),
    ],
)
def test_methods_that_are_not_thinned_out(config: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compress(get_peft_model(tiny("llama"), config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BinaryLoraConfig(r=2), "and is not made binarized: its weights are packed already"),
        (MaskLoraConfig(r=2), "and is not made binarized: its masks go by the order of scores"),
        (VQTConfig(task_type="SEQ_CLS"), "and is not made binarized: its head would be rounded, too"),
    ],
)
def test_methods_that_are_not_rounded(config: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        binarize(get_peft_model(tiny("bert"), config))


def test_coefficients_and_magnitudes_of_fused_loras_are_not_rounded(tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path)
    model = get_peft_model(tiny("llama"), LoraFusionConfig(adapters=[str(tmp_path)], magnitude=True))
    with pytest.raises(BadInput, match="are few: `--to lora` writes one LoRA"):
        binarize(model)


def test_a_mixed_model_is_not_packed_as_one() -> None:
    for make in (compress, binarize):
        with pytest.raises(
            TypeError, match="A PeftMixedModel is not packed: give a PeftModel, or the directory of one"
        ):
            make(PeftMixedModel(tiny("llama"), SSFConfig()))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
        VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
        LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        SNELLConfig(r=2, init_weights=False),
        BinaryLoraConfig(r=2, bits=32, init_weights=False),
        BinaryAdapterConfig(r=2, bits=32, init_weights=False),
    ],
)
def test_adapters_of_any_method_are_rounded(config: Any, tmp_path: Path) -> None:
    """To 8 bits, so that the function is nearly the same; DoRA's magnitudes stay as they are."""
    model = get_peft_model(tiny("llama"), config).eval()
    packed = binarize(model, bits=8)
    packed.save_pretrained(tmp_path)
    loaded = peft_ext.load(tmp_path, tiny("llama")).eval()
    batch = inputs("llama")
    found, change = logits(loaded, batch), logits(model, batch) - logits(tiny("llama"), batch)
    assert packed.nbytes < packed.original_nbytes
    assert (found - logits(model, batch)).norm() < 0.1 * change.norm()


def test_an_untrained_adapter(tmp_path: Path) -> None:
    model = lora()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.zero_()
    with pytest.raises(ValueError, match="All values of the adapter are equal"):
        compress(model)


def test_damaged_files(tmp_path: Path) -> None:
    compress(lora()).save_pretrained(tmp_path)
    file = tmp_path / PACKED
    good = load_file(file)
    header = read_packed(file)

    def write(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
        fields = {"version": 1, "kind": "ternary", "bits": 0, "shapes": header.shapes, "dtypes": header.dtypes}
        save_file(tensors, file, metadata={"peft_ext_packed": json.dumps({**fields, **changes})})

    first = next(iter(header.shapes))
    for tensors, changes, message in (
        ({**good, "packed.index": good["packed.index"][:-1].clone()}, {}, "parts do not fit together"),
        ({**good, "packed.signs": good["packed.signs"][:-1].clone()}, {}, "parts do not fit together"),
        ({key: t for key, t in good.items() if key != "packed.magnitude"}, {}, "parts do not fit together"),
        (good, {"shapes": {**header.shapes, first: [1 << 30, 1 << 20]}}, "parts do not fit together"),
        (good, {"shapes": {**header.shapes, first: [-1]}}, "metadata of .* are damaged"),
        (good, {"kind": "codes", "bits": 9}, "metadata of .* are damaged"),
        (good, {"version": 3}, "was packed in version 3 of the format: `pip install -U peft-ext`"),
    ):
        write(tensors, **changes)
        with pytest.raises(BadInput, match=message):
            read_packed(file).unpacked()
    file.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="is no packed adapter, or is damaged"):
        peft_ext.load(tmp_path, tiny("llama"))


@pytest.mark.parametrize("form", ["compressed", "binarized"])
def test_command_line(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No base model is loaded; what is there already is not overwritten."""
    model = lora()
    model.save_pretrained(str(tmp_path / "lora"))
    arguments = ["export", str(tmp_path / "lora"), "--to", form, "--output", str(tmp_path / "small")]
    assert main(arguments) == 0 and "bytes of tensors as" in capsys.readouterr().out
    loaded = get_peft_model_state_dict(peft_ext.load(tmp_path / "small", tiny("llama")))
    expected = (compress if form == "compressed" else binarize)(model).tensors()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert main(arguments) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "lora")]) == 2 and "is what is read from" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*changes the base weights:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_was_taken_out_of_the_base(init: Any, tmp_path: Path) -> None:
    """Zeros in the adapter would leave the rest of the base; as plain LoRA, with twice the rank, it can be packed."""
    base = tiny("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = init
    for make in (compress, binarize):
        with pytest.raises(
            BadInput,
            match=rf"The adapter 'default' is not packed: `init_lora_weights` is '{init}', whose start is taken out of the base",
        ):
            make(model)
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(BadInput, match="path_initial_model_for_weight_conversion"):
        compress(tmp_path / "saved")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert compress(tmp_path / "plain").nbytes


@pytest.mark.parametrize("config", [{"loftq_config": {}, "init_lora_weights": "loftq"}, {"init_lora_weights": "new"}])
def test_a_start_in_a_file(config: dict[str, Any], tmp_path: Path) -> None:
    lora().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(BadInput, match="whose start is taken out of the base"):
        compress(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": False}))
    assert compress(tmp_path).nbytes


@pytest.mark.parametrize("fails", [False, True])
def test_tuning_leaves_more_bits_than_a_file_has(fails: bool) -> None:
    model = trained(SparseFTConfig(selection="random", density=0.05, save_dtype="bfloat16"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def evaluate(candidate: PeftModel) -> float:
        if fails:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        compress(model, scale="tune", evaluate=evaluate)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_tuning_an_adapter_that_does_not_act() -> None:
    model = lora()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    arguments: dict[str, Any] = {"scale": "tune", "evaluate": lambda _: 0.0}
    with pytest.raises(ValueError, match=r"adapter 'second', which is not active \(active are \['default'\]"):
        compress(model, adapter_name="second", **arguments)
    with model.disable_adapter(), pytest.raises(ValueError, match="or adapters are disabled"):
        compress(model, **arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the base: `model.unmerge_adapter\(\)`"):
        compress(model, **arguments)
    model.unmerge_adapter()
    compress(model, **arguments)
    model.set_adapter("second")
    compress(model, adapter_name="second", **arguments)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (float("nan"), ValueError, r"`evaluate` gave nan for the scale 0\.5"),
        (float("inf"), ValueError, r"`evaluate` gave inf for the scale 0\.5"),
        (None, TypeError, r"`evaluate` gave a NoneType for the scale 0\.5"),
    ],
)
def test_results_that_tell_no_best_scale(result: Any, error: type[Exception], message: str) -> None:
    model = lora()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        compress(model, scale="tune", evaluate=lambda _: result)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_beside_other_adapters(tmp_path: Path) -> None:
    """What PEFT's `load_adapter` cannot read; an ordinary adapter, too."""
    model = lora()
    expected = compress(model)
    expected.save_pretrained(tmp_path / "packed")
    model.save_pretrained(str(tmp_path / "whole"))
    own = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    for place in ("packed", "whole"):
        assert peft_ext.load(tmp_path / place, model, adapter_name=place) is model
    assert set(model.peft_config) == {"default", "packed", "whole"} and model.active_adapters == ["default"]
    found = get_peft_model_state_dict(model, adapter_name="packed")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.tensors().items())
    found = get_peft_model_state_dict(model, adapter_name="whole")
    assert all(torch.equal(found[key], tensor) for key, tensor in own.items())
    for options, message in (
        ({}, "`adapter_name` is None, and the model has the adapters"),
        ({"adapter_name": "default"}, "`adapter_name` is 'default', and"),
        ({"adapter_name": "new", "dtype": 1}, "dtype: no options of an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_ext.load(tmp_path / "packed", model, **options)
    with pytest.raises(BadInput, match=r"is packed already \(adapter_packed\.safetensors\)"):
        compress(tmp_path / "packed")
