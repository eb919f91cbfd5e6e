"""Running a command: quiet libraries, and errors as one line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

from ..core import BadInput


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Runs a command; returns its exit status: 0, or 2 after one line on stderr that says what was wrong."""
    try:
        with _quiet():
            command(arguments)
    except BadInput as error:
        print(f"peft-ext: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers reports of its loading, and what libraries tell each other."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def explained(what: str) -> Iterator[None]:
    """What the libraries refuse is bad input too: they say it in errors of these types."""
    try:
        yield
    except BadInput:
        raise
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError, UserWarning) as error:
        raise BadInput(f"{what}: {one_line(error)}") from error
