"""A language model that is pruned while it is fine-tuned with TRL, then cut and saved.

    python examples/prune_sft.py                             # SmolLM2-135M on a bot's answers, no network needed
    python examples/prune_sft.py --target-sparsity 0.25 --learning-rate 3e-3
    python examples/prune_sft.py --train-file ../shared/data/instruct/gsm8k_train.parquet \
        --prompt-column question --completion-column answer
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cards import answers_card_info, size_rows, write_card, write_results
from common import console, logits_of, quiet, resolve_model
from round_trip import chat_batch
from sparse_sft import load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed
from trl import SFTConfig, SFTTrainer

import peft_ext
from peft_ext import MaskLoraCallback, MaskLoraConfig
from peft_ext.export import card_rows, markdown, report
from peft_ext.plots import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or any causal language model on the Hub")
    parser.add_argument("--train-file", help="parquet, instead of chatterbot's questions and answers")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--completion-column", default="completion")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--target-sparsity", type=float, default=0.2, help="share of the prunable weights to cut")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune_sft"))
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
        peft_config=MaskLoraConfig(target_sparsity=args.target_sparsity, task_type="CAUSAL_LM"),
        callbacks=[MaskLoraCallback()],
        args=SFTConfig(
            output_dir=str(args.output_dir / "trainer"),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.max_length,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    console.print(f"Loss of {args.held_out} held-out answers: {before:.3f} before, {after:.3f} after, masked")

    model: Any = trainer.model.eval()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output_dir / "adapter")
    plot(model).savefig(args.output_dir / "kept.png")
    info = answers_card_info(
        args,
        split,
        "mask-pruning LoRA",
        model,
        (before, after),
        ["target_sparsity"],
        title=f"{args.model} on questions and answers, pruned with LoRA",
    )
    write_card(args.output_dir / "adapter", args, info)
    batch = chat_batch(tokenizer, split["test"][:4]["prompt"])
    masked = logits_of(model, batch)
    pruned: Any = peft_ext.prune_and_unload(model).eval()
    console.print(f"Cut out, the logits differ by {(logits_of(pruned, batch) - masked).abs().max():.1e}")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    measured = report(dense, pruned, batch, batch_sizes=(1, 8), lengths=(64,))
    peft_ext.save_pruned(pruned, args.output_dir / "pruned", replace(info, sizes=card_rows(measured)))
    tokenizer.save_pretrained(args.output_dir / "pruned")
    loaded = peft_ext.load_pruned(args.output_dir / "pruned").eval()
    console.print(f"Saved and loaded, by {(logits_of(loaded, batch) - logits_of(pruned, batch)).abs().max():.1e}")

    answer = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    question = split["test"][0]["prompt"]
    reply = answer(question, max_new_tokens=30, do_sample=False)[0]["generated_text"][-1]["content"]
    console.print(f"{question[0]['content']}\n-> {reply}", markup=False)
    losses = {"before": before, "after": after}
    (args.output_dir / "report.json").write_text(json.dumps({"held_out_loss": losses, **measured}, indent=1) + "\n")
    write_results(args.output_dir / "pruned", args, info, report=measured, sizes=size_rows(pruned, measured))
    console.print(markdown(measured))
    console.print(f"In {args.output_dir}: adapter, pruned model, report.json, kept.png")


if __name__ == "__main__":
    main()
