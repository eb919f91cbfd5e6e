"""Which method learns most: scores on real data over methods, learning rates and seeds. It can be stopped and goes on.

    python examples/benchmark/compare.py sst2 cola trec --methods lora spiel-ag     # runs what is missing
    python examples/benchmark/compare.py gsm8k --methods lora spiel-ag --train 256 --epochs 1 --batch 4
    python examples/benchmark/compare.py text:dair-ai/emotion:text:label            # any set on the Hub, see tasks.py
    python examples/benchmark/compare.py trec --methods examples/benchmark/experiments/ssf/*    # PEFT's own format
    python examples/benchmark/compare.py --table                                    # prints what there is
    python examples/benchmark/compare.py signdigits@dinov2-small --fit-head         # a linear probe before all else
    python examples/benchmark/compare.py --write docs/results.md                          # puts it between the markers

Every run is one line of `results/compare.jsonl`: a run that has its line is not made again, so several processes can
share the work with `--part 0/2`, `--part 1/2`. The learning rate is chosen for each task, method and budget with the
first seed on the validation split (never on test), and the other seeds are run with it. With `--extend` the grid of
`--rates` grows, for every method alike, as long as the best rate is its smallest or its largest.

With `--fit-head` the head is fitted to the frozen model's features (`peft_ext.linear_probe`) before any calibration and
training, on the training data, of which a fifth chooses the regularisation. These runs are others than those without.
With `--bf16` the products are computed in bfloat16 (the Trainer's own `bf16`); these, too, are runs of their own.

What the methods are stands in `methods.py`, what the tasks are in `tasks.py`. Data: the parquet files of `--data` (see
the README there), or the Hub's.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from chosen_runs import RESULTS, best_rate, load_results, tried
from common import cache_directory
from compare_tables import rank_table, table, write_table
from configs import Setting
from methods import METHODS, OF_THEIR_OWN_SIZE, adapt, callbacks, is_experiment
from tasks import TASKS, Limits, Prepared, Task, exact_match, find_task, prepare, scores, splits

import peft_ext
from peft_ext.core import ExtConfig, tuner_of


GRID = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]  # what `--extend` goes along


# Runs


@dataclass(frozen=True)
class Plan:
    """One run."""

    task: str
    method: str
    budget: float
    learning_rate: float
    seed: int
    settings: str  # what else the scores depend on


def run(plan: Plan, args: argparse.Namespace, made: Prepared) -> dict[str, Any]:
    """Trains once; returns the line for the results."""
    task = find_task(plan.task)
    setting = setting_of(plan, args, made)
    found: dict[str, Any] = {}
    if args.fit_head:
        found["probe"] = fit_head(setting.model, plan, made)
        set_seed(plan.seed)  # again: what is drawn next does not depend on the fit
    with tempfile.TemporaryDirectory() as directory:

        def make_trainer(model: nn.Module) -> Trainer:
            # the dense phase of LT-SFT, like full fine-tuning, wants a smaller rate than the adapter of the second
            dense = plan.method == "lt-sft" and not isinstance(model, PeftModel)
            rate = plan.learning_rate / 10 if dense else plan.learning_rate
            return trainer_of(model, plan, args, made, directory, rate, callbacks(plan.method, setting))

        start = time.perf_counter()
        model, config = adapt(plan.method, setting)
        if args.fit_head and isinstance(config, ExtConfig) and tuner_of(config).trains_own_head:
            found["probe"] = fit_head(model, plan, made)
            start += found["probe"]["seconds"]  # which are told apart
        if plan.method == "lt-sft":
            model = peft_ext.lt_sft(model, config, make_trainer)  # type: ignore[arg-type]
            trainer = make_trainer(model)
        else:
            trainer = make_trainer(model)
            trainer.train()
        seconds = time.perf_counter() - start
        found |= scored(trainer, task, made)
    if args.answers and task.kind == "causal":
        rows = splits(task, limits(args), args.data)["test"]
        rows = rows.select(range(min(args.answers, len(rows))))
        found["exact_match"] = exact_match(model, task, rows, args.data, args.length)
    return {**asdict(plan), **found, **about_run(model, seconds, task, made)}


def fit_head(model: nn.Module, plan: Plan, made: Prepared) -> dict[str, Any]:
    """Fits the model's head, or that of its adapter, to the training data; returns what was found.

    The features of the pretrained model are kept between runs, as long as nothing but the head is drawn anew.
    """
    batches = DataLoader(made.data["train"], batch_size=32, collate_fn=made.collate)  # type: ignore[arg-type]
    cache = None if isinstance(model, PeftModel) else cache_directory() / "features"
    start = time.perf_counter()
    probe = peft_ext.linear_probe(model, batches, seed=plan.seed, cache=cache)
    return {"C": probe.C, "held_out": probe.score, "seconds": round(time.perf_counter() - start, 1)}


def setting_of(plan: Plan, args: argparse.Namespace, made: Prepared) -> Setting:
    """The pretrained model under the seed of the run, and what a method's config depends on."""
    set_seed(plan.seed)
    task_type = "CAUSAL_LM" if find_task(plan.task).kind == "causal" else "SEQ_CLS"
    batches = DataLoader(made.data["train"], batch_size=32, collate_fn=made.collate)  # type: ignore[arg-type]
    model = made.make_model().to("cuda" if torch.cuda.is_available() else "cpu")  # before anything looks at it
    return Setting(model, task_type, plan.budget, steps_of(args, made), plan.seed, batches)


def steps_of(args: argparse.Namespace, made: Prepared) -> int:
    return math.ceil(len(made.data["train"]) / args.batch) * args.epochs


def trainer_of(
    model: nn.Module,
    plan: Plan,
    args: argparse.Namespace,
    made: Prepared,
    directory: str,
    learning_rate: float,
    more: list[TrainerCallback],
) -> Trainer:
    """The stock `Trainer` as all runs have it: AdamW, cosine, no weight decay."""
    task = find_task(plan.task)
    arguments = TrainingArguments(
        directory,
        learning_rate=learning_rate,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=4 * args.batch if task.kind != "causal" else args.batch,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps_of(args, made) // 20),
        weight_decay=0.0,
        seed=plan.seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=getattr(args, "bf16", False),
        label_names=["labels"],
        prediction_loss_only=task.metric == "loss",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=made.data["train"],
        data_collator=made.collate,
        compute_metrics=scores(task),
        callbacks=more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def scored(trainer: Trainer, task: Task, made: Prepared) -> dict[str, float]:
    """The scores on validation and test."""
    key = "eval_loss" if task.metric == "loss" else "eval_score"
    return {split: trainer.evaluate(made.data[split])[key] for split in ("validation", "test")}  # type: ignore[arg-type]


def about_run(model: nn.Module, seconds: float, task: Task, made: Prepared) -> dict[str, Any]:
    """What a line of the results says beside plan and scores."""
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "sizes": {split: len(rows) for split, rows in made.data.items()},
        "metric": task.metric,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else machine,
    }


def limits(args: argparse.Namespace) -> Limits:
    return Limits(args.train, args.held_out, args.length)


def settings_of(args: argparse.Namespace) -> str:
    """What else the scores depend on, in words."""
    size = f"{args.train} examples" if args.train else "all examples"
    text = f"{size}, {args.epochs} epochs of batches of {args.batch}, at most {args.length} tokens"
    flags = {"bf16": "bfloat16 autocast", "fit_head": "head fitted first"}
    return ", ".join([text, *(words for flag, words in flags.items() if getattr(args, flag, False))])


def _key(row: dict[str, Any]) -> Plan:
    return Plan(**{name: row[name] for name in Plan.__dataclass_fields__})


def beyond(rates: dict[float, Any]) -> float | None:
    """The next learning rate of the grid if the best (the first) is the smallest or the largest so far."""
    best, known = next(iter(rates)), sorted(rates)
    place = GRID.index(best) if best in GRID else -1
    if best == known[-1] and 0 <= place < len(GRID) - 1:
        return GRID[place + 1]
    return GRID[place - 1] if best == known[0] and place > 0 else None


def plans(args: argparse.Namespace) -> Iterator[Plan]:
    """All runs that are asked for; the learning rate of the later seeds is known only when the first are done."""
    settings = settings_of(args)
    cells = [
        (task, method, budget)
        for task in args.tasks
        for method in args.methods
        for budget in (args.budgets[:1] if method in OF_THEIR_OWN_SIZE or is_experiment(method) else args.budgets)
    ]
    part, parts = (int(number) for number in args.part.split("/"))
    for cell in cells[part::parts]:
        for rate in args.rates:
            yield Plan(*cell, rate, 0, settings)
        while args.extend and (further := beyond(tried(load_results(args.results), *cell, settings))):
            yield Plan(*cell, further, 0, settings)
        rate = best_rate(load_results(args.results), *cell, settings)
        for seed in range(1, args.seeds):
            assert rate is not None
            yield Plan(*cell, rate, seed, settings)


def quiet(threads: int) -> None:
    """No progress bars, no warnings of libraries."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"{', '.join(TASKS)}, or a description of another (tasks.py)")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help=f"{', '.join(METHODS)}, or folders with an adapter_config.json"
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0], help="of LoRA r=8's number of weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--extend", action="store_true", help="go on while the best rate is at the grid's end")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000, help="training examples; 0: all")
    parser.add_argument("--held-out", type=int, default=500, help="validation examples; twice as many of test")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens at most")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 (autocast), weights as they are")
    parser.add_argument("--fit-head", action="store_true", help="fit the head to frozen features before all else")
    parser.add_argument("--answers", type=int, default=0, help="generated answers for the exact match of causal tasks")
    parser.add_argument("--part", default="0/1", help="this process's share of the work, as number/processes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--ranks", type=float, metavar="BUDGET", help="print mean ranks over all tasks with results")
    parser.add_argument("--write", type=Path, help="a file with markers for the tables")
    args = parser.parse_args()
    try:
        kinds = {name: find_task(name).kind for name in args.tasks}
    except ValueError as error:
        parser.error(str(error))
    if args.fit_head and (headless := [name for name, kind in kinds.items() if kind == "causal"]):
        parser.error(f"--fit-head: the model of {headless[0]} makes no logits of classes, so it has no head to fit")
    if unknown := [name for name in args.methods if name not in METHODS and not is_experiment(name)]:
        parser.error(f"no method and no folder with an adapter_config.json: {unknown[0]!r}")
    quiet(args.threads)
    args.results.parent.mkdir(exist_ok=True)
    made: dict[str, Prepared] = {}
    bar = tqdm(plans(args), desc="runs", unit="run", disable=not (args.tasks and sys.stderr.isatty()))
    for plan in bar:
        if any(_key(row) == plan for row in load_results(args.results)):
            continue
        if plan.task not in made:
            made = {plan.task: prepare(find_task(plan.task), limits(args), args.data)}
        row = run(plan, args, made[plan.task])
        with args.results.open("a") as file:  # one write of one line, so that processes do not mix
            file.write(json.dumps(row) + "\n")
        bar.write(
            f"{plan.task} {plan.method} x{plan.budget:g} lr {plan.learning_rate:g} seed {plan.seed}: "
            f"{row['validation']:.4f} validation, {row['test']:.4f} test, {row['seconds']:.0f} s"
        )
    rows = load_results(args.results)
    if args.ranks is not None:
        print(rank_table(rows, args.ranks))
    if args.table:
        print(table(rows))
    if args.write:
        write_table(args.write, rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
