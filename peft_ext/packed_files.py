"""Adapters packed for the disk: signs of one size at few indices, or codes of few bits; unpacked when they are loaded.

A packed adapter is a directory with the `adapter_config.json` of its method and one file in the place of its weights. Its
metadata name the tensors that are packed, in order, with their shapes:

- `"ternary"`: of all their entries together some are `+m` or `-m`, the rest zero. `index` has the indices of those that
  are not, in the code of Elias and Fano, `signs` a bit for each (1: positive), `magnitude` m.
- `"codes"`: each tensor's entries are levels, see `peft_ext.low_bit`; `codes` and `stats` by the tensor's key.

What is not packed (heads, indices) is in the file as it was. With `"start"` in the metadata the packed tensors are what
is to be added to the start of a LoRA adapter, see `lora_start.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .core import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BadInput
from .lora_start import DTYPES, STARTS, LoraStart
from .low_bit import BITS, Coded, decode
from .low_bit import encode as encode_levels
from .sparse import decode as decode_indices
from .sparse import encode as encode_indices
from .sparse import pack_bits, top_indices, unpack_bits


PACKED = "adapter_packed.safetensors"
HEADER, VERSIONS = "peft_ext_packed", (1, 2)  # 2: relative to a start
TERNARY, CODES = "ternary", "codes"
EXPANSION = 1 << 14  # entries for each byte of an index, at most
Tensors = dict[str, torch.Tensor]


@dataclass
class Packed:
    """The tensors of a packed adapter.

    Args:
        kind: `"ternary"` or `"codes"`.
        shapes: Of the packed tensors, by their keys, in order.
        dtypes: Likewise; the names in torch.
        tensors: What is in the file.
        bits: Of a code.
        start: What the packed tensors are added to; `None`: to zero.
    """

    kind: str
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    tensors: Tensors = field(default_factory=dict)
    bits: int = 0
    start: LoraStart | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors in the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, directory: Path) -> None:
        """Writes the file into `directory`."""
        header: dict[str, object] = {
            "version": VERSIONS[0] if self.start is None else VERSIONS[1],
            "kind": self.kind,
            "bits": self.bits,
            "shapes": self.shapes,
            "dtypes": self.dtypes,
        }
        if self.start is not None:
            header["start"] = asdict(self.start)
        metadata = {"format": "pt", HEADER: json.dumps(header)}
        save_file({key: t.contiguous() for key, t in self.tensors.items()}, directory / PACKED, metadata=metadata)

    def unpacked(self) -> Tensors:
        """The adapter's tensors as its method saves them.

        Raises:
            BadInput: The parts of the file do not fit together.
        """
        rest = dict(self.tensors)
        try:
            found = self._ternary(rest) if self.kind == TERNARY else self._codes(rest)
            if self.start is not None:
                if any(self.shapes.get(key) != shape for key, shape in self.start.shapes().items()):
                    raise ValueError("the start is of other tensors")
                found |= {key: found[key] + tensor for key, tensor in self.start.tensors().items()}
        except BadInput:
            raise
        except (KeyError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"{PACKED} is damaged, its parts do not fit together ({error}): restore the file."
            ) from error
        return {key: found[key].to(DTYPES[self.dtypes[key]]) for key in self.shapes} | rest

    def _ternary(self, rest: Tensors) -> Tensors:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        index, signs, magnitude = (rest.pop(f"packed.{part}") for part in ("index", "signs", "magnitude"))
        k, total = int(rest.pop("packed.count")), sum(sizes)
        if len(signs) != -(-k // 8):
            raise ValueError(f"{len(signs)} bytes of signs for {k} values")
        if total > EXPANSION * (len(index) + 1024):
            raise ValueError(f"{total} entries from {len(index)} bytes")
        vector = torch.zeros(total)
        values = (2 * unpack_bits(signs, 1, k) - 1) * magnitude
        vector[decode_indices(index, k, total).long()] = values.float()
        parts = vector.split(sizes)
        return {key: part.view(shape) for part, (key, shape) in zip(parts, self.shapes.items(), strict=True)}

    def _codes(self, rest: Tensors) -> Tensors:
        return {
            key: decode(Coded(rest.pop(f"{key}.codes"), rest.pop(f"{key}.stats")), self.bits, tuple(shape))
            for key, shape in self.shapes.items()
        }


def read_packed(file: Path) -> Packed:
    """The packed adapter in a file.

    Raises:
        BadInput: It is none, is damaged, or was written by a later version.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {})[HEADER])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        version, kind, bits = header["version"], header["kind"], header["bits"]
        shapes, dtypes = dict(header["shapes"]), dict(header["dtypes"])
        start = _start(header["start"]) if version == VERSIONS[1] else None
        sizes_are_whole = all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file} is no packed adapter, or is damaged ({type(error).__name__} {error}).") from error
    if version not in VERSIONS:
        raise BadInput(f"{file} was packed in version {version!r} of the format: `pip install -U peft-ext`.")
    is_sound = kind == TERNARY or (kind == CODES and bits in BITS)
    if not (is_sound and sizes_are_whole and shapes.keys() == dtypes.keys() and set(dtypes.values()) <= set(DTYPES)):
        raise BadInput(f"The metadata of {file} are damaged: restore the file that was written.")
    return Packed(kind, shapes, dtypes, tensors, bits, start)


def _start(header: dict[str, Any]) -> LoraStart:
    """The start in a header; its values are looked at here, since a file may hold anything."""
    modules: dict[str, tuple[int, int, int, str]] = {}
    for name, (rank, inputs, outputs, dtype) in header["modules"].items():
        modules[name] = (int(rank), int(inputs), int(outputs), str(dtype))
    is_sound = bool(modules) and all(min(m[:3]) > 0 and m[3] in DTYPES for m in modules.values())
    if not is_sound or header["init"] not in STARTS or not all(name and ".." not in f".{name}." for name in modules):
        raise ValueError("the start cannot be drawn")
    return LoraStart(int(header["seed"]), header["init"], modules, str(header["digest"]))


def ternary(tensors: Mapping[str, torch.Tensor], packed: list[str], keep: float, magnitude: float) -> Packed:
    """Keeps the sign of the share `keep` of all entries of the `packed` tensors that are largest by absolute value."""
    names = sorted(packed)
    vector = torch.cat([tensors[key].float().flatten() for key in names])
    k = min(max(1, round(keep * len(vector))), int(vector.count_nonzero()))
    indices = top_indices(lambda start, stop: vector[start:stop].abs(), len(vector), k)
    result = _packed(TERNARY, tensors, names)
    result.tensors |= {
        "packed.index": encode_indices(indices, len(vector)),
        "packed.signs": pack_bits((vector[indices] > 0).long(), 1),
        "packed.magnitude": torch.tensor(magnitude, dtype=torch.float32),
        "packed.count": torch.tensor(k),
    }
    return result


def coded(tensors: Mapping[str, torch.Tensor], packed: list[str], bits: int) -> Packed:
    """Rounds each of the `packed` tensors to `2**bits` levels."""
    result = _packed(CODES, tensors, sorted(packed))
    result.bits = bits
    for key in result.shapes:
        codes, stats = encode_levels(tensors[key].float(), bits)
        result.tensors |= {f"{key}.codes": codes, f"{key}.stats": stats}
    return result


def _packed(kind: str, tensors: Mapping[str, torch.Tensor], names: list[str]) -> Packed:
    shapes = {key: list(tensors[key].shape) for key in names}
    dtypes = {key: str(tensors[key].dtype).removeprefix("torch.") for key in names}
    return Packed(kind, shapes, dtypes, {key: tensor for key, tensor in tensors.items() if key not in shapes})


def write_unpacked(directory: Path, output: Path) -> None:
    """Writes a packed adapter as an ordinary one of its method."""
    shutil.copy(directory / ADAPTER_CONFIG, output / ADAPTER_CONFIG)
    tensors = {key: tensor.contiguous() for key, tensor in read_packed(directory / PACKED).unpacked().items()}
    save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def weights_file(directory: Path) -> Path:
    """The file with an adapter's tensors, packed or not."""
    return directory / (PACKED if is_packed(directory) else ADAPTER_WEIGHTS)


def is_packed(directory: Path) -> bool:
    """Whether an adapter lies there in packed form only."""
    return (directory / PACKED).is_file() and not (directory / ADAPTER_WEIGHTS).is_file()


@contextmanager
def unpacked(directory: Path) -> Iterator[Path]:
    """Inside, a directory with the packed adapter as an ordinary one."""
    with tempfile.TemporaryDirectory(prefix="peft_ext_") as folder:
        write_unpacked(directory, Path(folder))
        yield Path(folder)
