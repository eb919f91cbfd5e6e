"""A vision transformer that is pruned while it is adapted to new classes, then cut and saved.

Without arguments it needs no network: the tiny ViT and the digits of `image_classification.py`.

    python examples/prune_image_classification.py
    python examples/prune_image_classification.py --target-sparsity 0.5 --uniform
    python examples/prune_image_classification.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --max-train 1000 --max-test 2000
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cards import card_info, size_rows, write_card, write_results
from common import add_data_arguments, console, label_names, logits_of, quiet
from image_classification import base_and_data, make_trainer, with_pixels
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import peft_ext
from peft_ext import MaskLoraCallback, MaskLoraConfig
from peft_ext.export import card_rows, markdown, report
from peft_ext.plots import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, or any image classifier on the Hub or on disk")
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--target-sparsity", type=float, default=0.25, help="share of the prunable weights to cut")
    parser.add_argument("--uniform", action="store_true", help="as much from each layer, for a stock class to load")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune_image_classification"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    base, data = base_and_data(args)
    head = {**label_names(data), "ignore_mismatched_sizes": True}
    inputs = with_pixels(data, AutoImageProcessor.from_pretrained(base))
    dense = AutoModelForImageClassification.from_pretrained(base, **head).eval()
    config = MaskLoraConfig(target_sparsity=args.target_sparsity, uniform=args.uniform, modules_to_save=["classifier"])
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(base, **head), config)
    model.print_trainable_parameters()
    trainer = make_trainer(model, inputs["train"], args.learning_rate, args.epochs, args.seed)
    trainer.add_callback(MaskLoraCallback())
    trainer.train()
    score = trainer.evaluate(inputs["test"])["eval_accuracy"]
    console.print(f"Test accuracy: {score:.3f}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output_dir / "adapter")
    plot(model).savefig(args.output_dir / "kept.png")
    info = card_info(
        args,
        data,
        "image-classification",
        score,
        ["target_sparsity", "uniform", "epochs", "learning_rate", "seed"],
        title=f"ViT on {args.dataset}, pruned with LoRA",
        trainable_parameters=model.get_nb_trainable_parameters()[0],
    )
    write_card(args.output_dir / "adapter", args, info)
    batch: dict[str, torch.Tensor] = {"pixel_values": inputs["test"][:32]["pixel_values"]}
    masked = logits_of(model, batch)
    pruned: Any = peft_ext.prune_and_unload(model, uniform=args.uniform).eval()
    console.print(f"Cut out, the logits differ by {(logits_of(pruned, batch) - masked).abs().max():.1e}")
    measured = report(dense, pruned, batch)
    peft_ext.save_pruned(pruned, args.output_dir / "pruned", replace(info, sizes=card_rows(measured)))
    if args.uniform:  # nothing needs to be installed, and no code is loaded
        loaded = AutoModelForImageClassification.from_pretrained(args.output_dir / "pruned").eval()
    else:
        loaded = peft_ext.load_pruned(args.output_dir / "pruned").eval()
    console.print(f"Saved and loaded, by {(logits_of(loaded, batch) - logits_of(pruned, batch)).abs().max():.1e}")
    (args.output_dir / "report.json").write_text(json.dumps({"accuracy": score, **measured}, indent=1) + "\n")
    write_results(args.output_dir / "pruned", args, info, report=measured, sizes=size_rows(pruned, measured))
    console.print(markdown(measured))
    console.print(f"In {args.output_dir}: adapter, pruned model, report.json, kept.png")


if __name__ == "__main__":
    main()
