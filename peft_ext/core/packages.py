"""Which installed packages bring methods, and loading them."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version

from ..version import __version__


GROUP = "peft_ext.methods"
OURS = __name__.partition(".")[0]


def load_plugins() -> None:
    """Imports the modules that installed packages name in the entry-point group `peft_ext.methods`.

    Importing such a module registers the package's methods. One that fails is a `UserWarning` and nothing else.
    """
    for entry in entry_points(group=GROUP):
        try:
            if entry.attr:
                raise ValueError(f"the entry point must name a module, and names {entry.value!r}")
            import_module(entry.module)
        except Exception as error:  # noqa: BLE001  # whatever other people's code does
            warnings.warn(
                f"The package {_distribution(entry)} brings methods for peft_ext ({entry.value}), but they could not "
                f"be loaded: {type(error).__name__}: {error}. Update or uninstall it.",
                UserWarning,
                stacklevel=2,
            )


def is_plugin(package: str) -> bool:
    """Whether importing `peft_ext` imports the methods of this top-level package."""
    return any(entry.module.partition(".")[0] == package for entry in entry_points(group=GROUP))


@cache
def distribution_of(package: str) -> str | None:
    """The name by which the top-level package is installed, `None` if it was not installed at all."""
    if package == OURS:
        return "peft-ext"
    for entry in entry_points(group=GROUP):
        if entry.module.partition(".")[0] == package and entry.dist is not None:
            return entry.dist.name
    return next(iter(packages_distributions().get(package, ())), None)


def version_of(package: str) -> str | None:
    """The version of the installed top-level package, `None` if it was not installed."""
    distribution = distribution_of(package)
    if package == OURS:
        return __version__
    try:
        return None if distribution is None else version(distribution)
    except PackageNotFoundError:
        return None


def _distribution(entry: EntryPoint) -> str:
    return entry.module.partition(".")[0] if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
