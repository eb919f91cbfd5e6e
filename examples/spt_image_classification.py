"""A vision transformer on a budget of trainable parameters, which SPT spends where a few batches say.

Without arguments it needs no network: the tiny ViT and the digits of `image_classification.py`.

    python examples/spt_image_classification.py
    python examples/spt_image_classification.py --budget 0.005 --structured dora
    python examples/spt_image_classification.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --max-train 1000 --max-test 2000 --budget 400000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cards import card_info, write_card
from common import add_data_arguments, console, label_names, quiet
from image_classification import base_and_data, make_trainer, with_pixels
from peft import get_peft_model
from round_trip import check_round_trip
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import peft_ext
from peft_ext import SPTConfig
from peft_ext.plots import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, or any image classifier on the Hub or on disk")
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--budget", type=float, default=0.02, help="trainable parameters, or their share if below 1")
    parser.add_argument("--structured", default="lora", help="what sensitive matrices get: lora, dora or adapter")
    parser.add_argument("--batches", type=int, default=8, help="for the sensitivity pass")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/spt_image_classification"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    base, data = base_and_data(args)
    head = {**label_names(data), "ignore_mismatched_sizes": True}
    inputs = with_pixels(data, AutoImageProcessor.from_pretrained(base))
    model = AutoModelForImageClassification.from_pretrained(base, **head)

    # what the trainer will see is what the budget goes by
    batches = make_trainer(model, inputs["train"], args.learning_rate, args.epochs, args.seed)
    budget = args.budget if args.budget < 1 else int(args.budget)
    config = SPTConfig(budget=budget, structured=args.structured, modules_to_save=["classifier"])
    peft_ext.calibrate(model, config, trainer=batches, num_batches=args.batches)  # prints the allocation
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = make_trainer(model, inputs["train"], args.learning_rate, args.epochs, args.seed)
    trainer.train()
    score = trainer.evaluate(inputs["test"])["eval_accuracy"]
    console.print(f"Test accuracy: {score:.3f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure = args.output_dir / "allocation.png"
    plot(model).savefig(figure)
    console.print(f"Where the budget went: {figure}")
    model.save_pretrained(args.output_dir / "adapter")
    info = card_info(
        args,
        data,
        "image-classification",
        score,
        ["budget", "structured", "batches", "epochs", "learning_rate", "seed"],
        title=f"ViT on {args.dataset}, SPT",
        trainable_parameters=model.get_nb_trainable_parameters()[0],
    )
    write_card(args.output_dir / "adapter", args, info)
    if args.structured == "adapter":  # which does not merge
        return
    batch = {"pixel_values": inputs["test"][:64]["pixel_values"]}
    trip = check_round_trip(model, batch, args.output_dir, base, "AutoModelForImageClassification", head, save=False)
    trip.report(args.output_dir)


if __name__ == "__main__":
    main()
