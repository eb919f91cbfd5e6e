"""Pretrains a small vision transformer from scratch, so that results on images do not rest on random features.

Without arguments it needs no network: it learns scikit-learn's 8 x 8 digits, in a minute. What the vision benchmarks
adapt by default was trained in this way on Tiny-ImageNet at 32 x 32 pixels:

    python examples/pretrain_vit.py
    python examples/pretrain_vit.py --dataset zh-plus/tiny-imagenet --image-size 32 --patch-size 8 --flip \
        --width 192 --layers 6 --heads 3 --epochs 16 --batch-size 256

A run that was stopped goes on with `--resume`. The other examples take the result with `--model runs/pretrain_vit`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import accuracy, add_data_arguments, console, label_names, load_data, quiet
from datasets import Dataset
from image_classification import digits
from runs import progress_bar
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)


class Augment:
    """Makes a batch of rows with images: prepared pixels `(B, 3, H, W)` and labels `(B,)`.

    Args:
        processor: Resizes and normalises.
        padding: Pixels by which a training image is moved at most in each direction; 0 leaves it in place.
        flip: Half of the training images are mirrored, which does no good to digits and letters.
    """

    def __init__(self, processor: Any, padding: int = 0, flip: bool = False) -> None:
        self.processor, self.padding, self.flip = processor, padding, flip

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        if self.padding:
            height, width = pixels.shape[-2:]
            padded = F.pad(pixels, [self.padding] * 4, mode="replicate")
            corners = torch.randint(2 * self.padding + 1, (len(pixels), 2)).tolist()
            pixels = torch.stack(
                [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
            )
        if self.flip:
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


class ImageTrainer(Trainer):
    """A `Trainer` whose evaluation sees the images as they are."""

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> Any:
        training, self.data_collator = self.data_collator, Augment(self.processing_class)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--image-size", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--width", type=int, default=96, help="hidden size; the MLP has four times as much")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--padding", type=int, help="pixels by which images are moved at most; default: 1/16 of the size"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in the output directory")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pretrain_vit"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    is_digits = args.dataset == "digits" and not args.train_file
    data = digits(range(10), train=1400, validation=0) if is_digits else load_data(args, "image")
    side = {"height": args.image_size, "width": args.image_size}
    processor = ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    config = ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        **label_names(data),
    )
    model = ViTForImageClassification(config)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data['train']):,} images")
    padding = args.image_size // 16 if args.padding is None else args.padding
    steps = args.epochs * -(-len(data["train"]) // args.batch_size)
    trainer = ImageTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "trainer"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=args.weight_decay,
            label_smoothing_factor=0.1,
            bf16=torch.cuda.is_available(),
            save_total_limit=1,
            save_strategy="epoch",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        ),
        data_collator=Augment(processor, padding, args.flip),
        train_dataset=data["train"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    with progress_bar(steps) as bar:
        bar.follow(trainer, "pretraining")
        trainer.train(resume_from_checkpoint=args.resume or None)
    score = trainer.evaluate(data["test"])["eval_accuracy"]
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    console.print(f"Test accuracy {score:.3f}; in {args.output_dir}. For example:")
    console.print(f"python examples/image_classification.py --model {args.output_dir}")


if __name__ == "__main__":
    main()
