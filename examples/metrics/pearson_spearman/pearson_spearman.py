"""Mean of Pearson's and Spearman's correlation, STS-B's metric; by SciPy."""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr


class PearsonSpearman(evaluate.Metric):
    """`predictions` and `references` are real numbers; the results are in -1 to 1, 0 if the predictions are constant."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float32")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if np.ptp(predictions) == 0:
            return {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}
        pearson = float(pearsonr(predictions, references).statistic)
        spearman = float(spearmanr(predictions, references).statistic)
        return {"pearson_spearman": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}
