"""LT-SFT on two tasks, and the two adapters put together: MiniLM, no network needed.

    python examples/lt_sft.py
    python examples/lt_sft.py --train-file ../shared/data/text/sst2_train.parquet \\
        --test-file ../shared/data/text/sst2_validation.parquet --text-column sentence

Each task is trained twice: densely, to see which weights move, and then on these alone. The second task is the first
with the labels of half of the texts' lengths, so that something can be composed without a second data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cards import card_info, write_card
from common import accuracy, add_data_arguments, console, label_names, load_data, quiet, resolve_model
from datasets import DatasetDict
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import peft_ext
from peft_ext import SparseFTConfig


LABELS = {"sentiment": None, "length": "longer than the median of the training texts or not"}
COMPOSED = "sentiment-without-length"
SETTINGS = ("density", "dense_learning_rate", "sparse_learning_rate", "epochs", "l1", "max_length", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, or any encoder on the Hub")
    add_data_arguments(parser, "movie-reviews", "text")
    parser.add_argument("--density", type=float, default=0.01, help="tuned weights, of all parameters")
    parser.add_argument("--dense-learning-rate", type=float, default=5e-5)
    parser.add_argument("--sparse-learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=2.0, help="of each phase")
    parser.add_argument("--l1", type=float, default=0.0, help="coefficient of the L1 term, in both phases")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lt_sft"))
    args = parser.parse_args()
    quiet()
    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    sentiment = load_data(args, "text")
    labels = label_names(sentiment)
    options = {"truncation": True, "max_length": args.max_length}

    def tokenized(data: DatasetDict) -> DatasetDict:
        return data.map(lambda rows: tokenizer(rows["text"], **options), batched=True, remove_columns="text")

    middle = sorted(len(text) for text in sentiment["train"]["text"])[len(sentiment["train"]) // 2]
    long_or_short = sentiment.map(lambda row: {"label": int(len(row["text"]) > middle)})
    splits = {"sentiment": tokenized(sentiment), "length": tokenized(long_or_short)}
    adapters, scores = [], {}
    for task, data in splits.items():
        set_seed(args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, **labels)

        def make_trainer(model: nn.Module, task: str = task, data: DatasetDict = data) -> Trainer:
            rate = args.sparse_learning_rate if isinstance(model, PeftModel) else args.dense_learning_rate
            settings: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "seed": args.seed}
            return Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=str(args.output_dir / "trainer" / task),
                    learning_rate=rate,
                    num_train_epochs=args.epochs,
                    per_device_train_batch_size=16,
                    per_device_eval_batch_size=128,
                    dataloader_pin_memory=torch.cuda.is_available(),
                    **settings,
                ),
                train_dataset=data["train"],
                eval_dataset=data["test"],
                processing_class=tokenizer,
                compute_metrics=accuracy,
            )

        config = SparseFTConfig(selection="lt-sft", density=args.density, task_type="SEQ_CLS")
        sparse = peft_ext.lt_sft(model, config, make_trainer, l1=args.l1)
        scores[task] = make_trainer(sparse).evaluate()["eval_accuracy"]
        console.print(f"{task}: accuracy {scores[task]:.3f} with {args.density:.1%} of the weights")
        sparse.save_pretrained(args.output_dir / task)
        adapters.append(args.output_dir / task)
        info = card_info(
            args,
            data,
            "text-classification",
            scores[task],
            SETTINGS,
            title=f"{args.model} on {args.dataset}, LT-SFT, {task}",
            labels=LABELS[task],
            trainable_parameters=sparse.get_nb_trainable_parameters()[0],
        )
        write_card(adapters[-1], args, info)

    model = AutoModelForSequenceClassification.from_pretrained(base, **labels)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="sentiment")
    model.load_adapter(adapters[1], adapter_name="length")
    found = peft_ext.overlap(model, "sentiment", "length")[""]
    console.print(
        f"The two share {found.shared:,} of {found.first:,} weights (Jaccard {found.jaccard:.3f}); "
        f"{found.same_sign / max(1, found.shared):.0%} of these move in the same direction."
    )
    model.add_weighted_adapter(["sentiment", "length"], [1.0, -0.5], COMPOSED)
    heads = model.get_base_model().classifier.modules_to_save  # only the sparse weights are added up
    heads[COMPOSED].load_state_dict(heads["sentiment"].state_dict())
    model.set_adapter(COMPOSED)
    score = make_trainer(model, "composed", splits["sentiment"]).evaluate()["eval_accuracy"]
    model.save_pretrained(args.output_dir / "composed", selected_adapters=[COMPOSED])
    console.print(f"Their weighted difference has {score:.3f}; it is saved in {args.output_dir / 'composed'}")
    info = card_info(
        args,
        sentiment,
        "text-classification",
        score,
        SETTINGS,
        title=f"{args.model} on {args.dataset}, LT-SFT, {COMPOSED}",
        training={
            "composed of": "sentiment, times 1, and length, times -0.5; the head is that of sentiment",
            "weights of sentiment": found.first,
            "also in length": found.shared,
            "of these, with the same sign": found.same_sign,
        },
        comparison=[
            {"Adapter": "sentiment", "Accuracy on sentiment": scores["sentiment"]},
            {"Adapter": COMPOSED, "Accuracy on sentiment": score},
        ],
        limits=["It shows that adapters add up; nothing was tuned for it to be better than its parts."],
    )
    write_card(args.output_dir / "composed" / COMPOSED, args, info)


if __name__ == "__main__":
    main()
