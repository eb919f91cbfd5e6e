"""Training runs of the examples: what came out of them, tables and one progress bar over all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import console, count_trainable, logits_of
from peft import PeftModel
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from round_trip import adapter_bytes
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback


@dataclass(frozen=True)
class Run:
    """One training run: what it trained, what came out and what it took."""

    method: str
    seed: int
    learning_rate: float
    accuracy: float
    seconds: float
    trainable: int
    trainable_with_head: int
    adapter_bytes: int | None = None
    merged_difference: float | None = None


def train(
    trainer: Trainer, method: str, seed: int, data: Any, inputs: Mapping[str, torch.Tensor], directory: Path
) -> Run:
    """Trains, scores on `data`, saves the adapter under `directory` and compares the logits when it is merged."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model: Any = trainer.model
    trainable, with_head = count_trainable(model)
    score = trainer.evaluate(data)["eval_accuracy"]
    run = Run(method, seed, trainer.args.learning_rate, score, seconds, trainable, with_head)
    if not isinstance(model, PeftModel):
        return run
    model.save_pretrained(directory / "adapter")
    before = logits_of(model, inputs)
    model.merge_adapter()
    difference = (logits_of(model, inputs) - before).abs().max().item()
    model.unmerge_adapter()
    return replace(run, adapter_bytes=adapter_bytes(directory), merged_difference=difference)


def print_runs(title: str, runs: Sequence[Run], score: str = "test accuracy") -> None:
    """A table with a line for each method; with the learning rate if that varies, else with what was measured."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.learning_rate), []).append(run)
    is_grid = len({method for method, _ in groups}) < len(groups)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    measured = ("trainable", "with head", "adapter bytes", "merge error")
    for name in (score, "seconds", *(("learning rate",) if is_grid else measured)):
        table.add_column(name, justify="right")
    for (method, learning_rate), group in groups.items():
        scores = [run.accuracy for run in group]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        row = [method, f"{mean(scores):.4f}{spread}", f"{mean(run.seconds for run in group):.1f}"]
        if is_grid:
            table.add_row(*row, f"{learning_rate:g}")
            continue
        run = group[0]
        has_adapter = run.adapter_bytes is not None
        errors = [other.merged_difference for other in group if other.merged_difference is not None]
        error = f"{max(errors):.1e}" if errors else "-"
        size = f"{run.adapter_bytes:,}" if has_adapter else "-"
        table.add_row(*row, f"{run.trainable:,}", f"{run.trainable_with_head:,}", size, error)
    console.print(table)


def write_runs(file: Path, caption: str, runs: Sequence[Run]) -> None:
    """Writes the table of `print_runs` between `<!-- quickstart -->` and `<!-- /quickstart -->` of a Markdown file."""
    names = ("method", "test accuracy", "trainable, without head", "adapter file, bytes", "merged logits differ by")
    lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        scores = [run.accuracy for run in group]
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        size = group[0].adapter_bytes
        error = max(run.merged_difference or 0.0 for run in group)
        cells = [method, f"{mean(scores):.3f}{spread}", f"{group[0].trainable:,}"]
        cells += ["", ""] if size is None else [f"{size:,}", f"{error:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    start, end = "<!-- quickstart -->", "<!-- /quickstart -->"
    before, _, rest = file.read_text().partition(start)
    _, _, after = rest.partition(end)
    file.write_text("\n\n".join([before + start, caption, "\n".join(lines), end + after]))


class _Bar(TrainerCallback):
    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        self.progress, self.task, self.name = progress, task, name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, description=self.name, advance=1)


class Bar:
    """One progress bar over the steps of many runs of `Trainer` (made with `disable_tqdm=True`)."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.task = progress, progress.add_task("loading", total=total)

    def follow(self, trainer: Trainer, name: str) -> None:
        """Shows the steps of this trainer instead of what it prints itself."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Bar(self.progress, self.task, name))


@contextmanager
def progress_bar(total: int) -> Iterator[Bar]:
    """A bar over `total` steps with the time so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total)
