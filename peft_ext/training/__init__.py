"""What goes with every method, and with full fine-tuning: which layers are trained when, what activations cost."""

from .sampling import LayerSampling, layer_sampling


__all__ = ["LayerSampling", "layer_sampling"]
