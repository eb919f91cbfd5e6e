"""The data sets of the comparison: what is read, which model is adapted to it, how it is scored.

`find_task` knows the sets of `TASKS`, and any data set on the Hub or on disk by a description of its own:
`KIND:DATASET:INPUT:TARGET[:MODEL[:METRIC]]`, such as `text:dair-ai/emotion:text:label` or
`image:uoft-cs/cifar10:img:label:google/vit-base-patch16-224-in21k`. Two input columns are joined by `+`.

`TASK@MODEL` is a task on another model, `TASK@MODEL@PIXELS` one with images of that size, where the model takes any:
`signdigits@dinov2-small` (98 pixels, 49 patches), `clothing10@dinov2-small@56` (16 patches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from common import image_size, resolve_model
from datasets import Dataset, load_dataset
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)


METRICS = Path(__file__).resolve().parents[1] / "metrics"
DEFAULTS = {  # model and metric by the kind of task
    "text": ("minilm", "accuracy"),
    "image": ("models/vit-tiny-imagenet32", "accuracy"),
    "causal": ("smollm2", "loss"),
}
PIXELS = {"dinov2-small": 98, "efficientnet-lite0": 128}  # unless a task says another number


@dataclass(frozen=True)
class Task:
    """A data set, the model that is adapted to it, and how it is scored.

    Args:
        kind: `text`, `image` or `causal`.
        model: What `common.resolve_model` knows, or a path below `--data`, or a name on the Hub.
        metric: The name of a module in `examples/metrics`, or `loss`, of which less is better.
        columns: The columns of the inputs and, last, of the target.
        files: The files with the splits below `--data`; a split that is missing is taken from the training data.
        dataset: Instead of files, the name of a data set on the Hub or a directory.
        pixels: The side of the images; `None` leaves it to the model's image processor.
    """

    kind: str
    model: str
    metric: str
    columns: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    dataset: str = ""
    pixels: int | None = None

    @property
    def less_is_better(self) -> bool:
        return self.metric == "loss"


def _text(name: str, metric: str, *inputs: str, **files: str) -> Task:
    paths = tuple((split, f"text/{name}_{file}.parquet") for split, file in files.items())
    return Task("text", "minilm", metric, (*inputs, "label"), paths)


def _image(name: str, train: str, test: str) -> Task:
    files = (("train", f"vision/{name}_{train}.parquet"), ("test", f"vision/{name}_{test}.parquet"))
    return Task("image", DEFAULTS["image"][0], "accuracy", ("image", "label"), files)


PAIR = ("sentence1", "sentence2")
TASKS = {
    "sst2": _text("sst2", "accuracy", "sentence", train="train", validation="validation", test="test"),
    "cola": _text("cola", "matthews_correlation", "sentence", train="train", test="validation"),
    "trec": _text("trec", "accuracy", "text", train="train", test="test"),
    "subj": _text("subj", "accuracy", "text", train="train", test="test"),
    "mrpc": _text("mrpc", "f1", *PAIR, train="train", validation="validation", test="test"),
    "rte": _text("rte", "accuracy", *PAIR, train="train", test="validation"),
    "stsb": _text("stsb", "pearson_spearman", *PAIR, train="train", test="validation"),
    "signdigits": _image("signdigits", "train1000", "test"),
    "mnist": _image("mnist", "train1000", "test2000"),
    "cifar10": _image("cifar10", "train1000", "test2000"),
    "clothing10": _image("clothing10", "train", "test"),
    "gsm8k": Task(
        "causal",
        "smollm2",
        "loss",
        ("question", "answer"),
        (("train", "instruct/gsm8k_train.parquet"), ("test", "instruct/gsm8k_test.parquet")),
    ),
    "alpaca": Task(
        "causal", "smollm2", "loss", ("instruction", "output"), (("train", "instruct/alpaca_en_demo.parquet"),)
    ),
}


def find_task(name: str) -> Task:
    """The task of this name, or the one that it describes.

    Raises:
        ValueError: It is neither, or says a size of what are no images.
    """
    name, _, other = name.partition("@")
    task = TASKS[name] if name in TASKS else _described(name)
    if not other:
        return task
    model, _, pixels = other.partition("@")
    if pixels and (task.kind != "image" or not pixels.isdecimal() or int(pixels) == 0):
        raise ValueError(f"{pixels!r} behind the second @ must be a number of pixels, of a task with images")
    return replace(task, model=model, pixels=int(pixels) if pixels else PIXELS.get(model))


def _described(name: str) -> Task:
    parts = name.split(":")
    if not 4 <= len(parts) <= 6 or parts[0] not in DEFAULTS:
        raise ValueError(
            f"no task {name!r}: take one of {', '.join(TASKS)}, or KIND:DATASET:INPUT:TARGET[:MODEL[:METRIC]] with "
            f"KIND one of {', '.join(DEFAULTS)}; on another model TASK@MODEL, of other images TASK@MODEL@PIXELS"
        )
    kind, dataset, inputs, target = parts[:4]
    model, metric = (*parts[4:], *DEFAULTS[kind][len(parts) - 4 :])
    return Task(kind, model, metric, (*inputs.split("+"), target), dataset=dataset, pixels=PIXELS.get(model))


# Data


@dataclass(frozen=True)
class Limits:
    """How much is read: examples for training (0: all) and for validation (twice as many for test), tokens."""

    train: int
    held_out: int
    length: int


def splits(task: Task, limits: Limits, folder: Path) -> dict[str, Dataset]:
    """Training, validation and test data, the same for all methods and seeds."""
    if task.dataset:
        found = load_dataset(task.dataset)
    else:
        found = load_dataset("parquet", data_files={split: str(folder / file) for split, file in task.files})
    data = {name: found[name].shuffle(seed=0) for name in ("train", "validation", "test") if name in found}
    for name, wanted in (("validation", limits.held_out), ("test", 2 * limits.held_out)):
        if name not in data:
            rows = len(data["train"])
            spare = rows - limits.train
            held = min(wanted, spare if limits.train and spare >= 100 else rows // 5)
            data[name] = data["train"].select(range(rows - held, rows))
            data["train"] = data["train"].select(range(rows - held))
    sizes = {"train": limits.train, "validation": limits.held_out, "test": 2 * limits.held_out}
    return {
        name: data[name].select(range(min(size or len(data[name]), len(data[name])))) for name, size in sizes.items()
    }


@dataclass(frozen=True)
class Prepared:
    """A task as the `Trainer` takes it.

    Args:
        data: The three splits.
        make_model: Loads the pretrained model anew.
        collate: Makes a batch.
    """

    data: dict[str, Dataset | Images]
    make_model: Callable[[], Any]
    collate: Any


def prepare(task: Task, limits: Limits, folder: Path) -> Prepared:
    """Reads and tokenises the data, and finds the model."""
    name = resolve_model(task.model)
    name = str(folder / name) if (folder / name).exists() else name
    data = splits(task, limits, folder)
    encode, make_model, collate = {"text": _for_text, "image": _for_images, "causal": _for_answers}[task.kind](
        task, name, data, limits.length
    )
    encoded: dict[str, Any] = {
        split: Images([encode(row) for row in rows])
        if task.kind == "image"
        else rows.map(encode, remove_columns=rows.column_names)
        for split, rows in data.items()
    }
    return Prepared(encoded, make_model, collate)


class Images(TorchDataset[dict[str, torch.Tensor]]):
    """Images in memory, as tensors: decoding a batch from Arrow takes longer than a step on a GPU."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.pixel_values = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
        self.labels = torch.tensor([row["labels"] for row in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


Parts = tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[], nn.Module], Any]


def numbers(data: dict[str, Dataset], target: str) -> dict[Any, int]:
    """The classes by name, in the order of the names; a small split may not have all."""
    return {
        label: index for index, label in enumerate(sorted({row for rows in data.values() for row in rows[target]}))
    }


def _classifier(auto: Any, name: str, outputs: int) -> Callable[[], nn.Module]:
    return lambda: auto.from_pretrained(name, num_labels=outputs, ignore_mismatched_sizes=True, dtype=torch.float32)


def _for_text(task: Task, name: str, data: dict[str, Dataset], length: int) -> Parts:
    *inputs, target = task.columns
    regression = task.metric == "pearson_spearman"
    number = {} if regression else numbers(data, target)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        label = float(row[target]) if regression else number[row[target]]
        return {**tokenizer(*(row[key] for key in inputs), truncation=True, max_length=length), "labels": label}

    model = _classifier(AutoModelForSequenceClassification, name, len(number) or 1)
    return encode, model, DataCollatorWithPadding(tokenizer)


def _for_images(task: Task, name: str, data: dict[str, Dataset], length: int) -> Parts:
    source, target = task.columns
    number = numbers(data, target)
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    sizes = image_size(processor, task.pixels)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        pixels = processor(row[source].convert("RGB"), return_tensors="np", **sizes)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": number[row[target]]}

    return encode, _classifier(AutoModelForImageClassification, name, len(number)), default_data_collator


def _for_answers(task: Task, name: str, data: dict[str, Dataset], length: int) -> Parts:
    """The loss is that of the answer alone, after the chat template's prompt."""
    source, target = task.columns
    tokenizer = AutoTokenizer.from_pretrained(name)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        turn = [{"role": "user", "content": row[source]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = tokenizer(row[target] + tokenizer.eos_token, add_special_tokens=False).input_ids
        return {"input_ids": (before + after)[:length], "labels": ([-100] * len(before) + after)[:length]}

    def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.eos_token_id, "labels": -100, "attention_mask": 0}
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        padded = {key: [row[key] + [fill[key]] * (longest - len(row[key])) for row in rows] for key in fill}
        return {key: torch.tensor(value) for key, value in padded.items()}

    return encode, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), pad


# Scores


@cache
def metric(name: str) -> Any:
    """The metric of this name from `examples/metrics`, through `evaluate`; the Hub is not asked."""
    return evaluate.load(str(METRICS / name))


def scores(task: Task) -> Callable[[Any], dict[str, float]] | None:
    """`compute_metrics` for a `Trainer`; `None` where the loss itself is the score."""
    if task.metric == "loss":
        return None

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        found = logits[:, 0] if task.metric == "pearson_spearman" else np.argmax(logits, axis=-1)
        values = metric(task.metric).compute(predictions=found, references=prediction.label_ids)
        return {"score": float(values[task.metric])}

    return compute


@torch.no_grad()
def exact_match(model: Any, task: Task, rows: Dataset, folder: Path, length: int) -> float:
    """Share of generated answers (greedy, at most `length` new tokens) whose last number is the reference's."""
    source, target = task.columns
    name = resolve_model(task.model)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / name) if (folder / name).exists() else name)
    model.eval()
    answers = []
    for question in rows[source]:
        turn = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(next(model.parameters()).device)
        tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return float(metric("exact_match").compute(predictions=answers, references=rows[target])["exact_match"])
