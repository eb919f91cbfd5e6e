"""Adapts a vision transformer with any registered method, beside LoRA: one script, since all are used alike.

Without arguments but the method it needs no network: the tiny ViT and the digits of `image_classification.py`.

    python examples/any_method.py s2ft
    python examples/any_method.py wegeft --learning-rate 3e-3 --fields '{"r": 16, "share": "none"}'
    python examples/any_method.py sct --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --max-train 1000 --max-test 2000
    python examples/any_method.py fused_low_rank      # first trains two LoRAs, each on one half of the data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cards import card_info, method_rows, rivals_above, write_card
from common import add_data_arguments, console, count_trainable, label_names, logits_of, quiet
from image_classification import BATCH_SIZE, base_and_data, make_trainer, with_pixels
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from runs import Run, print_runs
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import peft_ext
from peft_ext.core import methods, tuner_of


HEAD = ["classifier"]
RATE = 1e-2
DEFAULTS: dict[str, tuple[dict[str, Any], float]] = {  # fields and learning rate; the others: none, and RATE
    "s2ft": ({"ratios": {"down": 0.1, "up": 0.1}}, 1e-2),
    "wegeft": ({"r": 8}, 3e-3),
    "low_rank_core": ({"r": 16}, 3e-3),
    "sct": ({"num_channels": 32, "site": "mlp"}, 1e-2),
    "snell": ({"r": 8}, 1e-2),
    "vpt": ({"num_tokens": 10}, 3e-2),
    "pasta": ({}, 3e-2),
    "unipt": ({"reduction_factor": 4}, 3e-3),
    "fused_low_rank": ({}, 3e-2),
}
LOOKS_FIRST = ("low_rank_core", "sct", "spt")  # at data, by default


def adapt(name: str, fields: dict[str, Any], model: Any, trainer: Any) -> PeftModel:
    """Puts the method on the model; a method that looks at data first is given those of the trainer."""
    config: PeftConfig = methods()[name.upper()].config(**fields)
    if not tuner_of(config).trains_own_head:
        config.modules_to_save = HEAD
    if name in LOOKS_FIRST:
        peft_ext.calibrate(model, config, trainer=trainer, num_batches=8, progress=False)
    return get_peft_model(model, config)


def lora(model: Any, head: list[str] | None) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=head))


def loras_on_halves(make_model: Callable[[], Any], data: Any, epochs: int, folder: Path) -> list[str]:
    """Trains a LoRA on each half of the data, without its head; the directories."""
    paths = []
    for part in range(2):
        half = data.shard(2, part)
        model = lora(make_model(), None)
        make_trainer(model, half, 5e-3, epochs).train()
        paths.append(str(folder / f"lora-{part}"))
        model.save_pretrained(paths[-1])
    return paths


def train(name: str, model: Any, inputs: Any, rate: float, args: argparse.Namespace) -> Run:
    """Trains the adapter and scores it."""
    trainer = make_trainer(model, inputs["train"], rate, args.epochs, args.seed)
    seconds = trainer.train().metrics["train_runtime"]
    score = trainer.evaluate(inputs["test"])["eval_accuracy"]
    return Run(name, args.seed, rate, score, seconds, *count_trainable(model))


def main() -> None:
    known = [name.lower() for name in methods()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--model", default="digits", help="digits, or any image classifier on the Hub or on disk")
    add_data_arguments(parser, "digits", "image")
    parser.add_argument("--fields", type=json.loads, help="of the config, as JSON; default: what is good here")
    parser.add_argument("--learning-rate", type=float, help="default: what is good for the method here")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args()
    fields, rate = DEFAULTS.get(args.method, ({}, RATE))
    fields, rate = fields if args.fields is None else args.fields, args.learning_rate or rate
    folder = args.output_dir or Path("runs/any_method") / args.method
    quiet()

    base, data = base_and_data(args)
    head = {**label_names(data), "ignore_mismatched_sizes": True}
    processor = AutoImageProcessor.from_pretrained(base)
    inputs = with_pixels(data, processor)

    def make_model() -> Any:
        set_seed(args.seed)
        return AutoModelForImageClassification.from_pretrained(base, **head)

    if args.method == "fused_low_rank" and "adapters" not in fields:
        fields = fields | {"adapters": loras_on_halves(make_model, inputs["train"], args.epochs, folder)}
    model = make_model()
    trainer = make_trainer(model, inputs["train"], rate, args.epochs, args.seed)
    about = methods()[args.method.upper()].about
    title = about.name
    model = adapt(args.method, fields, model, trainer)
    own = train(title, model, inputs, rate, args)
    model.save_pretrained(folder / "adapter")
    runs = [own, train("LoRA r=8", lora(make_model(), HEAD), inputs, 5e-3, args)]

    batch = dict(processor([image.convert("RGB") for image in data["test"][:64]["image"]], return_tensors="pt"))
    expected = logits_of(model, batch)
    loaded = PeftModel.from_pretrained(make_model(), folder / "adapter")
    difference = (logits_of(loaded, batch) - expected).abs().max().item()
    file = folder / "adapter" / "adapter_model.safetensors"
    runs[0] = own = replace(own, adapter_bytes=file.stat().st_size)
    if about.merges_with(vars(loaded.peft_config["default"])):
        merged = (logits_of(loaded.merge_and_unload(), batch) - expected).abs().max().item()
        runs[0] = own = replace(own, merged_difference=merged)
    print_runs(f"{len(data['train']):,} training images, one seed", runs)
    console.print(f"Saved in {folder / 'adapter'}; loaded again, the logits differ by {difference:.1e}")
    info = card_info(
        args,
        data,
        "image-classification",
        own.accuracy,
        ["epochs", "seed"],
        title=f"ViT on {args.dataset}, {title}",
        training={"learning rate": rate, "batch size": BATCH_SIZE},
        comparison=method_rows(runs),
        trainable_parameters=own.trainable_with_head,
        limits=rivals_above(runs, title),
    )
    write_card(folder / "adapter", args, info, runs=[asdict(run) for run in runs])


if __name__ == "__main__":
    main()
