"""Share of answers whose last number equals that of the reference, as GSM8K counts; other answers by their text."""

import re
from typing import Any

import datasets
import evaluate


def final(answer: str) -> str:
    """The last number of an answer without its separators, or the whole answer if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return numbers[-1].replace(",", "") if numbers else answer.strip()


class ExactMatch(evaluate.Metric):
    """`predictions` and `references` are texts; the result is in 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        equal = [final(a) == final(b) for a, b in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
