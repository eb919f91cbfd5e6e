"""Text classification with SSF the way one writes it with `Trainer`: best checkpoint, weight decay, push to the Hub.

    python examples/trainer_text_classification.py             # MiniLM on film reviews, no network needed
    python examples/trainer_text_classification.py --model FacebookAI/roberta-base --dataset stanfordnlp/sst2 \
        --text-column sentence --push-to-hub me/roberta-base-sst2-ssf
    python examples/trainer_text_classification.py --train-file train.parquet --test-file test.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cards import card_info, write_card
from common import accuracy, add_data_arguments, console, count_trainable, label_names, load_data, quiet, resolve_model
from peft import get_peft_model
from round_trip import check_round_trip
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_ext import SSFConfig
from peft_ext.cards import push_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, or any encoder on the Hub")
    add_data_arguments(parser, "movie-reviews", "text")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--identity", action="store_true", help="start from the base model's own output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/trainer_text_classification"))
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="where to publish the adapter (log in first)")
    args = parser.parse_args()
    if args.push_to_hub and args.model == "minilm":
        parser.error("--push-to-hub needs a --model that others find on the Hub")
    quiet()
    set_seed(args.seed)

    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_data(args, "text")
    labels = label_names(data)
    options = {"truncation": True, "max_length": args.max_length}
    tokens = data.map(lambda rows: tokenizer(rows["text"], **options), batched=True, remove_columns="text")

    model = AutoModelForSequenceClassification.from_pretrained(base, **labels)
    config = SSFConfig(task_type="SEQ_CLS", init_weights="identity" if args.identity else True)
    model = get_peft_model(model, config)
    without_head, with_head = count_trainable(model)
    size = len(data["train"])
    console.print(f"{size:,} training texts; {without_head:,} trainable parameters, {with_head:,} with the head")

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "checkpoints"),
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128,
            train_sampling_strategy="group_by_length",
            warmup_steps=0.1,
            weight_decay=0.1,  # decays the head alone: no optimizer decays the scales and shifts of SSF
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=10,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            push_to_hub=args.push_to_hub is not None,
            hub_model_id=args.push_to_hub,
            hub_strategy="end",
        ),
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=accuracy,
    )
    trainer.train()
    console.print(f"Best checkpoint: {trainer.state.best_model_checkpoint}")
    test_accuracy = trainer.evaluate(tokens["test"])["eval_accuracy"]
    console.print(f"Test accuracy: {test_accuracy:.4f}")

    batch = dict(tokenizer(data["test"][:64]["text"], padding=True, return_tensors="pt", **options))
    trip = check_round_trip(model, batch, args.output_dir, base, "AutoModelForSequenceClassification", labels)
    trip.report(args.output_dir)
    info = card_info(
        args,
        data,
        "text-classification",
        test_accuracy,
        ["learning_rate", "epochs", "batch_size", "max_length", "seed"],
        title=f"{args.model} on {args.dataset}, SSF",
        trainable_parameters=with_head,
    )
    write_card(args.output_dir / "adapter", args, info)
    if args.push_to_hub:
        trainer.push_to_hub()
        push_card(args.push_to_hub, info)  # last: it merges with the card that Trainer wrote


if __name__ == "__main__":
    main()
