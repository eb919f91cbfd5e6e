"""The pass over activations: against a plain computation in fp64, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import inputs, tiny

from peft_ext.channel_norms import ChannelSite, measure_channels


def _split(whole: dict[str, torch.Tensor], sizes: list[int]) -> dict[str, Any]:
    return {key: value.split(sizes) for key, value in whole.items()}


def test_norms_by_class_against_a_plain_computation() -> None:
    """The norm over all tokens but the first of the images of a class, in the mean over the classes."""
    model = tiny("vit").double()
    whole = {key: v.double() if v.is_floating_point() else v for key, v in inputs("vit", batch=12).items()}
    states = model(**whole, output_hidden_states=True).hidden_states[1].detach()  # (12, T, D), after the first block
    norms = [states[whole["labels"] == c][:, 1:].flatten(0, 1).norm(dim=0) for c in whole["labels"].unique()]
    site = ChannelSite("vit.layers.0", "outputs", skip=1, by_class=True)
    found = measure_channels(model, {"block": site}, [whole])
    torch.testing.assert_close(found.of("block"), torch.stack(norms).mean(0), atol=1e-6, rtol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[order] for key, value in whole.items()}
    parts = [{key: part[i] for key, part in _split(shuffled, [5, 1, 6]).items()} for i in range(3)]
    again = measure_channels(model, {"block": site}, parts)
    torch.testing.assert_close(again.of("block"), found.of("block"), atol=1e-7, rtol=1e-7)
    assert again.batches == 3


def test_means_of_a_row_by_class() -> None:
    model = tiny("vit").double()
    batch = {key: v.double() if v.is_floating_point() else v for key, v in inputs("vit", batch=6).items()}
    batch["labels"] = torch.tensor([2, 0, 2, 0, 0, 1])
    states = model(**batch, output_hidden_states=True).hidden_states[1].detach()  # after the first block
    site = ChannelSite("vit.layers.0", "outputs", by_class=True, row=0)
    parts = [{key: part[i] for key, part in _split(batch, [1, 5]).items()} for i in range(2)]
    found = measure_channels(model, {"block": site}, parts).means("block")
    assert list(found) == [0, 1, 2]
    for label, mean in found.items():
        torch.testing.assert_close(mean, states[batch["labels"] == label][:, 0].mean(0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_padding_does_not_count(side: str) -> None:
    model, batch = tiny("bert"), inputs("bert", batch=3)
    batch["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
    site = ChannelSite("bert.encoder.layer.1.output.dense", side)
    kept: list[torch.Tensor] = []
    hook = model.get_submodule(site.module).register_forward_hook(
        lambda _, args, output: kept.append(args[0] if side == "inputs" else output)
    )
    found = measure_channels(model, {"site": site}, [batch]).of("site")
    hook.remove()
    real = kept[0][batch["attention_mask"].bool()].double()
    torch.testing.assert_close(found, real.norm(dim=0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [7, 6])  # the encoder's own, and another
@pytest.mark.parametrize("told", ["decoder_attention_mask", "decoder_input_ids", "labels"])
def test_padding_of_each_stack_is_its_own(told: str, length: int) -> None:
    model, batch = tiny("t5"), inputs("t5", batch=3)
    batch = {"input_ids": batch["input_ids"], "attention_mask": torch.tensor([[1] * 2 + [0] * 5] * 3)}
    counts = torch.tensor([[1] * length, [1] * 4 + [0] * (length - 4), [1] + [0] * (length - 1)])
    tokens = torch.randint(3, 20, (3, length), generator=torch.Generator().manual_seed(0))
    batch["labels" if told == "labels" else "decoder_input_ids"] = tokens
    if told == "decoder_attention_mask":
        batch[told] = counts
    else:
        tokens[counts == 0] = -100 if told == "labels" else model.config.pad_token_id
    sites = {
        "own": ("decoder.block.0.layer.2.DenseReluDense.wi_0", counts),
        "crossed": ("decoder.block.0.layer.1.EncDecAttention.k", batch["attention_mask"]),
        "encoder": ("encoder.block.0.layer.1.DenseReluDense.wi_0", batch["attention_mask"]),
    }
    kept: dict[str, torch.Tensor] = {}
    for key, (module, _) in sites.items():
        model.get_submodule(module).register_forward_hook(lambda _, args, out, key=key: kept.update({key: args[0]}))
    found = measure_channels(model, {key: ChannelSite(m, "inputs") for key, (m, _) in sites.items()}, [batch])
    for key, (_, mask) in sites.items():
        torch.testing.assert_close(found.of(key), kept[key][mask.bool()].double().norm(dim=0), atol=1e-6, rtol=1e-6)


def test_the_model_is_left_alone_and_bad_input_is_refused() -> None:
    model = tiny("bert").train()
    site = {"site": ChannelSite("bert.encoder.layer.0.output.dense", "inputs")}
    measure_channels(model, site, [inputs("bert")])
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="gave no batch"):
        measure_channels(model, site, [])
    with pytest.raises(ValueError, match="must be a mapping"):
        measure_channels(model, site, [torch.zeros(2)])
    measure_channels(model, site, [inputs("bert")["input_ids"]], lambda model, ids: model(input_ids=ids))
    with pytest.raises(ValueError, match="never ran through 'bert"):
        measure_channels(model, site, [inputs("bert")], lambda model, batch: model.bert.embeddings(batch["input_ids"]))
