"""Compares VQT with probes and adapters on a frozen vision transformer, and puts it on top of trained adapters.

- linear probe: a linear head on the class token;
- Head2Toe-style: the tokens of every layer, averaged into as many groups as VQT has queries, under a head of the very
  same size (after Evci et al. 2022; without its feature selection);
- LoRA and SSF, with a linear head on the class token;
- VQT, trained on a frozen pass that is run once and kept on disk;
- VQT on top of the LoRA and SSF adapters trained before, which are frozen by then.

Learning rates are chosen on a fifth of the training images, then all of these are trained on. Without arguments it
needs no network: it takes the small ViT and the image sets of ../shared/data if they are there, else a tiny ViT that is
trained on scikit-learn's digits 0 to 4 and adapted to 5 to 9.

    python examples/vqt_image_classification.py
    python examples/vqt_image_classification.py --model digits  # wherever it is
    python examples/vqt_image_classification.py --model dinov2-small --pixels 98 --sets clothing10 signdigits \
        --methods probe head2toe vqt --queries 1
    python examples/vqt_image_classification.py --model google/vit-base-patch16-224-in21k \
        --train-file train.parquet --test-file test.parquet
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from cards import card_info, method_rows, rivals_above, write_card
from common import image_size, resolve_model
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from runs import Run as CardRun
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from peft_ext import FrozenPassCache, PeftMixedModel, SSFConfig, VQTConfig
from peft_ext.plots import plot
from peft_ext.tuners.vqt import layer_shares


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = {
    "signdigits": ("signdigits_train1000", "signdigits_test"),
    "mnist": ("mnist_train1000", "mnist_test2000"),
    "cifar10": ("cifar10_train1000", "cifar10_test2000"),
    "clothing10": ("clothing10_train", "clothing10_test"),
}
GRID = {
    "linear probe": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "Head2Toe-style": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "LoRA": (5e-3,),
    "SSF": (1e-2,),
}
VQT_GRID = ((3e-3, 0.1), (1e-2, 0.1), (3e-2, 0.1), (1e-1, 0.3))  # learning rate and dropout
METHODS = ["probe", "head2toe", "vqt", "LoRA", "SSF", "on-top"]


@dataclass
class Data:
    """Pixel values `(N, 3, H, W)` and labels `(N,)`."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: torch.Tensor | slice) -> Data:
        return Data(self.pixels[rows], self.labels[rows])


@dataclass
class Run:
    """One training and its test accuracy."""

    data: str
    method: str
    seed: int
    learning_rate: float
    accuracy: float
    seconds: float
    trainable: int
    head: int


def read(name: str, processor: Any, limit: int | None, pixels: int | None) -> Data:
    rows = load_dataset("parquet", data_files=name, split="train").shuffle(seed=0)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    images = [image.convert("RGB") for image in rows["image"]]
    sizes = image_size(processor, pixels)
    return Data(processor(images, return_tensors="pt", **sizes)["pixel_values"], torch.tensor(rows["label"]))


def batches(data: Data, size: int, generator: torch.Generator | None = None) -> Any:
    order = torch.arange(len(data)) if generator is None else torch.randperm(len(data), generator=generator)
    for rows in order.split(size):
        yield {"pixel_values": data.pixels[rows], "labels": data.labels[rows]}


def fit(model: nn.Module, data: Data, learning_rate: float, epochs: int, seed: int, size: int = 64) -> None:
    """AdamW and a cosine schedule, as one writes it for any classifier; the loss is the model's own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    steps = epochs * -(-len(data) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in batches(data, size, generator):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    correct = [
        (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum().item()
        for batch in batches(data, 128)
    ]
    return sum(correct) / len(data)


# Probes on features of the frozen model


class Probe(nn.Module):
    """A linear head on given features, called like a model."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(features, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.classifier(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def features(model: Any, data: Data, groups: int | None) -> Data:
    """The class token; with `groups`, also the tokens of every layer in so many means, each layer of unit length."""
    found = []
    for batch in batches(data, 128):
        output = model.base_model(pixel_values=batch["pixel_values"], output_hidden_states=True)
        token = output.last_hidden_state[:, 0]
        if groups is None:
            found.append(token)
            continue
        layers = [F.adaptive_avg_pool1d(h.transpose(1, 2), groups).flatten(1) for h in output.hidden_states[1:]]
        found.append(torch.cat([F.normalize(part, dim=-1) for part in (token, *layers)], 1))
    return Data(torch.cat(found), data.labels)


# One comparison


class Comparison:
    """All methods on one data set."""

    def __init__(self, name: str, base: Callable[[], Any], train: Data, test: Data, args: argparse.Namespace) -> None:
        self.name, self.base, self.train, self.test, self.args = name, base, train, test, args
        fifth = len(train) // 5
        self.validation, self.rest = train.part(slice(0, fifth)), train.part(slice(fifth, None))
        self.classes = int(train.labels.max()) + 1
        self.runs: list[Run] = []
        self.shares: dict[str, dict[str, float]] = {}
        self.chosen = VQT_GRID[0]
        self.scratch = Path(tempfile.mkdtemp(prefix="vqt-"))

    def probe(self, method: str, groups: int | None) -> None:
        model = self.base().requires_grad_(False).eval()
        train, test = features(model, self.train, groups), features(model, self.test, groups)
        fifth = len(self.validation)
        validation, rest = train.part(slice(0, fifth)), train.part(slice(fifth, None))

        def trained(data: Data, rate: float, seed: int) -> Probe:
            set_seed(seed)
            head = Probe(data.pixels.shape[1], self.classes)
            fit(head, data, rate, self.args.epochs, seed)
            return head

        grid = GRID[method.split(",")[0]]
        rate = max(grid, key=lambda rate: accuracy(trained(rest, rate, 0), validation))
        for seed in range(self.args.seeds):
            start = time.perf_counter()
            head = trained(train, rate, seed)
            self.note(method, seed, rate, accuracy(head, test), time.perf_counter() - start, head)

    def adapter(self, method: str) -> None:
        def trained(data: Data, rate: float, seed: int) -> Any:
            set_seed(seed)
            if method == "SSF":
                config: Any = SSFConfig(modules_to_save=["classifier"])
            else:
                config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
            model = get_peft_model(self.base(), config)
            fit(model, data, rate, self.args.adapter_epochs, seed, size=32)
            return model

        rate = self.choose(GRID[method], trained)
        for seed in range(self.args.seeds):
            start = time.perf_counter()
            model = trained(self.train, rate, seed)
            self.note(method, seed, rate, accuracy(model, self.test), time.perf_counter() - start, model)
            model.save_pretrained(self.scratch / f"{method}-{seed}")

    def vqt(self, queries: int, below: str | None = None) -> Any:
        """VQT on the base model, or on top of a trained adapter; the backbone runs once per sample."""
        method = f"VQT, {queries} queries" if queries > 1 else "VQT, 1 query"
        method += "" if below is None else f", on {below}"

        def fresh(seed: int, dropout: float) -> Any:
            set_seed(seed)
            config = VQTConfig(num_queries=queries, dropout=dropout)
            if below is None:
                return get_peft_model(self.base(), config)
            saved = self.scratch / f"{below}-{seed}"
            model = PeftMixedModel.from_pretrained(self.base(), saved, adapter_name="below")
            model.add_adapter("vqt", config)
            model.set_adapter(["below", "vqt"])
            model.set_requires_grad("below", False)
            return model

        def trained(data: Data, setting: tuple[float, float], seed: int) -> Any:
            rate, dropout = setting
            model = fresh(seed, dropout)
            where = self.scratch / f"cache-{below}-{seed if below else 0}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                written = (where / "frozen_pass.json").exists()
                cache = (
                    FrozenPassCache(where)
                    if written
                    else FrozenPassCache.write(model, batches(self.train, 64), where, num_samples=len(self.train))
                )
            with cache.use(model):
                fit(model, data, rate, self.args.epochs, seed)
            return model

        if below is None:
            self.chosen = self.choose(VQT_GRID, trained)
        # an adapter below has seen the validation images, so on top of it they cannot choose another setting
        for seed in range(self.args.seeds):
            start = time.perf_counter()
            model = trained(self.train, self.chosen, seed)
            self.note(method, seed, self.chosen[0], accuracy(model, self.test), time.perf_counter() - start, model)
        self.shares[method] = layer_shares(model)
        return model

    def choose(self, settings: tuple[Any, ...], trained: Callable[[Data, Any, int], nn.Module]) -> Any:
        """The setting (learning rate, ...) that is best on the validation images."""
        if len(settings) == 1:
            return settings[0]
        return max(settings, key=lambda setting: accuracy(trained(self.rest, setting, 0), self.validation))

    def note(self, method: str, seed: int, rate: float, score: float, seconds: float, model: nn.Module) -> None:
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        head = sum(size for name, size in sizes.items() if "classifier" in name or "vqt_head" in name)
        run = Run(self.name, method, seed, rate, score, round(seconds, 2), sum(sizes.values()), head)
        self.runs.append(run)
        print(f"{self.name:12} {method:28} seed {seed}  lr {rate:<7g} {score:.4f}  {seconds:6.1f} s", flush=True)


def table(runs: list[Run]) -> str:
    names = list(dict.fromkeys(run.data for run in runs))
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method in dict.fromkeys(run.method for run in runs):
        cells = []
        for name in names:
            scores = [run.accuracy for run in runs if (run.data, run.method) == (name, method)]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.4f} ± {spread:.4f}" if scores else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="digits, dinov2-small, or an image classifier on the Hub or on disk")
    parser.add_argument("--pixels", type=int, help="side of the images; the model's own if left out")
    parser.add_argument("--train-file", help="parquet with columns image and label")
    parser.add_argument("--test-file")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="sets of ../shared/data")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="of the probes and VQT")
    parser.add_argument("--adapter-epochs", type=int, default=8)
    parser.add_argument("--max-train", type=int, default=1000)
    parser.add_argument("--max-test", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/vqt/results.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    if args.model != "digits" and (args.model or (SHARED / "models").is_dir()):
        base = resolve_model(args.model or str(SHARED / "models" / "vit-tiny-imagenet32"))
        files = {name: tuple(str(SHARED / "vision" / f"{file}.parquet") for file in SETS[name]) for name in args.sets}
        if args.train_file:
            files = {Path(args.train_file).stem: (args.train_file, args.test_file)}
    else:
        from image_classification import pretrained_on_digits

        base, files = pretrained_on_digits(), None
    args.model = args.model or (base if files else "digits")
    processor = AutoImageProcessor.from_pretrained(base, use_fast=False)
    runs: list[Run] = []
    shares: dict[str, Any] = {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, (train_file, test_file) in (files or {"digits 5-9": ("", "")}).items():
        if train_file:
            train = read(train_file, processor, args.max_train, args.pixels)
            test = read(test_file, processor, args.max_test, args.pixels)
        else:
            train, test = _digits(processor)
        classes = int(train.labels.max()) + 1

        def load(classes: int = classes) -> Any:
            return AutoModelForImageClassification.from_pretrained(
                base, num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
            )

        comparison = Comparison(name, load, train, test, args)
        adapters = [method for method in ("LoRA", "SSF") if method in args.methods]
        if "probe" in args.methods:
            comparison.probe("linear probe", None)
        if "head2toe" in args.methods:
            comparison.probe(f"Head2Toe-style, {args.queries} a layer", args.queries)
        if "vqt" in args.methods:
            model = comparison.vqt(args.queries)
            plot(model).savefig(args.output.with_name(f"layers-{name}.png"), dpi=120)
            figure = plot(model, pixel_values=test.pixels[:1])
            figure.savefig(args.output.with_name(f"attention-{name}.png"), dpi=120)
            adapter = args.output.with_name(f"adapter-{name}".replace(" ", "-"))
            model.save_pretrained(adapter)
            saved = comparison.runs[-1]
        for method in adapters:
            comparison.adapter(method)
            if "on-top" in args.methods:
                comparison.vqt(args.queries, below=method)
        if "vqt" in args.methods:
            cells = [
                CardRun(r.method, r.seed, r.learning_rate, r.accuracy, r.seconds, r.trainable - r.head, r.trainable)
                for r in comparison.runs
            ]
            info = card_info(
                args,
                {"train": train, "test": test},
                "image-classification",
                saved.accuracy,
                ["queries", "epochs", "adapter_epochs"],
                default_data=name if train_file else "digits",
                title=f"ViT on {name}, VQT",
                training=dict(zip(("learning rate", "dropout"), comparison.chosen, strict=True))
                | {"seed": saved.seed},
                comparison=method_rows(cells),
                trainable_parameters=saved.trainable,
                limits=[
                    *rivals_above(cells, saved.method),
                    "The learning rates of LoRA and SSF were not chosen here.",
                ],
            )
            write_card(adapter, args, info, runs=[asdict(run) for run in cells])
        runs += comparison.runs
        shares[name] = comparison.shares
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        result = {"settings": settings, "layer_shares": shares, "runs": [asdict(run) for run in runs]}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(runs))


def _digits(processor: Any) -> tuple[Data, Data]:
    from image_classification import digits

    data = digits(range(5, 10), train=200, validation=0)
    parts = []
    for name in ("train", "test"):
        images = [image.convert("RGB") for image in data[name]["image"]]
        parts.append(Data(processor(images, return_tensors="pt")["pixel_values"], torch.tensor(data[name]["label"])))
    return parts[0], parts[1]


if __name__ == "__main__":
    main()
