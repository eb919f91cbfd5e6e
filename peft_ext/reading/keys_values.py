"""Keys and values of a frozen pass, picked up as the projections put them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .families import Family
from .forwards import AllFound


@dataclass
class Frozen:
    """What the frozen pass leaves behind in one layer, and all that a query needs of it.

    Args:
        keys, values: `(B, N, D)`, as the projections put them out.
        mask: What is added to the scores, or whether a key is seen (bool): `(B or 1, heads or 1, 1, N)`; `None`: all.
        args, kwargs: The block's other arguments, tensors left out.
        dtype: Of the hidden states.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


def query_mask(mask: Any, keys: int, device: torch.device) -> torch.Tensor | None:
    """The row `(B or 1, heads or 1, 1, N)` of an attention mask that holds for a query.

    A query has no position. It sees what the first token sees: the keys that are no padding, with the class token's
    own bias where the architecture has a relative position bias.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):  # flex attention's BlockMask
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, mask.shape[0], None, 1, keys, device=device)
    if mask.ndim == 2:  # flash attention's padding mask
        return mask.bool()[:, None, None, :]
    return mask[..., :1, :]


def refuse_added_keys(blocks: Iterable[nn.Module]) -> None:
    """Raises `ValueError` if an adapter adds keys and values to those of the tokens, which queries would not see."""
    for block in blocks:
        for child in block.children():
            adds = getattr(child, "adds_key_values", None)  # the name of the method
            if adds is not None and child.acts():  # type: ignore[operator]
                raise ValueError(
                    f"VQT cannot read a model on which {adds} acts: its queries attend to the tokens' keys and values, and "
                    "would not see those of the prompts. Activate one of the two (`set_adapter`), or put VQT on LoRA, "
                    "SSF or another adapter that changes the tokens."
                )


class KeysValuesCapture:
    """While open, each block that the backbone runs is handed over, with its keys and values, to `on_block`.

    With `cut_short`, the pass ends in `AllFound` inside the last block, which `finish` then hands over.
    """

    def __init__(
        self,
        family: Family,
        blocks: Mapping[int, nn.Module],
        on_block: Callable[[int, Frozen], None],
        cut_short: bool = False,
    ) -> None:
        self.family = family
        self.blocks = blocks
        self.on_block = on_block
        self.found: dict[str, Any] = {}
        self.index = -1
        self.last = max(blocks) if cut_short else None
        self.is_reading = False  # the block is being run on query rows, which is not to be captured

    def __enter__(self) -> Self:
        names = self.family.names
        refuse_added_keys(self.blocks.values())
        self.handles: list[RemovableHandle] = []
        for index, block in self.blocks.items():
            attention: Any = block.get_submodule(self.family.attention)
            self.handles += [
                block.register_forward_pre_hook(partial(self._enter_block, index), with_kwargs=True),
                attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True),
                # looked up anew each time: an adapter may have been put around them
                getattr(attention, names.k).register_forward_hook(partial(self._keep, "keys")),
                getattr(attention, names.v).register_forward_hook(partial(self._keep, "values")),
                block.register_forward_hook(partial(self._leave_block, index)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_reading:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self.index = index
        self.found = {
            "args": tuple(None if isinstance(value, torch.Tensor) else value for value in args[1:]),
            "kwargs": {
                key: None if isinstance(value, torch.Tensor) else value
                for key, value in kwargs.items()
                if key != "hidden_states"
            },
            "dtype": hidden.dtype,
        }

    def _enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_reading:
            self.found["mask"] = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _keep(self, name: str, projection: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.is_reading:
            return
        self.found[name] = output
        if self.index == self.last and {"keys", "values"} <= self.found.keys():
            raise AllFound

    def _leave_block(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        if not self.is_reading:
            self.finish()

    def finish(self) -> None:
        """Hands over the block whose keys and values were found last."""
        found, self.found = self.found, {}
        found["mask"] = query_mask(found["mask"], found["keys"].shape[1], found["keys"].device)
        self.is_reading = True
        try:
            self.on_block(self.index, Frozen(**found))
        finally:
            self.is_reading = False
