"""Toys: the architecture of a model at sizes that run in milliseconds, from which the model's own costs follow.

What a step keeps for its backward, and what an adapter adds, is a sum of tensors, whose numbers of entries are products
of sizes: tokens times width, tokens times vocabulary, width times width. So each cost is linear in a few such products,
and what it is at the sizes of a 70B model follows from what it is in a dozen of toys that run the very same code.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


MOST, SPARE = 64, 8  # toys: at most, and more than there are products that can vary by themselves
TRIES = 400  # to draw sizes as wanted
FAILURES = 8  # toys that a method may refuse, or twice as many as it takes
# fields of configs that follow another one where they are equal to it, as ELECTRA's `embedding_size` its `hidden_size`
ALIKE = {
    "hidden_size": r".*(hidden|embed|proj).*_(size|dim)|d_model",
    "num_hidden_layers": r".*layers",
    "num_attention_heads": r".*heads",
}
ROUGH = 0.15  # a larger standard error, as a share, is none that a prediction should have


@dataclass(frozen=True)
class Sizes:
    """The sizes on which the costs of a transformer depend.

    Attributes:
        batch, tokens: Of the batch.
        layers, width, inner: Blocks, hidden size and size of the feed-forward part.
        own_layers: Blocks with weights of their own.
        heads, head_dim, kv_heads: Of the attention.
        vocabulary: Of a text model, else 0.
    """

    batch: int
    tokens: int
    layers: int
    own_layers: int
    width: int
    inner: int
    heads: int
    head_dim: int
    kv_heads: int
    vocabulary: int

    @property
    def _layer(self) -> list[float]:
        return [1, self.width, self.inner, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.heads]

    def more_rows(self) -> tuple[bool, ...]:
        """Whether a batch has more rows than the inputs of modules have channels."""
        rows = self.batch * self.tokens
        return rows > self.width, rows > self.inner, rows > self.heads * self.head_dim

    def activations(self) -> list[float]:
        """What the bytes kept for the backward are linear in."""
        rows, pairs = self.batch * self.tokens, self.batch * self.tokens**2
        return [
            *(rows * self.layers * size for size in self._layer),
            pairs * self.layers * self.heads,  # attention weights, where the attention is not fused
            # likewise of one layer, since before the first trained module nothing is kept; then of what is outside
            *(rows * size for size in (*self._layer, self.vocabulary, self.head_dim)),
            pairs * self.heads,
            *(self.tokens * size for size in (1, self.head_dim, self.tokens)),  # positions and masks of all samples
            *(self.batch * size for size in (1, self.width)),
            *(self.batch * self.layers * size for size in self._layer[:5]),  # of rows that are no tokens
            pairs,
            *self.parameters(),  # of methods that keep weights
        ]

    def parameters(self) -> list[float]:
        """What numbers of parameters are linear in."""
        _, width, inner, queries, keys, heads = self._layer
        squares = [width * queries, width * keys, width * inner]
        return [
            *(self.own_layers * size for size in (1, width, inner, queries, keys, heads, *squares)),
            width * width,  # a pooler
            width * self.vocabulary,
            self.vocabulary,
            width,
            1,
        ]


def sizes_of(config: Any, batch: int, tokens: int) -> Sizes:
    """The sizes of a model.

    Raises:
        ValueError: The config does not say them in the usual words.
    """
    try:
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        layers = int(config.num_hidden_layers)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"Models of type {getattr(config, 'model_type', type(config).__name__)!r} cannot be planned for: the config "
            "has no `hidden_size`, `num_attention_heads` and `num_hidden_layers` that are numbers."
        ) from error
    return Sizes(
        batch=batch,
        tokens=tokens,
        layers=layers,
        own_layers=min(layers, int(getattr(config, "num_hidden_groups", layers))),  # ALBERT's
        width=width,
        inner=int(getattr(config, "intermediate_size", None) or 4 * width),
        heads=heads,
        head_dim=int(getattr(config, "head_dim", None) or width // heads),
        kv_heads=_kv_heads(config, heads),
        vocabulary=int(getattr(config, "vocab_size", None) or 0),
    )


def _kv_heads(config: Any, heads: int) -> int:
    """Of keys and values, by either of its names; in Falcon's first architecture one serves all queries."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return next((int(number) for name in names if (number := getattr(config, name, None)) is not None), heads)


def side_of(config: Any, field: str) -> int:
    """The side of a square that a config says as one number or two.

    Raises:
        ValueError: It says none, or two that differ.
    """
    value: Any = getattr(config, field, None)
    sides: set[Any] = set(value) if isinstance(value, (tuple, list)) else {value}
    if len(sides) != 1 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(
            f"Only square images in square patches can be planned for: `{field}` of the config is {value!r}, and a number "
            "of pixels is needed."
        )
    return sides.pop()


def toy_sizes(config: Any, like: Sizes, rng: random.Random, larger: bool = False) -> tuple[PreTrainedConfig, Sizes]:
    """A config of the same architecture with small sizes drawn at random, and those of it and its batch.

    Methods choose by whether a batch has more rows than a module has channels, so the toys are as `like` there. A batch
    of one is one in the toys, too: what does not vary need not be told.
    """
    for _ in range(TRIES):
        toy, tokens = _drawn(config, rng, (32, 40, 48) if larger else (8, 16, 24))
        sizes = sizes_of(toy, 1 if like.batch == 1 else rng.randint(2, 4), tokens)
        if sizes.more_rows() == like.more_rows():
            break
    return toy, sizes


def _drawn(config: Any, rng: random.Random, head_dims: Sequence[int]) -> tuple[PreTrainedConfig, int]:
    """A config and a number of tokens."""
    toy = copy.deepcopy(config)
    heads, head_dim = rng.choice((2, 3, 4, 6)), rng.choice(head_dims)
    computed = getattr(type(config), "head_dim", None)
    free = getattr(config, "head_dim", None) is not None and not (isinstance(computed, property) and not computed.fset)
    toy.num_attention_heads = heads
    toy.hidden_size = 8 * rng.randint(5, 16) if free else heads * head_dim
    if free:
        toy.head_dim = head_dim
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            full = getattr(config, name) == config.num_attention_heads
            setattr(toy, name, heads if full else rng.choice([n for n in range(1, heads) if heads % n == 0]))
    if getattr(config, "intermediate_size", None) is not None:
        toy.intermediate_size = 8 * rng.randint(6, 32)
    toy.num_hidden_layers = layers = rng.randint(1, 3)
    if getattr(config, "layer_types", None):
        kinds = config.layer_types  # of which there may be fewer
        toy.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    for field, names in ALIKE.items():
        for name, value in vars(config).items():
            if type(value) is int and value == getattr(config, field) and re.fullmatch(names, name):
                setattr(toy, name, getattr(toy, field))
    if getattr(config, "vocab_size", None):
        toy.vocab_size = rng.randint(40, 160)
        needed = ("pad_token_id", "decoder_start_token_id") if config.is_encoder_decoder else ("pad_token_id",)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(toy, name, None) is not None or name in needed:
                setattr(toy, name, 0)
        return toy, rng.randint(12, 120)
    side = rng.randint(3, 11)
    toy.image_size = side * side_of(config, "patch_size")
    return toy, side**2 + 1


def toy_batch(config: Any, batch: int, tokens: int, kind: str, rng: random.Random) -> dict[str, torch.Tensor]:
    """Random inputs with labels."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    labels = torch.randint(max(1, config.num_labels), (batch,), generator=generator)
    if kind == "image":
        shape = (batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator), "labels": labels}
    ids = torch.randint(1, config.vocab_size, (batch, tokens), generator=generator)
    if config.is_encoder_decoder and kind == "text":
        ids[:, -1] = config.eos_token_id or 0  # at whose place such models classify
    labels = ids if kind == "causal" else labels if config.num_labels > 1 else labels.float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept_for_backward(model: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes of the distinct storages that the backward of `run()` keeps, besides the model's own; and what it returns."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps the storage, so that no other takes its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(seen.values()), output


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that the backward of the loss keeps, which is run then."""

    def loss_of() -> torch.Tensor:
        loss = getattr(model(**inputs), "loss", None)
        if loss is None:
            raise ValueError("its output has no loss: a model with a head is needed")
        return loss

    total, loss = kept_for_backward(model, loss_of)
    if loss.requires_grad:
        loss.backward()
    return total


@dataclass(frozen=True)
class Costs:
    """Of one method on one model: trainable parameters and their bytes, and the bytes kept for the backward.

    `error` is the standard error of the activations: above zero where they depend on more than the sizes.
    """

    trainable: int
    trainable_bytes: int
    activations: int
    activations_of_one_layer: int
    error: int


Adapt = Callable[[PreTrainedModel, list[dict[str, torch.Tensor]]], nn.Module]


def costs_of(
    adapt: Adapt,
    build: Callable[[Any], PreTrainedModel],
    config: Any,
    sizes: Sizes,
    kind: str,
    dtype: torch.dtype,
    trainable: int | None = None,
) -> Costs:
    """The costs of what `adapt` makes of a model, at `sizes`, by way of toys.

    Args:
        adapt: Puts a method on a model; it also gets batches, for methods that look at data.
        build: Makes a model of a config.
        config: That of the model.
        sizes: Those to tell the costs at.
        kind: `"image"`, `"text"` or `"causal"`.
        dtype: Of the model's weights.
        trainable: The number of trainable parameters, of that precision, if it is known.

    Raises:
        ValueError, TypeError: What `adapt` raises on all toys. ValueError: A toy cannot be run, or the costs do not follow
            from the sizes.
    """
    rng = random.Random(0)
    rows: list[Sizes] = []
    found: list[tuple[int, int, int]] = []
    failed = 0
    with _quiet(), torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        while len(found) < _enough(rows):
            toy, row = toy_sizes(config, sizes, rng, larger=failed > 0)
            batches = [toy_batch(toy, row.batch, row.tokens, kind, rng) for _ in range(2)]
            with _told_as_toys("made"):
                fresh: Any = build(toy).to(dtype)  # type: ignore[arg-type]
            try:
                model = adapt(fresh, batches).train()
            except (ValueError, TypeError):  # some toys may be too small for a method's rank
                failed += 1
                if failed > max(FAILURES, 2 * len(found)):
                    raise
                continue
            inputs = {k: v.to(dtype) if v.is_floating_point() and k != "labels" else v for k, v in batches[0].items()}
            trained = [p for p in model.parameters() if p.requires_grad]
            counts = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
            with _told_as_toys("run"):
                found.append((*counts, saved_bytes(model, inputs)))
            rows.append(row)
    counts_at = [row.parameters() for row in rows]
    kept_at, kept = [row.activations() for row in rows], [f[2] for f in found]
    if trainable is None:
        trainable = _told(counts_at, [f[0] for f in found], sizes.parameters())[0]
        trainable_bytes, count_error = _told(counts_at, [f[1] for f in found], sizes.parameters())
    else:
        trainable_bytes, count_error = trainable * dtype.itemsize, 0
    activations, error = _told(kept_at, kept, sizes.activations())
    # weights, a gradient and two moments for each trainable parameter
    share = (error + 4 * count_error) / max(1, activations + 4 * trainable_bytes)
    if share > ROUGH:
        raise ValueError(
            "what it needs depends on the data, or on its choice of modules, more than on the model's sizes: told from "
            f"{len(found)} toys it would have a standard error of {share:.0%}."
        )
    return Costs(
        trainable=trainable,
        trainable_bytes=trainable_bytes,
        activations=activations,
        activations_of_one_layer=_told(kept_at, kept, replace(sizes, layers=1, own_layers=1).activations())[0],
        error=error,
    )


def _enough(rows: Sequence[Sizes]) -> int:
    """As many toys as there are products that can vary by themselves, and a few more."""
    if len(rows) < 8:
        return 8
    table = _scaled([row.activations() for row in rows])[0]
    rank = int(torch.linalg.matrix_rank(table, rtol=1e-6))
    return min(MOST, rank + SPARE)


def _scaled(table: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor(table, dtype=torch.float64)
    scale = rows.norm(dim=0).clamp_min(1e-12)
    return rows / scale, scale


def _told(table: Sequence[Sequence[float]], values: Sequence[float], at: Sequence[float]) -> tuple[int, int]:
    """The value at `at`, and its standard error, of the linear function of least squares.

    Where products move together, it is that of least norm. The residuals, which are zero but for rounding where a cost is
    a function of the sizes, grow by how far `at` lies outside of the toys.
    """
    rows, scale = _scaled(table)
    target = torch.tensor(at, dtype=torch.float64) / scale
    wanted = torch.tensor(values, dtype=torch.float64)
    solution = torch.linalg.lstsq(rows, wanted[:, None], rcond=1e-9, driver="gelsd")
    coefficients = solution.solution[:, 0]
    told = round(float(target @ coefficients))
    if told < 0:
        raise ValueError(f"what it keeps is no function of the model's sizes that {len(rows)} toys could show.")
    spare = max(1, len(rows) - int(solution.rank))
    residual = float((wanted - rows @ coefficients).norm()) / spare**0.5
    lever = float((torch.linalg.pinv(rows, rtol=1e-9).T @ target).norm())
    return told, round(residual * lever)


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _told_as_toys(done: str) -> Iterator[None]:
    """Inside, whatever is raised becomes a ValueError: of what it is about, the caller has not heard."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"a small model of its kind cannot be {done} ({type(error).__name__}: {error}).") from error
