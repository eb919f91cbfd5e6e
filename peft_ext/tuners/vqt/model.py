r"""VQT: visual query tuning (Tu, Mai, Chao 2023, "Visual Query Tuning: Towards Effective Usage of Intermediate
Representations for Parameter and Memory Efficient Transfer Learning", CVPR 2023, arXiv:2212.03220).

Layer l of a frozen transformer computes X_{l+1} = Block_l(X_l). T learnt queries P_l of its own are run through the
same block, except that they attend to the keys and values of the tokens alone:

    Z_l = Block_l(P_l | K_l, V_l),    K_l = W_k LN(X_l),  V_l = W_v LN(X_l)

The tokens never see the queries, so X_l, and the base model's output, stay what they are, and the queries of one layer
have no part in another's. A linear head, the only thing trained besides the queries, reads

    f = [ norm(x); norm(Z_1); ...; norm(Z_L) ],    norm(v) = v / |v|

where x is what the stock head reads (the class token) and Z_l is flattened or pooled over its T rows first.

**No backward through the backbone.** The loss depends on the trained parameters only through Z_l, and K_l and V_l do
not depend on them. So the backbone runs without autograd, its keys and values are picked up as its projections put
them out, and only the T query rows of each layer are computed with autograd. They need K_l and V_l in their backward;
with gradient checkpointing these are not kept but made again by a second frozen pass, layer by layer.

**On top of another adapter.** If the backbone holds trainable parameters (an active LoRA, say), it runs with autograd,
and gradients reach them through K_l, V_l and x. If that adapter is frozen, it is part of the frozen backbone.

Who calls whom, in one forward, stands in `peft_ext.reading.layer`. `_run_backbone` runs the frozen pass under hooks that
hand each block's keys and values to `read`, which runs the query rows; `_logits` gives what they put out to `vqt_head`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...reading import ReaderModel
from .layer import VQTLayer, active_adapter_of, layer_of


class VQTModel(ReaderModel):
    """Puts the queries and the head beside a model; used through `get_peft_model(model, VQTConfig(...))`."""

    prefix = "vqt_"
    tuner_layer_cls = VQTLayer


def attention_maps(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[int, torch.Tensor]:
    """By layer, the weights `(B, heads, T, N)` with which the queries read the tokens of `inputs`.

    Args:
        model: The model with the VQT adapter.
        adapter_name: The adapter to look at; `None`: the active one.
        inputs: Keyword arguments of the model's `forward`, for example `pixel_values=...`.
    """
    layer = layer_of(model)
    return layer.attention_maps(active_adapter_of(layer, adapter_name), inputs)
