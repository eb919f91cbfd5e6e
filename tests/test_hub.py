"""Pushing to and loading from the Hub over HTTP: the real client against the server in `hub_server.py`.

`huggingface_hub` reads HF_ENDPOINT once, when it is imported, and keeps it in several places. So what a user would run
(the functions below, down to the fixtures) runs in a second process that was started with HF_ENDPOINT set.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub_server import HubServer, only_local
from huggingface_hub import EvalResult, HfApi, ModelCard
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft_ext import SSFConfig, cards
from peft_ext.cards import CardInfo, push_card


BASE, LLAMA = "alice/tiny-bert", "alice/tiny-llama"
INPUT = [[5, 7, 3, 2]]
INFO = CardInfo(
    license="apache-2.0",
    datasets=["alice/digits"],
    training={"learning rate": 0.01, "epochs": 3},
    results=[
        EvalResult(
            task_type="text-classification",
            dataset_type="alice/digits",
            dataset_name="Digits",
            metric_type="accuracy",
            metric_value=0.75,
        )
    ],
    comparison=[{"Method": "LoRA", "Accuracy": 0.74}, {"Method": "SSF", "Accuracy": 0.75}],
)

Logits = list[list[float]]
Client = Callable[..., Any]


# what runs in the client process


def push_base() -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    BertForSequenceClassification(config).push_to_hub(BASE)
    llama = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(llama).push_to_hub(LLAMA)


def new_adapter(seed: int) -> PeftModel:
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=3)
    set_seed(seed)
    return get_peft_model(base, SSFConfig(task_type="SEQ_CLS"))


def logits_of(model: torch.nn.Module) -> Logits:
    with torch.no_grad():
        return model.eval()(torch.tensor(INPUT)).logits.tolist()


def push(repo_id: str, seed: int = 0, **kwargs: Any) -> Logits:
    model = new_adapter(seed)
    model.push_to_hub(repo_id, **kwargs)
    return logits_of(model)


def load(repo_id: str, **kwargs: Any) -> Logits:
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=3)
    return logits_of(PeftModel.from_pretrained(base, repo_id, **kwargs))


def error_of(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The chain of exceptions as text: the Hub's own ones do not survive pickling."""
    try:
        function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        chain, cause = [], error
        while cause is not None:
            chain.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        return "\n".join(chain)
    return ""


def api(method: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(HfApi(), method)(*args, **kwargs)


def push_card_with_a_commit_in_between(repo_id: str) -> None:
    update = cards.update_card

    def update_late(*args: Any) -> ModelCard:
        HfApi().upload_file(path_or_fileobj=b"---\n{}\n---\nmine", path_in_repo="README.md", repo_id=repo_id)
        return update(*args)

    cards.update_card = update_late
    try:
        push_card(repo_id)
    finally:
        cards.update_card = update


def run_code(code: str) -> Logits:
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    return logits_of(names["model"])


def train(folder: str, repo_id: str) -> Logits:
    data = [{"input_ids": torch.tensor(INPUT[0]), "labels": torch.tensor(i % 3)} for i in range(4)]
    args = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, hub_model_id=repo_id
    )
    trainer = Trainer(new_adapter(0), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset="Digits", dataset_tags="alice/digits", tasks="text-classification")
    return logits_of(trainer.model)


def train_with_trl(folder: str, repo_id: str) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(("<pad>", "</s>", "?", "a", "b"))}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="?")
    args = SFTConfig(
        folder, max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        hub_model_id=repo_id,
    )  # fmt: skip
    data = Dataset.from_dict({"text": ["a b", "b a"]})
    trainer = SFTTrainer(
        LLAMA, args=args, train_dataset=data, processing_class=tokenizer, peft_config=SSFConfig(task_type="CAUSAL_LM")
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="alice/letters")


# fixtures


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Runs a function of this module in the client process, which has alice's token."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_TOKEN": "hf_alice",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=only_local)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool.submit(push_base).result()  # the process starts here, and keeps this environment
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


# tests


def test_client_reaches_this_machine_only(client: Client) -> None:
    for host in ("192.0.2.1", "huggingface.co"):
        assert "AssertionError" in client(error_of, socket.create_connection, (host, 443), 1)


def test_pushed_adapter_loads_with_the_same_logits(hub: HubServer, client: Client) -> None:
    pushed = client(push, "alice/first")
    files = hub.repos["alice/first"].find("main").files
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < set(files)
    assert files["adapter_model.safetensors"].lfs
    assert client(load, "alice/first") == pushed


def test_revisions(hub: HubServer, client: Client) -> None:
    repo = "alice/revisions"
    old = client(push, repo, seed=1)
    sha = hub.repos[repo].branches["main"]
    client(api, "create_tag", repo, tag="v1")
    new = client(push, repo, seed=2)
    on_branch = client(push, repo, seed=3, revision="dev")
    assert len({str(logits) for logits in (old, new, on_branch)}) == 3

    assert client(load, repo, revision=sha) == old
    assert client(load, repo, revision="v1") == old
    assert client(load, repo) == new
    assert client(load, repo, revision="dev") == on_branch
    assert "RevisionNotFoundError" in client(error_of, load, repo, revision="v2")


def test_private_repository(hub: HubServer, client: Client) -> None:
    repo = "alice/private"
    pushed = client(push, repo, private=True)
    assert hub.repos[repo].private
    # strangers first: the client answers from its cache once it has the files
    for token, expected in (
        (False, "RepositoryNotFoundError: 401"),
        ("hf_bob", "RepositoryNotFoundError: 404"),
        ("hf_wrong", "Invalid credentials"),
    ):
        error = client(error_of, load, repo, token=token)
        assert expected in error, error
    assert client(load, repo) == pushed
    assert client(load, repo, token="hf_alice") == pushed
    assert "403" in client(error_of, push, "alice/first", token="hf_bob")


@pytest.mark.parametrize(("stage", "seed"), [("preupload", 10), ("lfs", 11), ("commit", 12)])
def test_failed_upload_changes_nothing_and_can_be_repeated(
    hub: HubServer, client: Client, stage: Any, seed: int
) -> None:
    repo = f"alice/fails-in-{stage}"
    old = client(push, repo, seed=1)
    before = hub.state(repo)
    hub.fail(stage)
    error = client(error_of, push, repo, seed=seed)
    hub.heal()
    assert "507" in error, error
    assert hub.state(repo) == before
    assert client(load, repo) == old

    new = client(push, repo, seed=seed)
    assert client(load, repo) == new != old
    assert len(hub.state(repo)["commits"]) == len(before["commits"]) + 1


def test_failed_first_push_leaves_an_empty_repository(hub: HubServer, client: Client) -> None:
    repo = "alice/new"
    hub.fail("commit", times=1)
    assert "507" in client(error_of, push, repo, seed=20)
    assert client(api, "list_repo_files", repo) == [".gitattributes"]
    assert "EntryNotFoundError" in client(error_of, load, repo)
    pushed = client(push, repo, seed=20)
    assert client(load, repo) == pushed


def test_short_outage_is_survived(hub: HubServer, client: Client) -> None:
    hub.fail("lfs", times=1, status=500)
    pushed = client(push, "alice/outage", seed=4)
    assert client(load, "alice/outage") == pushed


def test_deleted_repository_is_gone(hub: HubServer, client: Client) -> None:
    repo = "alice/deleted"
    client(push, repo)
    client(api, "create_branch", repo, branch="old")
    assert [commit.title for commit in client(api, "list_repo_commits", repo)] == ["Upload model", "initial commit"]
    assert {branch.name for branch in client(api, "list_repo_refs", repo).branches} == {"main", "old"}
    client(api, "delete_branch", repo, branch="old")
    assert "RevisionNotFoundError" in client(error_of, load, repo, revision="old")
    client(api, "delete_repo", repo)
    assert "RepositoryNotFoundError: 404" in client(error_of, load, repo)


def first_code_block(card: str) -> str:
    return re.search(r"```\w*\n(.*?)```", card, re.DOTALL)[1]


def test_card_on_the_hub(hub: HubServer, client: Client) -> None:
    repo = "alice/card"
    client(push, repo, tags=["mine"])
    hub.requests.clear()
    client(push_card, repo, INFO)
    assert ("POST", "/api/validate-yaml") in hub.requests
    text = hub.read(repo, "README.md").decode()
    data = ModelCard(text).data
    assert (data.base_model, data["base_model_relation"], data.library_name) == (BASE, "adapter", "peft")
    assert data.pipeline_tag == "text-classification"
    assert set(data.tags) >= {"mine", "ssf", "peft-ext"}
    assert data.eval_results[0].metric_value == 0.75

    code = first_code_block(text)
    assert code.startswith("import peft_ext")
    unmerged = client(load, repo)
    assert client(run_code, code.replace("model = model.merge_and_unload()", "")) == unmerged
    torch.testing.assert_close(torch.tensor(client(run_code, code)), torch.tensor(unmerged), rtol=0, atol=1e-5)

    client(push, repo, seed=5)  # a later push keeps the card that is on the Hub
    assert hub.read(repo, "README.md").decode() == text
    client(push_card, repo, INFO)
    assert hub.read(repo, "README.md").decode() == text


def test_card_on_a_branch(hub: HubServer, client: Client) -> None:
    client(push, "alice/branched", revision="dev")
    client(push_card, "alice/branched", revision="dev")
    assert b"import peft_ext" in hub.read("alice/branched", "README.md", "dev")
    assert "README.md" not in hub.repos["alice/branched"].find("main").files


def test_card_edited_in_between_is_not_lost(hub: HubServer, client: Client) -> None:
    client(push, "alice/edited")
    assert "412" in client(error_of, push_card_with_a_commit_in_between, "alice/edited")
    assert hub.read("alice/edited", "README.md").endswith(b"mine")


def check_merged(theirs: ModelCard, ours: ModelCard) -> None:
    """Every line, key and list item of the other library is still there."""
    assert first_code_block(ours.text).startswith("import peft_ext")
    lines = ours.text.splitlines()
    for line in theirs.text.splitlines():
        assert line in lines, line
    data = ours.data.to_dict()
    assert (data.pop("library_name"), data["base_model_relation"]) == ("peft", "adapter")
    for key, value in theirs.data.to_dict().items():
        if isinstance(value, list) and key != "model-index":
            assert set(value) <= set(data[key]), key
        elif key == "datasets":
            assert value in data[key]
        elif key not in ("library_name", "model-index", "model_name"):
            assert data[key] == value, key
    results = {(result.dataset_type, result.metric_type) for result in ours.data.eval_results}
    old = {(result.dataset_type, result.metric_type) for result in theirs.data.eval_results or []}
    assert results == old | {("alice/digits", "accuracy")}


def test_trainer_push_is_merged(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = "alice/trained"
    trained = client(train, str(tmp_path), repo)
    assert client(load, repo) == trained
    theirs = ModelCard(hub.read(repo, "README.md").decode())
    client(push_card, repo, INFO)
    text = hub.read(repo, "README.md").decode()
    check_merged(theirs, ModelCard(text))
    assert "This model is a fine-tuned version of" in text
    assert "learning_rate: 5e-05" in text  # the Trainer's
    assert "| learning rate | 0.01 |" in text


def test_trl_push_is_merged(hub: HubServer, client: Client, tmp_path: Path) -> None:
    repo = "alice/trl"
    client(train_with_trl, str(tmp_path), repo)
    theirs = ModelCard(hub.read(repo, "README.md").decode())
    assert theirs.data.library_name == "transformers"
    client(push_card, repo, INFO)
    ours = ModelCard(hub.read(repo, "README.md").decode())
    check_merged(theirs, ours)
    assert {"trl", "sft", "generated_from_trainer"} <= set(ours.data.tags)
    assert ours.data.pipeline_tag == "text-generation"
    assert "Cite TRL as" in ours.text
    unmerged = first_code_block(ours.text).replace("model = model.merge_and_unload()", "")
    assert len(client(run_code, unmerged)[0]) == len(INPUT[0])
