"""Modules that an adapter cannot act on, most because the module around them reads their weight and does not call them.

`nn.MultiheadAttention` passes `out_proj.weight` to a function, WavLM's attention all of its projections, Mamba's fused
kernels those of `dt_proj` and `out_proj`. An adapter on such a module would train nothing, or act on one path only.
The routers of Llama 4 and PhiMoE are Linear modules that return tuples.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn


# methods of a module that do not compute its output
_OTHER_METHODS = re.compile(r"__init__|.*(init|reset|resize|tie|embeddings).*")
# what is asked of a weight without computing with it
_ABOUT_WEIGHT = {"dtype", "device", "shape", "size", "ndim", "numel", "dim", "data", "requires_grad", "is_meta"}
_TURNED = {"T", "mT", "H", "mH"}
_QUESTIONS = {"isinstance", "hasattr", "getattr", "type", "id"}


def uncalled_children(cls: type[nn.Module]) -> dict[str, str]:
    """Which attributes of `cls` are modules that it reads instead of calling them, each with how."""
    return _uncalled(cls)  # type: ignore[arg-type]  # (mypy: a class is hashable)


def uncalled_modules(model: nn.Module) -> dict[str, str]:
    """The modules of `model` that are read instead of called, by name, each with the reason."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _returns_several(type(module)):  # type: ignore[arg-type]
            found[name] = f"{type(module).__name__} returns more than the product with its weight"
        for child, how in uncalled_children(type(module)).items():
            if isinstance(getattr(module, child, None), nn.Module):
                found[f"{name}.{child}" if name else child] = f"{type(module).__name__} {how}"
    return found | _uncalled_copies(model)


def _uncalled_copies(model: nn.Module) -> dict[str, str]:
    """Embeddings whose weight other embeddings share, and which their own module never calls: `shared` of T5 and BART."""
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            sharing.setdefault(id(module.weight), []).append(name)
    found = {}
    for names in sharing.values():
        for name in names if len(names) > 1 else ():
            parent, _, child = name.rpartition(".")
            called = _called(type(model.get_submodule(parent)))  # type: ignore[arg-type]
            if called is not None and child not in called:
                others = ", ".join(other for other in names if other != name)
                found[name] = f"the model calls {others} in its place, whose weight it shares"
    return found


@cache
def _called(cls: type[nn.Module]) -> frozenset[str] | None:
    """The attributes of `cls` that its methods call; `None` where they cannot be read."""
    methods = _methods_of_a_model(cls)
    nodes = (node for method in methods.values() for node in ast.walk(method) if isinstance(node, ast.Call))
    return frozenset(child for node in nodes for child in _own_attribute(node.func)) if methods else None


@cache
def _uncalled(cls: type[nn.Module]) -> dict[str, str]:
    methods = _methods_of_a_model(cls)
    read: set[str] = set()
    passed: set[str] = set()
    operands: set[str] = set()
    called: set[str] = set()
    for name, method in methods.items():
        if _OTHER_METHODS.fullmatch(name):
            continue
        questions = {id(part) for node in _about_weights(method) for part in ast.walk(node)}
        for node in ast.walk(method):
            if isinstance(node, ast.Call):
                called |= set(_own_attribute(node.func))
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                passed |= {child for value in arguments if id(value) not in questions for child in _own_weight(value)}
            if isinstance(node, ast.BinOp):
                sides = [_bare(side) for side in (node.left, node.right)]
                operands |= {child for side in sides if id(side) not in questions for child in _own_weight(side)}
            if id(node) not in questions:
                read |= set(_own_weight(node))
    never = dict.fromkeys(sorted(read - called), "reads its weight and never calls it")
    never |= dict.fromkeys(sorted(operands & called), "computes with its weight on a path where it does not call it")
    return never | dict.fromkeys(sorted(passed & called), "hands its weight to a fused kernel on its fast path")


@cache
def _returns_several(cls: type[nn.Linear]) -> bool:
    """Whether a kind of Linear puts out a tuple, as the routers of some mixtures of experts do."""
    forward = _methods_of_a_model(cls).get("forward")
    returned = () if forward is None else (node.value for node in ast.walk(forward) if isinstance(node, ast.Return))
    return any(isinstance(value, ast.Tuple) for value in returned)


def _is_of_a_model(cls: type) -> bool:
    """Whether a class computes with children of its own; torch's other modules and the bases of models do not."""
    if cls is nn.MultiheadAttention:
        return True
    name = cls.__module__
    return issubclass(cls, nn.Module) and not (
        name.startswith(("torch.", "peft.", "peft_ext."))
        or (name.startswith("transformers.") and not name.startswith("transformers.models."))
    )


def _own_attribute(node: ast.AST) -> Iterator[str]:
    """`X` if the node is `self.X`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        yield node.attr


def _own_weight(node: ast.AST) -> Iterator[str]:
    """`X` if the node is `self.X.weight`."""
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        yield from _own_attribute(node.value)


def _bare(node: ast.expr) -> ast.expr:
    """A tensor without what only chooses of it, `W[:, 0]`, or turns it, `W.T`."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in _TURNED):
        node = node.value
    return node


def _about_weights(method: ast.FunctionDef) -> Iterator[ast.AST]:
    """The parts of a method that ask a weight for its dtype, shape and the like."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _ABOUT_WEIGHT:
            yield node.value
            continue
        is_question = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS
        if is_question or isinstance(node, ast.Compare):  # Gemma 4 looks up which token an embedding is of
            yield node


def _methods_of_a_model(cls: type[nn.Module]) -> dict[str, ast.FunctionDef]:
    """The methods of a class and its bases, those of torch and of the bases of models left out."""
    methods: dict[str, ast.FunctionDef] = {}
    for base in reversed(cls.__mro__):
        if _is_of_a_model(base):
            methods |= _methods(base)
    return methods


def _methods(cls: type) -> dict[str, ast.FunctionDef]:
    definition = _classes(cls.__module__).get(cls.__name__)
    if definition is None or cls.__qualname__ != cls.__name__:
        return {}
    return {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}  # typed in at a prompt, or compiled: what a layer's own record says at save is all there is
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
