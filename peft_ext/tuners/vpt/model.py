r"""VPT: visual prompt tuning (Jia et al. 2022, "Visual Prompt Tuning", ECCV 2022, arXiv:2203.12119), with the
key-value rows and the pruning of E2VPT (Han et al. 2023, arXiv:2307.13770) as options.

Before block l of a frozen transformer, T trained rows P_l stand beside the tokens X_l. **Deep**: each block has rows of
its own, and what it makes of them is dropped:

    [X_{l+1}; _] = Block_l([X_l; P_l])

The tokens then see of P_l only its keys and values. So that is the same as T further keys and values in the attention,

    K = [W_k LN(P_l); W_k LN(X_l)],    V = [W_v LN(P_l); W_v LN(X_l)],    X_{l+1} = Block_l(X_l | K, V)

which is what is computed here: the prompts have no queries and no feed-forward part, no block sees another length, and
in inference the further keys and values are constants. E2VPT adds rows K_kv, V_kv that are trained as they are.
**Shallow**: one set of rows P enters before the first block, travels through all, and is dropped behind the last.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ...architectures import ARCHITECTURES, Block, describe, patch_inputs
from ...channel_norms import ChannelSite
from ...core import ExtLayer, ExtModel, Row, empty_like_of, features_of, head_modules, is_admitted, matched_targets
from .config import CLASS_TOKENS, VPTConfig
from .layer import CHILD, VPTLayer
from .starts import check_start, start, start_from


class VPTModel(ExtModel):
    """Puts prompts into the blocks of a model; used through `get_peft_model(model, VPTConfig(...))`."""

    prefix = "vpt_"
    tuner_layer_cls = VPTLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter on the model; with a `state_dict`, on the blocks of its tensors."""
        if kwargs.get("state_dict") is not None:
            inside, outside = (
                f".{CHILD}.{self.prefix}",
                f".{self.prefix}",
            )  # PEFT looks for the block by what is before
            kwargs["state_dict"] = {key.replace(inside, outside): v for key, v in kwargs["state_dict"].items()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @classmethod
    def default_modules(cls, config: Any, model: nn.Module) -> set[str]:
        """The blocks of the model, or of its image tower; those of `layers_to_transform`.

        Raises:
            ValueError: VPT cannot be had on the model, with the reason, or there are no such layers.
        """
        blocks = blocks_of(model)
        chosen = config.layers_to_transform
        indices = range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
        for index in indices:
            if not 0 <= index < len(blocks):
                raise ValueError(
                    f"`layers_to_transform` names layer {index}; the model has layers 0 to {len(blocks) - 1}."
                )
        return {blocks[index].name for index in indices}

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], model: nn.Module) -> Any:
        """Fills in `target_modules` with the names of blocks."""
        if config.target_modules is None:
            everywhere = config.for_adapter(reopen=False)
            everywhere.layers_to_transform = None
            names = cls.default_modules(config, model)
            config.target_modules = {name for name in names if is_admitted(everywhere, name)}
        return config

    @classmethod
    def check_targets(cls, config: Any, model: nn.Module) -> None:
        """Raises for a config that does not fit the model, while that is still as it was.

        Raises:
            ValueError: A target is no block, or the blocks are too unlike for what they are to share.
            TypeError: An attention cannot be given keys and values.
        """
        blocks = {block.name: block for block in blocks_of(model, every_tower=True)}
        targets = [name for name, _ in matched_targets(config, model)]
        if not targets or (others := [name for name in targets if name not in blocks]):
            found = f"names {others[0]!r}, which is no block" if targets else "names no module"
            raise ValueError(
                f"`target_modules` {found}: VPT puts prompts into whole blocks, which here are "
                f"{', '.join(list(blocks)[:3])}, ... Leave it out, and use `layers_to_transform` to choose some."
            )
        for name in targets:
            refuse_other_attention(name, model.get_submodule(blocks[name].attention[0].module))
        shares = [f for f, on in (("share_layers", config.share_layers), ("project_dim", config.project_dim)) if on]
        sizes = {_key_sizes(model, blocks[name].attention[0].k) for name in targets}
        if shares and len(sizes) > 1:
            raise ValueError(
                f"`{shares[0]}` needs blocks of one width; these have keys of the shapes {sorted(sizes)}."
            )
        if not config.deep:
            refuse_shallow(config, model, set(targets))
        if not (config.inference_mode or config.awaits_weights):
            check_start(config, targets if config.deep and not config.share_layers else [blocks_of(model)[-1].name])
            if isinstance(config.init_weights, str) and config.init_weights != CLASS_TOKENS:
                start_from(config, cls._trial(config, model, targets), "trial")

    @staticmethod
    def _trial(config: Any, model: nn.Module, targets: list[str]) -> dict[str, VPTLayer]:
        """The layers that an adapter would have, by their names, without values and not attached to the model."""
        layers: dict[str, VPTLayer] = {}
        with torch.device("meta"):
            for name in targets:
                layer = _layer_beside(model, name)
                layer.update_layer("trial", config, next(iter(layers.values()), None))
                layers[f"{name}.{CHILD}"] = layer
        return layers

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        """Adds the adapter to the layer beside the block's own modules, which is made if there is none."""
        model: Any = tuner.model
        block: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        holders = (m for m in model.modules() if isinstance(m, VPTLayer) and adapter_name in m.configs)
        owner = next(holders, None)
        layer: Any = getattr(block, CHILD, None)
        if layer is None:
            layer = _layer_beside(model, name)
            layer.like = empty_like_of(model)
            layer.activate_only(adapter_name)
        layer.update_layer(adapter_name, config, owner)
        layer.attach()
        if adapter_name not in tuner.active_adapters:
            for leaf in layer.leaves_of(adapter_name):  # an additional adapter is not trained until it is activated
                leaf.requires_grad_(False)
        return None

    @classmethod
    def finish_injection(cls, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Starts from class tokens, or from the prompts of another adapter, if `init_weights` says so."""
        start(model, config, adapter_name)

    # Calibration, for `init_weights="class-tokens"`

    @classmethod
    def kind_for(cls, config: Any) -> str:
        return "activation" if config.init_weights == CLASS_TOKENS else cls.scores_kind

    @classmethod
    def channel_sites(cls, config: Any, model: nn.Module) -> dict[str, Any]:
        """The class token that each block puts out, by the block; if all share their prompts, that of the last."""
        targets = list(cls.resolved_targets(config, model))
        refuse_no_class_token(model)
        if not config.deep or config.share_layers:
            targets = [blocks_of(model)[-1].name]
        return {name: ChannelSite(name, "outputs", by_class=True, row=0) for name in targets}

    @classmethod
    def take_scores(cls, config: Any, model: nn.Module, scores: Any) -> None:
        """Takes the mean class token of each class as a prompt; the classes in their order."""
        support: dict[str, torch.Tensor] = {}
        for name in scores.sums:
            means = scores.means(name)
            if len(means) != config.num_tokens:
                raise ValueError(
                    f"`init_weights={CLASS_TOKENS!r}` makes a prompt of each class, and the batches hold {len(means)}, "
                    f"while `num_tokens` is {config.num_tokens}: set `num_tokens={len(means)}`, or look at more "
                    "batches; they need `labels` of shape (samples,)."
                )
            support[name] = torch.stack(list(means.values())).float()
        config.support = support

    @classmethod
    def calibration_report(cls, config: Any, full: bool) -> tuple[str, list[Row]]:
        """Of each block: how far apart the classes are, as a share of their size."""
        rows: list[Row] = []
        for name, prompts in (config.support or {}).items():
            apart = (prompts - prompts.mean(0)).norm() / prompts.norm()
            rows.append({"block": name, "classes": len(prompts), "between them": f"{apart:.3f}"})
        return "Mean class tokens as prompts", rows


# Which blocks


def blocks_of(model: nn.Module, every_tower: bool = False) -> list[Block]:
    """The blocks that prompts can be put into, in their order; of a model with an image tower, those of that.

    Raises:
        ValueError: There are none, with the reason.
    """
    description = describe(model)
    kind, architecture = description.model_type, description.architecture
    start = f"VPT does not support models of type {kind!r}: "
    if architecture is None:
        known = sorted(
            name for name, entry in ARCHITECTURES.items() if any(a.norm is not None for a in entry.attention)
        )
        raise ValueError(f"VPT does not know models of type {kind!r}; it knows {', '.join(known)}.")
    if architecture.generates or getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"{start}each position sees only those before it, and there is a cache of keys and values. PEFT has "
            "`PrefixTuningConfig` and `PromptTuningConfig` for models that generate."
        )
    if architecture.is_convolutional:
        raise ValueError(f"{start}it is convolutional, and no token could read a prompt.")
    if architecture.shares_layers:
        raise ValueError(f"{start}it runs one block several times, and there would be no prompts for each layer.")
    outside = head_modules(model)
    found = [
        block
        for block in description.blocks
        if block.attention and block.attention[0].names.norm is not None and block.name not in outside
    ]
    is_causal = lambda name: any(tower in name for tower in architecture.causal_towers)
    seeing = [block for block in found if not is_causal(f"{block.stack} {kind or ''}")]
    if not seeing:
        reason = "it has no blocks whose attention VPT knows."
        if found:
            reason = "in its text tower each position sees only those before it, and it has no other."
        raise ValueError(start + reason)
    images = [block for block in seeing if "vision" in block.stack]
    return images if images and not every_tower else seeing


def refuse_other_attention(name: str, attention: Any) -> None:
    """Raises `TypeError` for an attention that does not ask its config for the implementation."""
    forward: Any = inspect.unwrap(type(attention).forward)
    if not hasattr(attention, "config") or "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise TypeError(
            f"The attention of the block {name!r}, a {type(attention).__name__}, computes its product itself and takes "
            "no other implementation, so that it cannot be given further keys and values. Leave the block out."
        )


def refuse_shallow(config: VPTConfig, model: nn.Module, targets: set[str]) -> None:
    """Raises `ValueError` where prompts cannot travel from block to block."""
    architecture = describe(model).architecture
    assert architecture is not None
    reason = None
    if architecture.has_windows:
        reason = "its tokens attend inside windows, which are cut out of a rectangle"
    elif architecture.position != "absolute":
        reason = "queries and keys depend on their positions in each block, and a prompt has none"
    if reason is not None:
        raise ValueError(f"`deep=False` cannot be had on a {type(model).__name__}: {reason}. Use `deep=True`.")
    if missing := [block.name for block in blocks_of(model) if block.name not in targets]:
        raise ValueError(f"With `deep=False` the prompts travel through all blocks; {missing[0]!r} is left out.")


def _key_sizes(model: nn.Module, name: str) -> tuple[int, int]:
    module: Any = model.get_submodule(name)
    inputs, outputs = features_of(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
    return outputs, inputs


def _layer_beside(model: nn.Module, name: str) -> VPTLayer:
    """A layer for the block of this name, or for the one inside another method's layer of this name."""
    stack = next(blocks for blocks in describe(model).stacks.values() if any(b.name == name for b in blocks))
    block = next(block for block in stack if block.name == name)
    module: Any = model.get_submodule(name)
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    names = block.attention[0].names
    return VPTLayer(module, names, names.norm or "", patch_inputs(model.config), block is stack[-1])


def refuse_no_class_token(model: nn.Module) -> None:
    """Raises `ValueError` for a model of images without a class token; the first token of a text stands for it."""
    config: Any = model.config
    architecture = describe(model).architecture
    is_image = any(hasattr(part, "patch_size") for part in (config, getattr(config, "vision_config", None)))
    if is_image and (architecture is None or not architecture.leading_rows):
        raise ValueError(
            f"`init_weights={CLASS_TOKENS!r}` needs a class token, and a {type(model).__name__} has none. Use "
            "`init_weights=True`."
        )
