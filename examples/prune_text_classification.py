"""A text classifier that is pruned while it is adapted, then cut, saved and loaded again, beside LoRA alone.

    python examples/prune_text_classification.py            # MiniLM on film reviews, no network needed
    python examples/prune_text_classification.py --target-sparsity 0.5 --seeds 3
    python examples/prune_text_classification.py --model FacebookAI/roberta-base --dataset stanfordnlp/sst2 \
        --text-column sentence
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cards import card_info, method_rows, rivals_above, size_rows, write_card, write_results
from common import (
    accuracy,
    add_data_arguments,
    console,
    count_trainable,
    label_names,
    load_data,
    logits_of,
    quiet,
    resolve_model,
)
from peft import LoraConfig, get_peft_model
from runs import Run
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_ext
from peft_ext import MaskLoraCallback, MaskLoraConfig
from peft_ext.export import card_rows, markdown, report
from peft_ext.plots import plot


def make_trainer(model: nn.Module, args: argparse.Namespace, tokenizer: Any, data: Any, seed: int) -> Trainer:
    """A `Trainer` as one writes it for any classifier; the callback is for the masks' schedule and the log."""
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output_dir / "trainer"),
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[MaskLoraCallback()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, or any encoder on the Hub")
    add_data_arguments(parser, "movie-reviews", "text")
    parser.add_argument("--target-sparsity", type=float, default=0.25, help="share of the prunable weights to cut")
    parser.add_argument("--round-to", type=int, default=1, help="keep multiples of so many channels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune_text_classification"))
    args = parser.parse_args()
    quiet()

    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_data(args, "text")
    head = label_names(data)
    inputs = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length), batched=True)
    batch = dict(tokenizer(data["test"][:32]["text"], padding=True, truncation=True, return_tensors="pt"))
    configs = {
        "LoRA": lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"),
        "mask-pruning LoRA": lambda: MaskLoraConfig(
            target_sparsity=args.target_sparsity, round_to=args.round_to, task_type="SEQ_CLS"
        ),
    }
    runs: list[Run] = []
    models: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, config in configs.items():
            set_seed(seed)
            model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, **head), config())
            trainer = make_trainer(model, args, tokenizer, inputs["train"], seed)
            seconds = trainer.train().metrics["train_runtime"]
            score = trainer.evaluate(inputs["test"])["eval_accuracy"]
            runs.append(Run(name, seed, args.learning_rate, score, seconds, *count_trainable(model)))
            console.print(f"{name}, seed {seed}: test accuracy {score:.3f}")
            models[name] = model.eval()

    model = models["mask-pruning LoRA"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output_dir / "adapter")
    plot(model).savefig(args.output_dir / "kept.png")
    info = card_info(
        args,
        data,
        "text-classification",
        runs[-1].accuracy,
        ["target_sparsity", "round_to", "learning_rate", "epochs", "batch_size", "max_length"],
        title=f"{args.model} on {args.dataset}, pruned with LoRA",
        training={"seed": runs[-1].seed},
        comparison=method_rows(runs),
        trainable_parameters=runs[-1].trainable_with_head,
        limits=rivals_above(runs, "mask-pruning LoRA"),
    )
    write_card(args.output_dir / "adapter", args, info, runs=[asdict(run) for run in runs])
    masked = logits_of(model, batch)
    pruned: Any = peft_ext.prune_and_unload(model).eval()
    console.print(f"Cut out, the logits differ by {(logits_of(pruned, batch) - masked).abs().max():.1e}")
    full = models["LoRA"].merge_and_unload().eval()
    scores = {name: [run.accuracy for run in runs if run.method == name] for name in configs}
    measured = report(full, pruned, batch, metrics={"Test accuracy": tuple(map(mean, scores.values()))})
    peft_ext.save_pruned(pruned, args.output_dir / "pruned", replace(info, sizes=card_rows(measured)))
    loaded = peft_ext.load_pruned(args.output_dir / "pruned").eval()
    console.print(f"Saved and loaded, by {(logits_of(loaded, batch) - logits_of(pruned, batch)).abs().max():.1e}")
    (args.output_dir / "report.json").write_text(json.dumps({"scores": scores, **measured}, indent=1) + "\n")
    rows = {"runs": [asdict(run) for run in runs], "sizes": size_rows(pruned, measured)}
    write_results(args.output_dir / "pruned", args, info, report=measured, **rows)
    console.print(markdown(measured))
    console.print(f"In {args.output_dir}: adapter, pruned model, report.json, kept.png")


if __name__ == "__main__":
    main()
