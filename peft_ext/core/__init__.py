"""What a method is made of. The public interface for authors of methods, and the one package that knows PEFT's insides.

A method is a config (`ExtConfig`), a layer (`ExtLayer`) with trainable leaves (`AdapterVector`, `ExactLeaf`), a model
(`ExtModel`) and a description (`About`); `register_method` makes it known to PEFT.
"""

from .about import About
from .advice import warn_of_experts
from .config import ExtConfig
from .layer import ExtLayer
from .leaves import HALF, AdapterVector, ExactLeaf
from .mixed import PeftMixedModel
from .model import ExtModel, tuner_of
from .modes import without_adapters
from .registry import Method, about_of, is_registered, method_of, methods, register_method
from .schedule import StepListener, exempt_from_weight_decay, listen_to_steps
from .targets import (
    backbone_linears,
    backbone_modules,
    count_parameters,
    is_admitted,
    layer_and_type,
    linear_features,
    linear_out_features,
    matched_targets,
    unadapted_modules,
)


__all__ = [
    "HALF",
    "About",
    "AdapterVector",
    "ExactLeaf",
    "ExtConfig",
    "ExtLayer",
    "ExtModel",
    "Method",
    "PeftMixedModel",
    "StepListener",
    "about_of",
    "backbone_linears",
    "backbone_modules",
    "count_parameters",
    "exempt_from_weight_decay",
    "is_admitted",
    "is_registered",
    "layer_and_type",
    "linear_features",
    "linear_out_features",
    "listen_to_steps",
    "matched_targets",
    "method_of",
    "methods",
    "register_method",
    "tuner_of",
    "unadapted_modules",
    "warn_of_experts",
    "without_adapters",
]
