"""The trainable matrices: quantised while they act, or plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core import HALF, ExactLeaf
from ..core.schedule import listen_to_steps, optimizer_of
from ..core.sharding import is_sharded, owned_weight, put, whole
from .codebook import Coded, coded_size, decode, encode, latents, used_values


LATENT = "low_bit_latent"  # in the optimizer's state of a weight, so that a training can be resumed
UNSET = -1e30  # the spread in `stats` while the latents count; so far from any that averages with it say so, too


class FullMatrix(ExactLeaf):
    """A trainable matrix in fp32, zero at first; calling it gives its values as a new tensor."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def forward(self) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        return weight.float() if weight.dtype in HALF else weight.clone()


class LowBitMatrix(FullMatrix):
    """A trainable matrix that acts in its quantised form; `weight` holds its latents.

    A file has no latents but `codes` and `stats`, whose shapes follow from the size of the matrix and the bits. Where
    they were loaded, they are what acts, until the first step of an optimizer: then the latents are those in the
    optimizer's state, if a training is resumed, or else ones that have these codes. `stats` says which holds: its
    spread is negative while the latents count.

    Latents that somebody writes count at once. The version of a tensor tells of that, but not of a write to `.data`
    (moving averages, TRL's synchronised reference): where the matrix, or the one it is a copy of, is trained, the
    values are looked at. What is only loaded to be run is spared that, since a GPU would have to be waited for.
    """

    training_only = ("weight",)  # a file need not have it

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        super().__init__(rows, columns)
        self.bits, self.shape = bits, (rows, columns)
        self.register_buffer("codes", torch.zeros(coded_size(rows * columns, bits), dtype=torch.uint8))
        self.register_buffer("stats", torch.tensor([0.0, UNSET]))
        self._decoded: torch.Tensor | None = None
        self._seen: Any = None
        self._sum: float | None = None  # of the latents, when they were looked at
        self._watched = False  # whether their values are looked at
        listen_to_steps(self)

    codes: torch.Tensor
    stats: torch.Tensor

    def __getstate__(self) -> dict[str, Any]:
        watched = self._watched or self.weight.requires_grad
        return {**self.__dict__, "_decoded": None, "_seen": None, "_sum": None, "_watched": watched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        listen_to_steps(self)  # copies and unpickled leaves too
        self._loaded()

    def __setattr__(self, name: str, value: Any) -> None:
        """transformers' loader gives tensors this way, past `load_state_dict`."""
        super().__setattr__(name, value)
        if name in ("codes", "stats") and name in self._buffers and "_watched" in self.__dict__:
            self._seen = None
            self._loaded()

    # What acts

    def _loaded(self) -> torch.Tensor | None:
        """The values that a file brought, while they are what acts."""
        if torch.compiler.is_compiling():  # was looked at when its tensors were made, given or moved
            return self._decoded
        now = _versions(self.codes), _versions(self.stats), _versions(self.weight)
        self._watched = self._watched or self.weight.requires_grad
        if self._seen is not None and _are_same(now, self._seen) and not self._was_written():
            return self._decoded
        same_file = self._seen is not None and _are_same(now[:2], self._seen[:2])
        if same_file and self._decoded is not None and now[2][0] is self._seen[2][0]:
            self._count_latents()  # somebody wrote the latents: these count from now on
            return None
        self._seen, self._decoded = now, None
        if not (self.stats.is_meta or self.codes.is_meta) and self.stats[1] >= 0:
            with torch.inference_mode(False):
                self._decoded = decode(Coded(self.codes, self._stats()), self.bits, self.shape)
            self._sum = self._sum_of_latents()
        return self._decoded

    def _was_written(self) -> bool:
        """Whether the latents behind loaded values have others than when they were looked at."""
        return self._decoded is not None and self._watched and self._sum_of_latents() != self._sum

    def _sum_of_latents(self) -> float | None:
        """`None` for what is no tensor of its own here: sharded, or somewhere else."""
        weight = self.weight
        if weight.is_meta or is_sharded(weight) or weight.shape != self.shape:
            return None
        return float(weight.detach().sum(dtype=torch.float64))

    def _stats(self) -> torch.Tensor:
        return self.stats.float() if self.stats.dtype in HALF else self.stats

    @torch.no_grad()
    def _count_latents(self) -> None:
        self.stats[1] = UNSET
        self._decoded = None
        self._seen = _versions(self.codes), _versions(self.stats), _versions(self.weight)

    def forward(self) -> torch.Tensor:
        """The quantised values `(rows, columns)`, in fp32 at least."""
        loaded = self._loaded()
        weight: torch.Tensor = self.weight
        if loaded is None:
            return used_values(weight.float() if weight.dtype in HALF else weight, self.bits)
        if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
            return _Loaded.apply(weight, loaded, self)
        return loaded

    # Latents

    def _latents(self) -> torch.Tensor:
        """Those behind what was loaded: the optimizer's, the leaf's own, or ones that fit."""
        owned = owned_weight(self)
        optimizer = optimizer_of(owned)
        kept = optimizer.state.get(owned, {}).get(LATENT) if optimizer is not None else None
        for candidate in (kept, self.weight):
            if candidate is not None and candidate.shape == self.shape:
                candidate = whole(candidate).to(self.codes.device, self._stats().dtype)
                if torch.equal(encode(candidate, self.bits).codes, self.codes):
                    return candidate
        return latents(Coded(self.codes, self._stats()), self.bits, self.shape)

    def before_step(self, optimizer: Optimizer, group: dict[str, Any], closure: bool) -> None:
        """From the first step on the latents are what acts."""
        if self._loaded() is not None and self.weight.shape == self.shape:
            put(self.weight, self._latents())
            self._count_latents()

    def after_step(self, optimizer: Optimizer, group: dict[str, Any], taken: bool) -> None:
        """Has the optimizer's checkpoints hold the latents, which the adapter's file does not; no copy is made.

        Not before the optimizer has state of its own: most take a state that is there for one that they have made.
        """
        if taken and (optimizer.state.get(self.weight) or self.weight.grad is not None):
            optimizer.state[self.weight][LATENT] = self.weight.detach()

    def foreign_step(self, optimizer: Optimizer) -> None:
        """Steps of optimizers without this matrix do not concern it."""

    # Files

    def stored_parts(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a file holds of a state of this leaf: codes and statistics."""
        if parts["stats"][1] >= 0:
            return {"codes": parts["codes"], "stats": parts["stats"]}
        weight = parts["weight"]
        return encode(weight.float() if weight.dtype in HALF else weight, self.bits)._asdict()

    def check_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the statistics of a file are none."""
        if "weight" not in tensors and not tensors["stats"][1] >= 0:
            raise ValueError(f"the spread of the values is {float(tensors['stats'][1]):g}, which cannot be negative")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loaded()  # takes note of latents that were written
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        weight, codes, stats = (state_dict.get(prefix + part) for part in ("weight", "codes", "stats"))
        if weight is None and codes is not None and stats is not None and codes.shape == self.codes.shape:
            coded = Coded(codes, stats.float() if stats.dtype in HALF else stats)
            state_dict[prefix + "weight"] = latents(coded, self.bits, self.shape).to(codes.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not (weight is None and codes is None and stats is None):  # else it is the file of another adapter
            self._seen = None
            self._loaded()

    def _apply(self, *args: Any, **kwargs: Any) -> LowBitMatrix:
        self._loaded()
        super()._apply(*args, **kwargs)
        self._seen = None
        self._loaded()
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.bits} bit"


class _Loaded(torch.autograd.Function):
    """The values of a file, with the gradient that the latents behind them get."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, loaded: torch.Tensor, leaf: LowBitMatrix) -> torch.Tensor:
        ctx.leaf = leaf
        ctx.dtype = weight.dtype
        return loaded.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        with torch.enable_grad():
            latent = ctx.leaf._latents().detach().requires_grad_()
            (gradient,) = torch.autograd.grad(used_values(latent, ctx.leaf.bits), latent, grad.to(latent))
        return gradient.to(ctx.dtype), None, None


def _versions(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor, and a number that changes with what is in it."""
    return tensor, 0 if tensor.is_inference() else tensor._version


def _are_same(now: Any, before: Any) -> bool:
    return all(a[0] is b[0] and a[1] == b[1] for a, b in zip(now, before, strict=True))
