"""The one layer of VQT: hooks on the model, and what they do in a forward; `model.py` tells who calls whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...reading import Family, ReaderLayer, replaced_forward
from .config import VQTConfig
from .frozen import (
    Capture,
    EmbeddingDropout,
    Frozen,
    attend,
    attention_weights,
    run_block,
)
from .queries import PoolingWeights, QueryHead, QueryRows, QueryTokens
from .rerun import rerunnable


CHILD = "vqt"  # the name of the layer in the model; PEFT skips names that contain the prefix `vqt_`


class FrozenPass(Protocol):
    """What the frozen pass left behind earlier, such as a `FrozenPassCache`."""

    def look_up(
        self, layer: VQTLayer, adapter: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Frozen], torch.Tensor, Any] | None:
        """Keys and values of each layer, the class token and a stand-in for the backbone's output; `None`: unknown."""


@dataclass
class _Reading:
    """One forward of the model with an adapter active."""

    adapter: str
    stack: ExitStack
    grad: bool = False  # whether autograd was on when the backbone was called
    rows: list[QueryRows] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    class_token: torch.Tensor | None = None


class VQTLayer(ReaderLayer):
    """The one layer of VQT, a child of the model named `vqt`: queries `vqt_queries` and head `vqt_head` per adapter.

    It stands beside the model's own modules and not around them, so that their names, and with them the keys of
    other adapters, stay what they are.
    """

    adapter_layer_names = ("vqt_queries", "vqt_pool", "vqt_head")
    vqt_queries: nn.ModuleDict
    vqt_pool: nn.ModuleDict
    vqt_head: nn.ModuleDict

    child = CHILD
    method = "VQT"
    configs: dict[str, VQTConfig]

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.cache: FrozenPass | None = None
        self.penalised_steps = 0  # how often a group lasso was added to the loss
        self._reading: _Reading | None = None
        self._is_paused = False
        super().__init__(model, family)

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
        self.start_at_random(adapter_name, config)
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

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: VQT adds tokens and features to the model, which no weight of it "
            "can hold. Keep the adapter: `save_pretrained` writes its queries and head, a few hundred kilobytes that "
            "load on the untouched base model, and several of them can share one frozen pass."
        )

    # One forward

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._close()  # a forward that was interrupted from the keyboard has left its own behind
        adapter = None if self._is_paused else self.reading_adapter()
        if adapter is None:
            return
        stack = ExitStack()
        reading = self._reading = _Reading(adapter, stack)
        backbone = self.backbone
        stack.enter_context(replaced_forward(backbone, partial(self._run_backbone, reading, backbone.forward)))
        head = model.get_submodule(self.family.head)
        before_head = model.get_submodule(self.family.class_token or self.family.head)
        stack.callback(before_head.register_forward_pre_hook(partial(self._take_class_token, reading)).remove)
        stack.callback(head.register_forward_hook(partial(self._answer, reading)).remove)

    def _run_backbone(self, reading: _Reading, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        family, backbone, blocks = self.family, self.backbone, self.blocks(reading.adapter)
        reading.grad = torch.is_grad_enabled()
        embedding_dropout = self.configs[reading.adapter].embedding_dropout if self.training else 0.0
        if self.cache is not None:
            if embedding_dropout > 0:
                raise ValueError(
                    "`embedding_dropout` draws another frozen pass at each step, which no cache holds: train without "
                    "the cache, or with `embedding_dropout=0`."
                )
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
        dropout = EmbeddingDropout(backbone, embedding_dropout)
        with torch.set_grad_enabled(reading.grad and trains_backbone), dropout, Capture(family, blocks, on_block):
            output = forward(*args, **kwargs)
        for found in later:
            read(*found)
        if rerun:
            reading.outputs = rerunnable(
                family, backbone, blocks, reading.rows, reading.outputs, dropout, args, kwargs
            )
        return output

    def _rows(self, adapter: str, batch: int) -> list[QueryRows]:
        return self.vqt_queries[adapter](batch)

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

    @torch.compiler.disable
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
                Capture(self.family, self.blocks(adapter), lambda index, frozen: found.append(frozen)),
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
    names = layer.active_names() if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in layer.configs:
        raise ValueError(
            f"`adapter_name` must be one of the VQT adapters {sorted(layer.configs)}, got {adapter_name!r}."
        )
    return names[0]
