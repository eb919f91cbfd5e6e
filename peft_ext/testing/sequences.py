"""Random sequences of what a user does with adapters, each step followed by a comparison with a dense reference.

Most faults come from two features that meet: a copy that is trained, a merge while another adapter is active, a forward
in inference mode before the first step. `SequenceTests` draws such sequences with hypothesis and prints one
that fails as a program. After each step

- every adapter holds the tensors that it must, bit for bit: only training moves them, and only those of active adapters;
- outputs and gradients are those of a float64 model whose weights are computed anew from the adapters' tensors by the
  method's equation (`Method.reference`; see `dense.DenseModel`). Without one, of a new model that the tensors are loaded
  into.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .dense import DenseModel, Tensors, adapter_tensors, as_reference
from .method import ConformanceTests, Method
from .models import inputs, logits, tiny


_tiny = functools.cache(tiny)  # copied, never changed
ADAPTERS = ("default", "second", "third", "ref")
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-6}
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}
seeds = st.integers(0, 1000)


class AdapterMachine(RuleBasedStateMachine):
    """A tiny model with adapters on it; subclasses have a method."""

    method: ClassVar[Method]

    def __init__(self) -> None:
        super().__init__()
        self.name = "mlp" if "mlp" in self.method.models else self.method.few[0]
        self.model_name = (
            "smooth_mlp" if self.name == "mlp" else self.name
        )  # a kink makes gradients depend on rounding
        self.dtype = torch.float32
        self.held: dict[str, dict[str, Tensors]] = {}  # what each adapter must hold
        self.active: list[str] = []
        self.merged: list[str] = []
        self.plain = self.base(torch.float64)
        self.dense = DenseModel(self.method, self.model_name) if self.method.reference is not None else None

    # What there is

    def base(self, dtype: torch.dtype | None = None) -> Any:
        """A new base model."""
        return copy.deepcopy(_tiny(self.model_name)).to(dtype or self.dtype)

    def batch(self) -> dict[str, Any]:
        """The one batch that all comparisons are made on."""
        given = inputs(self.name, batch=4)
        return {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in given.items()}

    def config(self) -> Any:
        """A new config for the model."""
        return self.method.config_for(self.name, self.base(torch.float32) if self.method.looks_at_data else None)

    def tensors(self, adapter: str) -> dict[str, Tensors]:
        """What an adapter holds now."""
        found = adapter_tensors(self.model, self.method.prefix, adapter)
        return {path: {leaf: tensor.clone() for leaf, tensor in own.items()} for path, own in found.items()}

    def take_note(self, adapter: str) -> None:
        """From now on the adapter must hold what it holds now."""
        self.held[adapter] = self.tensors(adapter)

    def free_names(self) -> list[str]:
        """Names of adapters that do not exist."""
        return [name for name in ADAPTERS if name not in self.held]

    def activate(self, adapters: list[str]) -> None:
        """Makes these the active adapters, in this order."""
        if len(adapters) == 1:
            self.model.set_adapter(adapters[0])
        else:
            self.model.base_model.set_adapter(adapters)
        self.active = adapters

    # Rules

    @initialize(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
    def start(self, seed: int, dtype: torch.dtype) -> None:
        """A model with one adapter."""
        self.dtype = dtype
        with quiet():
            self.model: Any = get_peft_model(self.base(), self.config()).eval()
        self.method.randomize(self.model, seed=seed)
        self.take_note("default")
        self.active = ["default"]

    @precondition(lambda self: self.free_names() and not self.merged)
    @rule(seed=seeds)
    def add(self, seed: int) -> None:
        """Adds an adapter, which is not active yet."""
        name = self.free_names()[0]
        with quiet():
            self.model.add_adapter(name, self.config())
        self.model.eval()
        self.method.randomize(self.model, name, seed=seed)
        self.take_note(name)
        self.check()

    @precondition(lambda self: self.free_names() and not self.merged)
    @rule(data=st.data())
    def copy_as_trl_does(self, data: st.DataObject) -> None:
        """TRL's way to a reference: an adapter with the config of another, and its parameters by name."""
        source, target = data.draw(st.sampled_from(sorted(self.held))), self.free_names()[-1]
        with quiet():
            self.model.add_adapter(target, self.model.peft_config[source])
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, parameter in parameters.items():
                if f".{target}." in key and self.method.prefix in key:
                    parameter.copy_(parameters[key.replace(f".{target}.", f".{source}.")])
        self.model.eval()
        self.held[target] = {path: dict(own) for path, own in self.held[source].items()}
        self.check()

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        """Makes one or several adapters active."""
        most = None if self.method.adapts_modules else 1
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=most, unique=True))
        self.activate(chosen)
        self.check()

    @precondition(lambda self: not self.merged)
    @rule(
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        steps=st.integers(1, 3),
        accumulation=st.integers(1, 2),
        before=st.sampled_from(["nothing", "no_grad", "inference_mode", "skipped step"]),
        data=st.data(),
    )
    def train(self, optimizer: str, steps: int, accumulation: int, before: str, data: st.DataObject) -> None:
        """Trains what is active; the other adapters must stay as they are."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        made = OPTIMIZERS[optimizer](trained)
        self.model.train()
        self.look(before)
        if before == "skipped step":
            self.loss().backward()
            made.zero_grad()
        for _ in range(steps):
            for _ in range(accumulation):
                (self.loss() / accumulation).backward()
            made.step()
            made.zero_grad(set_to_none=data.draw(st.booleans()))
        self.model.zero_grad()
        self.model.eval()
        assert all(parameter.isfinite().all() for parameter in trained), "training ends in numbers that are not finite"
        for adapter in self.active:
            self.take_note(adapter)
        self.check()

    @rule(how=st.sampled_from(["no_grad", "inference_mode"]))
    def look(self, how: str) -> None:
        """A forward without gradients."""
        if how in ("no_grad", "inference_mode"):
            with getattr(torch, how)():
                logits(self.model, self.batch())

    @precondition(lambda self: self.method.merges and not self.merged)
    @rule(data=st.data(), safely=st.booleans())
    def merge(self, data: st.DataObject, safely: bool) -> None:
        """Merges the active adapters, or others."""
        chosen = st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True)
        names = data.draw(st.one_of(st.none(), chosen))
        with quiet():
            self.model.merge_adapter(names, safe_merge=safely)
        self.merged = list(self.active if names is None else names)
        self.check()

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        """Takes them out again; the base has its own numbers back."""
        self.model.unmerge_adapter()
        self.merged = []
        self.check_base()
        self.check()

    @rule()
    def switch_off(self) -> None:
        """The base alone, for one forward; a merge does not outlive it."""
        with self.model.disable_adapter(), torch.no_grad():
            found = logits(self.model, self.batch())
            if self.merged:
                self.merged = []
            self.compare(found, logits(self.plain, self.doubled()), "With the adapters off, the outputs")
        self.check_base()
        self.check()

    @precondition(lambda self: len(self.held) > 1 and not self.merged)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Deletes an adapter; another one is made active if it was the only one that was."""
        name = data.draw(st.sampled_from(sorted(self.held)))
        with quiet():
            self.model.delete_adapter(name)
        del self.held[name]
        if name in self.active:
            self.activate([other for other in self.active if other != name] or sorted(self.held)[:1])
        self.check()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        """A copy takes the place of the model, which is spoilt."""
        original = self.model
        self.model = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.fill_(torch.nan)
        self.check()

    @precondition(lambda self: not self.merged)
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        """The whole model in another precision."""
        self.model.to(torch.float64).to(dtype)
        self.model.base_model.model.load_state_dict(self.base(dtype).state_dict(), strict=False)
        self.held = {
            adapter: {
                path: {leaf: t.to(dtype) if t.is_floating_point() else t for leaf, t in own.items()}
                for path, own in tensors.items()
            }
            for adapter, tensors in self.held.items()
        }
        self.dtype = dtype
        self.check()

    @precondition(lambda self: self.free_names() and not self.merged)
    @rule(data=st.data(), over=st.booleans())
    def save_and_load_beside(self, data: st.DataObject, over: bool) -> None:
        """Loads a saved adapter under another name, or over another adapter that exists."""
        source = data.draw(st.sampled_from(sorted(self.held)))
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = self.save(source, folder)
            others = [name for name in self.held if name != source]
            target = data.draw(st.sampled_from(others)) if over and others else self.free_names()[0]
            self.model.load_adapter(path, adapter_name=target, is_trainable=True)
        self.model.eval()
        self.activate(self.active)
        self.held[target] = {path: dict(own) for path, own in self.held[source].items()}
        self.check()

    @precondition(lambda self: not self.merged)
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def save_all_and_load_into_a_new_model(self, dtype: torch.dtype) -> None:
        """All adapters, in the order of their names, into a new base, in another precision perhaps."""
        self.cast(dtype)
        model: Any = None
        with tempfile.TemporaryDirectory() as folder, quiet():
            for name in sorted(self.held):
                path = self.save(name, folder)
                if model is None:
                    model = PeftModel.from_pretrained(self.base(), path, adapter_name=name, is_trainable=True)
                else:
                    model.load_adapter(path, adapter_name=name, is_trainable=True)
        self.model = model.eval()
        self.activate(self.active)
        self.check()

    def save(self, adapter: str, folder: str) -> str:
        """Saves one adapter; returns where."""
        path = Path(folder) if adapter == "default" else Path(folder) / adapter
        path.mkdir(exist_ok=True)
        (path / "README.md").write_text(
            "---\nlibrary_name: peft\n---\n"
        )  # PEFT adds to a card that is there; a new one takes it 0.1 s
        self.model.save_pretrained(folder, selected_adapters=[adapter])
        return str(path)

    # Comparisons

    def loss(self) -> torch.Tensor:
        """Smooth, of all outputs."""
        return logits(self.model, self.batch()).sin().sum()

    def doubled(self) -> dict[str, Any]:
        """The batch in float64."""
        return {k: value.double() if value.is_floating_point() else value for k, value in self.batch().items()}

    def compare(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Asserts that two tensors agree up to the rounding of the model's precision."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        error = (found.detach().double() - expected.detach().double()).abs().max().item()
        bound = TOLERANCE[self.dtype] * (1 + expected.abs().max().item())
        assert error <= bound, f"{what} differ from the reference by {error:.3g} (allowed: {bound:.1g})"

    def check_base(self) -> None:
        """The base has its own numbers, bit for bit."""
        own = {key: value.to(self.dtype) for key, value in self.plain.named_parameters()}
        for key, value in self.model.named_parameters():
            name = re.sub(r"^base_model\.model\.|\.base_layer", "", key)
            if name in own:
                assert torch.equal(value, own[name]), f"{name} of the base has changed"

    def check(self) -> None:
        """All that must hold after each step."""
        for adapter, expected in self.held.items():
            found = self.tensors(adapter)
            assert found.keys() == expected.keys(), f"adapter {adapter!r} is on {sorted(found)}"
            for path, own in expected.items():
                for leaf, tensor in own.items():
                    now = found[path][leaf]
                    is_same = now.dtype == tensor.dtype and torch.equal(now, tensor)
                    assert is_same, f"{path}.{leaf} of adapter {adapter!r} is not what it was"
        self.check_outputs()
        if not self.merged:
            self.check_gradients()

    def check_outputs(self) -> None:
        """Of the active or, if there are some, the merged adapters, in eval mode."""
        acting = self.merged or self.active
        with torch.no_grad():
            expected, _ = self.expected(acting, training=False)
            found = logits(self.model, self.batch())
        self.compare(found, expected, f"The outputs of {acting}{' merged' if self.merged else ''}")

    def check_gradients(self) -> None:
        """Of all parameters of the active adapters, in training mode; no others have any."""
        self.model.train()
        self.loss().backward()
        self.model.eval()
        _, gradients = self.expected(self.active, training=True)
        for key, parameter in self.model.named_parameters():
            if self.method.prefix not in key or re.fullmatch(self.method.estimated, key):
                assert parameter.grad is None or parameter.requires_grad, f"{key} has a gradient"
                continue
            name = key.removeprefix("base_model.model.")
            assert parameter.requires_grad == (name in gradients), (
                f"{key}: requires_grad is {parameter.requires_grad}; active: {self.active}"
            )
            if name in gradients:
                zero = torch.zeros_like(parameter)
                found = zero if parameter.grad is None else parameter.grad
                self.compare(found, gradients[name], f"The gradients of {name} with {self.active} active")
        self.model.zero_grad()

    def expected(self, adapters: list[str], training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Outputs, and gradients by parameter, of these adapters."""
        return (self._from_equation if self.dense is not None else self._from_new_model)(adapters, training)

    def _from_equation(self, adapters: list[str], training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self.dense is not None
        names = {name for name, _ in self.model.named_parameters()}
        copies, leaves = [], {}
        for adapter in adapters:
            wanted: dict[str, set[str]] = {}
            for path, own in self.held[adapter].items():
                for leaf in own:
                    module, _, rest = leaf.partition(".")
                    name = f"{path}.{module}.{adapter}.{rest}"
                    if f"base_model.model.{name}" in names:
                        wanted.setdefault(path, set()).add(leaf)
            copied = as_reference(self.held[adapter], wanted)
            copies.append(copied)
            for path, found in wanted.items():
                for leaf in found:
                    module, _, rest = leaf.partition(".")
                    leaves[f"{path}.{module}.{adapter}.{rest}"] = copied[path][leaf]
        configs = [self.model.peft_config[adapter] for adapter in adapters]
        with torch.enable_grad():
            outputs = logits(self.dense.put_on(copies, configs, training), self.doubled())
            wanted_leaves = list(leaves.values())
            gradients = torch.autograd.grad(outputs.sin().sum(), wanted_leaves, allow_unused=True)
        zeros = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        return outputs, {
            key: zeros[key] if gradient is None else gradient for key, gradient in zip(leaves, gradients, strict=True)
        }

    def _from_new_model(self, adapters: list[str], training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with quiet(), torch.enable_grad():
            model: Any = None
            for adapter in adapters:
                config = copy.deepcopy(self.model.peft_config[adapter])
                if model is None:
                    model = get_peft_model(self.base(), config, adapter_name=adapter)
                else:
                    model.add_adapter(adapter, config)
                set_peft_model_state_dict(model, get_peft_model_state_dict(self.model, adapter_name=adapter), adapter)
            model.base_model.set_adapter(adapters)
            model.train(training)
            outputs = logits(model, self.batch())
            outputs.sin().sum().backward()
        gradients = {
            key.removeprefix("base_model.model."): torch.zeros_like(p) if p.grad is None else p.grad
            for key, p in model.named_parameters()
            if p.requires_grad and self.method.prefix in key
        }
        return outputs, gradients


class quiet(warnings.catch_warnings):
    """Inside, PEFT's warnings about second adapters, names and cards are not shown."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def run_sequences(method: Method, number: int, steps: int = 8, seed: int | None = None, shorten: bool = False) -> None:
    """Draws sequences; the first that fails raises, with the program that it is in its notes.

    Args:
        method: The method.
        number: How many sequences.
        steps: The most steps in one.
        seed: For other sequences than the fixed ones of the tests.
        shorten: Whether to look for the shortest sequence that fails in the same way, which may take minutes.
    """
    machine: Any = type(f"{method.prefix.title().replace('_', '')}Machine", (AdapterMachine,), {"method": method})
    settings = hypothesis.settings(
        max_examples=number,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shorten else [])],
    )
    run_state_machine_as_test(machine if seed is None else hypothesis.seed(seed)(machine), settings=settings)


class SequenceTests(ConformanceTests):
    """Whatever is done with adapters, in whatever order, they are the functions that their tensors say."""

    sequences: ClassVar[int] = 200

    def test_random_sequences(self) -> None:
        run_sequences(self.method, self.sequences)
