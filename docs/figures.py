"""Draws the figures of the method pages: one adapter of each method, trained on real data on a CPU.

    python docs/figures.py            # all that this script makes
    python docs/figures.py ssf spt

The model is the tiny ViT of `examples/image_classification.py`, trained on the digits 0 to 4 of scikit-learn (made
once, a minute); each method adapts it to the digits 5 to 9, which takes seconds. The figures show what an adapter
looks like, and are no benchmark. VQT's are drawn by `examples/vqt_image_classification.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed


DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from common import label_names, quiet
from image_classification import digits, make_trainer, pretrained_on_digits, with_pixels

import peft_ext
from peft_ext import (
    BinaryAdapterConfig,
    BinaryLoraConfig,
    LoraFusionConfig,
    LoraSBConfig,
    MaskLoraCallback,
    MaskLoraConfig,
    PASTAConfig,
    S2FTConfig,
    SCTConfig,
    SNELLConfig,
    SparseFTCallback,
    SparseFTConfig,
    SPTConfig,
    SSFConfig,
    UniPTConfig,
    VPTConfig,
    WeGeFTConfig,
    plots,
)


# name of the file: config, learning rate, callbacks
FIGURES: dict[str, tuple[Any, float, list[Any]]] = {
    "binary_lora": (BinaryLoraConfig(r=8, modules_to_save=["classifier"]), 5e-3, []),
    "binary_adapter": (BinaryAdapterConfig(r=8, modules_to_save=["classifier"]), 5e-3, []),
    "ssf": (SSFConfig(modules_to_save=["classifier"]), 1e-2, []),
    "unipt": (UniPTConfig(reduction_factor=4), 1e-2, []),
    "vpt": (VPTConfig(num_tokens=5, modules_to_save=["classifier"]), 3e-2, []),
    "sparse": (
        SparseFTConfig(density=0.02, modules_to_save=["classifier"]),
        5e-3,
        [SparseFTCallback()],
    ),
    "spt": (SPTConfig(budget=0.05, r=4, modules_to_save=["classifier"]), 5e-3, []),
    "wegeft": (WeGeFTConfig(r=16, modules_to_save=["classifier"]), 5e-3, []),
    "s2ft": (
        S2FTConfig(ratios={"down": 0.1, "up": 0.1, "o": 0.25, "v": 0.25}, modules_to_save=["classifier"]),
        5e-3,
        [],
    ),
    "lora_fusion": (LoraFusionConfig(modules_to_save=["classifier"]), 5e-2, []),
    "lora_sb": (LoraSBConfig(r=8, step_size=1e-4, modules_to_save=["classifier"]), 5e-3, []),
    "sct": (SCTConfig(modules_to_save=["classifier"]), 5e-3, []),
    "snell": (
        SNELLConfig(sparsity=0.8, allocation="adaptive", total_steps=140, modules_to_save=["classifier"]),
        2e-2,
        [],
    ),
    "mask_pruning": (
        MaskLoraConfig(target_sparsity=0.25, modules_to_save=["classifier"]),
        5e-3,
        [MaskLoraCallback()],
    ),
    "pasta": (PASTAConfig(modules_to_save=["classifier"]), 1e-2, []),
}


def loras_on_pairs(base: str, folder: Path, epochs: int) -> list[str]:
    """Three LoRAs, each trained on two of the digits; their heads are left out."""
    found = []
    for pair in (range(5, 7), range(7, 9), range(8, 10)):
        data = digits(pair, train=80, validation=40)
        inputs = with_pixels(data, AutoImageProcessor.from_pretrained(base))
        model = AutoModelForImageClassification.from_pretrained(
            base, **label_names(data), ignore_mismatched_sizes=True
        )
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"], modules_to_save=["classifier"])
        trainer = make_trainer(get_peft_model(model, lora), inputs["train"], 5e-3, epochs)
        trainer.train()
        path = folder / "-".join(map(str, pair))
        trainer.model.peft_config["default"].modules_to_save = None
        trainer.model.save_pretrained(path)
        found.append(str(path))
    return found


def draw(name: str, file: Path, epochs: int = 20) -> None:
    """Trains the adapter of the method `name` and writes its figure, a PNG, to `file`."""
    config, learning_rate, callbacks = FIGURES[name]
    set_seed(0)
    base = pretrained_on_digits()
    data = digits(range(5, 10), train=200, validation=200)
    inputs = with_pixels(data, AutoImageProcessor.from_pretrained(base))
    model = AutoModelForImageClassification.from_pretrained(base, **label_names(data), ignore_mismatched_sizes=True)
    if isinstance(config, LoraFusionConfig):
        with tempfile.TemporaryDirectory() as folder:
            config.adapters = loras_on_pairs(base, Path(folder), epochs)
            model = get_peft_model(model, config)
        config = None
    if isinstance(config, (SPTConfig, LoraSBConfig, SCTConfig)):
        batches = make_trainer(model, inputs["train"], learning_rate, epochs)
        peft_ext.calibrate(model, config, trainer=batches, num_batches=8, progress=False)
    adapted = model if config is None else get_peft_model(model, config)
    trainer = make_trainer(adapted, inputs["train"], learning_rate, epochs)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    accuracy = trainer.evaluate(inputs["test"])["eval_accuracy"]
    figure = plots.plot(trainer.model)
    figure.savefig(file, dpi=80)
    print(f"{file}: test accuracy {accuracy:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FIGURES), help=f"of {', '.join(FIGURES)}; default: all")
    names = parser.parse_args().names
    if unknown := set(names) - set(FIGURES):
        parser.error(f"no such figure: {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    quiet()
    torch.set_num_threads(1)
    for name in names:
        draw(name, DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
