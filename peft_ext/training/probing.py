r"""Linear probing before fine-tuning (LP-FT, Kumar et al. 2022): the head is fitted before anything else is trained.

With f_i the input of the head's last Linear on sample i, from one pass of the frozen model, and m, s the mean and the
standard deviation of all entries of all f_i,

    W, b = argmin  sum_i loss(W (f_i - m) / s + b, y_i) + |W|^2 / (2 C)        C by validation
    head <- W / s,  b - (m / s) W 1                                            the standardisation undone

A fresh head sends random gradients into the model, and a method that looks at gradients first looks at those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from .features import FeatureCache
from .heads import Head, find_head


GRID = tuple(10.0**power for power in range(-7, 3))
IGNORED = -100  # the label of tokens that do not count
LABELS = ("labels", "label")


@dataclass(frozen=True)
class Probe:
    """What `linear_probe` found.

    Attributes:
        head: The name of the module that was written.
        kind: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        C: The inverse strength of the regularisation that was chosen.
        score: On the validation samples: accuracy, or R^2 of a regression.
        scores: The same for each C that was tried.
        samples: How many samples (or tokens) the head was fitted to in the end.
        missing: Classes that no sample has; their rows of the head are zero.
        converged: Whether the last fit reached its tolerance.
    """

    head: str
    kind: str
    C: float
    score: float
    samples: int
    converged: bool
    scores: dict[float, float] = field(default_factory=dict)
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Fit:
    """A linear map `(C, F)`, `(C,)` of standardised features."""

    weight: np.ndarray
    bias: np.ndarray
    converged: bool


def linear_probe(
    model: nn.Module,
    dataset: Any,
    validation: Any = None,
    *,
    head: str | None = None,
    grid: Sequence[float] = GRID,
    held_out: float = 0.2,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    cache: str | PathLike[str] | None = None,
    seed: int = 0,
) -> Probe:
    """Fits the model's head to the features of the frozen model, and writes it into the head.

    To be called before fine-tuning, with any adapter or none, and before `calibrate`. A head in `modules_to_save` is
    written into the copy of the active adapter. Needs scikit-learn.

    Args:
        model: A transformers model with a head, a `PeftModel` of one, or any module that takes keyword arguments and
            whose output is the logits or has them; then `head` must be given.
        dataset: Samples with labels, as a `Dataset`; or batches of the model's keyword arguments with labels: a
            `DataLoader`, a list or another iterable, for example `trainer.get_train_dataloader()`.
        validation: The same, to choose C on. `None` holds out a part of `dataset`, and fits to all of it in the end.
        head: Name of the Linear that makes the logits; `None` finds it.
        grid: The inverse regularisation strengths to try.
        held_out: The share that is held out without `validation`.
        batch_size: Of a `Dataset`.
        collate_fn: Makes batches of a `Dataset`; default: transformers' `default_data_collator`.
        cache: A directory in which the features are kept, so that a second call does not run the model. They are found
            again for the same weights and the same batches.
        seed: Of what is held out.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: The data are no `Dataset` and no batches, a batch is no mapping, or a number is none.
        ValueError: The model has no head that can be fitted (that of a causal language model, or one whose weight is
            that of the embeddings, cannot), the labels do not fit to it, features or labels are not finite, there are
            too few samples, or `grid` or `held_out` has a value that cannot be.
    """
    _need_sklearn()
    grid = _strengths(grid)
    if not isinstance(held_out, Real) or (validation is None and not 0 < held_out < 1):
        raise ValueError(f"`held_out` is {held_out!r}: it must lie between 0 and 1, or give `validation`.")
    found = find_head(model, head)
    store = FeatureCache(cache, model, found) if cache is not None else None

    def read(data: Any, field: str) -> tuple[np.ndarray, np.ndarray]:
        return _read(model, found, _batches(data, field, batch_size, collate_fn), store)

    features, labels = read(dataset, "dataset")
    kind = _kind(model, found, labels)
    labels = _checked(labels, kind, found)
    if validation is None:
        order = np.random.default_rng(seed).permutation(len(features))
        count = max(1, round(held_out * len(features)))
        if count == len(features):
            raise ValueError(
                f"`held_out` is {held_out}, which leaves none of {count} samples to fit the head to: give more samples, a "
                "smaller share, or `validation`."
            )
        train, rest = order[count:], order[:count]
        fitted_to, held = (features[train], labels[train]), (features[rest], labels[rest])
    else:
        held_features, held_labels = read(validation, "validation")
        fitted_to, held = (features, labels), (held_features, _checked(held_labels, kind, found))
    has_bias = found.module.bias is not None
    scores = _search(fitted_to, held, grid, kind, found.outputs, has_bias)
    best = max(scores, key=lambda value: (scores[value], -value))
    fit, mean, spread = _fit_all(features, labels, best, kind, found.outputs, has_bias)
    weight, bias = fit.weight / spread, fit.bias - mean / spread * fit.weight.sum(1)
    found.write(torch.from_numpy(weight), torch.from_numpy(bias))
    missing: tuple[int, ...] = ()
    if kind == "single_label_classification" and (missing := _missing(labels, found.outputs)):
        warnings.warn(
            f"No sample has the label {', '.join(map(str, missing))}: these rows of the head {found.name!r} are zero.",
            UserWarning,
            stacklevel=2,
        )
    return Probe(found.name, kind, best, scores[best], len(features), fit.converged, scores, missing)


# The frozen pass


def _strengths(grid: Iterable[float]) -> list[float]:
    try:
        found = sorted({float(value) for value in grid})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`grid` is {grid!r}: give positive numbers.") from error
    if not found or not all(0 < value < float("inf") for value in found):
        raise ValueError(f"`grid` is {found}: give positive numbers.")
    return found


def _batches(
    data: Any, field: str, batch_size: int, collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None
) -> Iterable[Mapping[str, Any]]:
    """Batches as they are; samples in batches, in their order."""
    if isinstance(data, Mapping):
        raise TypeError(
            f"`{field}` is a mapping with {', '.join(map(repr, data))}: give one batch as a list with it, and of a "
            "`DatasetDict` one split."
        )
    if not hasattr(data, "__getitem__") and not isinstance(data, Iterable):
        raise TypeError(
            f"`{field}` is a {type(data).__name__}: give a `Dataset`, a `DataLoader` or a list of batches."
        )
    is_batches = isinstance(data, (DataLoader, list, tuple)) or not hasattr(data, "__getitem__")
    return data if is_batches else DataLoader(data, batch_size, collate_fn=collate_fn or default_data_collator)


def _read(
    model: nn.Module, head: Head, batches: Iterable[Mapping[str, Any]], cache: FeatureCache | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features `(N, F)` in float64 and labels `(N,)` or `(N, C)`; tokens that do not count are left out."""
    all_features, all_labels = [], []
    with _frozen(model):
        for batch in batches:
            inputs, labels = _apart(batch)
            features = None if cache is None else cache.get(inputs)
            if features is None:
                features = head.features_of(model, inputs).cpu()
                if cache is not None:
                    cache.put(inputs, features)
            if features.ndim == 3:  # one label a token
                if labels.shape != features.shape[:2]:
                    raise ValueError(
                        f"The head {head.name!r} makes logits of {tuple(features.shape[:2])} tokens, and the labels "
                        f"have the shape {tuple(labels.shape)}: give one label a token."
                    )
                counts = labels != IGNORED
                features, labels = features[counts], labels[counts]
            if len(labels) != len(features):
                raise ValueError(f"A batch has {len(features)} samples and {len(labels)} labels.")
            all_features.append(features.double())  # numpy has no bfloat16
            all_labels.append(labels.cpu())
    if cache is not None:
        cache.save()
    if sum(map(len, all_features)) < 2:
        raise ValueError("There are fewer than two samples to fit the head to; is an iterator used up?")
    stacked = torch.cat(all_features)
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError(f"The features before the head {head.name!r} are not all finite.")
    return stacked.numpy(), torch.cat(all_labels).numpy()


def _apart(batch: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's inputs, and the labels."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"A batch must be a mapping of the model's keyword arguments, got {type(batch).__name__}.")
    name = next((name for name in LABELS if name in batch), None)
    if name is None:
        raise ValueError(f"A batch has {', '.join(map(repr, batch))} and no labels: add `labels`.")
    try:
        labels = torch.as_tensor(batch[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"The `{name}` of a batch are {batch[name]!r}: give numbers, a tensor of them.") from error
    if not labels.ndim:
        raise ValueError(
            f"The `{name}` of a batch are one number ({labels.item()}), as of a sample: give batches, or the samples as "
            "`DataLoader(samples, batch_size, collate_fn=...)`."
        )
    return {key: value for key, value in batch.items() if key not in LABELS}, labels


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# The labels


def _kind(model: nn.Module, head: Head, labels: np.ndarray) -> str:
    """As transformers decides which loss it computes."""
    stated = getattr(getattr(model, "config", None), "problem_type", None)
    if stated is not None:
        return stated
    if head.outputs == 1:
        return "regression"
    if labels.dtype.kind == "b" and labels.ndim == 1:
        raise ValueError(
            f"The labels are true or false, one a sample, and the head {head.name!r} has {head.outputs} outputs: give "
            "integers, the numbers of the classes (`labels.long()`)."
        )
    return "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"


def _checked(labels: np.ndarray, kind: str, head: Head) -> np.ndarray:
    """`(N,)` int64 of a classification, else `(N, C)` float64."""
    if kind == "single_label_classification":
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"Labels of a classification are integers (N,), got {labels.dtype} {labels.shape}.")
        if labels.min() < 0 or labels.max() >= head.outputs:
            raise ValueError(
                f"The labels lie between {labels.min()} and {labels.max()}, and the head {head.name!r} has "
                f"{head.outputs} classes: load the model with the right `num_labels`."
            )
        return labels.astype(np.int64)
    table = labels.reshape(len(labels), -1).astype(np.float64)
    if table.shape[1] != head.outputs:
        raise ValueError(
            f"The head {head.name!r} has {head.outputs} outputs, and the labels have the shape {labels.shape}."
        )
    if not np.isfinite(table).all():
        raise ValueError("The labels are not all finite.")
    if kind == "multi_label_classification" and not np.isin(table, (0, 1)).all():
        raise ValueError("Labels of a multi-label classification are 0 or 1.")
    return table


def _missing(labels: np.ndarray, classes: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(classes)) - set(np.unique(labels).tolist())))


# The fit

Samples = tuple[np.ndarray, np.ndarray]


def _standard(features: np.ndarray, has_bias: bool) -> tuple[float, float]:
    """One mean and one standard deviation of all entries; without a bias the mean could not be undone."""
    mean = float(features.mean()) if has_bias else 0.0
    spread = float(np.sqrt(np.square(features - mean).mean()))
    return mean, spread or 1.0


def _search(
    fitted_to: Samples, held: Samples, grid: Sequence[float], kind: str, outputs: int, has_bias: bool
) -> dict[float, float]:
    """The score on `held` for each C, from strong to weak regularisation, each fit starting at the one before."""
    mean, spread = _standard(fitted_to[0], has_bias)
    train, valid = ((features - mean) / spread for features in (fitted_to[0], held[0]))
    solver = _Solver(kind, outputs, has_bias)
    scores = {}
    for value in grid:
        fit = solver.fit(train, fitted_to[1], value, steps=200, tolerance=1e-4)
        scores[value] = _score(valid @ fit.weight.T + fit.bias, held[1], kind)
    return scores


def _fit_all(
    features: np.ndarray, labels: np.ndarray, value: float, kind: str, outputs: int, has_bias: bool
) -> tuple[_Fit, float, float]:
    mean, spread = _standard(features, has_bias)
    standard = (features - mean) / spread
    return _Solver(kind, outputs, has_bias).fit(standard, labels, value, steps=2000, tolerance=1e-7), mean, spread


def _score(logits: np.ndarray, labels: np.ndarray, kind: str) -> float:
    if kind == "single_label_classification":
        return float((logits.argmax(1) == labels).mean())
    if kind == "multi_label_classification":
        return float(((logits > 0) == (labels > 0)).mean())
    total = np.square(labels - labels.mean(0)).sum()
    return float(1 - np.square(labels - logits).sum() / (total or 1.0))


class _Solver:
    """Fits by scikit-learn; what was found is where the next fit starts."""

    def __init__(self, kind: str, outputs: int, has_bias: bool) -> None:
        from sklearn.linear_model import LogisticRegression, Ridge

        self.kind, self.outputs, self.has_bias = kind, outputs, has_bias
        self.ridge: Any = Ridge
        count = outputs if kind == "multi_label_classification" else 1
        self.logistic = [LogisticRegression(fit_intercept=has_bias, warm_start=True) for _ in range(count)]

    def fit(self, features: np.ndarray, labels: np.ndarray, value: float, steps: int, tolerance: float) -> _Fit:
        """features `(N, F)`; labels `(N,)` or `(N, C)`; `value` is C."""
        if self.kind == "regression":
            ridge = self.ridge(alpha=1 / value, fit_intercept=self.has_bias).fit(features, labels)
            weight = np.asarray(ridge.coef_).reshape(self.outputs, -1)
            return _Fit(weight, np.broadcast_to(ridge.intercept_, self.outputs), True)
        weight, bias, converged = np.zeros((self.outputs, features.shape[1])), np.zeros(self.outputs), True
        for place, solver in enumerate(self.logistic):
            targets = labels[:, place] if self.kind == "multi_label_classification" else labels
            if len(np.unique(targets)) < 2:
                what = f"label {place}" if self.kind == "multi_label_classification" else "the samples"
                raise ValueError(
                    f"All of {what} to fit to have the value {targets[0]}: there is nothing to tell apart."
                )
            solver.set_params(C=value, max_iter=steps, tol=tolerance)
            converged &= _fit_logistic(solver, features, targets)
            rows, offsets = solver.coef_, np.broadcast_to(solver.intercept_, len(solver.coef_))
            if self.kind == "multi_label_classification":
                weight[place], bias[place] = rows[0], offsets[0]
            else:
                if len(rows) == 1:  # one logit w of two classes: half of it for, half against
                    rows, offsets = np.stack([-rows[0], rows[0]]) / 2, np.array([-offsets[0], offsets[0]]) / 2
                weight[solver.classes_], bias[solver.classes_] = rows, offsets
        return _Fit(weight, bias, converged)


def _fit_logistic(solver: Any, features: np.ndarray, targets: np.ndarray) -> bool:
    """Whether it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver.fit(features, targets)
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("`linear_probe` needs scikit-learn: `pip install 'peft-ext[probe]'`.") from error
