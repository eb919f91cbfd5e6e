"""The one layer of VQT: hooks on the model, and what they do in a forward; `model.py` tells who calls whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core import Dropouts, require_model
from ...core.sharding import is_partitioned
from ...reading import (
    BackboneCall,
    Family,
    Frozen,
    Kept,
    KeysValuesCapture,
    ReaderLayer,
    Reading,
    records_outputs,
)
from .config import VQTConfig
from .frozen import EmbeddingDropout, attend, attention_weights, run_block
from .queries import PoolingWeights, QueryHead, QueryRows, QueryTokens
from .rerun import rerunnable


CHILD = "vqt"  # the name of the layer in the model; PEFT skips names that contain the prefix `vqt_`


@dataclass
class QueryReading(Reading):
    """One forward of the model with an adapter active."""

    rows: list[QueryRows] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    lasso: torch.Tensor | None = None  # the sum of the norms of the head's columns


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
    keeps = "keys and values"
    with_queries = True
    reading_class = QueryReading
    other_param_names = ("dropout",)
    configs: dict[str, VQTConfig]

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__(model, family)
        self.dropout = Dropouts(self.training)
        self.penalised_steps = 0  # how often a group lasso was added to the loss

    # Making and removing adapters

    def update_layer(self, adapter_name: str, config: VQTConfig, **kwargs: Any) -> None:
        self.configs[adapter_name] = config
        self._own_labels(config)
        assert config.id2label is not None
        layers, width = len(self.blocks(adapter_name)), self.width
        per_layer = width * (config.num_queries if config.pooling == "concatenate" else 1)
        features = width * self.family.class_tokens + layers * per_layer
        selected = config.num_selected_features
        if selected is not None and selected > features:
            raise ValueError(f"`num_selected_features` is {selected}, but there are only {features} features.")

        self.vqt_queries[adapter_name] = QueryTokens(layers, config.num_queries, width)
        self.dropout.put(adapter_name, config.dropout)
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

    def _run_backbone(self, reading: QueryReading, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        family, backbone, blocks = self.family, self.backbone, self.blocks(reading.adapter)
        reading.grad = torch.is_grad_enabled()
        if reading.grad and self.training and is_partitioned(backbone):
            raise ValueError(
                "VQT cannot be trained under DeepSpeed ZeRO-3: each block runs twice in a forward, and ZeRO-3 does not "
                "gather its frozen weights for the backward of the second run. Use ZeRO-1, ZeRO-2, FSDP2 "
                "(`fsdp_version: 2`) or DistributedDataParallel."
            )
        trains_backbone, rerun = self._modes(reading)
        embedding_dropout = self.configs[reading.adapter].embedding_dropout if self.training else 0.0
        if self.cache is not None:
            if embedding_dropout > 0:
                raise ValueError(
                    "`embedding_dropout` draws another frozen pass at each step, which no cache holds: train without "
                    "the cache, or with `embedding_dropout=0`."
                )
            kept = self.cache.look_up(self, reading.adapter, args, kwargs)
            if kept is not None:
                return self._read_kept(reading, kept)
        places = {index: place for place, index in enumerate(blocks)}
        later: list[tuple[int, Frozen]] = []

        def read(index: int, frozen: Frozen) -> None:
            if not reading.rows:
                with torch.set_grad_enabled(reading.grad):
                    reading.rows = self._rows(reading.adapter, len(frozen.keys))
            with torch.set_grad_enabled(reading.grad and not rerun):
                reading.outputs[index] = run_block(family, blocks[index], frozen, reading.rows[places[index]]())

        # a block that is run on queries while transformers records hidden states would be recorded too
        on_block = (lambda *found: later.append(found)) if records_outputs(backbone, kwargs) else read
        dropout = EmbeddingDropout(backbone, embedding_dropout)
        capture = KeysValuesCapture(family, blocks, on_block)
        with torch.set_grad_enabled(reading.grad and trains_backbone), dropout, capture:
            output = forward(*args, **kwargs)
        for found in later:
            read(*found)
        if rerun:
            reading.outputs = rerunnable(
                family, backbone, blocks, reading.rows, reading.outputs, dropout, args, kwargs
            )
        return output

    def _read_kept(self, reading: QueryReading, kept: Kept) -> BaseModelOutputWithPooling:
        """Runs the queries on keys and values of a cache; returns a stand-in for the output of the backbone."""
        reading.class_token = kept.class_token
        reading.rows = self._rows(reading.adapter, len(kept.states))
        for place, (index, block) in enumerate(self.blocks(reading.adapter).items()):
            call = kept.calls[place]
            frozen = Frozen(
                keys=kept.states[:, 2 * place],
                values=kept.states[:, 2 * place + 1],
                mask=None if kept.mask is None else kept.mask[:, place],
                args=tuple(call["args"]),
                kwargs=dict(call["kwargs"]),
                dtype=kept.dtype,
            )
            reading.outputs[index] = run_block(self.family, block, frozen, reading.rows[place]())
        # only its shape matters: the head's own input is replaced by the class token
        nothing = kept.class_token.new_zeros(())
        return BaseModelOutputWithPooling(
            last_hidden_state=nothing.expand(len(kept.states), kept.states.shape[2], self.width),
            pooler_output=nothing.expand(len(kept.states), self.width),
        )

    def _rows(self, adapter: str, batch: int) -> list[QueryRows]:
        return self.vqt_queries[adapter](batch, self.dropout.acting(adapter))

    def _logits(self, reading: QueryReading, class_token: torch.Tensor) -> torch.Tensor:
        features = self._features(reading.adapter, class_token, list(reading.outputs.values()))
        head: Any = self.vqt_head[reading.adapter]
        if self.configs[reading.adapter].group_lasso == 0 or not (self.training and torch.is_grad_enabled()):
            logits: torch.Tensor = head(features)
        else:
            logits, reading.lasso = head(features, with_lasso=True)
        return logits

    def _features(self, adapter: str, class_token: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        """f `(B, F)` from x `(B, D)` and Z_l `(B, T, D)`."""
        if adapter in self.vqt_pool:
            pooled = self.vqt_pool[adapter](outputs)
        elif self.configs[adapter].pooling == "mean":
            pooled = [z.mean(1) for z in outputs]
        else:
            pooled = [z.flatten(1) for z in outputs]
        return torch.cat([F.normalize(part, dim=-1) for part in (class_token, *pooled)], dim=-1)

    def _finish(self, reading: QueryReading, kwargs: dict[str, Any], output: Any) -> Any:
        if reading.lasso is None:
            return None
        penalty = self.configs[reading.adapter].group_lasso * reading.lasso
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

    # Looking at the frozen pass

    def frozen_pass(self, adapter: str, inputs: Mapping[str, Any]) -> tuple[list[Frozen], torch.Tensor, BackboneCall]:
        """What the frozen pass leaves behind in each layer, x, and the arguments that the backbone was called with."""
        found: list[Frozen] = []
        capture = KeysValuesCapture(self.family, self.blocks(adapter), lambda index, frozen: found.append(frozen))
        class_token, call = self.run_paused(adapter, inputs, capture)
        return found, class_token, call

    def to_keep(self, adapter: str, inputs: Mapping[str, Any]) -> tuple[Kept, BackboneCall]:
        """Keys and values of each layer, the masks of its keys, and x."""
        found, class_token, call = self.frozen_pass(adapter, inputs)
        masks = [one.mask.expand(len(class_token), -1, -1, -1) for one in found if one.mask is not None]
        calls = [
            {"args": [_plain(value) for value in one.args], "kwargs": {k: _plain(v) for k, v in one.kwargs.items()}}
            for one in found
        ]
        states = torch.stack([part for one in found for part in (one.keys, one.values)], dim=1)
        mask = torch.stack(masks, dim=1) if masks else None  # (B, L, heads or 1, 1, N)
        return Kept(states, found[0].dtype, class_token, mask, calls), call

    @torch.no_grad()
    def attention_maps(self, adapter: str, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """By layer, the weights `(B, heads, T, N)` with which the queries of `adapter` read the tokens."""
        maps: dict[int, torch.Tensor] = {}
        frozen_layers, _, _ = self.frozen_pass(adapter, inputs)
        queries = self.vqt_queries[adapter](1)
        for place, (index, block) in enumerate(self.blocks(adapter).items()):

            def look(
                family: Family, attention: nn.Module, frozen: Frozen, hidden_states: torch.Tensor, *_: Any, **__: Any
            ) -> tuple[torch.Tensor, None]:
                maps[index] = attention_weights(family, attention, frozen, hidden_states)  # noqa: B023
                return attend(family, attention, frozen, hidden_states)

            frozen = frozen_layers[place]
            rows = queries[place].rows.expand(len(frozen.keys), -1, -1)
            run_block(self.family, block, frozen, rows, look)
        return maps


def _plain(value: Any) -> Any:
    """`value` if JSON can hold it (a tuple becomes a list), else `None`, as for tensors: queries need no other."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def layer_of(model: nn.Module) -> VQTLayer:
    """The VQT layer of a model, wrapped by PEFT or not.

    Raises:
        ValueError: The model has none.
    """
    require_model(model)
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
