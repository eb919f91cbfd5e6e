"""Loading an adapter in one line. Importing this package is what makes PEFT know its methods."""

from __future__ import annotations

import os
from typing import Any

from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    TaskType,
)
from torch import nn


_AUTO_CLASSES: dict[str | None, Any] = {
    TaskType.CAUSAL_LM: AutoPeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoPeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoPeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoPeftModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoPeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: AutoPeftModelForFeatureExtraction,
    None: AutoPeftModel,
}


def load(adapter: str | os.PathLike[str], base_model: nn.Module | None = None, **kwargs: Any) -> PeftModel:
    """Loads an adapter of this package, or any PEFT adapter, from a directory or the Hub.

    `PeftModel.from_pretrained` does the same, but ends in `KeyError: 'SSF'` where `peft_ext` was not imported before.

    Args:
        adapter: Directory or Hub repository with the adapter.
        base_model: The model to put it on; if `None`, the one that the adapter names is loaded too.
        kwargs: Passed on to PEFT's `from_pretrained` (`revision`, `token`, `is_trainable`, ...) and, with the base
            model left out, to transformers' (`num_labels`, `dtype`, ...).
    """
    path = os.fspath(adapter)
    if base_model is not None:
        return PeftModel.from_pretrained(base_model, path, **kwargs)
    where = {key: kwargs[key] for key in ("revision", "token", "subfolder", "cache_dir") if key in kwargs}
    config = PeftConfig.from_pretrained(path, **where)
    return _AUTO_CLASSES[config.task_type].from_pretrained(path, **kwargs)
