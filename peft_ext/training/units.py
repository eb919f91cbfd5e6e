"""What layer sampling draws from: a model's trainable parameters, sorted into units and what stays outside of blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from peft import PeftModel
from torch import nn

from ..architectures import ARCHITECTURES, Description, describe
from ..core import unadapted_modules


OUTSIDE = ("embeddings", "norm", "head")
_CATEGORIES = {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}
_CATEGORIES |= {"gate": "ffn", "up": "ffn", "down": "ffn", "norm": "norm"}


@dataclass(frozen=True)
class Slot:
    """Where a parameter is: wrappers such as FSDP2 put another tensor in its place."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now."""
        return getattr(self.module, self.attribute)


@dataclass
class Unit:
    """What is trained or frozen together: a block, or a module of one."""

    name: str
    slots: list[Slot] = field(default_factory=list)


@dataclass
class Candidates:
    """The trainable parameters of a model.

    Attributes:
        units: By block and, for matrices, by category within the block; one category holds all of a whole block.
        outside: Those outside of all blocks, by `OUTSIDE`.
        holders: The modules inside of blocks, and these, each with the parameters inside of it.
    """

    units: list[dict[str, list[Unit]]]
    outside: dict[str, list[Slot]]
    holders: list[tuple[nn.Module, list[Slot]]]

    @property
    def slots(self) -> list[Slot]:
        """All, those outside of the blocks first."""
        inside = [slot for block in self.units for units in block.values() for unit in units for slot in unit.slots]
        return [slot for slots in self.outside.values() for slot in slots] + inside


def find_candidates(model: nn.Module, by_matrix: bool) -> Candidates:
    """Sorts the parameters of `model` that require a gradient; tied ones are where the model names them first.

    Raises:
        ValueError: The model's blocks are not known, or nothing in them is trainable.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    description = describe(base)
    if not description.blocks:
        raise ValueError(
            f"Where the blocks of a {type(base).__name__} (model type {description.model_type!r}) are is not known, so "
            f"there is nothing to sample from. Known are {', '.join(ARCHITECTURES)}."
        )
    blocks = {block.name: index for index, block in enumerate(description.blocks)}
    units: list[dict[str, dict[str, Unit]]] = [defaultdict(dict) for _ in blocks]
    outside: dict[str, list[Slot]] = {place: [] for place in OUTSIDE}
    holders: dict[str, list[Slot]] = defaultdict(list)
    names = [name for name, _ in unadapted_modules(base)]
    slots = [(slot, _last_containing(blocks, slot.name)) for slot in _trainable_slots(base)]
    before: str | None = None  # the last block so far
    for number, (slot, block) in enumerate(slots):
        if block is None:
            after = next((other for _, other in slots[number:] if other is not None), None)
            is_before_blocks = _in_common(slot.name, after) > _in_common(slot.name, before)
            outside[_place(slot.name, description, is_before_blocks)].append(slot)
            continue
        before = block
        parts = slot.name.split(".")
        for end in range(block.count(".") + 1, len(parts)):
            holders[".".join(parts[:end])].append(slot)
        owner = _last_containing(names, slot.name) if by_matrix else block
        assert owner is not None  # the block is one of the modules
        categories = [_CATEGORIES[role] for role in description.role_of(owner) if role in _CATEGORIES]
        category = (categories or ["other"])[0] if by_matrix else "block"
        units[blocks[block]][category].setdefault(owner, Unit(owner)).slots.append(slot)
    found = [{category: list(own.values()) for category, own in block.items()} for block in units if block]
    if not found:
        raise ValueError(
            f"No parameter in the blocks of this {type(model).__name__} requires a gradient: layer sampling chooses "
            "among trainable parameters. For full fine-tuning call `model.requires_grad_(True)` before."
        )
    return Candidates(found, outside, [(base.get_submodule(name), slots) for name, slots in holders.items()])


def tied_across(candidates: Candidates, model: nn.Module, always: Sequence[str]) -> list[str]:
    """The names of trainable parameters that are embeddings and head at once, if `always` names one of the two only."""
    if ("embeddings" in always) == ("head" in always):
        return []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    output = getattr(base, "get_output_embeddings", lambda: None)()
    ids = {id(parameter) for parameter in output.parameters()} if isinstance(output, nn.Module) else set()
    return [slot.name for slot in candidates.outside["embeddings"] if id(slot.parameter) in ids]


def _trainable_slots(model: nn.Module) -> Iterable[Slot]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, _, attribute = name.rpartition(".")
            yield Slot(modules[owner], attribute, name)


def _place(name: str, description: Description, is_before_blocks: bool) -> str:
    module = name.rpartition(".")[0]
    if any(_contains(head, name) for head in description.head):
        return "head"
    if module in description.norms:
        return "norm"
    return "embeddings" if is_before_blocks or module in description.embeddings else "head"


def _in_common(name: str, block: str | None) -> int:
    """How many parts two names have in common at the start: those of one stack have more. -1 if there is no block."""
    parts = [] if block is None else zip(name.split("."), block.split("."), strict=False)
    return -1 if block is None else len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))


def _last_containing(modules: Iterable[str] | Mapping[str, int], name: str) -> str | None:
    """The longest of the names that `name` is inside of."""
    return max((module for module in modules if _contains(module, name)), key=len, default=None)


def _contains(module: str, name: str) -> bool:
    return name.startswith(f"{module}.")
