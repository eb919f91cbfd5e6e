"""Small files of trained adapters: ComPEFT (Yadav, Choshen, Raffel, Bansal 2023, arXiv:2311.13171), and codes."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from ..core import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BadInput, about_of
from ..lora_start import BESIDE_THE_BASE, LoraStart, lora_start
from ..low_bit import BITS, FULL
from ..packed_files import PACKED, Packed, coded, is_packed, ternary


# that `scale="tune"` tries: the paper's, and 1.5 and 2.5, between which small models have their best
SCALES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
Evaluate = Callable[[PeftModel], float]


@dataclass
class PackedAdapter:
    """What `compress` and `binarize` give.

    Attributes:
        packed: The tensors.
        config: The text of `adapter_config.json`.
        nbytes: Of the packed file's tensors.
        original_nbytes: Of those of the adapter.
        scale: The magnitude of the kept values over the standard deviation of all; of codes `None`.
    """

    packed: Packed
    config: str
    original_nbytes: int
    scale: float | None = None

    @property
    def nbytes(self) -> int:
        """Of the tensors on disk."""
        return self.packed.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors, unpacked, as its method saves them."""
        return self.packed.unpacked()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the packed file and the config; `peft_ext.load` reads them.

        Raises:
            ValueError: An adapter lies there already.
        """
        path = Path(directory)
        if (path / ADAPTER_WEIGHTS).exists():
            raise ValueError(f"There is an adapter in {path} already: give another directory.")
        path.mkdir(parents=True, exist_ok=True)
        (path / ADAPTER_CONFIG).write_text(self.config, encoding="utf-8")
        self.packed.save(path)


def compress(
    adapter: PeftModel | str | os.PathLike[str],
    keep: float = 0.1,
    scale: float | str = "std",
    *,
    evaluate: Evaluate | None = None,
    seed: int | None = None,
    adapter_name: str = "default",
) -> PackedAdapter:
    """Thins an adapter out to the signs of its largest values, all of one magnitude (ComPEFT).

    Of all trained values together the share `keep` that is largest by absolute value stays. Each becomes `scale` times
    the standard deviation of all, with its sign; the others become zero. Heads and indices stay as they are.

    Args:
        adapter: A directory, a repository of the Hub, or a model with the adapter.
        keep: The share that stays.
        scale: `"std"` is 1; `"tune"` tries `SCALES` and takes the one with the largest value of `evaluate`.
        evaluate: Given the model with the compressed adapter on it, returns what is to be large, a finite number. The
            adapter must be active and not merged. The model is left as it was.
        seed: Of a LoRA adapter, given as a model: what `torch.manual_seed` got directly before `get_peft_model`. Then
            only what the training has changed is thinned out: A starts at random, and its start, which is drawn again
            when the file is loaded, takes no bytes.
        adapter_name: Which adapter of a model.

    Raises:
        ValueError: A value cannot be used, the adapter did not start from `seed`, `evaluate` does not see the adapter or
            gives no finite number, or the adapter's method does not say that its values may be thinned out, as where
            its start was taken out of the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
        TypeError: `evaluate` gives no number.
    """
    if isinstance(keep, bool) or not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise ValueError(f"`keep` is a share above 0 and up to 1, got {keep!r}.")
    number = 1.0 if isinstance(scale, str) else scale
    if scale not in ("std", "tune") and (isinstance(scale, (str, bool)) or not (number > 0 and math.isfinite(number))):
        raise ValueError(f"`scale` must be 'std', 'tune' or a number above 0, got {scale!r}.")
    if (scale == "tune") != (evaluate is not None):
        raise ValueError("`scale='tune'` and `evaluate` go together: a function of the model that returns a number.")
    if scale == "tune" and not isinstance(adapter, PeftModel):
        raise ValueError("`scale='tune'` needs the model with the adapter, not its directory: `peft_ext.load(...)`.")
    if seed is not None and not isinstance(adapter, PeftModel):
        raise ValueError("`seed` needs the model with the adapter, not its directory: `peft_ext.load(...)`.")
    config, tensors, names = _read(adapter, adapter_name)
    own, start = tensors, None
    if seed is not None:
        assert isinstance(adapter, PeftModel)
        start = lora_start(adapter, seed, adapter_name)
        tensors = _since(start, tensors)
    std = torch.cat([tensors[key].double().flatten() for key in names]).std().item()
    if not std > 0:
        raise ValueError("All values of the adapter are equal, so there is nothing to keep: was it trained?")

    def at(number: float) -> PackedAdapter:
        packed = replace(ternary(tensors, names, keep, number * std), start=start)
        return PackedAdapter(packed, config, _bytes(own), number)

    if evaluate is None:
        return at(number)
    assert isinstance(adapter, PeftModel)
    _check_acts(adapter, adapter_name)
    results = {}
    with _left_as_it_was(adapter, own, adapter_name):
        for candidate in SCALES:
            set_peft_model_state_dict(adapter, at(candidate).tensors(), adapter_name)
            results[candidate] = _number(evaluate(adapter), candidate)
    return at(max(results, key=lambda candidate: results[candidate]))


def binarize(
    adapter: PeftModel | str | os.PathLike[str], bits: int = 1, *, adapter_name: str = "default"
) -> PackedAdapter:
    """Rounds each trained tensor of an adapter to `2**bits` levels around its mean, as `BinaryLoraConfig` trains them.

    Rounding after the training loses more than training in few bits does. Tensors so small that codes would not be
    smaller, DoRA's magnitudes, heads and indices stay as they are.

    Args:
        adapter: A directory, a repository of the Hub, or a model with the adapter.
        bits: 1 to 8.
        adapter_name: Which adapter of a model.

    Raises:
        ValueError: `bits` is out of range, or the adapter is of a kind whose values must not be rounded: masks, readers
            with heads of their own, LoRA whose start was taken out of the base, what is packed already.
    """
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"`bits` must be {BITS[0]} to {BITS[-1]}, got {bits!r}.")
    config, tensors, names = _read(adapter, adapter_name, thins=False)
    large = [key for key in names if tensors[key].numel() * bits / 8 + 9 < _bytes({key: tensors[key]})]
    return PackedAdapter(coded(tensors, large, bits), config, _bytes(tensors))


def _check_acts(model: PeftModel, adapter_name: str) -> None:
    """Raises where another value in the adapter changes nothing in the model's output."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if adapter_name not in model.active_adapters or any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"`scale='tune'` evaluates the model with the adapter {adapter_name!r}, which is not active (active are "
            f"{model.active_adapters}, or adapters are disabled): `model.set_adapter({adapter_name!r})`."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "`scale='tune'` evaluates the model with other values in the adapter, which is merged into the base: "
            "`model.unmerge_adapter()`."
        )


@contextmanager
def _left_as_it_was(model: PeftModel, own: dict[str, torch.Tensor], adapter_name: str) -> Iterator[None]:
    """Inside, other values may be loaded; afterwards all is as before, to the bit: files may be of fewer bits."""
    named = [*model.named_parameters(), *model.named_buffers()]
    live = [(name, t) for name, t in named if t.requires_grad or adapter_name in name.split(".")]
    before = {name: tensor.detach().clone() for name, tensor in live}
    try:
        yield
    finally:
        set_peft_model_state_dict(model, own, adapter_name)
        now = dict([*model.named_parameters(), *model.named_buffers()])
        with torch.no_grad():
            for name, value in before.items():
                now[name].copy_(value)


def _number(found: object, scale: float) -> float:
    """What `evaluate` has given."""
    try:
        number = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`evaluate` gave a {type(found).__name__} for the scale {scale}: it must return a number."
        ) from error
    if not math.isfinite(number):
        raise ValueError(
            f"`evaluate` gave {number} for the scale {scale}: no best one can be told, give finite numbers."
        )
    return number


def _since(start: LoraStart, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors less their start.

    Raises:
        ValueError: They are no nearer to it than to zero.
    """
    first = start.tensors()
    changed = {key: (tensors[key].float() - first[key]).to(tensors[key].dtype) for key in first}
    before, after = (sum(t[key].double().square().sum() for key in first) for t in (tensors, changed))
    if not after < before:
        raise ValueError(
            f"The adapter did not start from seed {start.seed}: it is no nearer to that start than to zero. Give what "
            "`torch.manual_seed` was given directly before `get_peft_model`, or leave `seed` out."
        )
    return {**tensors, **changed}


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read(
    adapter: nn.Module | str | os.PathLike[str], adapter_name: str, source: str = "", thins: bool = True
) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """The text of the config, the tensors, and the keys of those that may be changed.

    Args:
        adapter: A directory, a repository of the Hub, or a model with the adapter.
        adapter_name: Which adapter of a model.
        source: What errors name.
        thins: Whether values become zero; they are only rounded else.
    """
    if isinstance(adapter, nn.Module) and not isinstance(adapter, PeftModel):
        raise TypeError(
            f"A {type(adapter).__name__} is not packed: give a PeftModel, or the directory of one adapter, as "
            "`save_pretrained` writes it for each."
        )
    if isinstance(adapter, PeftModel):
        if adapter_name not in adapter.peft_config:
            raise ValueError(
                f"There is no adapter {adapter_name!r} on this model, only {sorted(adapter.peft_config)}."
            )
        with tempfile.TemporaryDirectory(prefix="peft_ext_") as folder:
            adapter.save_pretrained(folder, selected_adapters=[adapter_name])
            saved = Path(folder) if adapter_name == "default" else Path(folder, adapter_name)
            return _read(saved, adapter_name, f"The adapter {adapter_name!r}", thins)
    directory = Path(adapter).expanduser()
    if not directory.is_dir():
        directory = Path(snapshot_download(os.fspath(adapter), allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    if is_packed(directory):
        raise BadInput(
            f"{adapter} is packed already ({PACKED}): pack the adapter that it was made of, or the model that "
            "`peft_ext.load` makes of it."
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise BadInput(f"{adapter} has no {name}: give the directory of a saved adapter.")
    config = (directory / ADAPTER_CONFIG).read_text(encoding="utf-8")
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    return config, tensors, _packable(config, tensors, source or str(adapter), thins)


def _packable(config: str, tensors: dict[str, torch.Tensor], source: str, thins: bool) -> list[str]:
    """The keys of the method's trained tensors.

    Raises:
        ValueError: The method does not say that they may be changed, or there is one that may not be.
    """
    fields = json.loads(config)
    method = fields.get("peft_type", "")
    about = about_of(method)
    form = "compressed" if thins else "binarized"
    if form in about.instead and fields.get("bits") != FULL:
        raise BadInput(f"{source} is of the method {method}, and is not made {form}: {about.instead[form]}.")
    if thins and not about.offsets:
        able = ", ".join(
            known.value
            for known in PEFT_TYPE_TO_CONFIG_MAPPING
            if about_of(known.value).offsets  # type: ignore[attr-defined]
        )
        raise BadInput(
            f"{source} is of the method {method}, which is not thinned out: a value of zero may not mean that nothing is "
            f"changed. Adapters of {able} are; `binarize` rounds those of more methods."
        )
    if method == "LORA" and (start := fields.get("init_lora_weights", True)) not in BESIDE_THE_BASE:
        raise BadInput(
            f"{source} is not packed: `init_lora_weights` is {start!r}, whose start is taken out of the base's weights, so "
            "that zeros in the adapter do not give back the base. PiSSA, OLoRA, CorDA and LoRA-GA become plain LoRA by "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`: pack that."
        )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(method)  # type: ignore[call-overload]
    if prefix is None:
        raise BadInput(f"{source} is of the method {method}, whose tensors cannot be told from others by their names.")
    found = []
    for key, tensor in tensors.items():
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(prefix)), None)
        if at is None or not tensor.is_floating_point():
            continue
        leaf = ".".join(parts[at:]).removeprefix(prefix)
        if leaf in about.state:
            continue  # frozen: it stays as it is
        if about.offsets and not re.fullmatch(about.offsets, leaf):
            if not thins:
                continue  # magnitudes: they stay as they are
            raise BadInput(
                f"{source} is not packed, since its {key!r} may not be thinned out or rounded: of {method} only "
                f"{about.offsets} may."
            )
        found.append(key)
    if not found:
        raise BadInput(f"{source} has no tensors of the method {method} that could be packed.")
    return found


# The forms of `peft-ext export`, which need no base model
FORMS: dict[str, Callable[[Path], PackedAdapter]] = {"compressed": compress, "binarized": binarize}
