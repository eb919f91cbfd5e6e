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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core import ExtLayer, ExtModel
from .config import NO_MODULE, VQTConfig
from .families import HEAD_NAMES, Family, check_model, family_of


if TYPE_CHECKING:
    from .cache import FrozenPassCache

CHILD = "vqt"  # the name of the layer in the model; PEFT skips names that contain the prefix `vqt_`


# What is trained


@dataclass
class QueryRows:
    """The query rows `(B, T, D)` of one layer, and which of their elements are dropped.

    The dropout is applied where the rows are used, so that for the backward one byte an element is kept and not eight.
    """

    rows: torch.Tensor
    dropped: torch.Tensor | None = None
    probability: float = 0.0

    def __call__(self) -> torch.Tensor:
        """The rows after the dropout."""
        return self.rows if self.dropped is None else self.rows.masked_fill(self.dropped, 0.0) / (1 - self.probability)


class QueryTokens(nn.Module):
    """The queries of all layers, `weight` `(L, T, D)`."""

    def __init__(self, layers: int, queries: int, width: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, queries, width))
        self.dropout = dropout

    def forward(self, batch: int) -> list[QueryRows]:
        """The rows of each layer for `batch` samples."""
        layers, queries, width = self.weight.shape
        rows = self.weight.unsqueeze(1).expand(layers, batch, queries, width)
        if not (self.training and self.dropout > 0):
            return [QueryRows(one) for one in rows.unbind(0)]
        dropped = torch.rand(rows.shape, device=rows.device) < self.dropout
        return [
            QueryRows(one, mask, self.dropout) for one, mask in zip(rows.unbind(0), dropped.unbind(0), strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, dropout={self.dropout}"


class PoolingWeights(nn.Module):
    """The weights `(L, T)` of a learnt sum over the queries of each layer."""

    def __init__(self, layers: int, queries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(layers, queries))

    def forward(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """outputs: `(B, T, D)` of each layer; returns `(B, D)` of each."""
        weight = self.weight
        return [torch.einsum("btd,t->bd", z, w.to(z.dtype)) for z, w in zip(outputs, weight.unbind(0), strict=True)]


class QueryHead(nn.Module):
    """The linear head: `weight` `(C, F)`, `bias` `(C,)`, and, after feature selection, the `columns` `(F,)` it reads.

    No `nn.Linear`, so that `target_modules="all-linear"` of another method does not take it for part of the model.
    """

    columns: torch.Tensor | None

    def __init__(self, features: int, classes: int, selected: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, selected or features))
        self.bias = nn.Parameter(torch.empty(classes))
        self.features = features
        self.columns_are_known = False
        # negative until a selection, or a loaded adapter, fills them in
        self.register_buffer("columns", None if selected is None else torch.full((selected,), -1, dtype=torch.int32))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features `(B, F)`; returns `(B, C)`."""
        if features.shape[-1] != self.features:
            raise ValueError(
                f"`vqt_head` was made for {self.features} features and got {features.shape[-1]}: the model is not "
                "the one that the adapter was made for. Load the adapter on its own base model."
            )
        if self.columns is not None:
            if not self.columns_are_known and self.columns[0] < 0:
                raise ValueError(
                    "`num_selected_features` is set, but no features were selected: it is written by "
                    "`peft_ext.select_features`. Leave it out of a new config."
                )
            self.columns_are_known = True  # so that a GPU is asked once only
            features = features[:, self.columns.long()]
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)

    def group_lasso(self) -> torch.Tensor:
        """The sum over the feature columns of their L2 norms."""
        return self.weight.norm(dim=0).sum()

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


# Running a block on query rows


@dataclass
class Frozen:
    """What the frozen pass leaves behind in one layer, and all that the queries need of it.

    Args:
        keys, values: `(B, N, D)`, as the projections put them out.
        mask: What is added to the scores, or whether a key is seen (bool): `(B or 1, heads or 1, 1, N)`; `None`: all.
        args, kwargs: The block's other arguments, tensors left out.
        dtype: Of the hidden states.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `module` runs `forward` in the place of its own."""
    own = module.__dict__.get("forward")  # accelerate and others put one here too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Inside, transformers does not checkpoint `block`, whose second run would not find the keys and values."""
    enabled = getattr(block, "gradient_checkpointing", False)
    if not enabled:
        yield
        return
    block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        block.gradient_checkpointing = enabled  # type: ignore[assignment]


def query_mask(mask: Any, keys: int, device: torch.device) -> torch.Tensor | None:
    """The row `(B or 1, heads or 1, 1, N)` of an attention mask that holds for a query.

    A query has no position. It sees what the first token sees: the keys that are no padding, with the class token's
    own bias where the architecture has a relative position bias.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):  # flex attention's BlockMask
        from torch.nn.attention.flex_attention import create_mask

        return create_mask(mask.mask_mod, mask.shape[0], None, 1, keys, device=device)
    if mask.ndim == 2:  # flash attention's padding mask
        return mask.bool()[:, None, None, :]
    return mask[..., :1, :]


def _heads(states: torch.Tensor, head_size: int) -> torch.Tensor:
    """`(B, N, D)` as `(B, heads, N, head_size)`."""
    return states.unflatten(-1, (-1, head_size)).transpose(1, 2)


def attend(
    family: Family, attention: nn.Module, frozen: Frozen, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What `attention` puts out for query rows `(B, T, D)` if they attend to the frozen keys and values.

    Stands in for the attention's own `forward`, whatever implementation that uses: they compute the same function.
    """
    names = family.names
    head_size = getattr(attention, names.head_size)
    queries = getattr(attention, names.q)(hidden_states)
    mask = frozen.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(queries.dtype)
    output = F.scaled_dot_product_attention(
        _heads(queries, head_size),
        _heads(frozen.keys, head_size),
        _heads(frozen.values, head_size),
        attn_mask=mask,
        scale=getattr(attention, names.scale),
    )
    output = output.transpose(1, 2).flatten(2)
    return output if names.out is None else getattr(attention, names.out)(output), None


def attention_weights(family: Family, attention: nn.Module, frozen: Frozen, rows: torch.Tensor) -> torch.Tensor:
    """The weights `(B, heads, T, N)` with which `rows`, as the attention gets them, read the tokens."""
    names = family.names
    head_size = getattr(attention, names.head_size)
    queries = _heads(getattr(attention, names.q)(rows), head_size)
    scores = queries @ _heads(frozen.keys, head_size).transpose(2, 3) * getattr(attention, names.scale)
    if frozen.mask is not None:
        shown = frozen.mask
        scores = scores.masked_fill(~shown, -math.inf) if shown.dtype == torch.bool else scores + shown
    return scores.softmax(-1)


def run_block(
    family: Family, block: nn.Module, frozen: Frozen, rows: torch.Tensor, attention_forward: Any = attend
) -> torch.Tensor:
    """Z `(B, T, D)`: the block's own output for the query rows `(B, T, D)`."""
    attention = block.get_submodule(family.attention)
    stand_in = partial(attention_forward, family, attention, frozen)
    with replaced_forward(attention, stand_in), _without_checkpointing(block):
        output = block(rows.to(frozen.dtype), *frozen.args, **frozen.kwargs)
    return output[0] if isinstance(output, tuple) else output


class _AllFound(Exception):
    """The keys and values of the last block are known, so the rest of the frozen pass would be for nothing."""


class _Capture:
    """While open, each block that the backbone runs is handed over, with its keys and values, to `on_block`.

    With `cut_short`, the pass ends in `_AllFound` inside the last block, which `finish` then hands over.
    """

    def __init__(
        self,
        family: Family,
        blocks: Mapping[int, nn.Module],
        on_block: Callable[[int, Frozen], None],
        cut_short: bool = False,
    ) -> None:
        self.family = family
        self.blocks = blocks
        self.on_block = on_block
        self.found: dict[str, Any] = {}
        self.index = -1
        self.last = max(blocks) if cut_short else None
        self.is_reading = False  # the block is being run on query rows, which is not to be captured

    def __enter__(self) -> Self:
        names = self.family.names
        self.handles: list[RemovableHandle] = []
        for index, block in self.blocks.items():
            attention: Any = block.get_submodule(self.family.attention)
            self.handles += [
                block.register_forward_pre_hook(partial(self._enter_block, index), with_kwargs=True),
                attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True),
                # looked up anew each time: an adapter may have been put around them
                getattr(attention, names.k).register_forward_hook(partial(self._keep, "keys")),
                getattr(attention, names.v).register_forward_hook(partial(self._keep, "values")),
                block.register_forward_hook(partial(self._leave_block, index)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_reading:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self.index = index
        self.found = {
            "args": tuple(None if isinstance(value, torch.Tensor) else value for value in args[1:]),
            "kwargs": {
                key: None if isinstance(value, torch.Tensor) else value
                for key, value in kwargs.items()
                if key != "hidden_states"
            },
            "dtype": hidden.dtype,
        }

    def _enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_reading:
            self.found["mask"] = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _keep(self, name: str, projection: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.is_reading:
            return
        self.found[name] = output
        if self.index == self.last and {"keys", "values"} <= self.found.keys():
            raise _AllFound

    def _leave_block(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        if not self.is_reading:
            self.finish()

    def finish(self) -> None:
        """Hands over the block whose keys and values were found last."""
        found, self.found = self.found, {}
        found["mask"] = query_mask(found["mask"], found["keys"].shape[1], found["keys"].device)
        self.is_reading = True
        try:
            self.on_block(self.index, Frozen(**found))
        finally:
            self.is_reading = False


class _Rerun(torch.autograd.Function):
    """Gives the query outputs, which were computed without autograd, a backward that runs the frozen pass again."""

    @staticmethod
    def forward(ctx: Any, replay: Callable[..., Any], layers: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """tensors: the query rows of each layer, their outputs, and whatever else `replay` needs."""
        ctx.replay, ctx.layers = replay, layers
        rows, outputs, inputs = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        ctx.save_for_backward(*rows, *inputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        row_grads = ctx.replay(saved[: ctx.layers], grads, saved[ctx.layers :])
        return (None, None, *row_grads, *[None] * (len(ctx.needs_input_grad) - 2 - ctx.layers))


# The layer


@dataclass
class _Reading:
    """One forward of the model with an adapter active."""

    adapter: str
    stack: ExitStack
    grad: bool = False  # whether autograd was on when the backbone was called
    rows: list[QueryRows] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    class_token: torch.Tensor | None = None


class VQTLayer(ExtLayer):
    """The one layer of VQT, a child of the model named `vqt`: queries `vqt_queries` and head `vqt_head` per adapter.

    It stands beside the model's own modules and not around them, so that their names, and with them the keys of
    other adapters, stay what they are.
    """

    adapter_layer_names = ("vqt_queries", "vqt_pool", "vqt_head")
    vqt_queries: nn.ModuleDict
    vqt_pool: nn.ModuleDict
    vqt_head: nn.ModuleDict

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__(nn.Identity())
        self.family = family
        self._model = (model,)  # in a tuple, which hides it from nn.Module
        self.configs: dict[str, VQTConfig] = {}
        self.cache: FrozenPassCache | None = None
        self.penalised_steps = 0  # how often a group lasso was added to the loss
        self._reading: _Reading | None = None
        self._is_paused = False
        self._stock_labels = self._labels()
        self._problem_types: dict[str, str | None] = {}
        self._labels_of: str | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def backbone(self) -> nn.Module:
        return self.model.get_submodule(self.family.backbone)

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        config: Any = self.backbone.config
        return config.hidden_size

    def blocks(self, adapter: str) -> dict[int, nn.Module]:
        """The blocks that the queries of `adapter` read, by their index."""
        blocks: Any = self.backbone.get_submodule(self.family.blocks)
        chosen = self.configs[adapter].layers_to_transform
        indices = range(len(blocks)) if chosen is None else [chosen] if isinstance(chosen, int) else sorted(chosen)
        for index in indices:
            if not 0 <= index < len(blocks):
                raise ValueError(
                    f"`layers_to_transform` names layer {index}; the model has layers 0 to {len(blocks) - 1}."
                )
        return {index: blocks[index] for index in indices}

    # Making and removing adapters

    def update_layer(self, adapter_name: str, config: VQTConfig, **kwargs: Any) -> None:
        self.configs[adapter_name] = config
        if config.id2label is None:
            config.id2label = dict(self._stock_labels[0])
        layers, width = len(self.blocks(adapter_name)), self.width
        per_layer = width * (config.num_queries if config.pooling == "concatenate" else 1)
        features = width * self.family.class_tokens + layers * per_layer
        selected = config.num_selected_features
        if selected is not None and selected > features:
            raise ValueError(f"`num_selected_features` is {selected}, but there are only {features} features.")

        self.vqt_queries[adapter_name] = QueryTokens(layers, config.num_queries, width, config.dropout)
        if config.pooling == "weighted":
            self.vqt_pool[adapter_name] = PoolingWeights(layers, config.num_queries)
        self.vqt_head[adapter_name] = QueryHead(features, len(config.id2label), selected)
        self.reset_parameters(adapter_name)
        self._move_to_model(adapter_name)
        self.train(self.model.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter: str) -> None:
        """The published initialisation: uniform queries, Kaiming-normal head (fan-out), a rare class as its prior."""
        queries: Any = self.vqt_queries[adapter]
        head: Any = self.vqt_head[adapter]
        limit = math.sqrt(6 / (self._patch_inputs() + queries.weight.shape[-1]))
        nn.init.uniform_(queries.weight, -limit, limit)
        if adapter in self.vqt_pool:
            nn.init.ones_(self.vqt_pool[adapter].weight)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.constant_(head.bias, -math.log(99) if len(head.bias) > 1 else 0.0)

    def _patch_inputs(self) -> int:
        """Inputs of the patch embedding, the fan-in of the initialisation; for text, the width in its place."""
        config: Any = self.backbone.config
        patch = getattr(config, "patch_size", None)
        if patch is None:
            return config.hidden_size
        height, width = (patch, patch) if isinstance(patch, int) else patch
        channels = 1 if hasattr(config, "num_mel_bins") else getattr(config, "num_channels", 3)
        return channels * height * width

    def _move_to_model(self, adapter: str) -> None:
        like = next(
            parameter for parameter in reversed(list(self.backbone.parameters())) if parameter.is_floating_point()
        )
        for name in self.adapter_layer_names:
            leaves = getattr(self, name)
            if adapter in leaves and not any(parameter.is_meta for parameter in leaves[adapter].parameters()):
                leaves[adapter].to(like.device, like.dtype)

    def select_columns(self, adapter: str, columns: torch.Tensor) -> None:
        """Gives `adapter` a fresh head, and fresh queries, that read only the feature `columns` `(k,)`."""
        old: Any = self.vqt_head[adapter]
        head = QueryHead(old.features, len(old.bias), len(columns))
        self.vqt_head[adapter] = head
        self.configs[adapter].num_selected_features = len(columns)
        self._move_to_model(adapter)
        head.to(old.weight.device, old.weight.dtype).train(old.training)
        head.columns = columns.to(old.weight.device, torch.int32)
        self.reset_parameters(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self._show_labels()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._show_labels()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._show_labels()

    def leave(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self.enable_adapters(False)
        delattr(model, CHILD)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: VQT adds tokens and features to the model, which no weight of it "
            "can hold. Keep the adapter: `save_pretrained` writes its queries and head, a few hundred kilobytes that "
            "load on the untouched base model, and several of them can share one frozen pass."
        )

    # The classes: the model's config shows those of the active adapter's head

    def _labels(self) -> tuple[Any, Any]:
        return self.model.config.id2label, self.model.config.label2id

    def _show_labels(self) -> None:
        active = self._active()
        shown = active[0] if len(active) == 1 else None
        model, config = self.model, self.model.config
        self._problem_types[self._labels_of or ""] = config.problem_type
        id2label, label2id = self._stock_labels
        if shown is not None:
            own = self.configs[shown].id2label or {}
            if own != id2label:
                id2label, label2id = dict(own), {label: index for index, label in own.items()}
        config.id2label, config.label2id = id2label, label2id
        if hasattr(model, "num_labels"):
            model.num_labels = len(id2label)
        if shown != self._labels_of:  # transformers guesses the problem type once; another head may have another
            config.problem_type = self._problem_types.get(shown or "", self._problem_types.get(""))
        self._labels_of = shown

    def _active(self) -> list[str]:
        return (
            []
            if self.disable_adapters
            else [name for name in self.present(self.active_adapters) if name in self.configs]
        )

    # One forward

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._close()  # a forward that was interrupted from the keyboard has left its own behind
        active = self._active()
        if self._is_paused or not active:
            return
        if len(active) > 1:
            raise ValueError(
                f"The VQT adapters {active} are active together, but each has a head of its own, and there is one "
                f"output. Activate one of them: `set_adapter({active[0]!r})`."
            )
        stack = ExitStack()
        reading = self._reading = _Reading(active[0], stack)
        backbone = self.backbone
        stack.enter_context(replaced_forward(backbone, partial(self._run_backbone, reading, backbone.forward)))
        head = model.get_submodule(self.family.head)
        before_head = model.get_submodule(self.family.class_token or self.family.head)
        stack.callback(before_head.register_forward_pre_hook(partial(self._take_class_token, reading)).remove)
        stack.callback(head.register_forward_hook(partial(self._answer, reading)).remove)

    def _run_backbone(self, reading: _Reading, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        family, backbone, blocks = self.family, self.backbone, self.blocks(reading.adapter)
        reading.grad = torch.is_grad_enabled()
        if self.cache is not None:
            hit = self.cache.look_up(self, reading.adapter, args, kwargs)
            if hit is not None:
                frozen, reading.class_token, stub = hit
                reading.rows = self._rows(reading.adapter, len(reading.class_token))
                for place, (index, block) in enumerate(blocks.items()):
                    reading.outputs[index] = run_block(family, block, frozen[place], reading.rows[place]())
                return stub
        trains_backbone = any(parameter.requires_grad for parameter in backbone.parameters())
        if trains_backbone:
            _refuse_reentrant_checkpointing(blocks.values())
        elif backbone.training:
            backbone.eval()
        checkpointing = any(getattr(block, "gradient_checkpointing", False) for block in blocks.values())
        rerun = checkpointing and reading.grad and not trains_backbone
        places = {index: place for place, index in enumerate(blocks)}
        later: list[tuple[int, Frozen]] = []

        def read(index: int, frozen: Frozen) -> None:
            if not reading.rows:
                with torch.set_grad_enabled(reading.grad):
                    reading.rows = self._rows(reading.adapter, len(frozen.keys))
            with torch.set_grad_enabled(reading.grad and not rerun):
                reading.outputs[index] = run_block(family, blocks[index], frozen, reading.rows[places[index]]())

        # a block that is run on queries while transformers records hidden states would be recorded too
        on_block = (lambda *found: later.append(found)) if _records_outputs(backbone, kwargs) else read
        with torch.set_grad_enabled(reading.grad and trains_backbone), _Capture(family, blocks, on_block):
            output = forward(*args, **kwargs)
        for found in later:
            read(*found)
        if rerun:
            self._make_rerunnable(reading, blocks, args, kwargs)
        return output

    def _rows(self, adapter: str, batch: int) -> list[QueryRows]:
        return self.vqt_queries[adapter](batch)

    def _make_rerunnable(
        self, reading: _Reading, blocks: dict[int, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Replaces the query outputs by ones whose backward runs the frozen pass again."""
        call = [*args, *kwargs.values()]
        at = [index for index, value in enumerate(call) if isinstance(value, torch.Tensor)]
        inputs = [call[index] for index in at]
        rest = [None if isinstance(value, torch.Tensor) else value for value in call]  # the tensors autograd keeps
        device = reading.rows[0].rows.device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        family, backbone = self.family, self.backbone
        places = {index: place for place, index in enumerate(blocks)}
        masks = [one.dropped for one in reading.rows if one.dropped is not None]
        probability = reading.rows[0].probability

        def replay(
            rows: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
        ) -> list[torch.Tensor]:
            again = list(rest)
            dropped = tensors[len(at) :]
            for index, tensor in zip(at, tensors, strict=False):
                again[index] = tensor
            row_grads: dict[int, torch.Tensor] = {}

            def read(index: int, frozen: Frozen) -> None:
                place = places[index]
                with torch.enable_grad():
                    leaf = rows[place].detach().requires_grad_()
                    queries = QueryRows(leaf, dropped[place] if dropped else None, probability)
                    output = run_block(family, blocks[index], frozen, queries())
                (row_grads[place],) = torch.autograd.grad(output, leaf, grads[place])

            if backbone.training:
                backbone.eval()
            named = dict(zip(kwargs, again[len(args) :], strict=True))
            with (
                torch.no_grad(),
                torch.autocast(device, enabled=autocast[0], dtype=autocast[1]),
                _Capture(family, blocks, read, cut_short=_may_be_cut_short(backbone)) as capture,
            ):
                try:
                    backbone(*again[: len(args)], **named)
                except _AllFound:
                    capture.finish()
            return [row_grads[place] for place in range(len(rows))]

        tensors = [*(one.rows for one in reading.rows), *reading.outputs.values(), *inputs, *masks]
        reading.outputs = dict(zip(blocks, _Rerun.apply(replay, len(reading.rows), *tensors), strict=True))

    def _take_class_token(self, reading: _Reading, module: nn.Module, args: tuple[Any, ...]) -> None:
        if reading.class_token is None:
            states = args[0]
            reading.class_token = states[:, 0] if states.ndim == 3 else states

    def _answer(self, reading: _Reading, head: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
        assert reading.class_token is not None
        features = self._features(reading.adapter, reading.class_token, list(reading.outputs.values()))
        return self.vqt_head[reading.adapter](features)

    def _features(self, adapter: str, class_token: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        """f `(B, F)` from x `(B, D)` and Z_l `(B, T, D)`."""
        if adapter in self.vqt_pool:
            pooled = self.vqt_pool[adapter](outputs)
        elif self.configs[adapter].pooling == "mean":
            pooled = [z.mean(1) for z in outputs]
        else:
            pooled = [z.flatten(1) for z in outputs]
        return torch.cat([F.normalize(part, dim=-1) for part in (class_token, *pooled)], dim=-1)

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        reading = self._close()
        if output is None or reading is None:
            return None
        weight = self.configs[reading.adapter].group_lasso
        if weight == 0 or not (self.training and torch.is_grad_enabled()):
            return None
        head: Any = self.vqt_head[reading.adapter]
        penalty = weight * head.group_lasso()
        if isinstance(output, tuple) and kwargs.get("labels") is not None:
            output = (output[0] + penalty, *output[1:])
        elif not isinstance(output, tuple) and output.get("loss") is not None:
            output["loss"] = output["loss"] + penalty
        else:
            raise ValueError(
                "`group_lasso` is added to the loss that the model computes, but it was called without labels. Pass "
                "`labels` (with `Trainer`: no label smoothing and no loss function of its own)."
            )
        self.penalised_steps += 1
        return output

    def _close(self) -> _Reading | None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.stack.close()
        return reading

    # Looking at the frozen pass

    def frozen_pass(
        self, adapter: str, inputs: Mapping[str, Any]
    ) -> tuple[list[Frozen], torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the frozen pass leaves behind in each layer, x, and the arguments that the backbone was called with."""
        found: list[Frozen] = []
        reading = _Reading(adapter, ExitStack())
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        before_head = self.model.get_submodule(self.family.class_token or self.family.head)
        handles = [
            self.backbone.register_forward_pre_hook(note_call, with_kwargs=True),
            before_head.register_forward_pre_hook(partial(self._take_class_token, reading)),
        ]
        if self.backbone.training:
            self.backbone.eval()
        self._is_paused = True
        try:
            with (
                torch.no_grad(),
                _Capture(self.family, self.blocks(adapter), lambda index, frozen: found.append(frozen)),
            ):
                device = next(self.backbone.parameters()).device
                moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                self.model(**moved)
        finally:
            self._is_paused = False
            for handle in handles:
                handle.remove()
        assert reading.class_token is not None
        return found, reading.class_token, calls[-1]

    @torch.no_grad()
    def attention_maps(self, adapter: str, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """By layer, the weights `(B, heads, T, N)` with which the queries of `adapter` read the tokens."""
        maps: dict[int, torch.Tensor] = {}
        frozen_layers, _, _ = self.frozen_pass(adapter, inputs)
        queries: Any = self.vqt_queries[adapter]
        for place, (index, block) in enumerate(self.blocks(adapter).items()):

            def look(
                family: Family, attention: nn.Module, frozen: Frozen, hidden_states: torch.Tensor, *_: Any, **__: Any
            ) -> tuple[torch.Tensor, None]:
                maps[index] = attention_weights(family, attention, frozen, hidden_states)  # noqa: B023
                return attend(family, attention, frozen, hidden_states)

            frozen = frozen_layers[place]
            rows = queries.weight[place].expand(len(frozen.keys), -1, -1)
            run_block(self.family, block, frozen, rows, look)
        return maps


def _may_be_cut_short(backbone: nn.Module) -> bool:
    """Whether nothing has to be tidied up after each module: FSDP frees the shards then, accelerate offloads."""
    return not any(
        hasattr(module, "_hf_hook")
        or any(cls.__name__.startswith(("FSDP", "FullySharded")) for cls in type(module).__mro__)
        for module in backbone.modules()
    )


def _records_outputs(backbone: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    names = ("output_hidden_states", "output_attentions")
    config = getattr(backbone, "config", None)
    return any(kwargs.get(name, None) or getattr(config, name, False) for name in names)


def _refuse_reentrant_checkpointing(blocks: Any) -> None:
    for block in blocks:
        options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
        if block.training and getattr(block, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing hides the keys and values from autograd, so the adapter under VQT "
                "would not be trained through them. Use "
                "`gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})`."
            )


# The model


class VQTModel(ExtModel):
    """Puts the queries and the head beside a model; used through `get_peft_model(model, VQTConfig(...))`."""

    prefix = "vqt_"
    tuner_layer_cls = VQTLayer
    trains_own_head = True

    @classmethod
    def default_targets(cls, config: Any, model_config: dict[str, Any], *_: Any) -> Any:
        """The one target is the backbone, whose name alone depends on the architecture."""
        target = {family_of(model_config.get("model_type")).backbone}
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
        family = family_of(getattr(model.config, "model_type", None))  # type: ignore[union-attr]
        check_model(family, model)

    @classmethod
    def inject_layer(
        cls, tuner: BaseTuner, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> ExtLayer | None:
        model: Any = tuner.model
        layer: Any = getattr(model, CHILD, None)
        is_new = layer is None
        if is_new:
            layer = VQTLayer(model, family_of(model.config.model_type))
            layer.activate_only(adapter_name)
        layer.update_layer(adapter_name, config)
        if is_new:
            model.add_module(CHILD, layer)
        if adapter_name not in tuner.active_adapters:
            for leaves in layer.adapter_layer_names:  # an additional adapter is not trained until it is activated
                if adapter_name in getattr(layer, leaves):
                    getattr(layer, leaves)[adapter_name].requires_grad_(False)
        return None


def layer_of(model: nn.Module) -> VQTLayer:
    """The VQT layer of a model, wrapped by PEFT or not.

    Raises:
        ValueError: The model has none.
    """
    for module in model.modules():
        if isinstance(module, VQTLayer):
            return module
    raise ValueError("The model has no VQT adapter; add one with `get_peft_model(model, VQTConfig())`.")


def active_adapter_of(layer: VQTLayer, adapter_name: str | None) -> str:
    """`adapter_name`, or the active one if it is `None`.

    Raises:
        ValueError: There is no such adapter, or not exactly one is active.
    """
    names = layer._active() if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in layer.configs:
        raise ValueError(
            f"`adapter_name` must be one of the VQT adapters {sorted(layer.configs)}, got {adapter_name!r}."
        )
    return names[0]


def attention_maps(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[int, torch.Tensor]:
    """By layer, the weights `(B, heads, T, N)` with which the queries read the tokens of `inputs`.

    Args:
        model: The model with the VQT adapter.
        adapter_name: The adapter to look at; `None`: the active one.
        inputs: Keyword arguments of the model's `forward`, for example `pixel_values=...`.
    """
    layer = layer_of(model)
    return layer.attention_maps(active_adapter_of(layer, adapter_name), inputs)
