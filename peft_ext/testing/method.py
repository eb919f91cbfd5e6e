"""What the kit must know about a method, and how its tests choose the models that they run on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from warnings import catch_warnings, filterwarnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..calibrate import ACTIVATION
from ..channel_norms import ChannelNorms
from ..core import ExtConfig, features_of, tuner_of, unadapted_modules
from ..scores import ExactScores
from .models import PLAIN_TARGETS, tiny


NOTHING = r"(?!)"  # a regular expression that matches no name
Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A method under test: what it is, and what it claims. Only the first three are needed.

    Args:
        prefix: Of the method's parameters: its `peft_type` in lower case and an underscore.
        config: Makes a config from keyword arguments: the class, or `functools.partial(MineConfig, rank=2)`. Dropout
            must be zero.
        models: The tiny models to run it on, by their names in `peft_ext.testing.models`.
        fields: Config fields for one of the models, by its name, such as `{"t5": {"target_modules": ["q"]}}`.
        merges: Whether it can be merged.
        mixes_batches: Whether it takes `adapter_names`, one for each sample of a batch.
        unmixable: Models on which it does not, since an adapted module sees what is not per sample.
        inert: Regular expression of parameters whose gradient is zero by the method's maths.
        estimated: Regular expression of parameters whose gradient is not the derivative of the loss, by design.
        keeps_fp32: Parameters that stay in fp32 on a half-precision base, even if PEFT is told not to cast.
        looks_at_data: Whether it is calibrated first; the kit does it with random scores.
        counts: Buffers that change as training steps go by.
        always: Modules of Llama that are adapted whatever `target_modules` says.
        adapts_modules: Whether it changes modules of the backbone. If not, it reads a frozen one into a head of its own,
            so that one adapter is active at a time, and what is peculiar to targets is not asked of it.
        reference: The method's equation, for the test of random sequences; see `peft_ext.testing.sequences`.
    """

    prefix: str
    config: Callable[..., ExtConfig]
    models: tuple[str, ...]
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    merges: bool = True
    mixes_batches: bool = False
    unmixable: tuple[str, ...] = ()
    inert: str = NOTHING
    estimated: str = NOTHING
    keeps_fp32: str = NOTHING
    looks_at_data: bool = False
    counts: str = NOTHING
    always: str = NOTHING
    adapts_modules: bool = True
    reference: Callable[..., dict[str, torch.Tensor]] | None = None

    @property
    def few(self) -> tuple[str, ...]:
        """A plain module, a decoder and an image model, or the first model if there are none of them."""
        found = tuple(name for name in self.models if name in ("mlp", "llama", "vit"))
        return found or self.models[:1]

    def config_for(self, name: str, model: nn.Module | None = None, **fields: Any) -> ExtConfig:
        """A config for the tiny model `name`, or for `model`, if that is another one."""
        targets = {"target_modules": PLAIN_TARGETS[name]} if name in PLAIN_TARGETS else {}
        config = self.config(**{**targets, **self.fields.get(name, {}), **fields})
        if self.looks_at_data:
            model = model or tiny(name)
            tuner_of(config).take_scores(config, model, random_scores(config, model))
        return config

    @torch.no_grad()
    def randomize(self, model: nn.Module, adapter: str = "", seed: int = 0) -> None:
        """Moves the adapters (or one) far from the identity; the values depend on the site and `seed` alone."""
        for key, parameter in model.named_parameters():
            site, _, leaf = key.partition("." + self.prefix)
            if leaf and adapter in [*leaf.split(".")[1:], ""]:
                site = re.sub(r"base_model\.model\.|\.base_layer", "", site) + leaf.split(".")[0]
                generator = torch.Generator().manual_seed(zlib.crc32(site.encode()) + seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def adapted(self, name: str, *, dtype: torch.dtype | None = None, **fields: Any) -> PeftModel:
        """A tiny model with one random adapter, in eval mode."""
        model = get_peft_model(tiny(name).to(dtype or torch.float32), self.config_for(name, **fields))
        self.randomize(model)
        return model.eval()


def random_scores(config: ExtConfig, model: nn.Module) -> Any:
    """What a calibration with this config could have measured on the model: weights, or channels of activations."""
    tuner, generator = tuner_of(config), torch.Generator().manual_seed(0)
    if tuner.kind_for(config) == ACTIVATION:
        norms, modules = ChannelNorms(), dict(unadapted_modules(model))
        for key, site in tuner.channel_sites(config, model).items():
            width = features_of(modules[site.module])[0 if site.side == "inputs" else 1]
            norms.sums[key] = {0: torch.rand(width, generator=generator, dtype=torch.float64)}
        return norms
    scores = ExactScores({key: p.numel() for key, p in tuner.candidates(config, model).items()})
    for sums in scores.sums.values():
        sums.copy_(torch.rand(len(sums), generator=generator) * torch.rand(1, generator=generator))
    return scores


class ConformanceTests:
    """The base of all test classes of the kit: gives each test the models that concern it, as its argument `name`."""

    method: ClassVar[Method]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest for each test of the class."""
        if not isinstance(getattr(self, "method", None), Method):
            raise pytest.UsageError(
                f"{type(self).__name__} tests no method: give it one, `method = Method(prefix='mine_', "
                "config=MineConfig, models=('mlp', 'llama', 'vit'))`."
            )
        names = models_of(metafunc.function, self.method)
        if "name" in metafunc.fixturenames:
            skipped = pytest.param("", marks=pytest.mark.skip("does not concern this method"), id="none")
            metafunc.parametrize("name", names or [skipped])

    # shorter for the tests

    @property
    def adapted(self) -> Callable[..., Any]:
        """See `Method.adapted`."""
        return self.method.adapted

    @property
    def config_for(self) -> Callable[..., Any]:
        """See `Method.config_for`."""
        return self.method.config_for

    @property
    def randomize(self) -> Callable[..., None]:
        """See `Method.randomize`."""
        return self.method.randomize


# Decorators of tests


def on(select: Callable[[Method], Iterable[str]]) -> Callable[[Test], Test]:
    """Runs a test on these of a method's models; it is skipped where there are none."""

    def mark(test: Test) -> Test:
        test.models_of = select  # type: ignore[attr-defined]
        return test

    return mark


def among(*names: str) -> Callable[[Test], Test]:
    """Runs a test on those of a method's models that are among `names`."""
    return on(lambda method: [name for name in method.models if name in names])


everywhere = on(lambda method: method.models)
on_transformers = on(lambda method: [name for name in method.models if name not in PLAIN_TARGETS])
on_a_few = on(lambda method: method.few if method.adapts_modules else ())
on_any_few = on(lambda method: method.few)
mergeable = on(lambda method: method.models if method.merges else ())


def shows(capability: str, only_if: str = "") -> Callable[[Test], Test]:
    """Says what a test shows that a method can do, for tables; only if that field of `Method` is true."""

    def mark(test: Test) -> Test:
        test.shows = (capability, only_if)  # type: ignore[attr-defined]
        return test

    return mark


def models_of(test: Callable[..., Any], method: Method) -> list[str]:
    """The models that a test of the kit runs a method on."""
    select = getattr(test, "models_of", None)
    return list(method.models if select is None else select(method))


# What tests compare


def trained_parameters(model: nn.Module) -> set[str]:
    """The names of what `requires_grad`."""
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def warns_only(message: str) -> Iterator[None]:
    """Lets through the warning that PEFT gives here; all others stay what they are."""
    with catch_warnings():
        filterwarnings("ignore", message=message)
        yield


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5, what: str = "The outputs") -> None:
    """Asserts equality up to the rounding of another order of operations."""
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda message: f"{what} differ. {message}")


def same(a: torch.Tensor, b: torch.Tensor, what: str = "The outputs") -> None:
    """Equal up to the last bits: two runs of one product may differ by where in memory its factors lie."""
    torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5, msg=lambda message: f"{what} differ. {message}")


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs are those of different functions."""
    return not torch.allclose(a, b, atol=1e-4)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_state(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Asserts that two state dicts have the same keys and values, bit for bit; NaN equals NaN."""
    assert a.keys() == b.keys(), f"only in one of the two: {sorted(a.keys() ^ b.keys())}"
    changed = [key for key, value in a.items() if not torch.equal(value.nan_to_num(), b[key].nan_to_num())]
    assert not changed, f"these tensors changed: {changed}"
