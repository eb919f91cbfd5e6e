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

Who calls whom, in one forward: a pre-forward hook on the model opens a `_Reading`. That puts `_run_backbone` in the
place of the backbone's `forward` and a hook on the head. `_run_backbone` runs the frozen pass under hooks that hand
each block's keys and values to `_read`, which runs the query rows. When the head is called, `_answer` puts the logits
of `vqt_head` in the place of its output, so that the loss is the model's own. A hook after the model's forward takes
everything away again.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...core import ExtLayer, ExtModel
from ...reading import HEAD_NAMES, check_model, family_of
from .config import NO_MODULE
from .layer import CHILD, VQTLayer, active_adapter_of, layer_of


class VQTModel(ExtModel):
    """Puts the queries and the head beside a model; used through `get_peft_model(model, VQTConfig(...))`."""

    prefix = "vqt_"
    tuner_layer_cls = VQTLayer
    trains_own_head = True
    stands_beside = True

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], *_: Any) -> Any:
        """The one target is the backbone, whose name alone depends on the architecture."""
        target = {family_of(VQTLayer.method, model_config.get("model_type")).backbone}
        if config.target_modules not in (None, target):
            raise ValueError(
                f"`target_modules` is {config.target_modules!r}, but VQT adapts no module: it reads the backbone "
                f"{target!r}. Leave it out, and use `layers_to_transform` to choose the layers that get queries."
            )
        config.target_modules = target
        # here and not in the config, since PEFT adds the head of sequence classifiers only after that was made
        added = [name for name in config.modules_to_save or () if name in HEAD_NAMES]
        if added:
            config.modules_to_save = [name for name in config.modules_to_save if name not in added] or [NO_MODULE]
        return config

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module) -> None:
        family = family_of(VQTLayer.method, getattr(model.config, "model_type", None), model)  # type: ignore[union-attr]
        check_model(family, model)

    @classmethod
    def own_head(cls, model: nn.Module, adapter_name: str) -> tuple[str, nn.Module] | None:
        layer: Any = getattr(model, CHILD, None)
        if layer is None or adapter_name not in layer.vqt_head or layer.disable_adapters:
            return None
        return f"{CHILD}.vqt_head.{adapter_name}", layer.vqt_head[adapter_name]

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        model: Any = tuner.model
        layer: Any = getattr(model, CHILD, None)
        is_new = layer is None
        if is_new:
            layer = VQTLayer(model, family_of(VQTLayer.method, model.config.model_type, model))
            layer.activate_only(adapter_name)
        layer.update_layer(adapter_name, config)
        if is_new:
            model.add_module(CHILD, layer)
        if adapter_name not in tuner.active_adapters:
            for leaves in layer.adapter_layer_names:  # an additional adapter is not trained until it is activated
                if adapter_name in getattr(layer, leaves):
                    getattr(layer, leaves)[adapter_name].requires_grad_(False)
        return None


def attention_maps(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[int, torch.Tensor]:
    """By layer, the weights `(B, heads, T, N)` with which the queries read the tokens of `inputs`.

    Args:
        model: The model with the VQT adapter.
        adapter_name: The adapter to look at; `None`: the active one.
        inputs: Keyword arguments of the model's `forward`, for example `pixel_values=...`.
    """
    layer = layer_of(model)
    return layer.attention_maps(active_adapter_of(layer, adapter_name), inputs)
