"""`peft-ext card`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..cards import CARD, CardInfo, push_card, update_card
from ..core import BadInput
from ..inspection import directory_of
from .running import explained


def main(arguments: argparse.Namespace) -> None:
    info = _with_metrics(arguments.metrics)
    if Path(arguments.adapter).is_dir():
        directory = directory_of(arguments.adapter)
        with explained(f"No card was written to {directory}"):
            update_card(directory, CardInfo(**info, repo_id=arguments.push))
        print(f"Wrote {directory / CARD}")
    elif arguments.push != arguments.adapter:
        directory_of(arguments.adapter)  # a `BadInput` if it is not on the Hub either
        raise BadInput(
            f"{arguments.adapter} is on the Hub; its card is written there with `--push {arguments.adapter}`."
        )
    if arguments.push:
        with explained(f"No card was pushed to {arguments.push}"):
            print(f"Pushed {push_card(arguments.push, CardInfo(**info))}")


def _with_metrics(paths: Iterable[Path]) -> dict[str, Any]:
    """The fields of a `CardInfo` that hold what the files measured."""
    results: list[EvalResult] = []
    rows: list[dict[str, Any]] = []
    for path in paths:
        with explained(f"{path} has no metrics that could be read"):
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = content if isinstance(content, list) else [content]
            for entry in entries:
                if "metric_value" in entry:
                    unknown = entry.keys() - {field.name for field in fields(EvalResult)}
                    if unknown:
                        raise BadInput(f"{path} has {', '.join(sorted(unknown))}, which is no field of `EvalResult`.")
                    results.append(EvalResult(**entry))
                    continue
                numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
                if not numbers:
                    raise BadInput(f"{path} has no numbers and no `metric_value`: give results, or `EvalResult`s.")
                rows.append({"Results": path.stem, **numbers})
    return {"results": results, "comparison": rows}
