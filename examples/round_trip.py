"""The check of the examples in a fresh process: adapter, merged model and their logits.

Run as a program it is the fresh process of `check_round_trip`, which starts it: `python round_trip.py adapter DIRECTORY`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import console, logits_of, quiet
from peft import PeftModel
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class RoundTrip:
    """Largest differences between the trained model's logits and those after each step, and the largest logit."""

    adapter_bytes: int
    reloaded: float
    merged: float
    merged_reloaded: float
    largest: float
    eps: float  # of the model's dtype

    def report(self, path: Path) -> None:
        """Says what was done; raises `SystemExit` if a step changed the logits."""
        steps = (
            ("adapter, reloaded in a fresh process", self.reloaded),
            ("merged there", self.merged),
            ("merged model, loaded by plain transformers in another process", self.merged_reloaded),
        )
        console.print(f"\nSaved in {path}: adapter of {self.adapter_bytes:,} bytes. Largest difference of the logits:")
        for step, difference in steps:
            console.print(f"  {difference:8.1e}  {step}")
        allowed = 100 * self.eps * max(1.0, self.largest)  # 1e-5 of the largest logit in float32
        if not all(difference <= allowed for _, difference in steps):
            raise SystemExit("The logits do not agree.")
        console.print("[green]All agree with those of the model that was trained.[/green]")


def adapter_bytes(directory: Path) -> int:
    """Size of the weights of the adapter saved in `directory / "adapter"`."""
    return (directory / "adapter" / "adapter_model.safetensors").stat().st_size


def chat_batch(tokenizer: Any, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The inputs of a chat model for a few prompts, padded."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False) for prompt in prompts]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def check_round_trip(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    directory: Path,
    base: str,
    auto_class: str,
    load_kwargs: Mapping[str, Any] | None = None,
    save: bool = True,
) -> RoundTrip:
    """Saves the adapter, reloads it in a fresh process, merges it there, and loads the merged model in another.

    Args:
        model: The trained `PeftModel`.
        inputs: The batch on which logits are compared.
        directory: Takes `adapter` and `merged`.
        base: Name or directory of the model without the adapter.
        auto_class: Name of the transformers class that loads it.
        load_kwargs: What `from_pretrained` needs besides the name, as JSON.
        save: Whether the adapter is still to be written to `directory / "adapter"`.
    """
    adapter = directory / "adapter"
    if save:
        model.save_pretrained(adapter)
    expected = logits_of(model, inputs)
    tensors = {name: value.cpu().contiguous() for name, value in inputs.items()}
    save_file(tensors | {"logits": expected.contiguous()}, directory / "check.safetensors")
    job = {"base": base, "auto_class": auto_class, "load_kwargs": dict(load_kwargs or {})}
    (directory / "check.json").write_text(json.dumps(job))
    with console.status("Reloading in a fresh process"):
        first = _fresh_process("adapter", directory)
        second = _fresh_process("merged", directory)
    return RoundTrip(
        adapter_bytes=adapter_bytes(directory),
        largest=expected.abs().max().item(),
        eps=torch.finfo(model.get_base_model().dtype).eps,
        **first,
        **second,
    )


def _fresh_process(step: str, directory: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, step, str(directory)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"The fresh process failed: {step} of {directory}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(step: str, directory: Path) -> dict[str, float]:
    job = json.loads((directory / "check.json").read_text())
    inputs = load_file(directory / "check.safetensors")
    expected = inputs.pop("logits")
    auto_class = getattr(transformers, job["auto_class"])
    if step == "merged":  # what somebody does who has never heard of this package
        model = auto_class.from_pretrained(directory / "merged")
        assert "peft_ext" not in sys.modules
        return {"merged_reloaded": (logits_of(model, inputs) - expected).abs().max().item()}

    import peft_ext  # noqa: F401  (makes SSF known to PEFT)

    base = auto_class.from_pretrained(job["base"], **job["load_kwargs"])
    model = PeftModel.from_pretrained(base, directory / "adapter")
    reloaded = (logits_of(model, inputs) - expected).abs().max().item()
    merged = model.merge_and_unload()
    merged.save_pretrained(directory / "merged")
    return {"reloaded": reloaded, "merged": (logits_of(merged, inputs) - expected).abs().max().item()}


if __name__ == "__main__":
    quiet()
    print(json.dumps(_main(sys.argv[1], Path(sys.argv[2]))))
