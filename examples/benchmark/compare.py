"""Which method learns most: scores on real data over methods, learning rates and seeds. It can be stopped and goes on.

    python examples/benchmark/compare.py sst2 cola trec --methods lora spiel-ag     # runs what is missing
    python examples/benchmark/compare.py gsm8k --methods lora spiel-ag --train 256 --epochs 1 --batch 4
    python examples/benchmark/compare.py --table                                    # prints what there is
    python examples/benchmark/compare.py --write README.md                          # puts it between the markers

Every run is one line of `results/compare.jsonl`: a run that has its line is not made again, so several processes can
share the work with `--part 0/2`, `--part 1/2`. The learning rate is chosen for each task, method and budget with the
first seed on the validation split (never on test), and the other seeds are run with it. All adapters have the same
number of trained weights: that of LoRA r=8 on all Linear modules, times `--budget`. The head is trained with each.

Data: the parquet files of `--data` (see the README there).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import resolve_model

import peft_ext
from peft_ext import MaskLoraConfig, SparseFTConfig, SPTConfig, SSFConfig, fix_masks
from peft_ext.base import tuner_of
from peft_ext.calibrate import ExactScores
from peft_ext.tuners.mask_pruning import MaskLoraLayer


RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
PROBE, LORA = "probe", "lora"


# Tasks


@dataclass(frozen=True)
class Task:
    """A data set, the model that is adapted to it, and how it is scored.

    Args:
        kind: `text`, `image` or `causal`.
        model: What `common.resolve_model` knows, or a path below `--data`, or a name on the Hub.
        metric: `accuracy`, `matthews` or `loss`; of `loss` less is better.
        files: The files with the splits; a split that is missing is taken from the training data.
        columns: The columns of the input and the label, or of prompt and completion.
    """

    kind: str
    model: str
    metric: str
    files: dict[str, str]
    columns: tuple[str, str]


def _text(name: str, metric: str, column: str, **files: str) -> Task:
    paths = {split: f"text/{name}_{file}.parquet" for split, file in files.items()}
    return Task("text", "minilm", metric, paths, (column, "label"))


def _image(name: str, train: str, test: str) -> Task:
    files = {"train": f"vision/{name}_{train}.parquet", "test": f"vision/{name}_{test}.parquet"}
    return Task("image", "models/vit-tiny-imagenet32", "accuracy", files, ("image", "label"))


TASKS = {
    "sst2": _text("sst2", "accuracy", "sentence", train="train", validation="validation", test="test"),
    "cola": _text("cola", "matthews", "sentence", train="train", test="validation"),
    "trec": _text("trec", "accuracy", "text", train="train", test="test"),
    "subj": _text("subj", "accuracy", "text", train="train", test="test"),
    "signdigits": _image("signdigits", "train1000", "test"),
    "mnist": _image("mnist", "train1000", "test2000"),
    "cifar10": _image("cifar10", "train1000", "test2000"),
    "clothing10": _image("clothing10", "train", "test"),
    "gsm8k": Task(
        "causal",
        "smollm2",
        "loss",
        {"train": "instruct/gsm8k_train.parquet", "test": "instruct/gsm8k_test.parquet"},
        ("question", "answer"),
    ),
}


def splits(task: Task, args: argparse.Namespace) -> dict[str, Dataset]:
    """The three splits as the model takes them, the same for all methods and seeds."""
    files = {name: str(args.data / file) for name, file in task.files.items()}
    data = load_dataset("parquet", data_files=files)
    data = {name: data[name].shuffle(seed=0) for name in data}
    spare = len(data["train"]) - args.train
    if "validation" not in data:
        held = min(args.held_out, spare if spare >= 100 else len(data["train"]) // 5)
        data["validation"] = data["train"].select(range(len(data["train"]) - held, len(data["train"])))
        data["train"] = data["train"].select(range(len(data["train"]) - held))
    limits = {"train": args.train, "validation": args.held_out, "test": 2 * args.held_out}
    return {name: data[name].select(range(min(limit, len(data[name])))) for name, limit in limits.items()}


def prepared(task: Task, args: argparse.Namespace) -> tuple[dict[str, Dataset], Callable[[], nn.Module], Any]:
    """The data, a function that makes the model, and the collator."""
    name = resolve_model(task.model)
    name = str(args.data / name) if (args.data / name).exists() else name
    data = splits(task, args)
    source, target = task.columns
    if task.kind == "causal":
        tokenizer = AutoTokenizer.from_pretrained(name)

        def tokens(row: dict[str, Any]) -> dict[str, Any]:
            turn = [{"role": "user", "content": row[source]}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            before = tokenizer(prompt, add_special_tokens=False).input_ids
            after = tokenizer(row[target] + tokenizer.eos_token, add_special_tokens=False).input_ids
            ids = (before + after)[: args.length]
            return {"input_ids": ids, "labels": ([-100] * len(before) + after)[: args.length]}

        def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)
            fill = {"input_ids": tokenizer.eos_token_id, "labels": -100, "attention_mask": 0}
            for row in rows:
                row["attention_mask"] = [1] * len(row["input_ids"])
            padded = {key: [row[key] + [fill[key]] * (longest - len(row[key])) for row in rows] for key in fill}
            return {key: torch.tensor(value) for key, value in padded.items()}

        data = {split: rows.map(tokens, remove_columns=rows.column_names) for split, rows in data.items()}
        return data, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), pad
    labels = sorted(set(data["train"][target]))
    auto: Any = AutoModelForSequenceClassification if task.kind == "text" else AutoModelForImageClassification
    number = {label: index for index, label in enumerate(labels)}

    def model() -> nn.Module:
        return auto.from_pretrained(name, num_labels=len(labels), ignore_mismatched_sizes=True, dtype=torch.float32)

    if task.kind == "text":
        tokenizer = AutoTokenizer.from_pretrained(name)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            return {**tokenizer(row[source], truncation=True, max_length=args.length), "labels": number[row[target]]}

        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            pixels = processor(row[source].convert("RGB"), return_tensors="np")["pixel_values"][0]
            return {"pixel_values": pixels, "labels": number[row[target]]}

        collator = default_data_collator
    data = {split: rows.map(encode, remove_columns=rows.column_names) for split, rows in data.items()}
    if task.kind == "image":
        data = {split: rows.with_format("torch") for split, rows in data.items()}
    return data, model, collator


# Methods


def budget_of(model: nn.Module, task: Task, share: float) -> tuple[list[str], int]:
    """The names of the Linear modules of the backbone, and so many weights as LoRA r=8 has on them, times `share`."""
    heads = {"classifier", "score", "lm_head", "pooler"}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not heads & set(name.split("."))
    }
    weights = sum(8 * (linear.in_features + linear.out_features) for linear in linears.values())
    return list(linears), int(share * weights)


def adapter_config(
    method: str, model: nn.Module, task: Task, share: float, steps: int, seed: int, batches: DataLoader[Any]
) -> PeftConfig:
    """The method's config at this budget; those that look at data first see `batches`."""
    names, budget = budget_of(model, task, share)
    task_type = {"text": "SEQ_CLS", "image": "SEQ_CLS", "causal": "CAUSAL_LM"}[task.kind]
    common: dict[str, Any] = {"task_type": task_type, "target_modules": names}
    rank = max(1, round(8 * share))
    if pruned := pruning(method):
        how, sparsity = pruned
        # the controls train LoRA alone until their masks are set, by `SetMasks`
        phases = {"warmup_ratio": FIX_RATIO, "fix_ratio": 1.0} if how != "mask" else {"fix_ratio": FIX_RATIO}
        return MaskLoraConfig(
            r=rank, lora_alpha=2 * rank, target_sparsity=sparsity, total_steps=steps, seed=seed, **phases, **common
        )
    if method in ("spt", "spt-random"):
        # no dropout, as for LoRA: only where the parameters are differs
        config = SPTConfig(task_type=task_type, budget=budget, r=8, lora_alpha=16, dropout=0.0, drop_path=0.0)
        if method == "spt":
            return peft_ext.calibrate(model, config, batches, num_batches=16, progress=False)
        tuner = tuner_of(config)  # the same budget, the same kinds of module, but spent without having looked
        chance = ExactScores({name: weight.numel() for name, weight in tuner.candidates(config, model).items()})
        generator = torch.Generator().manual_seed(seed)
        for sums in chance.sums.values():
            sums.uniform_(generator=generator)
        tuner.take_scores(config, model, chance)
        return config
    configs: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=2 * rank, **common),
        "ssf": lambda: SSFConfig(task_type=task_type),
        **{
            selection: lambda: SparseFTConfig(
                selection=method, num_tunable_weights=budget, total_steps=steps, seed=seed, **common
            )
            for selection in ("spiel-ag", "spiel-ma", "random")
        },
    }
    return configs[method]()


def pruning(method: str) -> tuple[str, float] | None:
    """How units are chosen, and the share of the prunable weights that goes, of `mask-25` and the like."""
    how, _, percent = method.rpartition("-")
    return (how, int(percent) / 100) if percent.isdecimal() else None


class SetMasks(TrainerCallback):
    """The controls of mask pruning: decides the masks by the weights' magnitude, or at random, while LoRA trains.

    At random from the first step on; by magnitude when learnt masks would be decided too, by the weights with LoRA in
    them: the mean square of a unit's columns, as a multiple of the group's mean.
    """

    def __init__(self, how: str, steps: int, seed: int) -> None:
        self.how, self.seed = how, seed
        self.when = 1 if how == "random" else round(FIX_RATIO * steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.when:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for module in kwargs["model"].modules():
            if isinstance(module, MaskLoraLayer) and "default" in module.mask_pruning_gate:
                gate: Any = module.mask_pruning_gate["default"]
                units, width = gate.group.units, gate.group.width
                if self.how == "random":
                    values = torch.rand(units, generator=generator)
                else:
                    weight = module.merged_tensors("default")["weight"].detach()
                    values = weight.square().mean(0).view(units, width).mean(1)
                    values = values / values.mean()
                gate.weight.data = values / gate.rate
        fix_masks(kwargs["model"])


METHODS = ["probe", "lora", "ssf", "spiel-ag", "spiel-ma", "random", "spt", "spt-random"]
METHODS += [f"{how}-{share}" for share in (25, 50) for how in ("mask", "magnitude", "random")]
FIX_RATIO = 0.5  # of the steps, after which the masks are decided


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


def scores(task: Task) -> Callable[[Any], dict[str, float]] | None:
    """`compute_metrics` for the task; `None` where the loss itself is the score."""
    if task.metric == "loss":
        return None

    def compute(prediction: Any) -> dict[str, float]:
        found, labels = prediction.predictions.argmax(-1), prediction.label_ids
        if task.metric == "accuracy":
            return {"score": float((found == labels).mean())}
        counts = np.histogram2d(found, labels, bins=2, range=[[0, 1], [0, 1]])[0]
        rows, columns = counts.sum(1), counts.sum(0)
        norm = math.sqrt(float(rows.prod() * columns.prod()))
        return {"score": float(counts[0, 0] * counts[1, 1] - counts[0, 1] * counts[1, 0]) / norm if norm else 0.0}

    return compute


def run(plan: Plan, args: argparse.Namespace, made: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Trains once; returns the line for the results."""
    task = TASKS[plan.task]
    data, make_model, collator = made
    set_seed(plan.seed)
    model: Any = make_model()
    steps = math.ceil(len(data["train"]) / args.batch) * args.epochs
    before = 0.0
    if plan.method == PROBE:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("classifier" in name.split("."))
    else:
        batches = DataLoader(data["train"], batch_size=32, collate_fn=collator)  # type: ignore[arg-type]
        start = time.perf_counter()
        config = adapter_config(plan.method, model, task, plan.budget, steps, plan.seed, batches)
        before = time.perf_counter() - start
        model = get_peft_model(model, config)
        if task.kind == "image":
            model.base_model.model.classifier.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            learning_rate=plan.learning_rate,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=4 * args.batch if task.kind != "causal" else args.batch,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            seed=plan.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            label_names=["labels"],
            prediction_loss_only=task.metric == "loss",
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data["train"],
            data_collator=collator,
            compute_metrics=scores(task),
        )
        if (pruned := pruning(plan.method)) and pruned[0] != "mask":
            trainer.add_callback(SetMasks(pruned[0], steps, plan.seed))
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = before + time.perf_counter() - start
        key = "eval_loss" if task.metric == "loss" else "eval_score"
        found = {split: trainer.evaluate(data[split])[key] for split in ("validation", "test")}
    sizes = {split: len(rows) for split, rows in data.items()}
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        **asdict(plan),
        **found,
        "trained": trained,
        "seconds": round(seconds, 1),
        "sizes": sizes,
        "metric": task.metric,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else machine,
    }


def load_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _key(row: dict[str, Any]) -> Plan:
    return Plan(**{name: row[name] for name in Plan.__dataclass_fields__})


def best_rate(rows: Sequence[dict[str, Any]], task: str, method: str, budget: float, settings: str) -> float | None:
    """The learning rate of the best validation score with the first seed; `None` if there is no run."""
    own = [
        row
        for row in rows
        if (row["task"], row["method"], row["budget"], row["settings"], row["seed"])
        == (task, method, budget, settings, 0)
    ]
    sign = -1 if own and own[0]["metric"] == "loss" else 1
    return max(own, key=lambda row: sign * row["validation"])["learning_rate"] if own else None


def plans(args: argparse.Namespace) -> Iterator[Plan]:
    """All runs that are asked for; the learning rate of the later seeds is known only when the first are done."""
    settings = f"{args.train} examples, {args.epochs} epochs of batches of {args.batch}, at most {args.length} tokens"
    cells = [(task, method, budget) for task in args.tasks for method in args.methods for budget in args.budgets]
    part, parts = (int(number) for number in args.part.split("/"))
    for task, method, budget in cells[part::parts]:
        if method == PROBE and budget != args.budgets[0]:
            continue
        for rate in args.rates:
            yield Plan(task, method, budget, rate, 0, settings)
        rate = best_rate(load_results(args.results), task, method, budget, settings)
        for seed in range(1, args.seeds):
            assert rate is not None
            yield Plan(task, method, budget, rate, seed, settings)


# Tables


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: mean and standard deviation over the seeds on test, and the paired difference from LoRA."""
    cells: dict[tuple[str, str, float, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["method"], row["budget"], row["settings"])
        if row["learning_rate"] == best_rate(rows, *key):
            cells.setdefault(key, {})[row["seed"]] = row
    lines = [
        "| task (metric) | method | trained with head | learning rate | test | minus LoRA, same seeds | s a run |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    notes: dict[str, list[str]] = {}
    for (task, method, budget, settings), seeds in cells.items():
        values = [row["test"] for row in seeds.values()]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        lora = cells.get((task, LORA, budget, settings), {})
        common = sorted(set(seeds) & set(lora))
        differences = [seeds[seed]["test"] - lora[seed]["test"] for seed in common]
        against = ""
        if method != LORA and differences:
            low, high = bootstrap(differences)
            against = f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"
        first = next(iter(seeds.values()))
        share = "" if budget == 1.0 or method == PROBE else f", budget x {budget:g}"
        lines.append(
            f"| {task} ({first['metric']}) | {method}{share} | {first['trained']:,} | {first['learning_rate']:g} | "
            f"{mean(values):.3f}{spread} | {against} | {mean(row['seconds'] for row in seeds.values()):.0f} |"
        )
        where = ", ".join(f"{size} {split}" for split, size in first["sizes"].items())
        notes.setdefault(f"{settings} ({where})", []).append(task)
    text = "; ".join(f"{', '.join(dict.fromkeys(tasks))}: {note}" for note, tasks in notes.items())
    rates = sorted({row["learning_rate"] for row in rows})
    seeds_run = max((len(seeds) for seeds in cells.values()), default=0)
    caption = (
        f"Mean ± standard deviation over {seeds_run} seeds; learning rate of {', '.join(f'{r:g}' for r in rates)} by "
        f"the validation split with the first seed. In brackets a 95 % bootstrap interval over the seeds. {text}."
    )
    return "\n".join([caption, "", *lines])


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval for the mean."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts tables between `<!-- compare:TASK,TASK:METHOD,METHOD -->` and `<!-- /compare -->`; `*` takes all."""

    def filled(match: re.Match[str]) -> str:
        tasks, methods = (part.split(",") for part in match[2].split(":"))
        own = [
            row
            for row in rows
            if (row["task"] in tasks or tasks == ["*"]) and (row["method"] in methods or methods == ["*"])
        ]
        return f"{match[1]}\n{table(own)}\n{match[3]}"

    pattern = r"(<!-- compare:(\S+) -->)\n.*?(<!-- /compare -->)"
    text, count = re.subn(pattern, filled, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not count:
        raise ValueError(f"{file} has no line `<!-- compare:TASKS:METHODS -->` followed by `<!-- /compare -->`")
    file.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=", ".join(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0], help="of LoRA r=8's number of weights")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=500, help="validation examples; twice as many of test")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens at most")
    parser.add_argument("--part", default="0/1", help="this process's share of the work, as number/processes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", type=Path, help="a file with markers for the tables")
    args = parser.parse_args()
    if unknown := [name for name in args.tasks if name not in TASKS]:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    args.results.parent.mkdir(exist_ok=True)
    made: dict[str, Any] = {}
    for plan in plans(args):
        if any(_key(row) == plan for row in load_results(args.results)):
            continue
        if plan.task not in made:
            made = {plan.task: prepared(TASKS[plan.task], args)}
        row = run(plan, args, made[plan.task])
        with args.results.open("a") as file:  # one write of one line, so that processes do not mix
            file.write(json.dumps(row) + "\n")
        print(f"{plan.task} {plan.method} x{plan.budget:g} lr {plan.learning_rate:g} seed {plan.seed}: ", end="")
        print(f"{row['validation']:.4f} validation, {row['test']:.4f} test, {row['seconds']:.0f} s", flush=True)
    rows = load_results(args.results)
    if args.table:
        print(table(rows))
    if args.write:
        write_table(args.write, rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
