"""Adapts a vision transformer to new classes with SSF, LoRA and a linear probe.

Without arguments it needs no network: a tiny ViT is trained on the digits 0 to 4 of scikit-learn (once, a minute), and
is then adapted to the digits 5 to 9.

    python examples/image_classification.py
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --max-train 1000 --max-test 2000
    python examples/image_classification.py --model path/to/vit --train-file train.parquet --test-file test.parquet
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cards import card_info, method_rows, rivals_above, write_card
from common import (
    accuracy,
    add_data_arguments,
    cache_directory,
    console,
    freeze_all_but,
    label_names,
    load_data,
    quiet,
)
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from peft import LoraConfig, get_peft_model
from round_trip import check_round_trip
from runs import Run, print_runs, progress_bar, train
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from peft_ext import SSFConfig


METHODS = ("linear probe", "SSF", "LoRA r=8")
BATCH_SIZE = 32


def adapt(model: PreTrainedModel, method: str) -> nn.Module:
    """PEFT has no task type for images: `modules_to_save` says that the new head is trained and saved too."""
    if method == "SSF":
        return get_peft_model(model, SSFConfig(modules_to_save=["classifier"]))
    if method == "LoRA r=8":
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
        return get_peft_model(model, config)
    return freeze_all_but(model)


def digits(classes: range, train: int, validation: int) -> DatasetDict:
    """Those of scikit-learn's 1,797 handwritten digits that are in `classes`, as RGB images of 8 x 8 pixels."""
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits

    source = load_digits()
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for image, label in zip(source.images, source.target, strict=True):
        if label in classes:
            rows["image"].append(PILImage.fromarray((image * 255 / 16).astype("uint8")).convert("RGB"))
            rows["label"].append(int(label) - classes.start)
    names = [str(label) for label in classes]
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=names)}))
    data = data.shuffle(seed=0)
    end = train + validation
    return DatasetDict(
        train=data.select(range(train)),
        validation=data.select(range(train, end)),
        test=data.select(range(end, len(data))),
    )


def pretrained_on_digits() -> str:
    """Directory of a tiny ViT that tells the digits 0 to 4 apart; it is trained if it is not there."""
    directory = cache_directory() / "vit-digits-0-4"
    if (directory / "config.json").exists():
        return str(directory)
    console.print(f"Training a tiny ViT on the digits 0 to 4, into {directory} (once)")
    data = digits(range(5), train=700, validation=0)
    set_seed(0)
    size = {"image_size": 8, "patch_size": 2, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**size, intermediate_size=384, **label_names(data)))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    inputs = with_pixels(data, processor)
    with progress_bar(30 * 22) as bar:
        trainer = make_trainer(model, inputs["train"], learning_rate=1e-3, epochs=30)
        bar.follow(trainer, "pretraining")
        trainer.train()
    console.print(f"Accuracy on held-out digits 0 to 4: {trainer.evaluate(inputs['test'])['eval_accuracy']:.4f}")
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    return str(directory)


def base_and_data(args: argparse.Namespace) -> tuple[str, DatasetDict]:
    """The model and the data that the flags name; by default the ViT of the digits 0 to 4, and the digits 5 to 9."""
    base = pretrained_on_digits() if args.model == "digits" else args.model
    if args.dataset == "digits" and not args.train_file:
        return base, digits(range(5, 10), train=200, validation=200)
    return base, load_data(args, "image")


def with_pixels(data: DatasetDict, processor: Any) -> DatasetDict:
    """The data with images turned into pixel values as they are read."""

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    return data.with_transform(pixels)


def make_trainer(model: nn.Module, data: Dataset, learning_rate: float, epochs: int, seed: int = 0) -> Trainer:
    """A `Trainer` as one writes it for any image classifier."""
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="runs/image_classification/trainer",
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=128,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            remove_unused_columns=False,  # the images are needed to make pixel values of
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data,
        compute_metrics=accuracy,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, or any image classifier on the Hub or on disk")
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each method")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr-probe", type=float, default=1e-2, dest="linear probe", help="default: %(default)s")
    parser.add_argument("--lr-ssf", type=float, default=1e-2, dest="SSF", help="default: %(default)s")
    parser.add_argument("--lr-lora", type=float, default=5e-3, dest="LoRA r=8", help="default: %(default)s")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="what the table shows")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/image_classification"))
    args = parser.parse_args()
    quiet()

    base, data = base_and_data(args)
    # a head for the new classes instead of the one in the checkpoint
    head = {**label_names(data), "ignore_mismatched_sizes": True}
    processor = AutoImageProcessor.from_pretrained(base)
    images = [image.convert("RGB") for image in data["test"][:64]["image"]]
    batch = dict(processor(images, return_tensors="pt"))
    inputs = with_pixels(data, processor)

    runs: list[Run] = []
    steps = -(-len(data["train"]) // BATCH_SIZE) * args.epochs
    with progress_bar(len(METHODS) * args.seeds * steps) as bar:
        for seed in range(args.seeds):
            for method in METHODS:
                set_seed(seed)
                model = adapt(AutoModelForImageClassification.from_pretrained(base, **head), method)
                trainer = make_trainer(model, inputs["train"], vars(args)[method], args.epochs, seed)
                bar.follow(trainer, f"{method}, seed {seed}")
                directory = args.output_dir / method.split()[0]
                runs.append(train(trainer, method, seed, inputs[args.split], batch, directory))
                if method == "SSF":
                    ssf = model
    print_runs(f"{len(data['train']):,} training images, {args.seeds} seeds", runs, f"{args.split} accuracy")

    directory = args.output_dir / "SSF"
    trip = check_round_trip(ssf, batch, directory, base, "AutoModelForImageClassification", head)
    trip.report(directory)
    last = [run for run in runs if run.method == "SSF"][-1]  # the one that is saved
    info = card_info(
        args,
        data,
        "image-classification",
        last.accuracy,
        ["epochs"],
        title=f"ViT on {args.dataset}, SSF",
        split=args.split,
        training={"learning rate": last.learning_rate, "batch size": BATCH_SIZE, "seed": last.seed},
        comparison=method_rows(runs),
        trainable_parameters=last.trainable_with_head,
        limits=rivals_above(runs, "SSF"),
    )
    write_card(directory / "adapter", args, info, runs=[asdict(run) for run in runs])


if __name__ == "__main__":
    main()
