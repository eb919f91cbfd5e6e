"""Supervised fine-tuning of a language model with SSF and TRL: answers and held-out loss before and after.

    python examples/sft.py                                     # SmolLM2-135M on a bot's answers, no network needed
    python examples/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --max-steps 500
    python examples/sft.py --train-file train.parquet --prompt-column question --completion-column answer

A data set from the Hub or a file needs either a column `messages` or the two columns of a prompt and its completion.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cards import answers_card_info, write_card
from common import console, question_answers, quiet, resolve_model
from datasets import Dataset, load_dataset
from rich.table import Table
from round_trip import chat_batch, check_round_trip
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from peft_ext import SSFConfig


TOPICS = (
    *("ai", "botprofile", "computers", "food", "history", "literature", "money", "movies", "politics"),
    *("psychology", "science", "sports", "trivia"),
)


def conversation(prompt: str, completion: str) -> dict[str, list[dict[str, str]]]:
    """What TRL calls a conversational prompt and completion: the loss is that of the completion."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def split_messages(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A conversation as its last answer and what came before it."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def load_conversations(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and held-out data with the columns `prompt` and `completion`."""
    if args.dataset == "chatterbot" and not args.train_file:
        data = Dataset.from_list([conversation(*pair) for pair in question_answers(TOPICS)])
    else:
        if args.train_file:
            kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(args.train_file).suffix, "parquet")
            data = load_dataset(kind, data_files=args.train_file, split="train")
        else:
            data = load_dataset(args.dataset, args.dataset_config, split=args.split)
        if "messages" in data.column_names:
            data = data.map(split_messages, remove_columns=data.column_names)
        else:
            names = (args.prompt_column, args.completion_column)
            data = data.map(lambda row: conversation(*(row[name] for name in names)), remove_columns=data.column_names)
    split = data.train_test_split(test_size=args.held_out, seed=0)
    return split["train"], split["test"]


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, str]]]) -> list[str]:
    """What the model says to each prompt, sampled with a fixed seed."""
    model.eval()
    torch.manual_seed(0)
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(model.device)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.3, top_p=0.9)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(text.split()))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or any causal language model on the Hub")
    parser.add_argument("--dataset", default="chatterbot", help="chatterbot, or the name of a data set on the Hub")
    parser.add_argument("--dataset-config", help="configuration of the data set on the Hub")
    parser.add_argument("--split", default="train", help="split of the data set on the Hub")
    parser.add_argument("--train-file", help="parquet, CSV or JSON lines, instead of --dataset")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--completion-column", default="completion")
    parser.add_argument("--held-out", type=int, default=64, help="number of examples that are not trained on")
    parser.add_argument("--samples", type=int, default=6, help="number of answers to show")
    parser.add_argument("--dtype", default="float32", help="of the model; bfloat16 is what large ones need")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a conversation")
    parser.add_argument("--published-init", action="store_true", help="start as in the paper, not at the identity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sft"))
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)

    base = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, held_out = load_conversations(args)
    prompts = held_out[: args.samples]["prompt"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    before = answer(model, tokenizer, prompts)

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=held_out,
        # a language model should start from what it already says, so not with the published random scales and shifts
        peft_config=SSFConfig(task_type="CAUSAL_LM", init_weights=True if args.published_init else "identity"),
        args=SFTConfig(
            output_dir=str(args.output_dir / "trainer"),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_length=args.max_length,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,  # no autocast: the model computes in --dtype
            activation_checkpointing=False,
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    )
    trainer.model.print_trainable_parameters()
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    loss_after = trainer.evaluate()["eval_loss"]
    after = answer(trainer.model, tokenizer, prompts)

    table = Table(title="Held-out questions", title_justify="left", title_style="bold", show_lines=True)
    for name in ("question", "answer in the data", "before", "after"):
        table.add_column(name)
    for prompt, reference, *answers in zip(
        prompts, held_out["completion"][: args.samples], before, after, strict=True
    ):
        table.add_row(prompt[-1]["content"], reference[0]["content"], *answers)
    console.print(table)
    console.print(f"Loss of {len(held_out)} held-out answers: {loss_before:.3f} before, {loss_after:.3f} after")

    batch = chat_batch(tokenizer, prompts)
    trip = check_round_trip(trainer.model, batch, args.output_dir, base, "AutoModelForCausalLM", {"dtype": args.dtype})
    trip.report(args.output_dir)
    info = answers_card_info(
        args,
        {"train": train, "held-out": held_out},
        "SSF",
        trainer.model,
        (loss_before, loss_after),
        [],
        split="held-out",
        title=f"{args.model} on {args.dataset}, SSF",
    )
    write_card(args.output_dir / "adapter", args, info)


if __name__ == "__main__":
    main()
