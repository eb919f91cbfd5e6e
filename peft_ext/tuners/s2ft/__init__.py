r"""S2FT: structured sparse fine-tuning (Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao, Chen 2024, arXiv:2412.06289).

Of a weight W, the columns (or rows) of some chosen channels c are trained, as a dense block S that starts at zero:

    y = W x + S x[c]        input channels: of the second layer of a feed-forward block, and of heads in o_proj
    y[c] += S x             output channels: of its first layer, and of heads in v_proj

Merged, W[:, c] += S, or W[c, :] += S. The paper's code permutes the weights so that the chosen channels lie side by side;
here they are gathered by index, so that the base stays as it is and adapters on other channels act beside each other.

**Backward.** The base's product needs nothing of x, since W is frozen, and S needs x[c] alone: of k chosen input channels
k columns of the input are kept, where LoRA keeps the whole of it.
"""

from .about import ABOUT
from .config import S2FTConfig
from .layer import ChannelBlock, S2FTLinear
from .model import S2FTModel


__all__ = ["ABOUT", "ChannelBlock", "S2FTConfig", "S2FTLinear", "S2FTModel"]
