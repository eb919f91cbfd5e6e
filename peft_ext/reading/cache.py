"""The frozen pass on disk: what a reader needs of a sample is made once, and later epochs never run the backbone.

A sample is known by its content: the key of its entry is a hash of the tensors that the backbone is called with, so
the data set, its order and its collator stay what they are. An input that changes from epoch to epoch, as random
augmentation makes it, is found nowhere and refused in training; in evaluation the backbone is simply run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import acting_adapters, empty_like_of
from .kept import Kept
from .layer import ReaderLayer, reader_of


_SHARD = "frozen_pass.arrow"
_META = "frozen_pass.json"
_FORMAT = 3


class FrozenPassCache:
    """What a reader needs of a data set's samples (keys and values, or hidden states), memory-mapped from disk.

    ```py
    cache = FrozenPassCache.write(model, DataLoader(train_set, 32, collate_fn=collate), "cache/flowers")
    with cache.use(model):
        Trainer(model, args, train_dataset=train_set, data_collator=collate).train()
    ```

    An existing cache is opened with `FrozenPassCache("cache/flowers")`, which reads it once to see that it is whole.

    Raises:
        ValueError: The directory holds no cache, or one that was damaged or that another version wrote.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from datasets import Dataset

        self.directory = Path(directory)
        if not (self.directory / _META).is_file():
            raise ValueError(f"{str(directory)!r} holds no frozen pass; write one with `FrozenPassCache.write`.")
        self.meta = _read_meta(self.directory)
        table = Dataset.from_file(str(self.directory / _SHARD)).data
        self._columns = {name: table.column(name) for name in ("states", "class_token", "mask")}
        self._tokens = table.column("tokens").to_pylist()
        self._rows = {key: row for row, key in enumerate(table.column("key").to_pylist())}
        self._state: tuple[Any, ...] | None = None
        self._layers: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    # Writing

    @classmethod
    def write(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        directory: str | os.PathLike[str],
        num_samples: int | None = None,
        dtype: torch.dtype | None = None,
        adapter_name: str | None = None,
    ) -> FrozenPassCache:
        """Runs the frozen pass over `batches` and writes it; prints its size before the first byte is written.

        Args:
            model: The model with the adapter.
            batches: Batches of the model's keyword arguments, for example a `DataLoader`. Labels are not looked at.
            directory: Where to write; must not hold a cache yet.
            num_samples: How many samples there are, if `batches` is no `DataLoader` that knows it.
            dtype: Precision on disk, for example `torch.float16`; `None`: that of the model.
            adapter_name: The adapter that is to read it; `None`: the active one.

        Raises:
            ValueError: The backbone holds trainable parameters, the directory holds a cache, or the disk is too small.
            TypeError: `dtype` is none of floating-point numbers, or `batches` is a single batch.
        """
        from datasets import Features, Value
        from datasets.arrow_writer import ArrowWriter

        layer, adapter = reader_of(model, adapter_name)
        _refuse_trained_backbone(layer)
        if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
            raise TypeError(f"`dtype` must be one of floating-point numbers, as torch.float16, got {dtype!r}.")
        if isinstance(batches, Mapping):
            raise TypeError("`batches` is one batch: give a DataLoader, or a list of batches.")
        target = Path(directory)
        if (target / _META).exists():
            raise ValueError(f"{str(target)!r} holds a frozen pass already; open it with `FrozenPassCache(...)`.")
        target.mkdir(parents=True, exist_ok=True)
        if num_samples is None:
            num_samples = _count(batches)
        binary = Value("large_binary")
        features = Features(
            {"key": Value("binary"), "tokens": Value("int32"), "states": binary, "class_token": binary, "mask": binary}
        )
        meta: dict[str, Any] | None = None
        seen: set[bytes] = set()
        with ArrowWriter(features=features, path=str(target / (_SHARD + ".part")), writer_batch_size=64) as writer:
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if not key.startswith("label")}
                kept, call = layer.to_keep(adapter, inputs)
                stored = dtype or kept.class_token.dtype
                if meta is None:
                    meta = _describe(layer, adapter, kept, stored)
                    _announce(target, _bytes_per_sample(kept, stored), num_samples)
                _note_mask(meta, kept.mask)
                for row, key in enumerate(sample_keys(*call)):
                    if key in seen:
                        continue
                    seen.add(key)
                    writer.write(
                        {
                            "key": key,
                            "tokens": kept.states.shape[2],
                            "states": _raw(kept.states[row].to(stored)),
                            "class_token": _raw(kept.class_token[row].to(stored)),
                            "mask": b"" if kept.mask is None else _raw(kept.mask[row]),
                        }
                    )
            if meta is None:
                raise ValueError("`batches` is empty, so there is nothing to cache.")
            writer.finalize()
        (target / (_SHARD + ".part")).rename(target / _SHARD)
        meta["shard"] = _checksum(target / _SHARD)
        whole = {"meta": meta, "checksum": _checksum_of(meta)}
        (target / _META).write_text(json.dumps(whole, indent=1))  # last: its presence says that the cache is whole
        return cls(target)

    # Using

    @contextmanager
    def use(self, model: nn.Module, adapter_name: str | None = None) -> Iterator[FrozenPassCache]:
        """Inside, the model reads the samples of this cache from it, with any adapter that reads the same layers.

        Raises:
            ValueError: The cache was made with another backbone, or for other layers.
        """
        layer, adapter = reader_of(model, adapter_name)
        _refuse_trained_backbone(layer)
        if fingerprint(layer, adapter) != self.meta["fingerprint"]:
            raise ValueError(
                f"The frozen pass in {str(self.directory)!r} holds {self.meta['keeps']}, made with another backbone or for "
                "another adapter (weights, active adapters and their scaling, layers, precision, what is read), or with "
                "adapters in the backbone by an earlier version; write one for this model with `FrozenPassCache.write`."
            )
        self._state, self._layers = _state(layer), list(layer.blocks(adapter))
        layer.cache = self
        try:
            yield self
        finally:
            layer.cache = None

    def look_up(
        self, layer: ReaderLayer, adapter: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Kept | None:
        """What the frozen pass would leave behind for these arguments of the backbone.

        `None`, in evaluation, if a sample is not in the cache.
        """
        if (layers := list(layer.blocks(adapter))) != self._layers:
            raise ValueError(
                f"The frozen pass in {str(self.directory)!r} is in use, which is of the layers {self._layers}; the adapter "
                f"{adapter!r} reads {layers}: leave `cache.use(...)` first."
            )
        if (state := _state(layer)) != self._state:
            if fingerprint(layer, adapter) != self.meta["fingerprint"]:
                raise ValueError(
                    "The backbone has changed while its cached pass was in use; leave `cache.use(...)` first."
                )
            self._state = state  # it is the same elsewhere: Trainer moves a model to its device
        rows = [self._rows.get(key) for key in sample_keys(args, kwargs)]
        missing = sum(row is None for row in rows)
        if missing and layer.training:
            raise ValueError(
                f"{missing} of {len(rows)} samples are not in the frozen pass {str(self.directory)!r}. Inputs must be "
                "the same in each epoch: no random augmentation (or draw it once and keep the result), and padding to "
                "one length for text."
            )
        if missing:
            return None
        return self._assemble(layer, [row for row in rows if row is not None])

    def _assemble(self, layer: ReaderLayer, rows: list[int]) -> Kept:
        meta, device = self.meta, empty_like_of(layer.backbone).device
        tokens = {self._tokens[row] for row in rows}
        if len(tokens) > 1:
            raise ValueError(f"One batch holds samples of {sorted(tokens)} tokens; pad all to one length.")
        (count,) = tokens
        stored, dtype = getattr(torch, meta["kept"]), getattr(torch, meta["dtype"])
        states = self._gather("states", rows, (meta["states"], count, meta["width"]), stored)
        class_token = self._gather("class_token", rows, (meta["class_features"],), stored)
        mask = self._masks(rows, count)
        return Kept(
            states=states.to(device).to(dtype),
            dtype=dtype,
            class_token=class_token.to(device).to(dtype),
            mask=None if mask is None else mask.to(device),
            calls=meta["calls"],
        )

    def _masks(self, rows: list[int], count: int) -> torch.Tensor | None:
        """`(B, ..., N)`; `None` if no sample has one, as of a batch without padding."""
        column = self._columns["mask"]
        masked = [place for place, row in enumerate(rows) if len(column[row].as_buffer())]
        if not masked:
            return None
        dtype = getattr(torch, self.meta["mask_dtype"])
        shape = (*self.meta["mask_shape"], count)
        masks = torch.full((len(rows), *shape), dtype == torch.bool, dtype=dtype)  # nothing is masked: True, or + 0
        masks[masked] = self._gather("mask", [rows[place] for place in masked], shape, dtype)
        return masks

    def _gather(self, name: str, rows: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The entries of `rows` as one tensor `(B, *shape)`, copied once from the memory map."""
        batch = torch.empty(len(rows), *shape, dtype=dtype)
        if not batch.numel():
            return batch
        flat = batch.view(torch.uint8).numpy().reshape(len(rows), -1)
        for target, row in zip(flat, rows, strict=True):
            target[:] = np.frombuffer(self._columns[name][row].as_buffer(), dtype=np.uint8)
        return batch


def sample_keys(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[bytes]:
    """A hash of each sample's part of the arguments that the backbone is called with.

    What has one row for all samples, such as `position_ids`, counts as a row of each.
    """
    named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.ndim}
    batch = max(len(value) for value in tensors.values())
    common = blake2b(digest_size=16)
    for name, value in sorted(named.items()):
        if name not in tensors and value is not None and value is not False and name != "num_items_in_batch":
            common.update(f"{name}={value!r};".encode())
    hashes = [common.copy() for _ in range(batch)]
    for name, value in sorted(tensors.items()):
        described = f"{name}:{value.dtype}:{tuple(value.shape[1:])}".encode()
        if len(value) not in (1, batch):
            raise ValueError(f"The input {name!r} has {len(value)} rows for {batch} samples, so it cannot be cached.")
        value = value.detach().cpu().expand(batch, *value.shape[1:])
        rows = value.contiguous().view(batch, -1).view(torch.uint8).numpy()
        for one, row in zip(hashes, rows, strict=True):
            one.update(described)
            one.update(row)
    return [one.digest() for one in hashes]


def fingerprint(layer: ReaderLayer, adapter: str) -> str:
    """A hash of all that the frozen pass depends on besides the sample."""
    whole = blake2b(digest_size=16)
    whole.update(
        repr((layer.keeps, layer.family, list(layer.blocks(adapter)), acting_adapters(layer.backbone))).encode()
    )
    for name, tensor in sorted(layer.backbone.state_dict().items()):
        whole.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def _state(layer: ReaderLayer) -> tuple[Any, ...]:
    """Something cheap that changes when the backbone does."""
    versions = tuple((parameter.data_ptr(), parameter._version) for parameter in layer.backbone.parameters())
    return versions, acting_adapters(layer.backbone)


def _refuse_trained_backbone(layer: ReaderLayer) -> None:
    for name, parameter in layer.backbone.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"The backbone is being trained ({name!r} requires gradients), so its pass cannot be cached. Train the "
                "other adapter first and freeze it, for example by loading it with `is_trainable=False`."
            )


def _count(batches: Iterable[Any]) -> int | None:
    dataset = getattr(batches, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _describe(layer: ReaderLayer, adapter: str, kept: Kept, stored: torch.dtype) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "keeps": layer.keeps,
        "fingerprint": fingerprint(layer, adapter),
        "dtype": str(kept.dtype).removeprefix("torch."),
        "kept": str(stored).removeprefix("torch."),
        "states": kept.states.shape[1],
        "width": kept.states.shape[3],
        "class_features": kept.class_token.shape[1],
        "mask_shape": None,  # of the first batch that has a mask; without samples and tokens
        "mask_dtype": None,
        "calls": kept.calls,
    }


def _note_mask(meta: dict[str, Any], mask: torch.Tensor | None) -> None:
    """Transformers leaves the mask out where nothing is padded, so whether there is one is a matter of each batch."""
    if mask is None:
        return
    found = {"mask_shape": list(mask.shape[1:-1]), "mask_dtype": str(mask.dtype).removeprefix("torch.")}
    if meta["mask_shape"] is None:
        meta |= found
    elif any(meta[key] != value for key, value in found.items()):
        raise ValueError(
            f"The attention masks of the batches differ in form: {found['mask_shape']} of {found['mask_dtype']}, before "
            f"{meta['mask_shape']} of {meta['mask_dtype']}."
        )


def _checksum_of(meta: dict[str, Any]) -> str:
    return blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksum(file: Path) -> dict[str, Any]:
    whole = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            whole.update(piece)
    return {"bytes": file.stat().st_size, "checksum": whole.hexdigest()}


def _read_meta(directory: Path) -> dict[str, Any]:
    """What the cache says of itself, once it is known that nothing of it was damaged."""
    advice = "delete it, and write it again with `FrozenPassCache.write`"
    try:
        whole = json.loads((directory / _META).read_text())
    except ValueError:  # UnicodeDecodeError too
        raise ValueError(f"{str(directory / _META)!r} is damaged: {advice}.") from None
    meta = whole.get("meta") if isinstance(whole, dict) else None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise ValueError(f"The frozen pass in {str(directory)!r} is of another version: {advice}.")
    shard = directory / _SHARD
    if whole.get("checksum") != _checksum_of(meta) or not shard.is_file() or _checksum(shard) != meta.get("shard"):
        raise ValueError(f"The frozen pass in {str(directory)!r} is damaged or incomplete: {advice}.")
    return meta


def _bytes_per_sample(kept: Kept, stored: torch.dtype) -> int:
    numbers = kept.class_token[0].numel() + kept.states[0].numel()
    return numbers * stored.itemsize + (0 if kept.mask is None else kept.mask[0].numel() * kept.mask.element_size())


def _announce(directory: Path, per_sample: int, num_samples: int | None) -> None:
    total = None if num_samples is None else per_sample * num_samples
    size = "" if total is None else f", {total / 2**20:.1f} MiB for {num_samples} samples"
    print(f"Frozen pass in {directory}: {per_sample / 2**20:.3f} MiB a sample{size}.")
    free = shutil.disk_usage(directory).free
    if total is not None and total > free:
        raise ValueError(
            f"The frozen pass needs {total / 2**30:.1f} GiB and {str(directory)!r} has {free / 2**30:.1f} GiB left. Use "
            "`dtype=torch.float16`, fewer layers (`layers_to_transform`) or another disk."
        )
