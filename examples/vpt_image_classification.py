"""Visual prompts on a vision transformer, and the learning rates that they need: `--grid` tries a whole range.

Without arguments it needs no network: the tiny ViT and the digits of `image_classification.py`.

    python examples/vpt_image_classification.py
    python examples/vpt_image_classification.py --grid                      # AdamW; rates by the validation split
    python examples/vpt_image_classification.py --grid --optimizer sgd      # the published grid
    python examples/vpt_image_classification.py --start class-tokens        # one prompt for each class
    python examples/vpt_image_classification.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --max-train 1000 --max-test 2000 --num-tokens 50 --grid
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import add_data_arguments, console, count_trainable, label_names, quiet
from image_classification import BATCH_SIZE, base_and_data, make_trainer, with_pixels
from peft import get_peft_model
from runs import Run, print_runs
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import peft_ext
from peft_ext import VPTConfig
from peft_ext.plots import plot


# The published rates are for a batch of 256 and SGD with momentum 0.9, and are scaled with the batch. They look far too
# high: a gradient reaches a prompt through keys and values only, and is small.
GRID = {
    "adamw": (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": tuple(rate * BATCH_SIZE / 256 for rate in (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)),
}
DEFAULT = {"adamw": 1e-2, "sgd": 5 * BATCH_SIZE / 256}


def with_sgd(trainer: Trainer, steps: int) -> Trainer:
    """Gives the trainer the published optimizer: momentum, and a tenth of the steps as warm-up before the cosine."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(parameters, trainer.args.learning_rate, momentum=0.9, weight_decay=1e-4)
    schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    return trainer


def run(args: argparse.Namespace, base: str, head: dict[str, Any], inputs: Any, rate: float) -> tuple[Run, Any]:
    """Trains prompts with one rate; returns what came out, on the split that is asked for, and the model."""
    set_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(base, **head)
    config = VPTConfig(num_tokens=args.num_tokens, deep=not args.shallow, modules_to_save=["classifier"])
    if args.start == "class-tokens":
        config = VPTConfig(num_tokens=model.num_labels, init_weights=args.start, modules_to_save=["classifier"])
        batches = make_trainer(model, inputs["train"], rate, args.epochs, args.seed)
        peft_ext.calibrate(model, config, trainer=batches, num_batches=8, progress=False)
    trainer = make_trainer(get_peft_model(model, config), inputs["train"], rate, args.epochs, args.seed)
    if args.optimizer == "sgd":
        with_sgd(trainer, len(trainer.get_train_dataloader()) * args.epochs)
    seconds = trainer.train().metrics["train_runtime"]
    split = "validation" if args.grid else "test"
    score = trainer.evaluate(inputs[split])["eval_accuracy"]
    trained: Any = trainer.model
    return Run(f"VPT, {args.optimizer}", args.seed, rate, score, seconds, *count_trainable(trained)), trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, or any image classifier on the Hub or on disk")
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--num-tokens", type=int, default=10)
    parser.add_argument("--shallow", action="store_true", help="prompts that enter before the first layer and travel")
    parser.add_argument("--start", default="random", choices=("random", "class-tokens"))
    parser.add_argument("--optimizer", default="adamw", choices=tuple(GRID))
    parser.add_argument("--learning-rate", type=float, help=f"default: {DEFAULT}")
    parser.add_argument("--grid", action="store_true", help="only compare learning rates, on the validation split")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vpt_image_classification"))
    args = parser.parse_args()
    if args.shallow and args.start != "random":
        parser.error("--start class-tokens is for prompts of each layer; leave --shallow out")
    quiet()

    base, data = base_and_data(args)
    head = {**label_names(data), "ignore_mismatched_sizes": True}
    inputs = with_pixels(data, AutoImageProcessor.from_pretrained(base))
    rates = GRID[args.optimizer] if args.grid else (args.learning_rate or DEFAULT[args.optimizer],)
    runs = [run(args, base, head, inputs, rate) for rate in rates]
    score = "validation accuracy" if args.grid else "test accuracy"
    print_runs(f"{len(data['train']):,} training images, one seed", [one for one, _ in runs], score)
    if args.grid:
        best = max((one for one, _ in runs), key=lambda one: one.accuracy)
        console.print(
            f"Best on the validation split: --optimizer {args.optimizer} --learning-rate {best.learning_rate:g}"
        )
        return
    model = runs[0][1]
    model.save_pretrained(args.output_dir / "adapter")
    plot(model).savefig(args.output_dir / "prompts.png")
    console.print(f"Adapter and figure: {args.output_dir}")


if __name__ == "__main__":
    main()
