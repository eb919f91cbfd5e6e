"""What a method is made of. The public interface for authors of methods, and the one package that knows PEFT's insides.

A method is a config (`ExtConfig`), a layer (`ExtLayer`) with trainable leaves (`AdapterVector`, `ExactLeaf`), a model
(`ExtModel`) and a description (`About`); `register_method` makes it known to PEFT.
"""

from .about import About, Writer
from .advice import all_linears, warn_of_experts
from .biases import bias_flags, set_bias_flags
from .calibration import CalibratedConfig
from .checks import require_model
from .chosen import ChosenChannels
from .config import ExtConfig, after_saving
from .dropout import Dropouts
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    STUMBLES,
    Adapter,
    BadInput,
    Column,
    Figures,
    Reading,
    Row,
    Site,
    is_trained,
    spread,
)
from .hooks import MethodHooks
from .layer import ExtLayer
from .leaves import HALF, AdapterVector, ExactLeaf, SharedLeaf, keeping_precision
from .listening import Listener, listener_between
from .lora import scale_at
from .mixed import PeftMixedModel
from .model import ExtModel, tuner_of
from .modes import (
    acting_adapters,
    adapted_in_groups,
    evaluating,
    is_hooked,
    needs_plain_operations,
    sorted_text,
    without_adapters,
)
from .names import group_key, layer_and_type
from .offloading import empty_like_of, onloaded
from .packages import load_plugins
from .pictures import Bars, Curve, Fillings, HeatMap, Image, Picture
from .quantised import QuantisedWeight, dequantised, in_order, is_quantised, weight_of
from .registry import Method, about_of, is_registered, method_of, methods, register_method
from .schedule import StepListener, exempt_from_weight_decay, listen_to_steps, owners_of, stop_listening
from .seeds import stable_generator
from .sharing import SharedLayer, SharingModel, StandIn
from .stored import layers_by_name
from .targets import (
    backbone_linears,
    backbone_modules,
    count_parameters,
    features_of,
    head_modules,
    is_admitted,
    is_named,
    linear_features,
    linear_out_features,
    matched_targets,
    unadapted_modules,
)
from .updates import LowRank, Overlap, Sparse, Support, Update, Vector, lora_scale, overlap_of
from .whole import carry_over


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "HALF",
    "STUMBLES",
    "About",
    "Adapter",
    "AdapterVector",
    "BadInput",
    "Bars",
    "CalibratedConfig",
    "ChosenChannels",
    "Column",
    "Curve",
    "Dropouts",
    "ExactLeaf",
    "ExtConfig",
    "ExtLayer",
    "ExtModel",
    "Figures",
    "Fillings",
    "HeatMap",
    "Image",
    "Listener",
    "LowRank",
    "Method",
    "MethodHooks",
    "Overlap",
    "PeftMixedModel",
    "Picture",
    "QuantisedWeight",
    "Reading",
    "Row",
    "SharedLayer",
    "SharedLeaf",
    "SharingModel",
    "Site",
    "Sparse",
    "StandIn",
    "StepListener",
    "Support",
    "Update",
    "Vector",
    "Writer",
    "about_of",
    "acting_adapters",
    "adapted_in_groups",
    "after_saving",
    "all_linears",
    "backbone_linears",
    "backbone_modules",
    "bias_flags",
    "carry_over",
    "count_parameters",
    "dequantised",
    "empty_like_of",
    "evaluating",
    "exempt_from_weight_decay",
    "features_of",
    "group_key",
    "head_modules",
    "in_order",
    "is_admitted",
    "is_hooked",
    "is_named",
    "is_quantised",
    "is_registered",
    "is_trained",
    "keeping_precision",
    "layer_and_type",
    "layers_by_name",
    "linear_features",
    "linear_out_features",
    "listen_to_steps",
    "listener_between",
    "load_plugins",
    "lora_scale",
    "matched_targets",
    "method_of",
    "methods",
    "needs_plain_operations",
    "onloaded",
    "overlap_of",
    "owners_of",
    "register_method",
    "require_model",
    "scale_at",
    "set_bias_flags",
    "sorted_text",
    "spread",
    "stable_generator",
    "stop_listening",
    "tuner_of",
    "unadapted_modules",
    "warn_of_experts",
    "weight_of",
    "without_adapters",
]
