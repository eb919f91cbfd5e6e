"""Supervised fine-tuning of a language model on a budget that SPT spends by what TRL's trainer will see.

    python examples/spt_sft.py                               # SmolLM2-135M on a bot's answers, no network needed
    python examples/spt_sft.py --model Qwen/Qwen3-0.6B --budget 0.002 --memory pool
    python examples/spt_sft.py --train-file ../shared/data/instruct/gsm8k_train.parquet \
        --prompt-column question --completion-column answer

`SFTTrainer` makes its batches inside itself. So one is made without an adapter, for calibration only; the config that
comes out goes into the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cards import answers_card_info, write_card
from common import console, quiet, resolve_model
from round_trip import chat_batch, check_round_trip
from sparse_sft import load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import peft_ext
from peft_ext import SPTConfig
from peft_ext.plots import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or any causal language model on the Hub")
    parser.add_argument("--train-file", help="parquet, instead of chatterbot's questions and answers")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--completion-column", default="completion")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.005, help="trainable parameters, or their share if below 1")
    parser.add_argument("--memory", default="exact", choices=["exact", "pool"], help="of the sensitivity pass")
    parser.add_argument("--batches", type=int, default=8, help="for the sensitivity pass")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/spt_sft"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    split = load_pairs(args).train_test_split(test_size=args.held_out, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    common = {
        "processing_class": tokenizer,
        "train_dataset": split["train"],
        "args": SFTConfig(
            output_dir=str(args.output_dir / "trainer"),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.max_length,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    }
    budget = args.budget if args.budget < 1 else int(args.budget)
    config = SPTConfig(budget=budget, task_type="CAUSAL_LM")
    peft_ext.calibrate(
        model, config, trainer=SFTTrainer(model=model, **common), num_batches=args.batches, memory=args.memory
    )
    trainer = SFTTrainer(model=model, peft_config=config, eval_dataset=split["test"], **common)
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    console.print(f"Loss of {args.held_out} held-out answers: {before:.3f} before, {after:.3f} after")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure = args.output_dir / "allocation.png"
    plot(trainer.model).savefig(figure)
    console.print(f"Where the budget went: {figure}")
    batch = chat_batch(tokenizer, split["test"][:4]["prompt"])
    trip = check_round_trip(trainer.model, batch, args.output_dir, base, "AutoModelForCausalLM", {"dtype": "float32"})
    trip.report(args.output_dir)
    info = answers_card_info(
        args,
        split,
        "SPT",
        trainer.model,
        (before, after),
        ["budget", "batches"],
        title=f"{args.model} on questions and answers, SPT",
    )
    write_card(args.output_dir / "adapter", args, info)


if __name__ == "__main__":
    main()
