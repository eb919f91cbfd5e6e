"""What goes with every method, and with full fine-tuning: a fitted head, which layers are trained, what a step costs."""

from .activations import SparseActivations, SparseActivationsCallback, sparse_activations
from .observing import ActivationReport, Kept, activation_report
from .planning import Advice, Plan, recommend
from .probing import Probe, linear_probe
from .sampling import LayerSampling, layer_sampling


__all__ = [
    "ActivationReport",
    "Advice",
    "Kept",
    "LayerSampling",
    "Plan",
    "Probe",
    "SparseActivations",
    "SparseActivationsCallback",
    "activation_report",
    "layer_sampling",
    "linear_probe",
    "recommend",
    "sparse_activations",
]
