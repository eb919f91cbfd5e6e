"""Tiny randomly initialised stand-ins for the models on the Hub that PEFT's tests load, in the layout of the Hub's cache.

Every repository keeps its name, so that `from_pretrained("peft-internal-testing/...")` finds it without a network, and
`config._name_or_path` is the name that the tests compare with the model card.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel


VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN = 1024, 32, 2, 4, 37  # small, and not square
STD = 0.1  # larger than the usual 0.02: an adapter must have a visible effect on a tiny model
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"  # which `test_config.py` loads at a revision
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 128,
    "initializer_range": STD,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    **BERT,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "initializer_range": STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DEBERTA: dict[str, Any] = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "ffn_dim": 4,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 128,
    "init_std": STD,
    "dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 128,
    "init_std": STD,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
RESNET: dict[str, Any] = {
    "embedding_size": 10,
    "hidden_sizes": [10, 20, 30, 40],
    "depths": [1, 1, 2, 1],
    "num_labels": 3,
    "problem_type": "multi_label_classification",
}


def _recipes() -> dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Model class and config, by the name of the repository."""
    opt, gpt2, gptj = tf.OPTConfig(**OPT), tf.GPT2Config(**GPT), tf.GPTJConfig(**GPT, rotary_dim=4)
    llama = tf.LlamaConfig(**{**LLAMA, "num_key_value_heads": HEADS})
    bert, roberta = tf.BertConfig(**BERT), tf.RobertaConfig(**{**BERT, "pad_token_id": 1})
    gemma3 = tf.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=64)
    peft, hf, trl = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
    return {
        peft + "tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, opt),
        peft + "tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, gpt2),
        hf + "tiny-random-gpt2": (tf.GPT2LMHeadModel, gpt2),
        peft + "tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, gptj),
        trl + "tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, llama),
        hf + "tiny-random-MistralForCausalLM": (tf.MistralForCausalLM, tf.MistralConfig(**LLAMA)),
        peft + "tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**LLAMA)),
        hf + "tiny-random-Gemma3ForCausalLM": (tf.Gemma3ForCausalLM, gemma3),
        peft + "tiny-random-T5ForConditionalGeneration-calibrated": (
            tf.T5ForConditionalGeneration,
            tf.T5Config(**T5),
        ),
        peft + "tiny-random-BartForConditionalGeneration": (tf.BartForConditionalGeneration, tf.BartConfig(**BART)),
        peft + "tiny-random-BertModel": (tf.BertModel, bert),
        peft + "tiny-random-RobertaModel": (tf.RobertaModel, roberta),
        peft + "tiny-random-DebertaModel": (tf.DebertaModel, tf.DebertaConfig(**DEBERTA)),
        peft + "tiny-random-DebertaV2Model": (tf.DebertaV2Model, tf.DebertaV2Config(**DEBERTA)),
        peft + "tiny-random-BertForSequenceClassification": (tf.BertForSequenceClassification, bert),
        peft + "tiny-random-RobertaForSequenceClassification": (tf.RobertaForSequenceClassification, roberta),
        trl + "tiny-LlamaForSequenceClassification-3.2": (tf.LlamaForSequenceClassification, llama),
        peft + "tiny-random-ResNetForImageClassification": (
            tf.ResNetForImageClassification,
            tf.ResNetConfig(**RESNET),
        ),
    }


def _tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token for each printable character."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + [chr(code) for code in range(32, 127)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pad, bos, eos, unknown = SPECIAL_TOKENS
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=100,
    )


def _snapshot(cache: Path, repository: str, *refs: str) -> Path:
    """The folder of the one snapshot of a repository, to which `refs` point."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(repository.encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def build(cache: Path) -> None:
    """Writes the models that `cache` does not have yet."""
    for repository, (model_class, config) in _recipes().items():
        snapshot = _snapshot(cache, repository, "main")
        if (snapshot / "config.json").exists():
            continue
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # fresh biases and norms are constant
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.eval().save_pretrained(snapshot)
        if model_class is not tf.ResNetForImageClassification:
            _tokenizer().save_pretrained(snapshot)
    snapshot = _snapshot(cache, ADAPTER, "main", "test")
    snapshot.mkdir(parents=True, exist_ok=True)
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "peft-internal-testing/tiny-random-OPTForCausalLM",
        "inference_mode": True,
    }
    (snapshot / "adapter_config.json").write_text(json.dumps(adapter))
