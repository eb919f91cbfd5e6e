"""What a cut has brought: parameters, FLOPs, latency, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")


@torch.no_grad()
def report(
    before: nn.Module,
    after: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] = (),
    seconds: float = 1.0,
    rounds: int = 3,
    metrics: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Measures two models on the same inputs, in turns, so that neither has the machine's better minutes.

    Args:
        before: The model before the cut, in eval mode.
        after: The model after it, on the same device.
        inputs: Keyword arguments of `forward`; their first sample is repeated. Labels are left out.
        batch_sizes: Sizes of the batches.
        lengths: Numbers of tokens; text inputs are repeated up to them. Empty: as they are.
        seconds: How long each measurement takes at least.
        rounds: How often both are measured.
        metrics: Further rows: name, and values before and after.

    Returns:
        `{"parameters": {"before": ..., "after": ...}, "weight_bytes": ..., "metrics": ..., "runs": [...]}`, where a run
        has `batch_size`, `length`, `flops`, `seconds` (the median, with as many threads as torch is set to) and, on a
        GPU, `peak_bytes`, each before and after. It can be written as JSON. Weights take as many bytes in memory as in a file.

    Raises:
        ValueError: A model is in training mode, in which latency means something else.
    """
    models = {"before": before, "after": after}
    if before.training or after.training:
        raise ValueError("The models must be in eval mode: `model.eval()`.")
    runs = []
    for length in lengths or (None,):
        for size in batch_sizes:
            batch = _batch(inputs, size, length)
            run: dict[str, Any] = {"batch_size": size, "length": length, "flops": {}, "seconds": {}}
            for name, model in models.items():
                # only the plain implementation of attention is made of operations that the counter knows
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    model(**batch)
                run["flops"][name] = counter.get_total_flops()
            times: dict[str, list[float]] = {"before": [], "after": []}
            for _ in range(rounds):
                for name, model in models.items():
                    timer = Timer(
                        "model(**batch)",
                        globals={"model": model, "batch": batch},
                        num_threads=torch.get_num_threads(),  # which a Timer sets to one
                    )
                    times[name].append(timer.blocked_autorange(min_run_time=seconds / rounds).median)
            run["seconds"] = {name: median(found) for name, found in times.items()}
            if next(before.parameters()).is_cuda:
                run["peak_bytes"] = {name: _peak_bytes(model, batch) for name, model in models.items()}
            runs.append(run)
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "weight_bytes": {
            name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()
        },
        "metrics": {name: {"before": old, "after": new} for name, (old, new) in (metrics or {}).items()},
        "runs": runs,
    }


def markdown(measured: Mapping[str, Any]) -> str:
    """A table of what `report` found: a row for each figure, with the ratio of after to before."""
    lines = ["| | Before | After | Ratio |", "| --- | ---: | ---: | ---: |"]
    figures = [("Parameters", measured["parameters"], "{:,}"), *_figures(measured)]
    for name, values, form in figures:
        old, new = values["before"], values["after"]
        ratio = f"{new / old:.3f}" if old else ""
        lines.append(f"| {name} | {form.format(old)} | {form.format(new)} | {ratio} |")
    return "\n".join(lines)


def card_rows(measured: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same for the card of a pruned model: `save_pruned(model, path, CardInfo(sizes=card_rows(measured)))`.

    The number of parameters is not among the rows, since `save_pruned` counts them itself.
    """
    return [
        {
            "": name,
            "Before": form.format(values["before"]),
            "Now": form.format(values["after"]),
            "Left": f"{values['after'] / values['before']:.1%}" if values["before"] else "",
        }
        for name, values, form in _figures(measured)
    ]


def _figures(measured: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float], str]]:
    """Name, values before and after, and how they are written."""
    yield "Weights, MB", _scaled(measured["weight_bytes"], 1e-6), "{:.1f}"
    for name, values in measured["metrics"].items():
        yield name, values, "{:.4g}"
    for run in measured["runs"]:
        where = f"batch {run['batch_size']}" + (f", {run['length']} tokens" if run["length"] else "")
        yield f"GFLOPs, {where}", _scaled(run["flops"], 1e-9), "{:.4g}"
        yield f"Latency (median), {where}, ms", _scaled(run["seconds"], 1e3), "{:.4g}"
        if "peak_bytes" in run:
            yield f"Peak memory, {where}, MB", _scaled(run["peak_bytes"], 1e-6), "{:.1f}"


def _scaled(values: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in values.items()}


def _batch(inputs: Mapping[str, torch.Tensor], size: int, length: int | None) -> dict[str, torch.Tensor]:
    batch = {}
    for key, value in inputs.items():
        if key == "labels":
            continue
        sample = value[:1]
        if length is not None and key in _TOKENS:
            sample = sample.repeat(1, -(-length // sample.shape[1]))[:, :length]
        batch[key] = sample.expand(size, *sample.shape[1:]).contiguous()
    return batch


def _peak_bytes(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    torch.cuda.reset_peak_memory_stats()
    model(**batch)
    return torch.cuda.max_memory_allocated()
