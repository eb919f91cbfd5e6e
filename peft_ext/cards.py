"""Model cards: what an adapter is, how to load it, how it was trained, how it compares, whom to cite.

PEFT, transformers' `Trainer`, TRL and the user write into the same README.md. So nothing here replaces a card: the two
sections of this package stand between HTML comments, by which a later call finds them, and everything else is left as
it is, except for the empty parts of the template that nobody has filled in. `Trainer`, TRL and `push_to_hub` do write
the card anew, so `update_card` or `push_card` comes after them.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .core import ADAPTER_CONFIG, ADAPTER_WEIGHTS, About, Method, after_saving, method_of, methods


CARD = "README.md"
PYPI = "https://pypi.org/project"


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
PIPELINE_TAGS = {  # by the end of the class name; a sequence-to-sequence class does not tell what its task is
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}


@dataclass(frozen=True)
class CardInfo:
    """What the saved files do not tell. Every field may be left out.

    Args:
        repo_id: Where the adapter is, or will be, on the Hub; stands in the code that loads it.
        title: Heading of a card that has none yet.
        base_model: Hub id of the base model, where the adapter names a local directory.
        base_class: transformers class that loads the base model, where `task_type` does not lead to the right one.
        task: Pipeline tag, for example `"image-classification"`.
        license: Licence id of the Hub, for example `"apache-2.0"`.
        datasets: Hub ids of the training data.
        training: Hyper-parameters and data, one table row each.
        results: Evaluation results; they go to the card's `model-index` as well.
        comparison: Table rows, one a method (the base model, LoRA, ...); the keys are the columns.
        sizes: Table rows of what a cut has brought, as `peft_ext.export.card_rows` makes them; what was cut is added to
            them when a pruned model is saved.
        limits: What the adapter is not good for; one line each.
        trainable_parameters: `model.get_nb_trainable_parameters()[0]`; by default the parameters in the file.
        relation: `"adapter"`, or what a merged model is to its base.
        method: `peft_type` of a merged model, which has no adapter config to tell.
    """

    repo_id: str | None = None
    title: str | None = None
    base_model: str | None = None
    base_class: str | None = None
    task: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    training: Mapping[str, Any] | None = None
    results: Sequence[EvalResult] = ()
    comparison: Sequence[Mapping[str, Any]] = ()
    sizes: Sequence[Mapping[str, Any]] = ()
    limits: Sequence[str] = ()
    trainable_parameters: int | None = None
    relation: Literal["adapter", "finetune", "quantized"] = "adapter"
    method: str | None = None


def model_card(directory: str | os.PathLike[str], info: CardInfo | None = None) -> ModelCard:
    """A new card for the adapter (or merged model) saved in `directory`; nothing is written."""
    return _fill(ModelCard("---\n{}\n---\n"), _Saved(Path(directory)), info or CardInfo())


def update_card(directory: str | os.PathLike[str], info: CardInfo | None = None) -> ModelCard:
    """Writes the card in `directory`: into the README.md that is there, or into a new one.

    Of an existing card, keys and prose are kept, lists are united, results are replaced only by a newer value of the
    same metric, and the sections of an earlier call are replaced.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        card = model_card(directory, info)
    else:
        card = _fill(_load(path), _Saved(path.parent), info or CardInfo())
    _save(card, path)
    return card


def _load(path: Path) -> ModelCard:
    """The card with plain line feeds, whatever ends the lines of the file."""
    return ModelCard(path.read_text(encoding="utf-8-sig"))


def _save(card: ModelCard, path: Path) -> None:
    """Writes the card with the line ends of the file that is there."""
    has_crlf = path.is_file() and b"\r\n" in path.read_bytes()
    path.write_text(str(card), encoding="utf-8", newline="\r\n" if has_crlf else "\n")


def push_card(
    repo_id: str,
    info: CardInfo | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Update model card",
) -> str:
    """Like `update_card`, for an adapter on the Hub; returns the commit's URL.

    Call it after `model.push_to_hub` or `trainer.push_to_hub`, which push a card of their own over the one that was
    saved with the adapter. The card is validated first; if somebody commits in between, the push is refused.
    """
    api = HfApi(token=token)
    head = api.model_info(repo_id, revision=revision).sha
    with TemporaryDirectory() as folder:
        files = [CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "config.json"]
        api.snapshot_download(repo_id, revision=head, local_dir=folder, allow_patterns=files)
        card = update_card(folder, replace(info or CardInfo(), repo_id=repo_id))
    return card.push_to_hub(repo_id, token=token, revision=revision, parent_commit=head, commit_message=commit_message)


def add_usage(directory: str | os.PathLike[str]) -> None:
    """Puts the code that loads the adapter into the card that PEFT has just written beside it.

    Every config calls it when it is saved. It works offline, and leaves alone a README.md that is no adapter's card.
    """
    folder, subfolder = Path(directory), None
    path = folder / CARD
    if not path.is_file():  # PEFT saves an adapter that is not called "default" one level below its card
        if (folder.parent / ADAPTER_CONFIG).is_file():
            return  # that card describes the default adapter
        path, subfolder = folder.parent / CARD, folder.name
    try:
        if path.is_file() and "\nlibrary_name: peft" in path.read_text(encoding="utf-8"):
            saved = _Saved(folder, subfolder)
            if method_of(saved.config.get("peft_type", "")) is not None:
                _save(_fill(_load(path), saved, CardInfo(), usage_only=True), path)
    except (OSError, ValueError, YAMLError) as error:  # a damaged card is no reason to lose a trained adapter
        warnings.warn(f"The card {path} does not tell how to load the adapter: {error}", UserWarning, stacklevel=3)


class _Saved:
    """What the files in a directory tell about an adapter or a merged model."""

    def __init__(self, directory: Path, subfolder: str | None = None) -> None:
        self.directory, self.subfolder = directory, subfolder
        self.config = _read_json(directory / ADAPTER_CONFIG)
        self.shapes = _tensor_shapes(directory / ADAPTER_WEIGHTS)

    def method(self, info: CardInfo) -> Method:
        key = info.method or self.config.get("peft_type")
        if key is None:
            raise ValueError(
                f"There is no {ADAPTER_CONFIG} in {self.directory}. Save the adapter there first; for a merged model "
                'say what it is: CardInfo(method="SSF", relation="finetune", base_model="...").'
            )
        method = method_of(key)
        if method is None:
            raise ValueError(
                f"{key} is not a method of peft_ext or of a package for it; cards are for {', '.join(methods())}."
            )
        return method

    def base_class(self, info: CardInfo) -> str | None:
        """Name of the transformers class of the model, or `None` if it is of another library."""
        mapping = self.config.get("auto_mapping") or {}
        of_transformers = str(mapping.get("parent_library")).startswith("transformers.")
        if info.base_class or of_transformers or self.base_is_pruned:
            return info.base_class or mapping["base_model_class"]
        merged = _read_json(self.directory / "config.json").get("architectures") or [None]
        return AUTO_CLASSES.get(str(self.config.get("task_type")), merged[0])

    @property
    def base_is_pruned(self) -> bool:
        """Whether the adapter was trained on a model of `modeling_pruned.py`, ours or the copy beside its weights."""
        library = (self.config.get("auto_mapping") or {}).get("parent_library")
        return str(library).rpartition(".")[2] == "modeling_pruned"

    def load_options(self, base_class: str) -> str:
        """Keyword arguments without which the base model would not fit the adapter."""
        options = [f'revision="{self.config["revision"]}"'] if self.config.get("revision") else []
        heads = [s for name, s in self.shapes.items() if re.search(r"(classifier(\.out_proj)?|score)\.weight$", name)]
        if base_class.endswith("Classification") and heads and len(heads[-1]) == 2:
            options += [f"num_labels={heads[-1][0]}", "ignore_mismatched_sizes=True"]
        return "".join(f", {option}" for option in options)


def _fill(card: ModelCard, saved: _Saved, info: CardInfo, usage_only: bool = False) -> ModelCard:
    method = saved.method(info)
    about = method.about
    data: Any = card.data  # typed as the parent of ModelCardData
    known = re.search(r"<!-- peft_ext:usage repo=(\S*) base=(\S*) -->", card.text)  # by an earlier call
    known_repo, known_base = known.groups() if known else ("", "")
    # The Hub refuses a card whose base model is a local path, which is what PEFT writes for one.
    named = hub_ids(_as_list(data.base_model))
    configured = hub_ids([saved.config.get("base_model_name_or_path"), known_base])
    bases = [info.base_model] if info.base_model else named or configured[:1]
    info = replace(info, repo_id=info.repo_id or known_repo, base_model=bases[0] if bases else None)
    stand_in = f"{about.name} {'adapter' if info.relation == 'adapter' else 'model'}"
    title = info.title or (info.repo_id or stand_in).split("/")[-1]
    _fill_metadata(data, saved, info, about, title, bases)

    nameless = re.compile(rf"^# (Model Card for Model ID|{stand_in})$", re.MULTILINE)
    text = nameless.sub(lambda _: f"# {title}", _without_template(card.text), count=1)
    note = f" repo={info.repo_id or ''} base={info.base_model or ''}"
    text = _set_block(text, "usage", note, _usage(saved, info, method), title)
    if not usage_only:
        text = _set_block(text, "details", "", _details(saved, info, about), title)
    card.text = text.rstrip() + "\n"
    return card


def _fill_metadata(
    data: ModelCardData, saved: _Saved, info: CardInfo, about: About, title: str, bases: list[str]
) -> None:
    data.library_name = "peft" if info.relation == "adapter" else "transformers"
    data.base_model = bases[0] if len(bases) == 1 else bases or None
    data["base_model_relation"] = info.relation if bases else None
    prefix = "base_model:adapter:"  # PEFT writes this tag, too, with a local path
    kept = [tag for tag in data.tags or [] if not tag.startswith(prefix) or hub_ids([tag.removeprefix(prefix)])]
    data.tags = _union(kept, [about.name.lower().replace(" ", "-"), "peft-ext"])
    base_class = saved.base_class(info) or ""
    derived = next((tag for end, tag in PIPELINE_TAGS.items() if base_class.endswith(end)), None)
    data.pipeline_tag = info.task or data.pipeline_tag or derived
    data.license = info.license or data.license
    data.datasets = _union(_as_list(data.datasets), info.datasets) or None
    data.metrics = _union(_as_list(data.metrics), [result.metric_type for result in info.results]) or None
    if info.results:
        new = [replace(result, metric_value=_plain(result.metric_value)) for result in info.results]
        old = [r for r in data.eval_results or [] if not any(r.is_equal_except_value(n) for n in new)]
        data.eval_results, data.model_name = old + new, data.model_name or title


def _usage(saved: _Saved, info: CardInfo, method: Method) -> str:
    base, base_class = info.base_model, saved.base_class(info)
    about = method.about
    name = f"[{about.name}]({about.paper})" if about.paper else about.name
    lines = [f"{name} {about.idea}" if about.idea else f"The method is {name}."]
    if base:
        lines.append(f"The base model is [{base}](https://huggingface.co/{base}).")
    elif local := saved.config.get("base_model_name_or_path"):  # only its last part: the rest is about a machine
        lines.append(f"The base model, `{Path(local).name}`, was a local directory and is not on the Hub.")
    code = [f"from transformers import {base_class}"] if base_class else []
    if info.relation == "adapter":
        lines.append(_installation(method))
        first = (
            f"import {method.import_name}  # tells PEFT what {about.name} is; has to come before the adapter is loaded"
        )
        load = f"{base_class}.from_pretrained"
        if saved.base_is_pruned:
            code, load = ["import peft_ext"] if method.import_name != "peft_ext" else [], "peft_ext.load_pruned"
        code = [first, "from peft import PeftModel", *code, ""]
        options = saved.load_options(base_class or "")
        own = (saved.config.get("auto_mapping") or {}).get("base_model_class", "model")
        loaded = f'{load}("{base or "path/to/base"}"{options})'
        code.append(f"base = {loaded}" if base_class else f"base = ...  # the {own} that the adapter was trained on")
        subfolder = f', subfolder="{saved.subfolder}"' if saved.subfolder else ""
        code.append(f'model = PeftModel.from_pretrained(base, "{info.repo_id or "path/to/adapter"}"{subfolder})')
        if about.merges_with(saved.config):
            code.append("model = model.merge_and_unload()  # optional: folds the adapter into the base's weights")
    else:
        lines.append("The adapter is merged into the weights: the model is loaded like any other of its class.")
        where = info.repo_id or "path/to/model"
        merged = _read_json(saved.directory / "config.json")
        if "pruned" in merged:
            # those that also load models made for something else say the least about this one
            general = {"AutoModelForPreTraining", "AutoModelForMaskedLM"}
            auto = min(merged.get("auto_map") or ["AutoModel"], key=lambda name: name in general)
            lines[-1] = (
                "Its layers differ in size, so it comes with the code that builds them, `modeling_pruned.py`; or "
                "[peft-ext](https://pypi.org/project/peft-ext/) loads it without that."
            )
            code = [f"from transformers import {auto}", ""]
            code += [f'model = {auto}.from_pretrained("{where}", trust_remote_code=True)', "# or, the same:"]
            code += ["import peft_ext", f'model = peft_ext.load_pruned("{where}")']
        else:
            code += ["", f'model = {base_class or "AutoModel"}.from_pretrained("{where}")']
    return "\n".join([*lines, "", "```python", *code, "```"])


def _installation(method: Method) -> str:
    """Which package to install: ours, or the one that the method is from."""
    distribution = method.distribution
    if distribution is None:
        return f"The method is from the module `{method.package}`, which has to be imported and is in no package."
    ours = f"[peft-ext]({PYPI}/peft-ext/)"
    loaded_with = (
        ours if distribution == "peft-ext" else f"[{distribution}]({PYPI}/{distribution}/), which uses {ours}"
    )
    return f"It is loaded with {loaded_with}: `pip install {distribution}`."


def _details(saved: _Saved, info: CardInfo, about: About) -> str:
    parts = []
    if info.training:
        parts += ["## How it was trained", _table([{"Setting": k, "Value": v} for k, v in info.training.items()])]
    if info.sizes:
        parts += ["## What was cut", _table(info.sizes)]
    if saved.shapes:
        stored = sum(math.prod(shape) for shape in saved.shapes.values())
        count = f"{info.trainable_parameters:,} trainable" if info.trainable_parameters else f"{stored:,} stored"
        file_bytes = (saved.directory / ADAPTER_WEIGHTS).stat().st_size
        parts += ["## Size", f"{count} parameters; the adapter file has {file_bytes:,} bytes."]
    results = [
        {"Dataset": r.dataset_name, "Split": r.dataset_split or "", "Metric": r.metric_type, "Value": r.metric_value}
        for r in info.results
    ]
    if tables := [_table(rows) for rows in (results, info.comparison) if rows]:
        parts += ["## Results", *tables]
    if limits := [*info.limits, *(about.limits if info.relation == "adapter" else ())]:
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in limits)]
    citation = ["## Citation", f"```bibtex\n{about.bibtex}\n```"] if about.bibtex else []
    return "\n\n".join([*parts, *citation])


def _set_block(text: str, name: str, note: str, body: str, title: str) -> str:
    """Replaces the block `name`, or puts it where it belongs: the usage below the title, the details at the end."""
    block = f"<!-- peft_ext:{name}{note} -->\n{body}\n<!-- /peft_ext:{name} -->"
    old = re.compile(rf"<!-- peft_ext:{name}\b[^>]*-->.*?<!-- /peft_ext:{name} -->", re.DOTALL)
    if old.search(text):
        return old.sub(lambda _: block, text, count=1)
    if name == "usage":
        heading = re.search(r"^# .*$", text, re.MULTILINE)
        if heading is None or "```" in text[: heading.start()]:  # in a code block it would be a comment
            return f"\n# {title}\n\n{block}\n\n{text.strip()}"
        cut = heading.end()
    else:
        usage = text.find("<!-- /peft_ext:usage -->") + len("<!-- /peft_ext:usage -->")
        only_versions = text[usage:].strip().startswith("### Framework versions")
        cut = usage if only_versions else len(text)
    return f"{text[:cut].rstrip()}\n\n{block}\n\n{text[cut:].strip()}"


@cache
def _template_lines() -> frozenset[str]:
    """The lines of the card that PEFT and transformers start from, as they are when nothing is filled in."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    cards = (ModelCard.from_template(ModelCardData(), model_description=text) for text in ("", description))
    return frozenset(line.strip() for card in cards for line in card.text.splitlines())


def _without_template(text: str) -> str:
    """Drops the sections that nobody filled in from a card that still has the template's title."""
    title = "# Model Card for Model ID"
    if title not in text.splitlines():
        return text
    text = text.replace("<!-- Provide a quick summary of what the model is/does. -->\n", "", 1)
    sections = re.split(r"^(?=#{1,6} )", text, flags=re.MULTILINE)
    is_empty = [all(line.strip() in _template_lines() for line in section.splitlines()) for section in sections]
    kept = [s for s, empty in zip(sections, is_empty, strict=True) if not empty or s.startswith(title)]
    return re.sub(r"\n{3,}", "\n\n", "".join(kept))


def hub_ids(names: Iterable[Any]) -> list[str]:
    """Those of `names` that can be ids of models on the Hub, and are no directories here."""
    ids = []
    for name in names:
        with suppress(HFValidationError):
            validate_repo_id(name)
            if name and not os.path.exists(name):
                ids.append(name)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the parameters in a safetensors file, from its header alone; indices and masks are none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:  # not a safetensors file, for example a git LFS pointer
            return {}
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: tensor["shape"] for name, tensor in header.items() if tensor["dtype"].startswith(("F", "BF"))}


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = _union([], [key for row in rows for key in row])
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    value = _plain(value)
    return (f"{value:.5g}" if isinstance(value, float) else str(value)).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as a Python number, which YAML can write."""
    return value.item() if hasattr(value, "item") else value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _union(old: Sequence[str], new: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))


after_saving(add_usage)
