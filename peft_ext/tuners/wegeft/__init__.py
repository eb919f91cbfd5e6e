r"""WeGeFT: weight-generative fine-tuning (Savadikar, Song, Wu 2025, arXiv:2312.00700; first called GIFT).

The update of a frozen weight W `(out, in)` is made from W itself by two linear maps, P `(r, in)` and Q `(in, r)`:

    W' = W + (W P^T) Q^T = W (I + P^T Q^T)

which is the same as editing what the module reads, so that W is not touched, nor its quantisation undone:

    y = W x' + b,    x' = x + P^T (Q^T x)

Q starts at zero, P as `nn.Linear` does. **Sharing.** The modules of one name in all layers share one pair (the
default), or all targets do, or each has its own. A shared pair belongs to the model: it lies beside the model's own
modules in `shared_maps`, is saved once, and is a unit of its own or of the root under FSDP, whichever layers use it.

Several active adapters edit the same x, so that their updates add: W (I + D_1 + D_2). Merging makes each from the weight
before any of them.
"""

from .about import ABOUT
from .config import WeGeFTConfig
from .layer import WeGeFTLayer, WeGeFTLinear
from .model import WeGeFTModel


__all__ = ["ABOUT", "WeGeFTConfig", "WeGeFTLayer", "WeGeFTLinear", "WeGeFTModel"]
