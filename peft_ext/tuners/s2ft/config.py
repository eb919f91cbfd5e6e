"""The fields of S2FT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...core import CalibratedConfig


BY_DATA = ("activation", "product", "gradient")
SELECTIONS = ("random", "weight", *BY_DATA)
SCOPES = ("global", "per_layer")


@dataclass
class S2FTConfig(CalibratedConfig):
    """Configuration of S2FT; see also the common fields of [`ExtConfig`].

    Args:
        ratios: The share of the channels that is trained, by kind of module: `"down"` and `"up"`, the second and first
            layer of feed-forward blocks, by channel; `"o"` and `"v"`, the output and value projections of attention,
            by head (of grouped queries, by group). A key can also be a module's name, or the end of it. Input channels
            are chosen, of `"up"` and `"v"` output channels. A number holds for all of `target_modules`; without those,
            for `"down"`.
        selection: Which channels. `"random"`; by the norm of their `"weight"`, of their `"activation"`, the
            `"product"` of both, or the norm of the `"gradient"` of their weight. The last three need
            `peft_ext.calibrate`.
        largest: Whether the largest of these are chosen, and not the smallest.
        scope: `"global"`: from all layers together, so that a layer may get many or none; `"per_layer"`: each layer
            gets its share.
        seed: Of the random choice; the same in all processes.
        num_channels_per_module: Chosen channels of each module, by name. Filled in by itself, so that an adapter loads
            without data; given by hand, it replaces the shares, also in `calibrate`.
        sides_per_module: Whether these are `"inputs"` or `"outputs"` of the module; filled in by itself.

    Raises:
        ValueError: A field has a value that S2FT cannot use; the message names it.
    """

    METHOD: ClassVar[str] = "S2FT"
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("ratios", "selection", "largest", "scope", "seed", "sides_per_module")
    SIZES: ClassVar[tuple[str, ...]] = ("num_channels_per_module",)
    # no field, so not in the JSON
    channels = None  # type: Any  # those of all targets, while the adapter is put on

    ratios: dict[str, float] | float = field(
        default_factory=lambda: {"down": 0.03},
        metadata={"help": "Share of the channels that is trained, by kind of module (down, up, o, v) or by name."},
    )
    selection: str = field(default="random", metadata={"help": f"Which channels: one of {', '.join(SELECTIONS)}."})
    largest: bool = field(default=False, metadata={"help": "Choose the largest by `selection`, not the smallest."})
    scope: str = field(default="global", metadata={"help": f"Over the layers: {' or '.join(SCOPES)}."})
    seed: int = field(default=0, metadata={"help": "Seed of the random choice."})
    num_channels_per_module: dict[str, int] | None = field(
        default=None, metadata={"help": "Chosen channels of each module; filled in by itself."}
    )
    sides_per_module: dict[str, str] | None = field(
        default=None, metadata={"help": "Whether these are inputs or outputs of each module; filled in by itself."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        shares: Any = self.ratios.values() if isinstance(self.ratios, dict) else [self.ratios]
        if isinstance(self.ratios, dict) and not all(isinstance(key, str) for key in self.ratios):
            raise ValueError(f"`ratios` must be by names or kinds of modules, got {self.ratios!r}.")
        if not shares or not all(
            isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1 for share in shares
        ):
            raise ValueError(f"`ratios` must be in (0, 1], got {self.ratios!r}.")
        if self.selection not in SELECTIONS:
            raise ValueError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.largest not in (True, False):
            raise ValueError(f"`largest` must be True or False, got {self.largest!r}.")
        if self.largest and self.selection == "random":
            raise ValueError("`largest=True` has no effect with `selection='random'`: choose another selection.")
        if self.scope not in SCOPES:
            raise ValueError(f"`scope` must be {' or '.join(map(repr, SCOPES))}, got {self.scope!r}.")
        counts = self.num_channels_per_module
        if counts is not None and not (
            isinstance(counts, dict)
            and counts
            and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts.values())
        ):
            raise ValueError("`num_channels_per_module` must map names of modules to positive integers.")
        sides = self.sides_per_module
        if sides is not None and not (isinstance(sides, dict) and set(sides.values()) <= {"inputs", "outputs"}):
            raise ValueError("`sides_per_module` must map names of modules to 'inputs' or 'outputs'.")

    def check_support(self, support: dict[str, torch.Tensor], where: str) -> None:
        """`ValueError` if these are not as many channels as the config says."""
        counts = self.num_channels_per_module or {}
        for name in sorted(support.keys() | counts.keys()):
            found = support.get(name)
            if found is None or found.shape != (counts.get(name),) or found.dtype != torch.int32:
                has = "none" if found is None else f"{tuple(found.shape)} of {found.dtype}"
                raise ValueError(
                    f"The calibration in {where} is damaged: it has {has} for {name!r}, not {counts.get(name, 0)} int32."
                )
