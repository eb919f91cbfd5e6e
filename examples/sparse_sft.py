"""Supervised fine-tuning of a language model with SpIEL and TRL: held-out loss, turnover, where the deltas live.

    python examples/sparse_sft.py                          # SmolLM2-135M on a bot's answers, no network needed
    python examples/sparse_sft.py --selection spiel-ma --learning-rate 1e-3
    python examples/sparse_sft.py --train-file ../shared/data/instruct/gsm8k_train.parquet \\
        --prompt-column question --completion-column answer

Nothing about the trainer is special: the tuner moves its support, and the optimizer's state, by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cards import answers_card_info, write_card
from common import console, question_answers, quiet, resolve_model
from datasets import Dataset, load_dataset
from round_trip import chat_batch, check_round_trip
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import peft_ext
from peft_ext import SparseFTConfig
from peft_ext.plots import plot


TOPICS = ("ai", "computers", "food", "history", "literature", "movies", "science", "sports", "trivia")


def load_pairs(args: argparse.Namespace) -> Dataset:
    """Conversations of one question and its answer."""
    if args.train_file:
        data = load_dataset("parquet", data_files=args.train_file, split="train")
        pairs = zip(data[args.prompt_column], data[args.completion_column], strict=True)
    else:
        pairs = iter(question_answers(TOPICS))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for question, answer in pairs
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or any causal language model on the Hub")
    parser.add_argument("--train-file", help="parquet, instead of chatterbot's questions and answers")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--completion-column", default="completion")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--selection", default="spiel-ag", help="spiel-ag, spiel-ma, random, smallest or largest")
    parser.add_argument("--density", type=float, default=0.01, help="tuned weights, of all parameters")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sparse_sft"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    split = load_pairs(args).train_test_split(test_size=args.held_out, seed=0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        processing_class=tokenizer,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        peft_config=SparseFTConfig(selection=args.selection, density=args.density, task_type="CAUSAL_LM"),
        callbacks=[peft_ext.SparseFTCallback()],  # optional: tells the schedule how long the training is
        args=SFTConfig(
            output_dir=str(args.output_dir / "trainer"),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.max_length,
            lr_scheduler_type="linear",
            warmup_steps=0.03,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    )
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    console.print(f"Loss of {args.held_out} held-out answers: {before:.3f} before, {after:.3f} after")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure = args.output_dir / "support.png"
    plot(trainer.model).savefig(figure)
    console.print(f"Where the deltas live, and how the support turned over: {figure}")
    batch = chat_batch(tokenizer, split["test"][:4]["prompt"])
    trip = check_round_trip(trainer.model, batch, args.output_dir, base, "AutoModelForCausalLM", {"dtype": "float32"})
    trip.report(args.output_dir)
    info = answers_card_info(
        args,
        split,
        "sparse",
        trainer.model,
        (before, after),
        ["selection", "density"],
        title=f"{args.model} on questions and answers, {args.selection}",
    )
    write_card(args.output_dir / "adapter", args, info)


if __name__ == "__main__":
    main()
