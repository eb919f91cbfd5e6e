"""Trainings in variants, for the scripts that compare what goes with every method: one line of JSON for each run.

A script says which jobs there are and what is done in one; here is what they have in common. A job that has its line is
not run again, so a script can be stopped and goes on. Data, trainer, seeds and scores are those of `compare.py`, and so are
the learning rates, unless `--rates` gives others: then the best is chosen by the validation split with the first seed.
A variant that changes nothing is a run of `compare.py`, whose lines count (`plain`).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from chosen_runs import RESULTS, best_rate, load_results
from compare import Plan, about_run, limits, quiet, scored, setting_of, settings_of, trainer_of
from methods import adapt, callbacks
from tasks import Prepared, find_task, prepare
from torch import nn
from transformers import Trainer


FOLDER = RESULTS.parent
LENGTHS: dict[str, dict[str, int]] = {  # as `compare.jsonl` has them
    "trec": {"train": 1000, "held_out": 500, "epochs": 6, "batch": 16, "length": 40},
    "signdigits": {"train": 1000, "held_out": 500, "epochs": 15, "batch": 16, "length": 40},
    "gsm8k": {"train": 192, "held_out": 32, "epochs": 1, "batch": 4, "length": 160},
}
Run = Callable[["Job", argparse.Namespace, Prepared], dict[str, Any]]


@dataclass(frozen=True)
class Job(Plan):
    """One run: that of `compare.py`, and what the script varies."""

    variant: str


def parser(text: str | None, tasks: Sequence[str], seeds: int = 3) -> argparse.ArgumentParser:
    """The options that all scripts have; each adds `--methods`, `--variants` and its own."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("tasks", nargs="*", help=f"default: {' '.join(tasks)}, unless only --write is given")
    made.add_argument("--seeds", type=int, default=seeds)
    made.add_argument("--rates", nargs="+", type=float, help="default: the rate that compare.jsonl has chosen")
    for name in ("train", "held-out", "epochs", "batch", "length"):
        made.add_argument(f"--{name}", type=int, help="default: as compare.jsonl has the task")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    made.add_argument("--write", type=Path, metavar="FILE", help="put the tables between their markers")
    made.set_defaults(known=tasks, plain={})  # plain: the variant of a method that is a run of compare.py
    return made


def parsed(made: argparse.ArgumentParser, results: str) -> argparse.Namespace:
    """The options, with all tasks where none are named and nothing is written."""
    made.add_argument("--results", type=Path, default=FOLDER / results)
    args = made.parse_args()
    if not args.tasks and not args.write:
        args.tasks = args.known
    if unknown := [name for name in args.tasks if name not in LENGTHS]:
        made.error(f"no task {unknown[0]!r}: take some of {', '.join(LENGTHS)}")
    quiet(args.threads)
    return args


def lengths_of(task: str, args: argparse.Namespace) -> argparse.Namespace:
    """The options with the task's own lengths where none are given."""
    given = {name: getattr(args, name) for name in LENGTHS[task] if getattr(args, name) is not None}
    return argparse.Namespace(**vars(args) | LENGTHS[task] | given)


def jobs(args: argparse.Namespace, cells: Iterable[tuple[str, str]]) -> Iterator[Job]:
    """Of each method and variant, the first seed of all before the second of any.

    Raises:
        ValueError: No rate is known for a method.
    """
    cells = list(cells)
    for seed in range(args.seeds):
        for task in args.tasks:
            settings = settings_of(lengths_of(task, args))
            for method, variant in cells:
                for rate in _rates(args, task, method, variant, settings, seed):
                    yield Job(task, method, 1.0, rate, seed, settings, variant)


def _rates(
    args: argparse.Namespace, task: str, method: str, variant: str, settings: str, seed: int
) -> Sequence[float]:
    if args.rates and seed == 0:
        return args.rates
    rows = _own(lines_of(args), variant) if args.rates else load_results(RESULTS)
    rate = best_rate(rows, task, method, 1.0, settings)
    if rate is None:
        raise ValueError(f"{RESULTS.name} has no run of {method} on {task} with {settings}: give --rates")
    return [rate]


def lines_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the results, and those of the comparison that are plain variants."""
    settings = {(task, settings_of(lengths_of(task, args))) for task in (*args.known, *args.tasks)}
    return load_results(args.results) + [
        row | {"variant": args.plain[row["method"]]}
        for row in load_results(RESULTS)
        if row["method"] in args.plain and row["budget"] == 1 and (row["task"], row["settings"]) in settings
    ]


def _own(rows: Iterable[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["variant"] == variant]


def work(args: argparse.Namespace, todo: Iterable[Job], run: Run) -> None:
    """Runs the jobs that have no line in the results yet."""
    args.results.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, Prepared] = {}
    for job in todo:
        done = [Job(**{name: row[name] for name in Job.__dataclass_fields__}) for row in lines_of(args)]
        if job in done:
            continue
        own = lengths_of(job.task, args)
        if job.task not in made:
            made = {job.task: prepare(find_task(job.task), limits(own), args.data)}
        row = run(job, own, made[job.task])
        with args.results.open("a") as file:  # one write of one line, so that processes do not mix
            file.write(json.dumps(asdict(job) | row) + "\n")
        print(
            f"{job.task} {job.method} {job.variant} lr {job.learning_rate:g} seed {job.seed}: "
            f"{row['test']:.4f} test, {row['seconds']:.0f} s",
            flush=True,
        )


@dataclass(frozen=True)
class Trained:
    """A trained model, and the line for the results."""

    model: Any
    trainer: Trainer
    row: dict[str, Any]


def train(
    job: Job,
    args: argparse.Namespace,
    made: Prepared,
    before: Callable[[Any], dict[str, Any]] = lambda model: {},
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext(),
) -> Trained:
    """Trains and scores once.

    Args:
        job: What to train.
        args: The lengths.
        made: The task.
        before: What is done to the pretrained model first; it returns what the line for the results says of it. What
            it draws changes how the adapter starts.
        around: A context of the training, given the model with the method on it.
    """
    task = find_task(job.task)
    setting = setting_of(job, args, made)
    said = before(setting.model)
    start = time.perf_counter()
    model, _ = adapt(job.method, setting)
    with tempfile.TemporaryDirectory() as directory:
        more = callbacks(job.method, setting)
        trainer = trainer_of(model, job, args, made, directory, job.learning_rate, more)
        with around(model):
            trainer.train()
        seconds = time.perf_counter() - start
        found = scored(trainer, task, made)
    return Trained(model, trainer, {**found, **said, **about_run(model, seconds, task, made)})


# Tables


def chosen(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[int, dict[str, Any]]]:
    """The runs with the best rate of the first seed, by task, settings, method and variant, and by seed."""
    cells: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        task, settings, method, variant = (row[name] for name in ("task", "settings", "method", "variant"))
        if row["learning_rate"] == best_rate(_own(rows, variant), task, method, 1.0, settings):
            cells.setdefault((task, settings, method, variant), {})[row["seed"]] = row
    return cells


def score(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table, of whose columns the first `left` are text."""
    ruler = "|".join("---" if i < left else "---:" for i in range(len(head)))
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, f"|{ruler}|", *rest])


def caption(rows: Sequence[dict[str, Any]]) -> str:
    """What was run, in words."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        where = ", ".join(f"{size} {split}" for split, size in row["sizes"].items())
        notes.setdefault(f"{row['settings']} ({where})", []).append(f"{row['task']} ({row['metric']})")
    return "; ".join(f"{', '.join(dict.fromkeys(tasks))}: {note}" for note, tasks in notes.items()) + "."


def write_between(file: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: The file has no such lines.
    """
    text = file.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)"
        text, count = re.subn(
            pattern,
            lambda match, table=table: f"{match[1]}{table}\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if not count:
            raise ValueError(f"{file} has no line `<!-- {name} -->` followed by `<!-- /{name} -->`")
    file.write_text(text, encoding="utf-8")
