"""The conformance kit has teeth: a method that is broken on purpose fails, and in the test that is about the fault.

`ToyLayer` is sound, and the whole kit passes on it. Each row of `FAULTS` breaks one thing about it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from peft_ext.core import AdapterVector, ExtConfig, ExtLayer, ExtModel, register_method
from peft_ext.testing import Method, MethodConformance


@dataclass
class ToyConfig(ExtConfig):
    """`factor` stands for a field that matters after loading."""

    METHOD = "TOY"
    factor: float = 1.0


class ToyLayer(ExtLayer):
    """`y = factor * (1 + s) * (W x + b) + t` on a Linear; `toy_scale` holds s, `toy_shift` t."""

    adapter_layer_names = ("toy_scale", "toy_shift")
    other_param_names: tuple[str, ...] = ("factor",)
    supports_mixed_batches = True

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.factor: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: ToyConfig) -> None:
        for leaves, offset in ((self.toy_scale, 1.0), (self.toy_shift, 0.0)):
            leaves[adapter_name] = AdapterVector(self.get_base_layer().out_features, offset)
        self.factor[adapter_name] = config.factor
        self.finish_update(adapter_name, config)

    def vectors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factor[name] * self.toy_scale[name](), self.toy_shift[name]()

    def adapted_forward(self, adapters: list[str], x: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(x)
        for name in adapters:
            scale, shift = self.vectors(name)
            output = (output * scale + shift).to(output.dtype)
        return output

    def mixed_batch_forward(self, adapter_names: list[str], x: torch.Tensor) -> torch.Tensor:
        output = self.base_layer(x)
        changed = [
            row * self.vectors(name)[0] + self.vectors(name)[1] if name in self.toy_scale else row
            for name, row in zip(adapter_names, output, strict=True)
        ]
        return torch.stack(changed).to(output.dtype)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        base = self.get_base_layer()
        scale, shift = self.vectors(adapter_name)
        bias = shift if base.bias is None else base.bias * scale + shift
        return {"weight": base.weight * scale[:, None], "bias": bias}


class ToyModel(ExtModel):
    prefix = "toy_"
    tuner_layer_cls = ToyLayer
    target_module_mapping: ClassVar = {"vit": ["q_proj", "fc1", "fc2"]}


class Kit(MethodConformance):
    """No `Test` in front: pytest does not collect it."""

    method = Method(
        prefix="toy_",
        config=partial(ToyConfig, factor=1.5),
        models=("mlp", "vit"),
        fields={"mlp": {"target_modules": ["fc1", "fc2"]}},
        mixes_batches=True,
    )


@pytest.fixture(scope="module", autouse=True)
def toy(own_registry: None) -> None:
    """Registers the method for these tests alone."""
    assert register_method("toy", ToyConfig, ToyModel)


class TestToy(Kit):
    """The sound method passes."""


# Faults: each is given `monkeypatch.setattr`

Patch = Callable[..., None]
FAULTS: dict[str, tuple[Callable[[Patch], None], str, str, str]] = {}


def fault(test: str, name: str = "mlp", match: str = "differ") -> Callable[[Callable[[Patch], None]], None]:
    """Which test of the kit must fail on which model, with what in its message."""

    def enter(breaks: Callable[[Patch], None]) -> None:
        FAULTS[breaks.__name__] = (breaks, test, name, match)

    return enter


def after_update(patch: Patch, act: Callable[[Any, str], None]) -> None:
    """Lets `act(layer, adapter_name)` follow on each `update_layer`."""
    sound = ToyLayer.update_layer

    def update_layer(self: Any, adapter_name: str, config: Any) -> None:
        sound(self, adapter_name, config)
        act(self, adapter_name)

    patch(ToyLayer, "update_layer", update_layer)


def after_forward(patch: Patch, act: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Lets `act(layer, output)` follow on each adapted forward."""
    sound = ToyLayer.adapted_forward
    patch(ToyLayer, "adapted_forward", lambda self, adapters, x: act(self, sound(self, adapters, x)))


@fault("test_save_and_load", match="toy_shift|differ|missing")
def a_tensor_is_missing_on_disk(patch: Patch) -> None:
    def stored_tensors(
        cls: Any, model: Any, config: Any, adapter_name: str, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        return {key: value for key, value in tensors.items() if "toy_shift" not in key}

    patch(ToyModel, "stored_tensors", classmethod(stored_tensors))


@fault("test_save_and_load")
def a_field_is_missing_on_disk(patch: Patch) -> None:
    sound = ToyConfig.to_dict
    patch(ToyConfig, "to_dict", lambda self: {k: v for k, v in sound(self).items() if k != "factor"})


@fault("test_config_round_trip", match="factor")
def a_field_is_missing_in_the_config_file(patch: Patch) -> None:
    sound = ToyConfig.to_dict
    patch(ToyConfig, "to_dict", lambda self: {k: v for k, v in sound(self).items() if k != "factor"})


@fault("test_loading_is_deterministic", match="tensors changed")
def loading_is_random(patch: Patch) -> None:
    def act(layer: Any, adapter: str) -> None:
        layer.register_buffer(f"noise_{adapter}", torch.rand(2), persistent=False)

    after_update(patch, act)


@fault("test_save_and_load")
def what_is_drawn_at_random_matters_and_is_not_saved(patch: Patch) -> None:
    after_update(patch, lambda layer, adapter: layer.factor.update({adapter: 1 + torch.rand(()).item()}))


@fault("test_a_copy_is_independent", match="changed|assert")
def a_copy_shares_its_layers(patch: Patch) -> None:
    patch(ToyLayer, "__deepcopy__", lambda self, memo: self, raising=False)


@fault("test_state_dict_of_the_whole_model_copy_and_pickle", match="pickle|local")
def a_layer_cannot_be_pickled(patch: Patch) -> None:
    after_update(patch, lambda layer, adapter: setattr(layer, "activation", lambda x: x))


@fault("test_merge_and_unload")
def one_tensor_is_forgotten_in_the_merge(patch: Patch) -> None:
    def merged_tensors(self: Any, adapter_name: str) -> dict[str, torch.Tensor]:
        return {"weight": self.get_base_layer().weight * self.vectors(adapter_name)[0][:, None]}

    patch(ToyLayer, "merged_tensors", merged_tensors)


@fault("test_merging_several_adapters")
def a_merge_overwrites_the_one_before(patch: Patch) -> None:
    sound = ToyLayer.merged_tensors

    def merged_tensors(self: Any, adapter_name: str) -> dict[str, torch.Tensor]:
        current = self.get_base_layer().weight
        original = self._unmerged.get("weight", current)
        scale = self.vectors(adapter_name)[0][:, None]
        return {**sound(self, adapter_name), "weight": original * scale}

    patch(ToyLayer, "merged_tensors", merged_tensors)


@fault("test_merging_in_another_order_is_exact_or_refused")
def a_scale_is_said_to_add(patch: Patch) -> None:
    patch(ToyLayer, "adds", True)


@fault("test_merge_and_unmerge", match="tensors changed|only in one")
def a_merge_is_not_undone(patch: Patch) -> None:
    patch(ToyLayer, "unmerge", lambda self: self.merged_adapters.clear())


@fault("test_merge_and_unmerge", match="tensors changed|only in one")
def a_merge_is_undone_by_dividing(patch: Patch) -> None:
    def unmerge(self: Any) -> None:
        base = self.get_base_layer()
        for name in reversed(self.merged_adapters):
            scale, shift = self.vectors(name)
            base.weight.data = base.weight.data / scale.detach()[:, None]
            base.bias.data = (base.bias.data - shift.detach()) / scale.detach()
        self.merged_adapters.clear()

    patch(ToyLayer, "unmerge", unmerge)


@fault("test_safe_merge_finds_nan_and_changes_nothing", match="DID NOT RAISE")
def a_safe_merge_is_not_safe(patch: Patch) -> None:
    patch(ToyLayer, "checked_merge", lambda self, name, safe_merge: self.merged_tensors(name))


@fault("test_merge_in_half_precision", match=r"assert")
def a_merge_changes_the_dtype(patch: Patch) -> None:
    def set_base_tensor(self: Any, key: str, value: torch.Tensor) -> None:
        base = self.get_base_layer()
        self._unmerged.setdefault(key, None if getattr(base, key) is None else getattr(base, key).data)
        setattr(base, key, nn.Parameter(value.float(), requires_grad=False))

    patch(ToyLayer, "_set_base_tensor", set_base_tensor)


@fault("test_training_a_merged_model_is_refused", match="DID NOT RAISE")
def training_a_merged_model_is_let_through(patch: Patch) -> None:
    patch(ToyLayer, "_refuse_training_while_merged", lambda self: None)


@fault("test_unload_gives_the_base_back", match="assert")
def a_hook_stays_behind(patch: Patch) -> None:
    after_update(patch, lambda layer, adapter: layer.base_layer.register_forward_hook(_no_change) and None)


def _no_change(module: nn.Module, args: Any, output: Any) -> None: ...


@fault("test_unload_gives_the_base_back", match="tensors changed")
def the_base_is_changed_when_it_is_adapted(patch: Patch) -> None:
    def act(layer: Any, adapter: str) -> None:
        layer.base_layer.weight.data.mul_(1.01)

    after_update(patch, act)


@fault("test_disabling")
def disabling_is_ignored(patch: Patch) -> None:
    patch(ToyLayer, "disable_adapters", property(lambda self: False))


@fault("test_several_active_adapters_and_deletion", match="assert")
def only_the_first_active_adapter_acts(patch: Patch) -> None:
    sound = ToyLayer.adapted_forward
    patch(ToyLayer, "adapted_forward", lambda self, adapters, x: sound(self, adapters[:1], x))


@fault("test_several_active_adapters_and_deletion", match="assert")
def an_adapter_reads_the_tensors_of_another(patch: Patch) -> None:
    sound = ToyLayer.vectors
    patch(ToyLayer, "vectors", lambda self, name: sound(self, next(iter(self.toy_scale))))


@fault("test_one_batch_through_several_adapters")
def one_adapter_serves_the_whole_batch(patch: Patch) -> None:
    sound = ToyLayer.mixed_batch_forward

    def mixed_batch_forward(self: Any, adapter_names: list[str], x: torch.Tensor) -> torch.Tensor:
        return sound(self, adapter_names[:1] * len(adapter_names), x)

    patch(ToyLayer, "mixed_batch_forward", mixed_batch_forward)


@fault("test_a_deleted_adapter_leaves_nothing_behind", match="fc1.factor")
def an_attribute_is_left_behind(patch: Patch) -> None:
    patch(ToyLayer, "other_param_names", ())


def after_injection(patch: Patch, act: Callable[[nn.Module], Any]) -> None:
    """Lets `act(layer)` follow for each layer once an adapter is on the model."""

    def finish_injection(cls: Any, model: nn.Module, config: Any, adapter_name: str) -> None:
        for layer in model.modules():
            if isinstance(layer, ToyLayer):
                act(layer)

    patch(ToyModel, "finish_injection", classmethod(finish_injection))


@fault("test_requires_grad", match="assert")
def the_base_is_trained_too(patch: Patch) -> None:
    after_injection(patch, lambda layer: layer.base_layer.requires_grad_(True))


@fault("test_requires_grad", match="assert")
def an_adapter_that_is_not_active_is_trained(patch: Patch) -> None:
    after_injection(patch, lambda layer: layer.toy_scale.requires_grad_(True))


@fault("test_a_forward_changes_nothing", match="in place")
def the_input_is_changed_in_place(patch: Patch) -> None:
    sound = ToyLayer.adapted_forward
    patch(ToyLayer, "adapted_forward", lambda self, adapters, x: sound(self, adapters, x.mul_(1.01)))


@fault("test_a_forward_changes_nothing", match="calls")
def a_forward_in_eval_mode_counts(patch: Patch) -> None:
    after_update(patch, lambda layer, adapter: layer.register_buffer("calls", torch.zeros(())))

    def act(layer: Any, output: torch.Tensor) -> torch.Tensor:
        layer.calls += 1
        return output

    after_forward(patch, act)


@fault("test_samples_do_not_see_each_other", match="one by one differ")
def a_batch_is_normalised(patch: Patch) -> None:
    after_forward(patch, lambda layer, output: output - 0.1 * output.mean(0, keepdim=True))


@fault("test_every_trainable_parameter_moves_and_nothing_else", match="toy_shift")
def a_trainable_never_moves(patch: Patch) -> None:
    sound = ToyLayer.vectors
    patch(ToyLayer, "vectors", lambda self, name: (sound(self, name)[0], sound(self, name)[1].detach()))


@fault("test_gradients_are_the_derivatives_of_the_loss", match="toy_scale.*gradient gives")
def a_gradient_is_half_of_what_it_is(patch: Patch) -> None:
    def vectors(self: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.factor[name] * self.toy_scale[name]()
        return (scale + scale.detach()) / 2, self.toy_shift[name]()

    patch(ToyLayer, "vectors", vectors)


@fault("test_gradients_are_the_derivatives_of_the_loss", match="gradient gives")
def the_gradient_of_the_input_is_cut(patch: Patch) -> None:
    sound = ToyLayer.adapted_forward
    patch(ToyLayer, "adapted_forward", lambda self, adapters, x: sound(self, adapters, x.detach()))


@fault("test_half_precision_base", match="assert|mixed dtype")
def the_output_has_the_wrong_dtype(patch: Patch) -> None:
    after_forward(patch, lambda layer, output: output.float())


@fault("test_half_precision_base", match="assert")
def the_adapter_has_the_wrong_dtype(patch: Patch) -> None:
    after_update(patch, lambda layer, adapter: layer.toy_scale.double() and None)


@fault("test_gradient_checkpointing", name="vit")
def the_second_forward_is_another_one(patch: Patch) -> None:
    def act(layer: Any, output: torch.Tensor) -> torch.Tensor:
        layer.calls = layer.__dict__.get("calls", 0) + 1
        return output * (1 + layer.calls % 2) if layer.training else output

    after_forward(patch, act)


@fault("test_beside_lora_in_a_mixed_model", match="assert|differ")
def an_adapter_goes_past_the_one_below(patch: Patch) -> None:
    def adapted_forward(self: Any, adapters: list[str], x: torch.Tensor) -> torch.Tensor:
        output = self.get_base_layer()(x)
        for name in adapters:
            scale, shift = self.vectors(name)
            output = output * scale + shift
        return output

    patch(ToyLayer, "adapted_forward", adapted_forward)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, test, name, match = FAULTS[fault]
    breaks(monkeypatch.setattr)
    failed = []
    for arguments in calls(getattr(Kit, test), name, tmp_path):
        try:
            getattr(Kit(), test)(**arguments)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            failed.append(str(error))
    assert failed, f"{test} lets it through"
    assert any(re.search(match, message) for message in failed), failed


def calls(test: Callable[..., Any], name: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The arguments of a test of the kit on one model, once for each value that it is parametrised over."""
    wanted = inspect.signature(test).parameters
    own = {key: value for key, value in (("name", name), ("tmp_path", tmp_path)) if key in wanted}
    combinations: list[dict[str, Any]] = [own]
    for mark in getattr(test, "pytestmark", ()):
        argument, values = mark.args
        combinations = [{**chosen, argument: value} for chosen in combinations for value in values]
    return iter(combinations)
