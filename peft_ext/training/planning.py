"""What fits: the bytes of a training step of each method, told from the shapes of the model before anything is loaded.

    weights      parameters of the model times the bytes of its precision, and those of the adapter
    gradients    bytes of the trainable parameters
    optimizer    twice as many: the two moments of AdamW, in the precision of the parameters
    activations  what the forward keeps for the backward, see `toys.py`; with gradient checkpointing the inputs of the
                 blocks and what one block keeps

Left out: what the allocator and the kernels of a device need for themselves, and the data.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from numbers import Real
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..calibrate import calibrate
from ..core import head_modules, methods
from .toys import Costs, Sizes, costs_of, side_of, sizes_of


GOALS = ("memory", "parameters", "latency", "speed")
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SHOWN = 0.02  # a standard error above this share of the activations is in the table
FULL, LOW_RANK = "full fine-tuning", "LoRA r=8"
AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
    "text": AutoModelForSequenceClassification,
}
TASKS = {"causal": "CAUSAL_LM", "image": "SEQ_CLS", "text": "SEQ_CLS"}


@dataclass(frozen=True)
class Advice:
    """One method on one model; all sizes in bytes.

    Attributes:
        method: Its `peft_type`, or what it is called.
        name: What it is called.
        trainable: Trainable parameters, a head that is trained in full included.
        weights, gradients, optimizer, activations: See the top of `planning.py`.
        error: Standard error of the activations; zero where they follow from the sizes alone.
        checkpointed: Activations with gradient checkpointing.
        merges: Whether nothing of it is left at inference.
        fits: `"yes"`, `"with gradient checkpointing"` or `"no"`; `None` without a limit.
        step: Time of a training step over that of LoRA r=8, as measured, by the model that it was measured on.
        saved: Bytes kept for the backward over those of LoRA r=8, likewise.
    """

    method: str
    name: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    merges: bool
    error: int = 0
    fits: str | None = None
    step: Mapping[str, float] = field(default_factory=dict)
    saved: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def total_checkpointed(self) -> int:
        return self.total - self.activations + self.checkpointed


@dataclass(frozen=True)
class Plan:
    """What `recommend` says: the methods, the best for the goal first, and why others are not among them."""

    parameters: int
    batch: int
    tokens: int
    dtype: str
    memory: int | None
    goal: str
    rows: tuple[Advice, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        """A table in Markdown, in GB (10^9 bytes)."""
        head = ["method", "trainable", "weights", "gradients", "optimizer", "activations", "total"]
        head += ["with checkpointing", "merges", "step over LoRA's", *(["fits"] if self.memory is not None else [])]
        lines = [head, ["---", *(["---:"] * 7), *(["---"] * (len(head) - 8))]]
        for row in self.rows:
            sizes = (row.weights, row.gradients, row.optimizer, row.activations, row.total, row.total_checkpointed)
            middle = _median(row.step)
            cells = [row.name, f"{row.trainable:,}", *(f"{size / 1e9:,.2f}" for size in sizes)]
            if row.error > SHOWN * row.activations:
                cells[5] += f" ± {row.error / 1e9:,.2f}"
            cells += ["yes" if row.merges else "no", "-" if middle is None else f"{middle:.2f}"]
            lines.append([*cells, *([row.fits or ""] if self.memory is not None else [])])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recommend(
    model: Any,
    size: Any,
    *,
    memory: str | float | None = None,
    goal: str = "memory",
    dtype: torch.dtype | str | None = None,
    kind: str | None = None,
    chosen: Iterable[str] | None = None,
) -> Plan:
    """Which methods fit a model, a batch and a budget, by what a training step would need. Nothing large is loaded.

    Each registered method is taken with its default config, beside LoRA r=8 on all Linears and full fine-tuning, all
    with AdamW. Their costs come from toys of the same architecture that are really run. A method whose costs the toys do
    not tell within 15 % (by the residuals of what is fitted to them) is left out.

    Args:
        model: A transformers model (on the meta device, too), a config, or a name on the Hub or on disk.
        size: `(batch, tokens)`, `batch` alone for images, one batch of the model's inputs, or batches of which the
            first is looked at.
        memory: The most that a step may need: bytes, or text as `"24GB"`. `None`: no limit.
        goal: What to sort by, among those that fit: `"memory"`, `"parameters"` (trainable), `"latency"` (methods of
            which nothing is left at inference first), or `"speed"` (steps as measured on this package's benchmark).
        dtype: Of the weights, or its name; `None` takes the model's.
        kind: `"causal"`, `"text"` (classification) or `"image"`; `None` reads it off the config.
        chosen: `peft_type`s to look at; `None`: all that are registered.

    Raises:
        ValueError: `goal`, `kind`, `memory`, `dtype` or `chosen` has a value that there is not, the model's config does not
            say its sizes, or the model is quantised, or no method at all can be planned for it, as where it computes no
            loss of classes or next tokens.
        TypeError: `model`, `size` or `memory` is of another type.
    """
    if goal not in GOALS:
        raise ValueError(f"`goal` is {goal!r}; there are {', '.join(GOALS)}.")
    config, build = _model(model, kind)
    kind = kind or _kind(config)
    dtype = _dtype(dtype or getattr(config, "dtype", None) or torch.float32)
    batch, tokens = _size(size, config, kind)
    sizes, limit = sizes_of(config, batch, tokens), _bytes(memory)
    parameters = _parameters(build, config)
    rows, left_out, registered = [], {}, methods()
    for name, (title, merges, adapt) in _methods(kind, chosen).items():
        if name in registered and (reason := registered[name].about.unplanned):
            left_out[title] = f"no plan can be made: {reason}."
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of toys: fresh heads, small ranks
                known = parameters if name == FULL else None
                costs = costs_of(adapt, build, config, sizes, kind, dtype, known)
        except (ValueError, TypeError) as error:
            left_out[title] = " ".join(str(error).split())
            continue
        rows.append(_advice(name, title, merges, costs, parameters, sizes, dtype, limit))
    if not rows:
        reasons = " ".join(dict.fromkeys(left_out.values()))
        raise ValueError(
            f"Nothing can be planned for this {config.model_type} as kind {kind!r}: {reasons} Give a model of classes, "
            "images or next tokens, or the config of one."
        )
    return Plan(
        parameters, batch, tokens, str(dtype).removeprefix("torch."), limit, goal, tuple(_sorted(rows, goal)), left_out
    )


# What is asked


def _model(model: Any, kind: str | None) -> tuple[PreTrainedConfig, Callable[[Any], PreTrainedModel]]:
    if kind is not None and kind not in AUTO:
        raise ValueError(f"`kind` is {kind!r}; there are {', '.join(AUTO)}.")
    if isinstance(model, str):
        model = AutoConfig.from_pretrained(model, trust_remote_code=False)
    config: Any = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"`model` is a {type(model).__name__}: give a transformers model, a config or a name.")
    if config is not model and config.is_encoder_decoder and type(model).__name__.endswith("ForConditionalGeneration"):
        raise ValueError(
            f"What a {type(model).__name__} keeps is not planned: its decoder has an input of its own. Give the config, "
            "which is planned as a classifier; the logits of all tokens of the output come on top."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The model is quantised (`quantization_config`), and what its weights and kernels keep is not known: give the "
            "config of the model before that, and subtract what its weights take less."
        )
    return config, AUTO[kind or _kind(config)].from_config if config is model else type(model)._from_config


def _parameters(build: Callable[[Any], PreTrainedModel], config: Any) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(config).parameters())
    except Exception as error:
        raise ValueError(
            f"No model can be made of this {type(config).__name__} ({type(error).__name__}: {error}): give another `kind` "
            f"({', '.join(AUTO)}), or a model."
        ) from error


def _dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"`dtype` is {dtype!r}: give one of weights that are trained, as torch.bfloat16 or 'bfloat16'."
        )
    return found


def _kind(config: Any) -> str:
    if any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        return "causal"
    if getattr(config, "image_size", None) is not None:
        return "image"
    is_decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.architectures
    return "causal" if is_decoder and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "text"


def _size(size: Any, config: Any, kind: str) -> tuple[int, int]:
    """Samples and tokens of a batch."""
    patches = None
    if kind == "image":
        patches = (side_of(config, "image_size") // side_of(config, "patch_size")) ** 2 + 1
    if isinstance(size, int):
        size = (size,)
    if isinstance(size, (tuple, list)) and size and all(isinstance(number, int) for number in size):
        if any(isinstance(number, bool) for number in size):
            raise TypeError(f"`size` is {size}: give (batch, tokens) as numbers.")
        if min(size) < 1 or (len(size) != 2 and patches is None):
            raise ValueError(f"`size` is {size}: give (batch, tokens), both at least 1.")
        return size[0], patches or size[1]
    batch = size if isinstance(size, Mapping) else next(iter(size), None) if hasattr(size, "__iter__") else None
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`size` is a {type(size).__name__}: give (batch, tokens), a batch, or an iterable of batches."
        )
    first = next((batch[name] for name in ("input_ids", "pixel_values") if name in batch), None)
    if first is None or first.ndim < 2:
        raise ValueError(
            f"The batch has {', '.join(batch)}: `input_ids` or `pixel_values` of a whole batch is needed."
        )
    return first.shape[0], patches or first.shape[1]


def _bytes(memory: str | float | None) -> int | None:
    if memory is None:
        return None
    if isinstance(memory, str):
        digits = memory.strip().rstrip("BbIiKkMmGgTt ")
        unit = memory.strip()[len(digits) :].strip().upper() or "B"
        try:
            memory = float(digits) * UNITS[unit]
        except (ValueError, KeyError) as error:
            raise ValueError(f"`memory` is {memory!r}: give bytes, or text such as '24GB' or '16GiB'.") from error
    if isinstance(memory, bool) or not isinstance(memory, Real):
        raise TypeError(f"`memory` is {memory!r}: give bytes, or text such as '24GB' or '16GiB'.")
    if not 0 < memory < math.inf:
        raise ValueError(f"`memory` is {memory}: it must be positive and finite; `None` is no limit.")
    return int(memory)


# The methods

Method = tuple[str, bool, Callable[[PreTrainedModel, list[dict[str, torch.Tensor]]], nn.Module]]


def _methods(kind: str, chosen: Iterable[str] | None) -> dict[str, Method]:
    """What each is called, whether it merges, and what puts it on a model."""
    registered = methods()
    if isinstance(chosen, str):
        raise TypeError(f"`chosen` is {chosen!r}: give a list of names.")
    names = list(registered) if chosen is None else list(chosen)
    if unknown := [name for name in names if name not in registered]:
        raise ValueError(f"There are no methods {unknown}; there are {', '.join(registered)}.")
    found: dict[str, Method] = {
        FULL: (FULL, True, lambda model, batches: model.requires_grad_(True)),
        "LORA": (LOW_RANK, True, partial(_low_rank, task=TASKS[kind])),
    }
    for name in names:
        method = registered[name]
        adapt = partial(_adapted, config_class=method.config, task=TASKS[kind])
        found[name] = (method.about.name, method.about.merges_with(vars(method.config())), adapt)
    return found


def _low_rank(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], task: str) -> nn.Module:
    """LoRA r=8 on all Linears but those of a head that PEFT trains in full, which it takes by the end of their name."""
    trained = [name for name in head_modules(model) if "." not in name and name.endswith(("classifier", "score"))]
    return get_peft_model(
        model, LoraConfig(task_type=task, r=8, target_modules="all-linear", exclude_modules=trained or None)
    )


def _adapted(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], config_class: Callable[..., PeftConfig], task: str
) -> nn.Module:
    """The toy with the method on it, calibrated on its batches where the method looks at data."""
    config: Any = config_class(task_type=task)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        config = config_class(task_type=task)
        try:
            calibrate(model, config, batches, num_batches=len(batches), progress=False)
        except TypeError:  # it looks at no data, so that is not what is missing
            raise error from None
    return get_peft_model(model, config)


# What comes of it


def _advice(
    name: str,
    title: str,
    merges: bool,
    costs: Costs,
    parameters: int,
    sizes: Sizes,
    dtype: torch.dtype,
    limit: int | None,
) -> Advice:
    trainable, trainable_bytes = costs.trainable, costs.trainable_bytes
    inputs = sizes.layers * sizes.batch * sizes.tokens * sizes.width * dtype.itemsize
    measured = _measured().get(name, {})
    row = Advice(
        method=name,
        name=title,
        trainable=trainable,
        weights=parameters * dtype.itemsize + (0 if name == FULL else trainable_bytes),
        gradients=trainable_bytes,
        optimizer=2 * trainable_bytes,
        activations=costs.activations,
        checkpointed=min(costs.activations, inputs + costs.activations_of_one_layer),
        merges=merges,
        error=costs.error,
        step=measured.get("step", {}),
        saved=measured.get("saved", {}),
    )
    if limit is None:
        return row
    fits = "yes" if row.total <= limit else "with gradient checkpointing" if row.total_checkpointed <= limit else "no"
    return Advice(**{**vars(row), "fits": fits})


def _sorted(rows: Iterable[Advice], goal: str) -> Iterator[Advice]:
    """Those that fit first; then by the goal, and by memory where that does not tell."""
    order = {"yes": 0, None: 0, "with gradient checkpointing": 1, "no": 2}

    def key(row: Advice) -> tuple[float, ...]:
        step = _median(row.step)
        by_goal = {
            "memory": 0.0,
            "parameters": float(row.trainable),
            "latency": float(not row.merges),
            "speed": float("inf") if step is None else step,
        }
        return order[row.fits], by_goal[goal], row.total

    return iter(sorted(rows, key=key))


def _measured() -> dict[str, Any]:
    """Ratios over LoRA r=8 by method, from `examples/benchmark/results`; written by `examples/benchmark/plan_check.py`."""
    return json.loads(files("peft_ext.training").joinpath("measured.json").read_text())["methods"]


def _median(values: Mapping[str, float]) -> float | None:
    return None if not values else torch.tensor(sorted(values.values()), dtype=torch.float64).quantile(0.5).item()
