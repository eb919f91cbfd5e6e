"""The layer of VPT: a child of a block, named `prompt_layer`, that holds the prompts and gives their keys and values."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...architectures import Attention
from ...core import Dropouts, ExtLayer, linear_features
from .attention import PromptedConfig, lengthened
from .config import VPTConfig
from .leaves import Elsewhere, Rows, Widening, start_key_values, start_rows, start_widening


# The name of the layer in its block. PEFT skips names that contain the prefix `vpt_`, and takes a part of a name for that
# of an adapter if there is one of that name.
CHILD = "prompt_layer"
# the prompts that travel from block to block in one forward: `(B, T, D)`
_travelling: ContextVar[torch.Tensor | None] = ContextVar("travelling", default=None)


class VPTLayer(ExtLayer):
    """The prompts of one block, `vpt_prompts`, and its key-value rows.

    It stands beside the block's own modules and not around the block, so that their names, and with them the keys of
    other adapters, stay what they are.
    """

    adds_key_values = "VPT"  # who does, beside the block's own projections of its tokens: what queries must not miss
    adapter_layer_names = ("vpt_prompts", "vpt_project", "vpt_keys", "vpt_values")
    other_param_names = ("configs", "dropout", "_owners")
    why_not_mixed = (
        "the prompts are further tokens for a whole batch; samples with other prompts would each need an attention mask "
        "of their own, which not every attention implementation takes"
    )
    vpt_prompts: nn.ModuleDict
    vpt_project: nn.ModuleDict
    vpt_keys: nn.ModuleDict
    vpt_values: nn.ModuleDict

    def __init__(self, block: nn.Module, names: Attention, norm: str, patch_inputs: int, is_last: bool) -> None:
        super().__init__(nn.Identity().train(block.training))
        self._block = (block,)  # in a tuple, which hides it from nn.Module
        self.names = names
        self.norm = norm
        self.patch_inputs = patch_inputs
        self.is_last = is_last
        self.configs: dict[str, VPTConfig] = {}
        self.dropout = Dropouts(self.training)
        self._owners: dict[str, tuple[VPTLayer]] = {}  # of what all layers share; not of the first layer itself
        self.recorded: list[torch.Tensor] | None = None  # see `Prompter`

    # Attaching to the block

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    @property
    def attention(self) -> Any:
        return self.block.get_submodule(self.names.module)

    @property
    def width(self) -> int:
        """D, of the rows that the keys are made of."""
        return _features(self.block.get_submodule(self.names.k))[0]

    @property
    def head_size(self) -> int:
        size: int = getattr(self.attention, self.names.head_size)
        return size

    @property
    def heads(self) -> int:
        """The number of heads that keys and values have."""
        parts = 3 if self.is_fused else 1
        return _features(self.block.get_submodule(self.names.k))[1] // parts // self.head_size

    @property
    def is_fused(self) -> bool:
        """Whether one module makes queries, keys and values."""
        return self.names.q == self.names.k

    def attach(self) -> None:
        """Takes the place of the attention's config and, for an adapter whose prompts travel, of the block's forward."""
        block, attention = self.block, self.attention
        if getattr(block, CHILD, None) is not self:
            block.add_module(CHILD, self)
            attention.config = PromptedConfig(attention.config, self)
        own = vars(block).get("forward")
        if not (all(config.deep for config in self.configs.values()) or isinstance(own, _Lengthened)):
            block.forward = _Lengthened(self, own)

    def leave(self, model: nn.Module) -> None:
        self.attention.config = self.attention.config.stock
        self._restore_forward()
        delattr(self.block, CHILD)

    def _restore_forward(self) -> None:
        own = vars(self.block).get("forward")
        if isinstance(own, _Lengthened):
            del self.block.forward
            if own.inner is not None:
                self.block.forward = own.inner

    # Making and removing adapters

    def update_layer(self, adapter_name: str, config: VPTConfig, owner: VPTLayer | None = None, **kwargs: Any) -> None:
        """Creates the leaves of one adapter; `owner` is the first layer that has it, `None` for that layer itself."""
        self.configs[adapter_name] = config
        self.dropout.put(adapter_name, config.prompt_dropout)
        if owner is not None:
            self._owners[adapter_name] = (owner,)
        shares_prompts = owner is not None and (config.share_layers or not config.deep)
        if owner is not None and shares_prompts:
            self.vpt_prompts[adapter_name] = Elsewhere(owner.vpt_prompts[adapter_name])
        else:
            width = config.project_dim or self.width
            prompts = Rows(config.num_tokens, width, pruned_segments=config.pruned_segments)
            self.vpt_prompts[adapter_name] = prompts
        if config.project_dim is not None and owner is None:
            self.vpt_project[adapter_name] = Widening(config.project_dim, self.width)
        if config.kv_tokens:
            for name in ("vpt_keys",) if config.share_kv else ("vpt_keys", "vpt_values"):
                leaves = getattr(self, name)
                if owner is not None and config.share_layers:
                    leaves[adapter_name] = Elsewhere(getattr(owner, name)[adapter_name])
                else:
                    leaves[adapter_name] = Rows(self.heads, config.kv_tokens, self.head_size)
        self.reset_parameters(adapter_name)
        self.finish_update(adapter_name, config)

    def reset_parameters(self, adapter_name: str) -> None:
        """The published initialisation of all leaves of an adapter that this layer holds."""
        leaf: Any = self.vpt_prompts[adapter_name]
        if isinstance(leaf, Rows):
            start_rows(leaf.weight, self.patch_inputs)
        if adapter_name in self.vpt_project:
            start_widening(self.vpt_project[adapter_name])  # type: ignore[arg-type]
        for leaves in (self.vpt_keys, self.vpt_values):
            if adapter_name in leaves and isinstance(leaves[adapter_name], Rows):
                start_key_values(leaves[adapter_name].weight)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if all(config.deep for config in self.configs.values()):
            self._restore_forward()

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: VPT adds tokens to the model, which no weight of it can hold. "
            "Keep the adapter: `save_pretrained` writes its prompts, which load on the untouched base model."
        )

    # Rows for the attention

    def active_names(self) -> list[str]:
        """The adapters that act."""
        return [] if self.disable_adapters else self.present(self.active_adapters)

    def acts(self) -> bool:
        return bool(self.active_names())

    def travelling(self) -> int:
        rows = _travelling.get()
        return 0 if rows is None else rows.shape[1]

    def key_values(self, attention: nn.Module, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values `(B, heads, T, head size)` of all active adapters, one after the other."""
        if torch.is_grad_enabled():
            self.has_run = True
        keys, values = [queries.new_empty(len(queries), self.heads, 0, self.head_size)], []
        values.append(keys[0])
        for adapter in self.active_names():
            config = self.configs[adapter]
            if config.deep:
                k, v = self._prompt_key_values(adapter, attention, queries)
                keys.append(k)
                values.append(v)
            if config.kv_tokens:
                rows = self.vpt_keys[adapter]().to(queries)[None]
                keys.append(rows)
                values.append(rows if config.share_kv else self.vpt_values[adapter]().to(queries)[None])
        size = len(queries)
        return (
            torch.cat([rows if len(rows) == size else rows.expand(size, -1, -1, -1) for rows in keys], 2),
            torch.cat([rows if len(rows) == size else rows.expand(size, -1, -1, -1) for rows in values], 2),
        )

    def rows(self, adapter: str, batch: int) -> torch.Tensor:
        """The prompts as the block gets them: `(1, T, D)`, or `(batch, T, D)` with a dropout that acts."""
        config = self.configs[adapter]
        rows = self.vpt_prompts[adapter]()
        if config.project_dim is not None:
            rows = self._owner(adapter).vpt_project[adapter](rows)
        rows = rows[None]
        if dropped := self.dropout.acting(adapter):
            rows = F.dropout(rows.expand(batch, -1, -1), dropped)
        return rows

    def _owner(self, adapter: str) -> VPTLayer:
        return self._owners[adapter][0] if adapter in self._owners else self

    def _prompt_key_values(
        self, adapter: str, attention: nn.Module, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # made anew each time: few rows, beside those of the tokens, and nothing tells cheaply whether they are the same
        norm = self.block.get_submodule(self.norm) if self.norm else None
        inside = f"{self.names.module}."
        make_key = attention.get_submodule(self.names.k.removeprefix(inside))
        rows = self.rows(adapter, len(queries))
        like = next((p for module in (norm, make_key) if module for p in module.parameters() if p.ndim), queries)
        device = queries.device if like.is_meta else like.device  # offloaded
        rows = rows.to(device, like.dtype if like.is_floating_point() else queries.dtype)
        rows = rows if norm is None else norm(rows)
        if self.is_fused:
            _, k, v = make_key(rows).chunk(3, -1)
        else:
            k = make_key(rows)
            v = attention.get_submodule(self.names.v.removeprefix(inside))(rows)
        keys, values = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2).to(queries.device, queries.dtype)
            for part in (k, v)
        )
        return keys, values


class _Lengthened:
    """The forward of a block through which prompts travel behind its tokens; outside of it nobody sees them."""

    def __init__(self, layer: VPTLayer, inner: Any) -> None:
        self.layer = layer
        self.inner = inner  # what accelerate, or somebody else, has put in the place of the block's forward before

    @torch.compiler.disable  # a compiler would break here anyway, and again in what follows
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, block = self.layer, self.layer.block
        forward = self.inner or partial(type(block).forward, block)
        adapters = [name for name in layer.active_names() if not layer.configs[name].deep]
        if not adapters:
            return forward(hidden_states, *args, **kwargs)
        if torch.is_grad_enabled():
            layer.has_run = True
        batch, tokens = hidden_states.shape[:2]
        own = [layer.rows(name, batch).expand(batch, -1, -1) for name in adapters if name not in layer._owners]
        rows = torch.cat(own, 1) if own else _travelling.get()
        if rows is None:
            raise ValueError(
                "The prompts of `deep=False` enter at the first layer, which was not run before this one."
            )
        rows = rows.to(hidden_states)
        args, kwargs = _with_longer_mask(block, args, kwargs, rows.shape[1], hidden_states)
        _travelling.set(rows)
        try:
            output = forward(torch.cat([hidden_states, rows], 1), *args, **kwargs)
        except BaseException:
            _travelling.set(None)
            raise
        is_tuple = isinstance(output, tuple)
        states = output[0] if is_tuple else output
        _travelling.set(None if layer.is_last else states[:, tokens:])
        states = states[:, :tokens]
        return (states, *output[1:]) if is_tuple else states


def _with_longer_mask(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int, hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's other arguments, with a mask for `count` further tokens."""
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": lengthened(kwargs["attention_mask"], count, hidden)}
    names = list(inspect.signature(type(block).forward).parameters)[2:]
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    if place >= len(args):
        return args, kwargs
    return (*args[:place], lengthened(args[place], count, hidden), *args[place + 1 :]), kwargs


def _features(module: nn.Module) -> tuple[int, int]:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    features = linear_features(base)
    if features is None:
        raise TypeError(f"VPT needs to know the size of keys and values; {type(base).__name__} is no Linear module.")
    return features
