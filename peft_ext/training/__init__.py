"""What goes with every method, and with full fine-tuning: which layers are trained when, what activations cost."""

from .activations import SparseActivations, SparseActivationsCallback, sparse_activations
from .observing import ActivationReport, Kept, activation_report
from .sampling import LayerSampling, layer_sampling


__all__ = [
    "ActivationReport",
    "Kept",
    "LayerSampling",
    "SparseActivations",
    "SparseActivationsCallback",
    "activation_report",
    "layer_sampling",
    "sparse_activations",
]
