"""The config fields that every method has."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..version import __version__
from .registry import is_registered


LARGEST = torch.finfo(torch.float32).max
ADAPTER_FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)

_after_saving: list[Callable[[str], None]] = []


def after_saving(call: Callable[[str], None]) -> None:
    """Has `call` run on every directory that a config was saved in; cards put the code that loads the adapter there."""
    _after_saving.append(call)


@dataclass
class ExtConfig(PeftConfig):
    """The fields that every method of this package has.

    Args:
        target_modules: Names of the modules to adapt: a list of names (a module is taken if its full name equals one
            of them or ends with `"." +` one of them), a regular expression that must match the full name, or
            `"all-linear"`. `None` takes the method's default for the architecture.
        exclude_modules: Names, or a regular expression, of modules that are left alone although they match.
        modules_to_save: Names of modules that are trained in full and saved with the adapter, for example a fresh
            classification head.
        layers_to_transform: Index, or indices, of the layers to adapt; 0 counts as an index. Needs `target_modules`
            to be a list or `None`.
        layers_pattern: Name, or names, of the module list that holds the layers, if it is not found by itself.
        init_weights: How the adapter starts. `True` is the method's published initialisation. `False` adds noise to it,
            so that the model clearly differs from its base from the start; PEFT's convention, for tests.
        trainable_token_indices: Token ids whose embeddings are trained besides the adapter (a list for the input
            embedding, or a dict from embedding name to ids), as in PEFT's LoRA. TRL sets it when it adds a chat
            template's special tokens.
        peft_ext_version: Version of this package that wrote the config; filled in by itself.

    Raises:
        TypeError, ValueError: A field has a value that no method accepts; the message names the field.
    """

    METHOD: ClassVar[str] = ""
    SIZES: ClassVar[tuple[str, ...]] = ()  # fields that say how large tensors of the adapter are
    NAMED_STARTS: ClassVar[tuple[str, ...]] = ()  # what `init_weights` takes besides True and False
    STARTS_FROM_ADAPTER: ClassVar[bool] = False  # whether that may be the directory, or the name, of an adapter
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ()  # fields that a trained adapter's function does not depend on
    # no fields, so not in the JSON
    awaits_weights = False  # read from a file whose weights were not loaded yet
    # optimizer steps of the training that is under way, from a callback
    trainer_steps = None  # type: int | None
    # of a config that belongs to an adapter: what its model has filled in, as (what was asked for, what was found)
    filled_in = None  # type: dict[str, tuple[Any, Any]] | None

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the layers."}
    )
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "How the adapter starts: True as published, False clearly away from the base model."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained besides the adapter."}
    )
    peft_ext_version: str | None = field(
        default=None, metadata={"help": "Version of peft_ext that wrote this config; leave empty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_registered(type(self), self.METHOD):
            raise ValueError(
                f"{type(self).__name__} is not registered with PEFT as {self.METHOD!r}: the installed peft has a "
                "method of that name itself. Use PEFT's method, or install an older peft."
            )
        self.peft_type = PeftType(self.METHOD)
        self._check_numbers()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"`{name}` is no valid regular expression: {value!r} ({error}).") from None
            elif isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value):
                setattr(self, name, set(value))
            elif value is not None:
                raise TypeError(f"`{name}` must be a list of names or a string, got {value!r}.")
        indices = self.trainable_token_indices
        parts = [[]] if indices is None else list(indices.values()) if isinstance(indices, dict) else [indices]
        if not all(isinstance(part, list) and all(type(index) is int for index in part) for part in parts):
            raise TypeError(
                f"`trainable_token_indices` must be a list of token ids, or lists by name, got {indices!r}."
            )
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, (list, tuple, set)) else () if layers is None else (layers,)
        if not all(type(index) is int for index in numbers):
            raise TypeError(f"`layers_to_transform` must be an index or a list of indices, got {layers!r}.")
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"`modules_to_save` must be a list of names, got the string {self.modules_to_save!r}; "
                f"write [{self.modules_to_save!r}]."
            )
        kept = self.modules_to_save
        if kept is not None:
            if not (isinstance(kept, (list, tuple, set)) and all(isinstance(name, str) for name in kept)):
                raise TypeError(f"`modules_to_save` must be a list of names, got {kept!r}.")
            self.modules_to_save = kept if isinstance(kept, list) else sorted(kept)
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` has no effect when `target_modules` is a regular expression: put the layer "
                        "indices into the expression, or give `target_modules` as a list."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is set but `layers_to_transform` is not; set both or neither.")
        is_adapter = self.STARTS_FROM_ADAPTER and isinstance(self.init_weights, str) and self.init_weights != ""
        if not (isinstance(self.init_weights, bool) or self.init_weights in self.NAMED_STARTS or is_adapter):
            names = ["True", "False", *map(repr, self.NAMED_STARTS)]
            names += ["an adapter's directory or name"] if self.STARTS_FROM_ADAPTER else []
            raise ValueError(
                f"`init_weights` must be {', '.join(names[:-1])} or {names[-1]} for {self.METHOD}, got "
                f"{self.init_weights!r}."
            )
        self._check_version()

    def _check_numbers(self) -> None:
        """Refuses what is no number where one is wanted, and what no tensor of a model can hold.

        Either would otherwise end in the words of Python or torch, or in infinities.
        """
        inherited = PeftConfig.__dataclass_fields__
        for part in fields(self):
            value = getattr(self, part.name)
            kind, optional, _ = str(part.type).partition(" | None")
            is_number = kind in ("int", "float") and part.name not in inherited and not (optional and value is None)
            if is_number and isinstance(value, Real) and not isinstance(value, (int, float)):  # NumPy's: JSON has none
                value = int(value) if isinstance(value, Integral) else float(value)
                setattr(self, part.name, value)
            if is_number and not isinstance(value, Real):  # of which kind is for the methods themselves to say
                raise TypeError(f"`{part.name}` must be a number{' or None' if optional else ''}, got {value!r}.")
            if part.name == "seed" and type(value) is not int:
                raise TypeError(f"`seed` must be a whole number, got {value!r}.")
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
                raise ValueError(f"`{part.name}` must be a finite number that float32 can hold, got {value!r}.")

    def _check_version(self) -> None:
        if self.peft_ext_version is None:
            self.peft_ext_version = __version__
            return
        try:
            is_newer = Version(self.peft_ext_version).release[:2] > Version(__version__).release[:2]
        except InvalidVersion:
            raise ValueError(f"`peft_ext_version` is not a version: {self.peft_ext_version!r}.") from None
        if is_newer:
            warnings.warn(
                f"This adapter was written by peft_ext {self.peft_ext_version}, {__version__} is installed; if it does "
                "not behave as expected, run `pip install -U peft-ext`.",
                UserWarning,
                stacklevel=2,
            )

    def for_adapter(self, reopen: bool = True) -> Self:
        """A copy for one adapter, which its model may fill in: the user's config stays what was asked for.

        Args:
            reopen: Of a config that belongs to an adapter of another model, take back what that has filled in, unless
                it was changed since.
        """
        own = copy.copy(self)
        for name, value in vars(self).items():
            setattr(own, name, copy.copy(value) if isinstance(value, (list, set, dict)) else value)
        for name, (asked, found) in (own.filled_in or {}).items() if reopen else ():
            if is_same(getattr(own, name), found):
                setattr(own, name, asked)
        if reopen:
            own.filled_in = {}
        return own

    def note_filled_in(self, before: Mapping[str, Any]) -> None:
        """Notes what has changed since `vars(self)` was `before`."""
        now = {name: value for name, value in vars(self).items() if name not in ("filled_in", "modules_to_save")}
        changed = {name: (before.get(name), v) for name, v in now.items() if not is_same(before.get(name), v)}
        self.filled_in = {**(self.filled_in or {}), **changed}

    def is_of(self, other: ExtConfig) -> bool:
        """Whether this is the config of the adapter that has the config `other`, or a copy of it."""
        if self is other:
            return True
        if self.filled_in is None or type(self) is not type(other):
            return False
        ours, theirs = ({k: v for k, v in vars(c).items() if k != "awaits_weights"} for c in (self, other))
        return is_same(ours, theirs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Reads `adapter_config.json`; as in PEFT, the config is of the class of the method that the file names.

        Where that is another method than this class's, a warning says so.

        Raises:
            ValueError: No method of that name is known, or a field has a value that the method cannot use.
        """
        directory = str(args[0] if args else kwargs["pretrained_model_name_or_path"])
        try:
            config = super().from_pretrained(*args, **kwargs)
        except KeyError as error:
            raise ValueError(
                f"The adapter_config.json in {directory!r} is of the method {error.args[0]!r}, which neither the "
                f"installed peft nor peft_ext {__version__} has; run `pip install -U peft peft-ext`."
            ) from None
        if not isinstance(config, cls):
            warnings.warn(
                f"This is the config of an adapter of the method {config.peft_type.value}, not {cls.METHOD}: it is "
                f"returned as a {type(config).__name__}.",
                UserWarning,
                stacklevel=2,
            )
        if isinstance(config, ExtConfig):
            # a saved adapter says so; a config that was saved alone is as it was
            config.awaits_weights = config.inference_mode or _has_weights(directory, kwargs.get("subfolder"))
            config.check_sizes(directory, kwargs.get("subfolder"))
        return config

    def check_sizes(self, directory: str, subfolder: str | None = None) -> None:
        """Compares `sizes` with an adapter's file, if that is on this machine, before anything of such a size is made.

        Raises:
            ValueError: No tensor in the file has such a size.
        """
        file = os.path.join(directory, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        sizes = list(self.sizes())
        if not (sizes and os.path.isfile(file)):
            return
        try:
            with safe_open(file, "pt") as tensors:
                there = {size for key in tensors.keys() for size in tensors.get_slice(key).get_shape()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file!r} cannot be read, it is damaged or not complete: {error}") from None
        for name, size in sizes:
            if size not in there:
                raise ValueError(
                    f"`{name}` of adapter_config.json says {size}, and no tensor in {file!r} has such a size: the "
                    "two are not of one adapter. Restore the files that were saved."
                )

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Of what sizes there must be tensors in the adapter's file, with the field that says so."""
        for name in self.SIZES:
            value = getattr(self, name)
            for size in value.values() if isinstance(value, dict) else () if value is None else (value,):
                yield name, size

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; names come sorted, so that equal configs are written alike."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and how to load the adapter into the card that PEFT wrote beside it."""
        super().save_pretrained(save_directory, **kwargs)
        for call in _after_saving:
            call(save_directory)


def _has_weights(directory: str, subfolder: str | None) -> bool:
    return any(os.path.isfile(os.path.join(directory, subfolder or "", name)) for name in ADAPTER_FILES)


def is_same(first: Any, second: Any) -> bool:
    """Whether two values of config attributes are equal; they may hold tensors."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if is_dataclass(first) and not isinstance(first, type):
        return is_same(vars(first), vars(second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(is_same, first, second))
    return bool(first == second)
