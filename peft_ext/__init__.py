"""Fine-tuning methods that PEFT does not have, as a plug-in: `import peft_ext` registers them with PEFT."""

from .base import ExtConfig, PeftMixedModel
from .loading import load
from .register import register_method
from .tuners.ssf import SSFConfig, SSFModel


__version__ = "0.1.0"
__all__ = ["ExtConfig", "PeftMixedModel", "SSFConfig", "SSFModel", "load"]

register_method("ssf", SSFConfig, SSFModel)
