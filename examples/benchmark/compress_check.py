"""What ComPEFT leaves of a trained LoRA: bytes, and the score before and after.

    python examples/benchmark/compress_check.py                          # TREC and sign digits; stops and goes on
    python examples/benchmark/compress_check.py --write docs/export.md   # the table, between its markers

LoRA r=8 on all Linears is trained as in `compare.py` and compressed at each share of `--keep`: all values as they are, or
A relative to its random start; of the magnitude of the standard deviation, or of the one that is best on the validation
split. Bytes are those of LoRA's own tensors: the head is trained and stays as it is. Lines go to
`results/compress-check.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from chosen_runs import load_results
from compare import scored
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from resumable import Job, Trained, caption, jobs, markdown, parsed, parser, score, train, work, write_between
from tasks import Prepared, find_task
from transformers import set_seed

from peft_ext.export import compress


FORMS: dict[str, dict[str, Any]] = {
    "std": {"scale": "std"},
    "tuned": {"scale": "tune"},
    "std, from the start": {"scale": "std", "seed": True},
    "tuned, from the start": {"scale": "tune", "seed": True},
}


def run(job: Job, args: argparse.Namespace, made: Prepared) -> dict[str, Any]:
    def drawn_anew(_: Any) -> dict[str, Any]:
        set_seed(job.seed)  # the seed of LoRA's start, which is drawn again from it
        return {}

    trained = train(job, args, made, drawn_anew)
    return {**trained.row, "forms": compressed(trained, job, args.keep, made)}


def compressed(trained: Trained, job: Job, keeps: Sequence[float], made: Prepared) -> list[dict[str, Any]]:
    """Bytes, scale and scores of each share and form; the model is left as it was."""
    model, trainer, task = trained.model, trained.trainer, find_task(job.task)
    own = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    besides = sum(tensor.nbytes for key, tensor in own.items() if "lora_" not in key)

    def on_validation(_: Any) -> float:
        return trainer.evaluate(made.data["validation"])["eval_score"]  # type: ignore[arg-type]

    found = []
    for keep, (form, fields) in product(keeps, FORMS.items()):
        tuned = {"evaluate": on_validation} if fields["scale"] == "tune" else {}
        seed = job.seed if "seed" in fields else None
        packed = compress(model, keep, fields["scale"], seed=seed, **tuned)
        set_peft_model_state_dict(model, packed.tensors())
        sizes = {"bytes": packed.nbytes - besides, "original_bytes": packed.original_nbytes - besides}
        found.append({"keep": keep, "form": form, **sizes, "scale": packed.scale, **scored(trainer, task, made)})
        set_peft_model_state_dict(model, own)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each task, share and form; means over the seeds."""
    cells: dict[tuple[str, float, str], dict[int, tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        for form in row["forms"]:
            cells.setdefault((row["task"], form["keep"], form["form"]), {})[row["seed"]] = row["test"], form
    lines = []
    for (task, keep, name), seeds in cells.items():
        before, forms = zip(*seeds.values(), strict=True)
        change = statistics.mean(f["test"] - b for f, b in zip(forms, before, strict=True))
        ratio = statistics.mean(f["original_bytes"] / f["bytes"] for f in forms)
        scales = ", ".join(f"{f['scale']:g}" for f in forms)
        sizes = (f"{forms[0]['original_bytes']:,}", f"{forms[0]['bytes']:,}", f"{ratio:.1f}")
        after = score([f["test"] for f in forms])
        lines.append(
            (task, name, f"{keep:g}", str(len(seeds)), *sizes, scales, score(before), after, f"{change:+.3f}")
        )
    head = ("task", "magnitude", "keep", "seeds", "bytes of LoRA", "compressed", "times smaller", "scales", "before")
    return f"{markdown((*head, 'after', 'difference'), lines, 2)}\n\n{caption(rows)}"


def main() -> None:
    made = parser(__doc__, ("trec", "signdigits"))
    made.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.3, 0.5], metavar="SHARE")
    args = parsed(made, "compress-check.jsonl")
    work(args, jobs(args, [("lora", f"keep {', '.join(f'{keep:g}' for keep in args.keep)}")]), run)
    if args.write:
        write_between(args.write, {"compressed": table(load_results(args.results))})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
