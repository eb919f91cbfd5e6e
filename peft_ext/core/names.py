"""What the name of a module tells."""

from __future__ import annotations

import re
from collections.abc import Iterable


def layer_and_type(name: str) -> tuple[int, str]:
    """The number of the layer that a module is in, -1 if in none, and its name within the layer.

    A model may have a second stack of layers; the name then begins with that of the stack, such as `decoder.`.
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is None:
        return -1, name
    stack = re.search(r"(?:^|\.)(decoder|text_model|vision_model)\.", name[: match.start() + 1])
    return int(match[1]), (f"{stack[1]}." if stack else "") + name[match.end() :]


def group_key(parts: Iterable[str]) -> str:
    """Names of modules as one key of a `ModuleDict`, which holds no dots; other parts give another key."""
    return "-".join(part.replace("-", "--") for part in parts)
