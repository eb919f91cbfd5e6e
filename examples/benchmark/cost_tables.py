"""The tables of `cost.py`: medians, ratios within a round, and where they go in a Markdown file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parent))
from cost_methods import FROZEN, LORA
from workloads import MIB


RESULTS = Path(__file__).parent / "results"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return middle.item(), low.item(), high.item()


def paired(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio, round by round."""
    return quartiles([a / b for a, b in zip(values, reference, strict=True)])


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per method what the table shows: ratios of times as (median, lower quartile, upper quartile)."""
    rows = results["rows"]
    found: dict[str, dict[str, Any]] = {}
    for method, row in rows.items():
        seconds = row["seconds"]
        found[method] = {
            "saved_ratio": row["saved_bytes"] / rows[FROZEN]["saved_bytes"],
            "step_seconds": quartiles(seconds["step"])[0],
            "step_ratio": paired(seconds["step"], rows[LORA]["seconds"]["step"]),
            **{
                f"{kind}_ratio": paired(seconds[kind], results["base_seconds"])
                for kind in ("unmerged", "merged")
                if kind in seconds
            },
        }
    return found


def spread(values: tuple[float, float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def _size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count >= MIB else f"{count / 1024:,.1f} KiB"


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    has_peak = results["machine"]["gpu"] is not None
    header = [
        "method",
        "trainable",
        "saved for backward, MiB",
        "over frozen",
        *(["CUDA peak, MiB"] if has_peak else []),
    ]
    header += ["step, ms", "step over LoRA", "forward over base", "merged over base", "file"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for method, found in summary(results).items():
        row = results["rows"][method]
        peak = [f"{row['cuda_peak_bytes'] / MIB:,.1f}"] if has_peak else []
        lines.append(
            [
                method,
                f"{row['trainable']:,}",
                f"{row['saved_bytes'] / MIB:,.1f}",
                f"{found['saved_ratio']:.2f}",
                *peak,
                f"{found['step_seconds'] * 1000:,.1f}",
                spread(found["step_ratio"]),
                spread(found.get("unmerged_ratio")),
                spread(found.get("merged_ratio")),
                _size(row["file_bytes"]) if row["trainable_with_head"] else "",
            ]
        )
    return "\n".join([caption(results), "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def caption(results: Mapping[str, Any]) -> str:
    """What was run, on what."""
    work, computer, settings = results["workload"], results["machine"], results["settings"]
    head = max(row["trainable_with_head"] - row["trainable"] for row in results["rows"].values())
    where = computer["gpu"] or f"{computer['cpu']}, {computer['threads']} threads"
    precision = f"autocast to {settings['autocast']}" if settings["autocast"] else "float32"
    return (
        f"{work['about']} ({results['parameters']:,} parameters), batch of {work['size']}, {precision}; {where}, "
        f"torch {computer['torch']}. Median of {settings['rounds']} rounds (quartiles)."
        + (f" A head of {head:,} parameters comes on top of the trainable ones." if head else "")
    )


def write_tables(file: Path, results: Path = RESULTS) -> list[str]:
    """Puts the tables of `results/cost-NAME-*.json` between `<!-- cost:NAME -->` and `<!-- /cost:NAME -->` in `file`.

    Returns:
        The names that were found.

    Raises:
        ValueError: The file has no such markers, or there are no results for one.
    """
    written: list[str] = []

    def tables(match: re.Match[str]) -> str:
        name = match[2]
        sources = [results / f"cost-{name}-{device}.json" for device in ("cpu", "cuda")]
        found = [table(json.loads(source.read_text())) for source in sources if source.exists()]
        if not found:
            raise ValueError(f"{file} wants the costs of {name!r}, and there are no results: {sources[0]}")
        written.append(name)
        return "\n".join([match[1], "\n\n".join(found), match[3]])

    pattern = r"(<!-- cost:(\S+) -->)\n.*?(<!-- /cost:\2 -->)"
    text = re.sub(pattern, tables, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not written:
        raise ValueError(f"{file} has no line `<!-- cost:NAME -->` followed by a line `<!-- /cost:NAME -->`")
    file.write_text(text, encoding="utf-8")
    return written
