"""The start of a LoRA adapter, drawn again from its seed, so that a file needs only what the training has changed.

PEFT draws A (and B where it does not start at zero) when the adapter is made, module by module, from torch's generator of
the CPU. It is made here again on modules of the same sizes that hold no weights, so the base model is not needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .core import BadInput


STARTS = (True, "gaussian", "orthogonal")  # values of `init_lora_weights` that look at no weights of the base
# values of it that leave the base's weights alone, so that an adapter of zeros changes nothing
BESIDE_THE_BASE = (*STARTS, False, "eva", "mica")
PREFIX = "base_model.model."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraStart:
    """What the start follows from.

    Args:
        seed: What `torch.manual_seed` was given before the adapter was made.
        init: `init_lora_weights` of the config.
        modules: Rank, input and output features, and the name of the base weight's dtype, by the names of the modules,
            in the order in which PEFT makes their adapters.
        digest: Of the start as it was when this was written; empty if there is none yet.
    """

    seed: int
    init: bool | str
    modules: dict[str, tuple[int, int, int, str]]
    digest: str = ""

    def shapes(self) -> dict[str, list[int]]:
        """Of the tensors, by their keys in an adapter's file."""
        found = {}
        for name, (rank, inputs, outputs, _) in self.modules.items():
            found[f"{PREFIX}{name}.lora_A.weight"] = [rank, inputs]
            found[f"{PREFIX}{name}.lora_B.weight"] = [outputs, rank]
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """The start in float32, by the keys of an adapter's file. torch's generator is left as it was.

        Raises:
            BadInput: It is not what it was when it was packed.
        """
        ranks = {name: module[0] for name, module in self.modules.items()}
        common = max(ranks.values(), key=list(ranks.values()).count)
        config = LoraConfig(
            r=common,
            rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common},
            target_modules=list(self.modules),
            init_lora_weights=self.init,  # type: ignore[arg-type]
        )
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            model = inject_adapter_in_model(config, self._skeleton())
        found = {}
        for name in self.modules:
            layer: Any = model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                found[f"{PREFIX}{name}.{part}.weight"] = getattr(layer, part)["default"].weight.detach().float()
        if self.digest and _digest(found) != self.digest:
            raise BadInput(
                f"The start of seed {self.seed}, which this packed adapter is relative to, is no longer drawn as it was "
                f"when it was packed (here torch {torch.__version__}): unpack it with the versions of torch and PEFT "
                "that packed it, and save it as an ordinary adapter."
            )
        return found

    def _skeleton(self) -> nn.Module:
        """Linears of the right sizes under the right names, whose weights take no memory."""
        root = nn.Module()
        for name, (_, inputs, outputs, dtype) in self.modules.items():
            *path, last = name.split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            linear = nn.Linear(inputs, outputs, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.zeros(1, 1, dtype=DTYPES[dtype]).expand(outputs, inputs), False)
            parent.add_module(last, linear)
        return root


def lora_start(model: PeftModel, seed: int, adapter_name: str = "default") -> LoraStart:
    """The start of an adapter that was made directly after `torch.manual_seed(seed)`.

    Raises:
        ValueError: The seed is none, the adapter is none of LoRA, or it starts in a way that a seed does not tell.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")
    config: Any = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise BadInput(f"`seed` is for LoRA, whose start is random; the adapter is of {config.peft_type.value}.")
    if config.init_lora_weights not in STARTS:
        raise ValueError(
            f"`seed` does not tell how the adapter started: `init_lora_weights` is {config.init_lora_weights!r}, and only "
            f"{', '.join(map(repr, STARTS))} look at no weights of the base. Leave `seed` out."
        )
    start = LoraStart(seed, config.init_lora_weights, dict(_modules(model, adapter_name)))
    return LoraStart(start.seed, start.init, start.modules, _digest(start.tensors()))


def _modules(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, tuple[int, int, int, str]]]:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in {*module.lora_A, *module.lora_embedding_A}:
            continue
        down: Any = module.lora_A[adapter_name].weight if adapter_name in module.lora_A else None
        if down is None or down.ndim != 2 or model.peft_config[adapter_name].target_parameters:  # type: ignore[attr-defined]
            raise ValueError(f"`seed` is for LoRA on Linear modules, and {name!r} is none: leave `seed` out.")
        weight: Any = getattr(module.get_base_layer(), "weight", None)
        # PEFT makes the adapter in the precision of the base, unless that is quantised
        dtype = str(weight.dtype).removeprefix("torch.") if weight is not None else ""
        up: Any = module.lora_B[adapter_name].weight
        sizes = (int(down.shape[0]), int(down.shape[1]), int(up.shape[0]))
        yield name.removeprefix(PREFIX), (*sizes, dtype if dtype in DTYPES else "float32")


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(tensors[key].contiguous().numpy().tobytes())
    return found.hexdigest()
