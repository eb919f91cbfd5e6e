"""Fine-tuning methods that PEFT does not have, as a plug-in: `import peft_ext` registers them with PEFT."""

from .base import ExtConfig, PeftMixedModel
from .loading import load
from .register import register_method
from .tuners.sparse_ft import (
    SparseFTCallback,
    SparseFTConfig,
    SparseFTModel,
    graft,
    import_lt_sft,
    lt_sft,
    overlap,
)
from .tuners.ssf import SSFConfig, SSFModel
from .version import __version__


__all__ = [
    "ExtConfig",
    "PeftMixedModel",
    "SSFConfig",
    "SSFModel",
    "SparseFTCallback",
    "SparseFTConfig",
    "SparseFTModel",
    "__version__",
    "graft",
    "import_lt_sft",
    "load",
    "lt_sft",
    "overlap",
]

register_method("ssf", SSFConfig, SSFModel)
register_method("sparse_ft", SparseFTConfig, SparseFTModel)
