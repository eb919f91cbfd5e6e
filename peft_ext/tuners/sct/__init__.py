r"""SCT: salient channel tuning (Zhao, Wang, Zhao, Luo, Wang, Shou 2023, arXiv:2309.08513).

Of the C channels of a layer, the K with the largest activations are chosen once, in a pass over some data. With E
`(C, K)` the matrix that selects them, a K x K map M and a vector c are trained:

    y = x + E (M E^T x + c)

**Sites.** `"attn"`, as published: x is the residual stream after the attention of a block, which the next norm and the
skip connection read; no weight makes it, so that nothing can be merged. With a block that adds the attention's output a
to its input h, x = h + a, and the same y comes of the attention's output a + E (M E^T (h + a) + c), which is what is
computed. In a block that normalises after it adds (BERT), x is what that norm puts out. `"mlp"`: x is the output of
the last layer of a feed-forward part, x = W u + b, and the map merges into it:

    W' = (I + E M E^T) W,    b' = (I + E M E^T) b + E c

`"qkv"`: the same, with a map each, on the projections of queries and values.

**Choice.** By the L2 norm of a channel over all tokens of the samples of a class, in the mean over the classes; the class
token and padding do not count. Without labels there is one class.
"""

from .about import ABOUT
from .config import SCTConfig
from .layer import ChannelMap, SCTLayer
from .model import SCTModel


__all__ = ["ABOUT", "ChannelMap", "SCTConfig", "SCTLayer", "SCTModel"]
