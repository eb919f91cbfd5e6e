r"""The sensitivity pass: which weights the loss depends on, found with a few batches before training begins.

With g_b the gradient of the mean loss of batch b (with several processes: of their batches together), the score of a
weight w is, summed over the batches,

    "sensitivity"   g_b^2              what one step would change the loss by, up to the learning rate (SPT, He et al. 2023)
    "fisher"        g_i^2              over single samples i instead of batches: the diagonal of the empirical Fisher matrix
    "magnitude"     |w g_b|            first-order change of the loss if w were removed, batch by batch
    "snip"          |w sum_b g_b|      the same of all batches together (Lee et al. 2019)
    "gradient"      sum_b g_b          with its sign: the direction of a step (LoRA-SB)
    "random"        U(0, 1)            from the seed of the config, without any data: a choice by chance

Each gradient is added to its sums on the host as soon as it is complete, and released, so that no two large gradients
are alive at once (with several processes, when the backward of the batch is done, so that all add up the same). `memory="exact"` keeps one fp32 sum a weight. `memory="pool"` keeps the sums of the largest eighth
only: those below a floor that rises with what was seen are forgotten, and of a weight that enters late it is estimated
what it had before.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import StringIO
from typing import Any

import torch
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from torch import distributed, nn
from tqdm.auto import tqdm

from .batches import batches, is_first_process, loader, world
from .channel_norms import ChannelNorms, measure_channels
from .core import ExtConfig, QuantisedWeight, in_order, require_model, tuner_of
from .scores import ExactScores, PooledScores, Scores, random_scores


ACTIVATION = "activation"  # what a pass of another sort measures, see `channel_norms.py`
KINDS = ("sensitivity", "fisher", "magnitude", "snip", "gradient")
RANDOM = "random"  # no pass at all


def calibrate(
    model: nn.Module,
    config: ExtConfig,
    dataloader: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int = 16,
    *,
    trainer: Any = None,
    budgets: Sequence[float] | None = None,
    kind: str | None = None,
    memory: str = "exact",
    progress: bool = True,
    full_report: bool = False,
) -> Any:
    """Runs a few batches through the model and writes what the config's method needs to know of them into the config.

    The model comes back as it was, its modes, gradients, buffers and random state included, also after an error.

    Args:
        model: The model without this adapter, as it is about to be given to `get_peft_model`.
        config: A config that looks at data, such as `SparseFTConfig(selection="sensitivity", density=0.01)`.
        dataloader: Gives batches, each a mapping that is passed to the model as keyword arguments. With `kind="random"`
            there is none.
        loss_fn: Makes the mean loss of a batch, `loss_fn(model, batch)`, if it is not the `loss` of what the model
            returns.
        num_batches: At most so many batches are looked at.
        trainer: Instead of `dataloader`: a `Trainer` or `SFTTrainer` that was made with the same model and data, but
            without `peft_config`; the batches are those that it would train on.
        budgets: Several budgets to calibrate for in one pass: shares below 1, or whole numbers of parameters.
        kind: `"sensitivity"`, `"fisher"`, `"magnitude"`, `"snip"`, `"gradient"` or `"random"`; see the top of
            `calibrate.py`. `None` takes what suits the method and its config: `"magnitude"` for masks, `"activation"`
            for channels that are chosen by it (see `channel_norms.py`; no loss is needed), else `"sensitivity"`.
        memory: `"exact"`, four bytes a weight on the host, or `"pool"`, one: for budgets well below an eighth of the
            weights.
        progress: Show a bar, and print a summary of what was decided.
        full_report: Print it layer by layer instead, as wide as it is.

    Returns:
        The config itself; with `budgets` a dict of a copy for each.

    Raises:
        TypeError: The config's method looks at no data.
        ValueError: There are no batches, the loss is not finite or depends on no target, or an argument is none of
            those it can be.

    Targets that the loss does not depend on, such as a pooler, get the score 0, and a warning names them. The gradient
    of a quantised weight is that of what it is dequantised to.
    """
    require_model(model)
    if not isinstance(config, ExtConfig):
        raise TypeError(f"{type(config).__name__} is no config of this package, so there is nothing to calibrate.")
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # by whose names a config goes
    tuner = tuner_of(config)
    configs = {} if budgets is None else {share: tuner.with_budget(config, share) for share in _checked(budgets)}
    needed = tuner.kind_for(config)
    if kind not in (None, ACTIVATION, RANDOM, *KINDS):
        raise ValueError(f"`kind` must be one of {', '.join((*KINDS, RANDOM))}, got {kind!r}.")
    apart = {ACTIVATION, "gradient"}  # no scores that the others could stand for: channels' norms, and signed sums
    if kind is not None and kind != needed and {kind, needed} & apart:
        raise ValueError(
            f"`kind={kind!r}` is not what this {type(config).__name__} goes by, which is {needed!r}: leave `kind` out."
        )
    if kind == RANDOM:
        _refuse_data(
            dataloader=dataloader, loss_fn=loss_fn, trainer=trainer, memory=None if memory == "exact" else memory
        )
        sizes = {name: parameter.numel() for name, parameter in tuner.candidates(config, model).items()}
        measured: Any = random_scores(sizes, getattr(config, "seed", 0))
    elif needed == ACTIVATION:
        measured = _measure_channels(model, config, dataloader, loss_fn, num_batches, trainer, memory, progress)
    else:
        measured = measure(
            model,
            tuner.candidates(config, model),
            dataloader,
            loss_fn,
            num_batches,
            trainer=trainer,
            kind=kind or needed,
            memory=memory,
            progress=progress,
        )
    for other in configs.values():
        tuner.take_scores(other, model, measured)
    if configs:
        return configs
    tuner.take_scores(config, model, measured)
    if progress and is_first_process():
        _print(*tuner.calibration_report(config, full_report), wide=full_report)
    return config


def _checked(budgets: Sequence[float]) -> Sequence[float]:
    """`budgets` as they are, if each is a share below 1 or a whole number."""
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        raise TypeError(f"`budgets` must be a list of shares or numbers of parameters, got {budgets!r}.")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"`budgets` must be numbers, got {budget!r}.")
        if not 0 < budget < float("inf") or (budget >= 1 and budget != int(budget)):
            raise ValueError(f"Each of `budgets` must be a share below 1 or a whole number, got {budget!r}.")
    if len(set(budgets)) < len(budgets) or not budgets:
        raise ValueError(f"`budgets` must name at least one, and each once, got {list(budgets)!r}.")
    return budgets


def _refuse_data(**given: Any) -> None:
    if unused := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"`kind='random'` looks at no data, so that `{unused[0]}` has no effect: leave it out.")


def _print(title: str, rows: Sequence[Mapping[str, Any]], wide: bool) -> None:
    """A table whose columns are the keys of the rows, no wider than the terminal unless it may be."""
    if not rows:
        return
    table = Table(box=box.MARKDOWN)
    columns = _columns(rows)
    for column in columns:
        is_number = all(isinstance(row.get(column, 0), int) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells))
    out = StringIO()
    width = 10_000 if wide else shutil.get_terminal_size((119, 24)).columns
    Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(table)
    tqdm.write("\n".join([title, *(line.rstrip() for line in out.getvalue().splitlines() if line.strip())]))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows; one that a row lacks keeps its place before those that follow it elsewhere."""
    columns: list[str] = []
    for row in rows:
        place = 0
        for key in row:
            if key not in columns:
                columns.insert(place, key)
            place = columns.index(key) + 1
    return columns


def measure(
    model: nn.Module,
    candidates: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int = 16,
    *,
    trainer: Any = None,
    kind: str = "sensitivity",
    memory: str = "exact",
    progress: bool = True,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """The pass itself: the scores of the `candidates`, parameters of `model`; the arguments are those of `calibrate`.

    With `training=False` the model is in eval mode; `dtype` is that of exact sums.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if memory not in ("exact", "pool"):
        raise ValueError(f"`memory` must be 'exact' or 'pool', got {memory!r}.")
    if memory == "pool" and kind in ("snip", "gradient"):
        raise ValueError(f"`memory='pool'` keeps the largest of growing sums; those of {kind=} change their sign.")
    dataloader = loader(dataloader, trainer, num_batches)
    sizes = {name: parameter.numel() for name, parameter in candidates.items()}
    scores = ExactScores(sizes, dtype) if memory == "exact" else PooledScores(sizes)
    seen: set[str] = set()

    def take(name: str, grad: torch.Tensor, parameter: torch.Tensor) -> None:
        seen.add(name)
        # a single tensor of the gradient's size is alive besides it, and none if it is in fp32
        values = grad.detach().to(dtype).reshape(-1)
        if kind in ("magnitude", "snip"):
            weight = parameter.values() if isinstance(parameter, QuantisedWeight) else parameter.detach()
            values = values.mul_(weight.reshape(-1))
        is_signed = kind in ("snip", "gradient")
        scores.add(name, values if is_signed else values.abs_() if kind == "magnitude" else values.square_())

    def release(parameter: torch.Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        take(names[id(parameter)], grad, parameter)

    names = {id(parameter): name for name, parameter in candidates.items()}
    if away := [name for name, p in candidates.items() if p.is_meta]:
        raise ValueError(
            f"{_some(away)} is offloaded or not loaded, and only the weights of Linear modules can be measured then: "
            "calibrate on the model loaded without offloading; the config that comes out fits both."
        )
    with ExitStack() as stack:
        stack.enter_context(in_order(model))
        stack.enter_context(_as_it_was(model, candidates))
        for parameter in candidates.values():
            if isinstance(parameter, QuantisedWeight):
                stack.callback(parameter.attach().remove)
        model.train(training)
        for parameter in candidates.values() if world() == 1 else ():
            hook = parameter.register_post_accumulate_grad_hook(release)
            stack.callback(hook.remove)
        bar = stack.enter_context(
            tqdm(total=num_batches, desc="calibrating", disable=not (progress and is_first_process()))
        )
        for batch in batches(dataloader, num_batches, model):
            for part in _samples(batch) if kind == "fisher" else (batch,):
                loss = _loss(model, part, loss_fn)
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"The loss of batch {scores.batches} of the sensitivity pass is {loss.item()}.")
                if not loss.requires_grad:
                    raise ValueError(
                        "The loss does not depend on the weights that the config targets: it is detached, computed "
                        "under `no_grad`, or `target_modules` are not on its way."
                    )
                loss.backward()
                if world() > 1:
                    _take_together(candidates, take)
            scores.batches += 1
            bar.update()
    if scores.batches == 0:
        raise ValueError("The data loader gave no batch: it is empty, or an iterator that was used up before.")
    if missing := [name for name in candidates if name not in seen]:
        if len(missing) == len(candidates):
            raise ValueError(
                f"The loss has no gradient for {_some(missing)}, which are all targets: give a `loss_fn` that uses them."
            )
        warnings.warn(
            f"The loss does not depend on {_some(missing)}: they get the score 0.", UserWarning, stacklevel=2
        )
        for name in missing:
            scores.add(name, torch.zeros(scores.sizes[name]))
    if isinstance(scores, ExactScores) and kind == "snip":
        for sums in scores.sums.values():
            sums.abs_()  # they have a sign until all are added
    return scores


def mean_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int | None = None,
) -> dict[str, torch.Tensor]:
    """The mean, with its sign, of the gradients of the batches' losses, in eval mode; by the parameters' names, in fp32 at least.

    With several processes it is the mean over all of them.

    Raises:
        ValueError: See `calibrate`.
    """
    number = sys.maxsize if num_batches is None else num_batches
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    options: Any = {"kind": "gradient", "progress": False, "training": False, "dtype": dtype}
    scores = measure(model, parameters, dataloader, loss_fn, number, **options)
    return {
        name: (scores.of(name) / scores.batches).view(parameter.shape).to(parameter.device)
        for name, parameter in parameters.items()
    }


def _measure_channels(
    model: nn.Module,
    config: ExtConfig,
    dataloader: Iterable[Any] | None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None,
    num_batches: int,
    trainer: Any,
    memory: str,
    progress: bool,
) -> ChannelNorms:
    """The pass over activations; `loss_fn` only runs the model."""
    if memory != "exact":
        raise ValueError(f"`memory={memory!r}` has no effect on a pass over activations, which keeps sums by channel.")
    sites = tuner_of(config).channel_sites(config, model)
    found = batches(loader(dataloader, trainer, num_batches), num_batches, model)
    shown = tqdm(found, total=num_batches, desc="calibrating", disable=not (progress and is_first_process()))
    return measure_channels(model, sites, shown, loss_fn)


def _take_together(
    candidates: Mapping[str, nn.Parameter], take: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> None:
    """Takes the mean gradients over all processes, each in the same order, whatever each of them used.

    A process may use no part of a module, such as an expert, or reach the modules in another order.
    """
    parameters = list(candidates.items())
    device = parameters[0][1].device
    has_one = torch.tensor([parameter.grad is not None for _, parameter in parameters], device=device).int()
    distributed.all_reduce(has_one, distributed.ReduceOp.MAX)
    for (name, parameter), used in zip(parameters, has_one.tolist(), strict=True):
        if used:
            grad, parameter.grad = parameter.grad, None
            grad = torch.zeros_like(parameter) if grad is None else grad
            distributed.all_reduce(grad)
            take(name, grad / world(), parameter)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''}"


@contextmanager
def _as_it_was(model: nn.Module, candidates: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, only the candidates are trained and the model is in train mode; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {buffer.device.index for buffer in model.parameters() if buffer.device.type == "cuda"}
    chosen = {id(parameter) for parameter in candidates.values()}
    with torch.random.fork_rng(sorted(index for index in devices if index is not None)), torch.enable_grad():
        try:
            model.train()
            for parameter, _, _ in trained:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, requires_grad, grad in trained:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for buffer, kept in buffers:
                buffer.copy_(kept)


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None) -> torch.Tensor:
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    else:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"A batch must be a mapping of keyword arguments of the model, got {type(batch).__name__}; for "
                "anything else give a `loss_fn(model, batch)`."
            )
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"The model returns no loss for {', '.join(batch)}: add `labels`, or give a `loss_fn`.")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError("The loss must be a tensor with a single number, the mean over the batch.")
    return loss


def _samples(batch: Any) -> Iterator[dict[str, Any]]:
    """The samples of a batch as batches of one."""
    if not isinstance(batch, Mapping):
        raise TypeError("kind='fisher' takes batches apart and needs them to be mappings of tensors.")
    size = min(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    for index in range(size):
        yield {k: v[index : index + 1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
