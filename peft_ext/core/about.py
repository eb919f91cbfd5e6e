"""The description of a method: what cards, inspection, the command line, figures and the docs say about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """What there is to say about a method, whatever it was trained on. Every field but the name may be left out.

    Args:
        name: The method's name in running text.
        idea: The rest of a sentence that begins with the name.
        paper: The address of the paper.
        bibtex: How to cite it.
        merges: Whether `merge_and_unload` works.
        limits: What the method cannot do; one sentence each.
        headline: The fields of the config that say most about an adapter.
    """

    name: str
    idea: str = ""
    paper: str = ""
    bibtex: str = ""
    merges: bool = True
    limits: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
