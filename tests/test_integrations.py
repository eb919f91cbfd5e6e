"""The real trainers and runtimes: Trainer, SFTTrainer, accelerate, several processes, FSDP, quantised bases."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import inputs, logits, tiny
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import peft_ext
from peft_ext import MaskLoraConfig, SPTConfig, SSFConfig


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(34))]
CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **special)


def classification_data(rows: int = 24) -> Dataset:
    batch = inputs("bert", batch=rows)
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()})


def arguments(path: Path, **fields: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **fields})


def ssf_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "ssf_" in key}


def classifier() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny("bert"), SSFConfig(task_type="SEQ_CLS"))


def test_trainer_saves_resumes_and_keeps_the_best(tmp_path: Path) -> None:
    """A run that stops half way and resumes ends where the uninterrupted one does."""
    whole = classifier()
    options = {
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "lr_scheduler_type": "cosine",
    }
    trainer = Trainer(
        whole,
        arguments(tmp_path / "whole", load_best_model_at_end=True, weight_decay=0.1, **options),
        train_dataset=classification_data(),
        eval_dataset=classification_data(8),
    )
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert set(load_file(checkpoint / "adapter_model.safetensors"))
    resumed = classifier()
    second = Trainer(
        resumed,
        arguments(tmp_path / "half", weight_decay=0.1, **options),
        train_dataset=classification_data(),
        eval_dataset=classification_data(8),
    )
    second.train(resume_from_checkpoint=str(checkpoint))
    last = load_file(tmp_path / "whole" / "checkpoint-8" / "adapter_model.safetensors")
    again = load_file(tmp_path / "half" / "checkpoint-8" / "adapter_model.safetensors")
    assert last.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in last.items())
    loaded = PeftModel.from_pretrained(tiny("bert"), str(tmp_path / "whole" / "checkpoint-8"))
    assert ssf_state(loaded).keys() == ssf_state(whole).keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"max_grad_norm": 0.01},
    ],
    ids=lambda fields: next(iter(fields)) + str(next(iter(fields.values()))),
)
def test_trainer_options(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = classifier()
    before = ssf_state(model)
    Trainer(model, arguments(tmp_path, max_steps=3, **fields), train_dataset=classification_data()).train()
    after = ssf_state(model)
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    assert {key for key in after if "key.ssf_shift" not in key} <= set(moved)
    assert all(value.isfinite().all() for value in after.values())


def sft_trainer(path: Path, words: PreTrainedTokenizerFast | None = None, **fields: Any) -> SFTTrainer:
    """On a tiny Llama, or on `model=`; three steps."""
    messages = [
        [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2}"}]
        for i in range(16)
    ]
    return SFTTrainer(
        fields.pop("model", None) or tiny("llama"),
        SFTConfig(
            output_dir=str(path),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
            max_length=32,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=words or tokenizer(),
        **fields,
    )


def test_sft_trainer(tmp_path: Path) -> None:
    words = tokenizer()
    peft_config = SSFConfig(task_type="CAUSAL_LM", trainable_token_indices=[4, 5])
    trainer = sft_trainer(tmp_path, words, peft_config=peft_config)
    before = ssf_state(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[key], value) for key, value in ssf_state(trainer.model).items())
    trainer.save_model(str(tmp_path / "adapter"))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("trainable_tokens_delta" in key for key in stored) and any("ssf_scale" in key for key in stored)
    assert "import peft_ext" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, inputs("llama")), logits(trainer.model.eval(), inputs("llama")))


def test_a_config_calibrated_on_what_sft_trainer_sees(tmp_path: Path) -> None:
    """The way that is documented: one SFTTrainer without an adapter to look at, the config into a second."""
    model = tiny("llama")
    untouched = copy.deepcopy(model.state_dict())
    config = SPTConfig(budget=200, r=2, task_type="CAUSAL_LM")
    peft_ext.calibrate(model, config, trainer=sft_trainer(tmp_path, model=model), num_batches=2, progress=False)
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    trainer = sft_trainer(tmp_path, model=model, peft_config=config)
    assert trainer.model.get_nb_trainable_parameters()[0] == 200
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(before[key], p) for key, p in trainer.model.named_parameters() if key in before)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, inputs("llama")), logits(trainer.model.eval(), inputs("llama")))


def test_sft_trainer_prunes(tmp_path: Path) -> None:
    fields = {"num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 4}
    config = MaskLoraConfig(r=2, target_sparsity=0.3, task_type="CAUSAL_LM")
    callbacks = [peft_ext.MaskLoraCallback()]
    trainer = sft_trainer(tmp_path, model=tiny("llama", **fields), peft_config=config, callbacks=callbacks)
    trainer.train()
    assert config.total_steps is None  # the callback's number of steps ends with the training
    with pytest.raises(ValueError, match=r"TRL's SFTTrainer computes its loss itself"):
        sft_trainer(tmp_path, peft_config=replace(config, distillation=0.5)).train()
    expected = logits(trainer.model.eval(), inputs("llama"))
    pruned = peft_ext.prune_and_unload(trainer.model)
    torch.testing.assert_close(logits(pruned, inputs("llama")), expected, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in tiny("llama", **fields).parameters())


def test_trainable_tokens_beside_the_adapter() -> None:
    model = get_peft_model(tiny("llama"), SSFConfig(trainable_token_indices=[7])).train()
    model(**inputs("llama")).loss.backward()
    tokens = [p for key, p in model.named_parameters() if "trainable_tokens" in key and p.requires_grad]
    assert tokens and all(p.grad is not None for p in tokens)
    expected = logits(model.eval(), inputs("llama"))
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs("llama")), expected, atol=1e-5, rtol=1e-4)


def quantised_llama() -> nn.Module:
    """A tiny Llama whose decoder Linears are 4-bit, as `BitsAndBytesConfig(load_in_4bit=True)` leaves it."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama", hidden_size=64, intermediate_size=64, head_dim=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            linear.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name.rpartition(".")[2], linear.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def check_training_and_merging_in_4_bit(config: Any, prefix: str) -> None:
    """An adapter on a 4-bit base has gradients and an effect, and comes out of a merge again."""
    model, batch = get_peft_model(quantised_llama(), config), inputs("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if prefix in key:
                parameter.normal_(std=0.1)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval(), batch)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, batch), expected, atol=1e-2)
    model.merge_adapter()  # requantises to 4 bits
    assert (logits(model, batch) - expected).abs().max() < 0.5 * expected.abs().max()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=0.05, rtol=0.05)


@pytest.mark.capability("4-bit base", "ssf")
@pytest.mark.filterwarnings("ignore:.*ecompile.*", "ignore:.*quant_state.*")
def test_4bit_base() -> None:
    model = get_peft_model(quantised_llama(), SSFConfig(shift=False)).eval()
    batch = inputs("llama")
    expected = logits(model, batch)
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    packed = {
        key: value.clone() for key, value in model.state_dict().items() if key.endswith("q_proj.base_layer.weight")
    }
    model.merge_adapter()
    merged = logits(model, batch)
    assert not torch.equal(merged, expected)
    assert (merged - expected).abs().max() < 0.5 * expected.abs().max()  # merging requantises to 4 bits
    model.unmerge_adapter()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in packed.items())
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*quant_state.*")
def test_bf16_trainables_on_a_quantised_base_still_move() -> None:
    """TRL casts trainables to bfloat16 there: near one, bfloat16 has steps of 0.8 %, but the offset has finer ones."""
    model = get_peft_model(
        prepare_model_for_kbit_training(quantised_llama(), use_gradient_checkpointing=False),
        SSFConfig(init_weights="identity"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()(**inputs("llama")).loss.backward()
    optimizer.step()
    scales = [p for key, p in model.named_parameters() if "ssf_scale" in key]
    assert all((p.abs() > 5e-5).float().mean() > 0.9 for p in scales)


def run_processes(tmp_path: Path, script: str, processes: int = 2) -> list[dict[str, Any]]:
    """Runs `script` under torchrun on the CPU; it writes `result(...)` of each rank."""
    prelude = f"""
        import json, os, sys, warnings
        import torch
        import torch.distributed as dist
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(peft_ext.__file__).parents[1])!r}]
        import peft_ext
        from models import inputs, tiny
        from peft import get_peft_model
        torch.set_num_threads(1)
        def result(**values):
            path = os.path.join({str(tmp_path)!r}, f"rank{{os.environ['RANK']}}.json")
            json.dump(values, open(path, "w"))
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(prelude) + textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]


def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    ranks = run_processes(
        tmp_path,
        """
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = get_peft_model(tiny("bert"), peft_ext.SSFConfig(modules_to_save=["classifier"])).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        for step in range(3):
            loss = wrapped(**inputs("bert", seed=10 * step + accelerator.process_index)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        values = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "ssf_" in n])
        result(sum=values.double().sum().item(), norm=values.norm().item(), processes=accelerator.num_processes)
        """,
    )
    assert ranks[0] == ranks[1] and ranks[0]["processes"] == 2


def test_fsdp_shards_the_leaves(tmp_path: Path) -> None:
    """PEFT's policy wraps the leaves; the sharded step, decay exempted, equals the one of a single process."""
    ranks = run_processes(
        tmp_path,
        """
        import functools
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        dist.init_process_group("gloo")

        def step(model, parameters, weight_decay):
            optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=weight_decay)
            model(**inputs("llama")).loss.backward()
            optimizer.step()
            return model(**inputs("llama")).loss.item()

        def build():
            torch.manual_seed(0)
            return get_peft_model(tiny("llama"), peft_ext.SSFConfig()).train()

        def leaf(module):  # as peft.utils.other.fsdp_auto_wrap_policy
            has_weight = getattr(module, "weight", None) is not None and module.weight.requires_grad
            return not list(module.named_children()) and has_weight

        plain = build()
        expected = step(plain, [p for p in plain.parameters() if p.requires_grad], 0.0)
        policy = functools.partial(_or_policy, policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        ])
        sharded = FSDP(build(), auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu"))
        units = sum(isinstance(m, FSDP) for m in sharded.modules())
        result(expected=expected, got=step(sharded, sharded.parameters(), 5.0), units=units)
        dist.destroy_process_group()
        """,
    )
    for rank in ranks:
        assert rank["units"] > 20
        assert rank["got"] == pytest.approx(rank["expected"], abs=1e-5)


def test_moving_device_and_dtype() -> None:
    model = get_peft_model(tiny("vit"), SSFConfig()).eval()
    expected = logits(model, inputs("vit"))
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in inputs("vit").items()}
    torch.testing.assert_close(logits(model, batch).float(), expected, atol=1e-5, rtol=1e-4)
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())


def test_importing_registers_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error::UserWarning:peft_ext",
                "-c",
                "import peft_ext, peft; print(peft.PeftType.SSF)",
            ],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(peft_ext.__file__).parents[1],
        )
    assert "SSF" in done.stdout
