"""Asking what is where in a model: its blocks, what each module in them does, embeddings, norms, head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from ..core import backbone_modules, head_modules, unadapted_modules
from .layout import Architecture, Attention, FeedForward
from .table import ARCHITECTURES, architecture_of


ROLES = ("q", "k", "v", "o", "gate", "up", "down", "norm", "embedding", "head")


@dataclass(frozen=True)
class BlockAttention:
    """One attention of a block, with full names; `names` are those relative to the block."""

    module: str
    q: str
    k: str
    v: str
    o: str
    names: Attention


@dataclass(frozen=True)
class BlockFeedForward:
    """One feed-forward part of a block, with full names; `None` stands for a gate or norm that it has not."""

    up: str
    down: str
    gate: str | None
    norm: str | None = None


@dataclass
class Block:
    """One block of a model.

    Attributes:
        name: Its full name, `"bert.encoder.layer.0"`.
        stack: The module list it is in.
        index: Its number there.
        attention: Its attentions: self-attention first.
        ffn: Its feed-forward parts.
        norms: The full names of its norms, in the order of the model's modules.
    """

    name: str
    stack: str
    index: int
    attention: list[BlockAttention] = field(default_factory=list)
    ffn: list[BlockFeedForward] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Description:
    """What is where in one model; made by [`describe`].

    Attributes:
        model_type: Of its config, if it has one.
        architecture: The entry of the table, if there is one.
        blocks: All blocks, in the order of the model's modules; of several stacks one after the other.
        embeddings: The modules that make vectors of tokens or patches.
        norms: All norms of the backbone, those of the blocks included.
        head: The modules outside the backbone with parameters: what a task adds.
        roles: What each module does, by its full name; a module that makes several things has several roles.
    """

    model_type: str | None
    architecture: Architecture | None
    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]

    @cached_property
    def stacks(self) -> dict[str, list[Block]]:
        """The blocks by the module list that they are in."""
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.stack, []).append(block)
        return found

    def role_of(self, name: str) -> tuple[str, ...]:
        """What the module does: some of `ROLES`; empty if the table does not say."""
        return self.roles.get(name, ())

    def modules(self, roles: Iterable[str]) -> list[str]:
        """The full names of the modules with one of these roles, in the order of the model's modules.

        Raises:
            ValueError: There is no such role, or the model has none of them; the message says which it has.
        """
        wanted = set(roles)
        if unknown := wanted - set(ROLES):
            raise ValueError(f"There are no roles {sorted(unknown)}; there are {', '.join(ROLES)}.")
        found = [name for name, own in self.roles.items() if wanted & set(own)]
        if not found:
            if self.architecture is None:
                known = f"it knows {', '.join(ARCHITECTURES)}"
                raise ValueError(
                    f"The table of architectures does not know models of type {self.model_type!r}, so it is not known "
                    f"which modules are {', '.join(sorted(wanted))}; {known}. Name them in `target_modules`."
                )
            there = sorted({role for own in self.roles.values() for role in own})
            raise ValueError(
                f"A model of type {self.model_type!r} has no modules with the roles {', '.join(sorted(wanted))}; it "
                f"has {', '.join(there)}. Name others in `target_modules`."
            )
        return found


def describe(model: nn.Module) -> Description:
    """What is where in `model`, with adapters on it or not; names are those without adapters.

    A model that the table does not know, or that is no transformers model, has norms, embeddings and a head, which its
    modules show, but no blocks.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    backbone_config = getattr(config, "backbone_config", None)  # of heads for segmentation or depth on any backbone
    architecture = architecture_of(model_type) or architecture_of(getattr(backbone_config, "model_type", None))
    modules = dict(unadapted_modules(model))
    backbone = {name for name, _ in backbone_modules(model)}
    blocks = _blocks(architecture or Architecture(), modules)
    every_norm = [name for name, module in modules.items() if is_norm(module)]
    norms = tuple(name for name in every_norm if name in backbone)
    for block in blocks.values():
        block.norms = [name for name in every_norm if name.startswith(f"{block.name}.")]
    ends = architecture.embeddings if architecture is not None else ()
    tables = [model.get_input_embeddings()] if isinstance(model, PreTrainedModel) and _has_table(model) else []
    embeddings = tuple(
        name for name, module in modules.items() if _ends(name, ends) or any(module is table for table in tables)
    )
    outside = head_modules(model)
    head = tuple(
        name for name in modules if name in outside and next(modules[name].parameters(recurse=False), None) is not None
    )
    roles = _roles(blocks.values(), {"norm": norms, "embedding": embeddings, "head": head})
    ordered = {name: roles[name] for name in modules if name in roles}
    return Description(model_type, architecture, tuple(blocks.values()), embeddings, norms, head, ordered)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises and has one weight per channel, by the name of its class."""
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, nn.Parameter) and weight.ndim == 1
    return is_vector and re.search(r"(Norm|Norm1P|Norm[123]d)$", type(module).__name__) is not None


def variants(rules: Iterable[Attention | FeedForward], modules: Mapping[str, nn.Module]) -> list[tuple[str, int]]:
    """Which rules hold where: the block's name and the number of the rule, wherever all of its modules are there."""
    found = []
    for number, rule in enumerate(rules):
        *rows, last = (*rule.rows, rule.o if isinstance(rule, Attention) else rule.down)
        for name in modules:
            block = name.removesuffix(f".{last}")
            is_in_list = block != name and block.rpartition(".")[2].isdecimal()  # a pooling head may have these names
            if is_in_list and all(f"{block}.{row}" in modules for row in rows):
                found.append((block, number))
    return found


def _blocks(architecture: Architecture, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
    blocks: dict[str, Block] = {}

    def block_at(name: str) -> Block:
        if name not in blocks:
            stack, _, index = name.rpartition(".")
            blocks[name] = Block(name, stack, int(index))
        return blocks[name]

    for name, number in variants(architecture.attention, modules):
        names = architecture.attention[number]
        holder, q, k, v, o = (f"{name}.{part}" for part in (names.module, names.q, names.k, names.v, names.o))
        block_at(name).attention.append(BlockAttention(holder, q, k, v, o, names))
    for name, number in variants(architecture.ffn, modules):
        part = architecture.ffn[number]
        gate = f"{name}.{part.gate}" if part.gate else None
        norm = f"{name}.{part.norm}" if part.norm and f"{name}.{part.norm}" in modules else None
        block_at(name).ffn.append(BlockFeedForward(f"{name}.{part.up}", f"{name}.{part.down}", gate, norm))
    for stack, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _ends(stack, architecture.blocks):
            for index in range(len(module)):
                block_at(f"{stack}.{index}")
    return {name: blocks[name] for name in modules if name in blocks}


def _roles(blocks: Iterable[Block], others: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    roles: dict[str, list[str]] = {}
    for block in blocks:
        for attention in block.attention:
            for role in ("q", "k", "v", "o"):
                roles.setdefault(getattr(attention, role), []).append(role)
        for part in block.ffn:
            for role in ("gate", "up", "down"):
                if (name := getattr(part, role)) is not None:
                    roles.setdefault(name, []).append(role)
    for role, names in others.items():
        for name in names:
            roles.setdefault(name, []).append(role)
    return {name: tuple(dict.fromkeys(own)) for name, own in roles.items()}


def _has_table(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:  # by which some models of images say that they have none
        return False


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
