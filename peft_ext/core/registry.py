"""The one place that changes PEFT: a `PeftType` member and a registry entry for each method.

`PeftType` is a closed enum, so a plug-in cannot name its methods without adding members, and PEFT and transformers
call `.value` on the type, so a plain string will not do.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from peft import PeftConfig, PeftType
from peft import __version__ as peft_version
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .about import About
from .lora import LORA
from .packages import OURS, distribution_of, is_plugin, version_of


StrEnum = TypeVar("StrEnum", bound=enum.Enum)


@dataclass(frozen=True)
class Method:
    """One registered method."""

    peft_type: str
    config: type[PeftConfig]
    model: type[BaseTuner]
    about: About

    @property
    def package(self) -> str:
        """The top-level package that must be imported before PEFT knows the method."""
        return self.config.__module__.partition(".")[0]

    @property
    def distribution(self) -> str | None:
        """The name by which that package is installed with pip, `None` if it was not."""
        return distribution_of(self.package)

    @property
    def version(self) -> str | None:
        """The version of that package, `None` if it was not installed."""
        return version_of(self.package)

    @property
    def import_name(self) -> str:
        """What to import so that PEFT knows the method: `peft_ext`, where that imports the package by itself."""
        return OURS if is_plugin(self.package) else self.package

    @property
    def cuts(self) -> bool:
        """Whether `prune_and_unload` can cut a model by its adapters."""
        return bool(getattr(self.model, "cuts", False))

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{self.peft_type.lower()}_"


_methods: dict[str, Method] = {}  # by `peft_type`
_BUILT_IN = {"LORA": LORA}  # what is said here about PEFT's own methods


def methods() -> dict[str, Method]:
    """All methods that were registered through this package, by `peft_type`, in the order of their registration."""
    return dict(_methods)


def method_of(peft_type: str) -> Method | None:
    """The registered method of this `peft_type`, `None` if there is none."""
    return _methods.get(peft_type)


def about_of(peft_type: str) -> About:
    """The description of a method, registered or PEFT's own; one with nothing but its name if it has none."""
    method = _methods.get(peft_type)
    return _BUILT_IN.get(peft_type) or About(peft_type) if method is None else method.about


def add_member(enum_class: type[StrEnum], name: str) -> StrEnum:
    """Adds the member `name`, whose value is `name` too, to a `str` enum and returns it; a second call is a no-op.

    The member behaves like one that was written in the class: lookup by name and value, iteration, equality with the
    string, pickle, deepcopy and JSON.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member: Any = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class.__members__)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    getattr(enum_class, "_hashable_values_", []).append(name)  # where Python 3.14 looks for `"SSF" in PeftType`
    # `EnumType.__setattr__` refuses to rebind members; Python 3.11 finds members through the map, 3.12 and later
    # through the class attribute.
    type.__setattr__(enum_class, name, member)
    return member


def register_method(
    name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], about: About | None = None
) -> bool:
    """Makes a method known to PEFT under `name` (lower case), so that it is used like a built-in one.

    Args:
        name: The method's `peft_type` in lower case; the prefix of its tensors is this and an underscore.
        config_cls: Its config, an `ExtConfig`.
        model_cls: Its tuner, an `ExtModel`.
        about: What cards, inspection and the command line say about it; may be left out.

    Returns whether our method is registered. If PEFT itself ships a method of this name, PEFT's stays in place: a
    warning says so, and our config class then refuses to be constructed. Calling it again is a no-op.

    Raises:
        ValueError: A method of this name is registered already, from another package.
    """
    type_name = name.upper()
    known = _registered_config(type_name)
    if known is config_cls:
        _methods[type_name] = Method(type_name, config_cls, model_cls, about or about_of(type_name))
        return True
    if (other := _methods.get(type_name)) and other.package != config_cls.__module__.partition(".")[0]:
        raise ValueError(
            f"Two packages bring a method called {type_name!r}: {other.config.__module__} has registered its "
            f"{other.config.__name__}, and {config_cls.__module__} would replace it by its {config_cls.__name__}. "
            "Register one of them under another name, or uninstall one."
        )
    if type_name in PeftType.__members__ and (known is None or known.__module__.startswith("peft.")):
        warnings.warn(
            f"peft {peft_version} ships a method called {type_name!r} of its own, so peft_ext does not register its "
            f"{config_cls.__name__}. Use PEFT's method, or install an older peft to keep using peft_ext's.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    peft_type = add_member(PeftType, type_name)
    for registry in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        registry.pop(peft_type, None)
    register_peft_method(
        name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_", is_mixed_compatible=True
    )
    _methods[type_name] = Method(type_name, config_cls, model_cls, about or About(type_name))
    return True


def is_registered(config_cls: type[PeftConfig], peft_type: str) -> bool:
    """Whether PEFT resolves `peft_type` to this very config class."""
    return _registered_config(peft_type) is config_cls


def _registered_config(peft_type: str) -> type[PeftConfig] | None:
    registry: dict[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING  # its members hash like their values
    return registry.get(peft_type)
