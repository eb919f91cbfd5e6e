"""What `peft_ext.recommend` predicts, against what is measured; its tables; and the measured ratios that it quotes.

    python examples/benchmark/plan_check.py --check               # five models, into results/plan-check.json
    python examples/benchmark/plan_check.py --llama               # 1B, 8B and 70B shapes, into results/plan-llama.json
    python examples/benchmark/plan_check.py --ratios              # peft_ext/training/measured.json from results/cost-*.json
    python examples/benchmark/plan_check.py --write docs/plan.md  # the tables, between their markers

**Measured** is the sum of bytes of all parameters, of the gradients after a backward, of AdamW's state after a step, and
of the distinct storages that the forward keeps for the backward; so it is what `recommend` predicts, of a model at its
true sizes. A GPU's allocator takes more than that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

import peft_ext
from peft_ext.core import methods
from peft_ext.training import Plan
from peft_ext.training.planning import FULL, _methods
from peft_ext.training.toys import saved_bytes


sys.path.insert(0, str(Path(__file__).resolve().parent))
from cost import Settings as CostSettings
from cost import machine, no_foreign_warnings
from workloads import PRESETS, Workload


RESULTS = Path(__file__).parent / "results"
RATIOS = Path(peft_ext.__file__).parent / "training" / "measured.json"
MODELS = ("vit-tiny", "vit-6x384", "minilm", "smollm2-135m", "vit-b16")
BATCHES = {"vit-b16": 2, "smollm2-135m": 1}  # so that AdamW's state and all activations fit into a small machine
PEFT_TYPES = {  # as `cost.py` calls them
    "full fine-tuning": FULL,
    "LoRA r=8": "LORA",
    "SSF": "SSF",
    "VQT, 4 queries": "VQT",
    "SpIEL-AG": "SPARSE_FT",
    "SPT, at random": "SPT",
    "mask-pruning LoRA r=8": "MASK_PRUNING",
    "S2FT": "S2FT",
    "UniPT": "UNIPT",
    "LoRA-XS": "LOW_RANK_CORE",
    "SCT": "SCT",
    "SNELL": "SNELL",
    "VPT, 10 prompts": "VPT",
    "WeGeFT": "WEGEFT",
    "Bi-LoRA r=8": "BINARY_LOW_RANK",
    "Bi-AdaptFormer": "BINARY_ADAPTER",
    "PASTA": "PASTA",
    "LoRAFusion": "FUSED_LOW_RANK",
}
LLAMA: dict[str, dict[str, int]] = {  # as meta-llama's configs have them
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
BATCH, LENGTH = 1, 2048


def llama(name: str) -> LlamaConfig:
    sizes: Any = LLAMA[name]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    return LlamaConfig(
        **sizes,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        tie_word_embeddings=name == "1B",
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def measured_bytes(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and of what the backward needs."""
    kept = saved_bytes(model, inputs)  # and its backward
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    # of copies, so that no method's schedule is asked how long the training is
    copies = [torch.nn.Parameter(p.detach().clone()) for p in trained if p.grad is not None]
    for copy, parameter in zip(copies, [p for p in trained if p.grad is not None], strict=True):
        copy.grad = parameter.grad
    optimizer = torch.optim.AdamW(copies, fused=True)
    optimizer.step()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if getattr(v, "ndim", 0))
    weights = sum(p.nbytes for p in model.parameters())
    return {"weights": weights, "gradients": gradients, "optimizer": state, "activations": kept}


@no_foreign_warnings()
def check(names: list[str], chosen: list[str] | None) -> None:
    """Writes what was found after each method, beside the models that were looked at before."""
    file = RESULTS / "plan-check.json"
    found: dict[str, Any] = json.loads(file.read_text())["models"] if file.exists() else {}
    for name in names:
        work: Workload = PRESETS[name]
        batch = BATCHES.get(name, work.batch)
        torch.manual_seed(0)
        model = work.build()
        plan = peft_ext.recommend(model, (batch, work.length or 1), kind=work.kind, chosen=chosen)
        found[name] = {"batch": batch, "tokens": plan.tokens, "rows": {}, "left_out": dict(plan.left_out)}
        for row in plan.rows:
            torch.manual_seed(0)
            model = work.build()
            inputs = {key: value[:batch].clone() for key, value in work.inputs(model.config).items()}
            adapt = _methods(work.kind, [row.method] if row.method in methods() else [])[row.method][2]
            true = measured_bytes(adapt(model, [inputs] * 2).train(), inputs)
            ratios = {
                "activations": row.activations / max(1, true["activations"]),
                "total": row.total / sum(true.values()),
            }
            found[name]["rows"][row.method] = {"predicted": asdict(row), "measured": true, "ratios": ratios}
            print(name, row.name, {key: round(value, 3) for key, value in ratios.items()}, flush=True)
            results = {"machine": machine(CostSettings()), "models": {n: found[n] for n in MODELS if n in found}}
            file.write_text(json.dumps(results, indent=1) + "\n")


def plans() -> None:
    """Writes what was found after each shape."""
    found: dict[str, Any] = {"batch": BATCH, "tokens": LENGTH, "models": {}}
    for name in LLAMA:
        plan: Plan = peft_ext.recommend(llama(name), (BATCH, LENGTH))
        found["models"][name] = {"parameters": plan.parameters, "table": str(plan), "left_out": dict(plan.left_out)}
        (RESULTS / "plan-llama.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}\n{plan}", flush=True)


def ratios() -> dict[str, Any]:
    """Medians over rounds of the times over LoRA's, and saved bytes over LoRA's, of every result of `cost.py`."""
    found: dict[str, Any] = {name: {"step": {}, "saved": {}} for name in PEFT_TYPES.values()}
    sources = sorted(RESULTS.glob("cost-*-cpu.json"))
    for source in sources:
        results = json.loads(source.read_text())
        rows, preset = results["rows"], results["workload"]["name"]
        lora = rows["LoRA r=8"]
        for title in PEFT_TYPES.keys() & rows.keys():
            row, target = rows[title], found[PEFT_TYPES[title]]
            pairs = zip(row["seconds"]["step"], lora["seconds"]["step"], strict=True)
            target["step"][preset] = round(torch.tensor([a / b for a, b in pairs]).median().item(), 3)
            target["saved"][preset] = round(row["saved_bytes"] / lora["saved_bytes"], 3)
    return {"sources": [f"examples/benchmark/results/{source.name}" for source in sources], "methods": found}


def tables() -> dict[str, str]:
    found = {}
    if (path := RESULTS / "plan-llama.json").exists():
        results = json.loads(path.read_text())
        parts = [
            f"Llama {name} ({model['parameters']:,} parameters in bfloat16), batch of {results['batch']} x "
            f"{results['tokens']} tokens, in GB:\n\n{model['table']}"
            for name, model in results["models"].items()
        ]
        found["llama"] = "\n\n".join(parts)
    if (path := RESULTS / "plan-check.json").exists():
        lines = [
            "| model | method | activations, predicted over measured | standard error | all, predicted over measured |"
        ]
        lines.append("|---|---|---:|---:|---:|")
        for name, model in json.loads(path.read_text())["models"].items():
            for row in model["rows"].values():
                ratio = row["ratios"]
                told = row["predicted"]
                error = f"{told['error'] / max(1, told['activations']):.3f}"
                cells = (name, told["name"], f"{ratio['activations']:.3f}", error, f"{ratio['total']:.3f}")
                lines.append(f"| {' | '.join(cells)} |")
        found["check"] = "\n".join(lines)
    return found


def updated(text: str) -> str:
    """`text` with the tables between `<!-- plan:NAME -->` and `<!-- /plan:NAME -->`."""
    for name, table in tables().items():
        pattern = rf"(<!-- plan:{name} -->\n).*?(<!-- /plan:{name} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="*", choices=[*MODELS, []], metavar="MODEL", help=f"default: {MODELS}")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="peft types to check; default: all")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--ratios", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.ratios:
        RATIOS.write_text(json.dumps(ratios(), indent=1) + "\n")
    if args.llama:
        plans()
    if args.check is not None:
        check(args.check or list(MODELS), args.methods)
    if args.write:
        args.write.write_text(updated(args.write.read_text()))


if __name__ == "__main__":
    main()
