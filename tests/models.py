"""The tiny models of the conformance kit, by the name under which the tests import them."""

from peft_ext.testing.models import (
    ARCHITECTURES,
    CLASSES,
    MLP,
    MORE_ARCHITECTURES,
    PLAIN,
    PLAIN_TARGETS,
    VOCABULARY,
    ConvNet,
    EmbeddingNet,
    inputs,
    logits,
    loss,
    randomize,
    tiny,
)


__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "MLP",
    "MORE_ARCHITECTURES",
    "PLAIN",
    "PLAIN_TARGETS",
    "VOCABULARY",
    "ConvNet",
    "EmbeddingNet",
    "inputs",
    "logits",
    "loss",
    "randomize",
    "tiny",
]
