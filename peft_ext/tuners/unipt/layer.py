"""The one layer of UniPT: the side network and the head of each adapter, and what they do in a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ...architectures import architecture_of
from ...reading import (
    AllFound,
    BackboneCall,
    Kept,
    ReaderHead,
    ReaderLayer,
    Reading,
    StatesCapture,
    may_be_cut_short,
    padding_mask,
    records_outputs,
    same_autocast,
    skipped_blocks,
    split_call,
    with_backward,
)
from .config import UniPTConfig
from .side import SideLinear, SideLinears, SideNetwork, SideNorms


CHILD = "unipt"  # the name of the layer in the model; PEFT skips names that contain the prefix `unipt_`


SIDE = ("unipt_down", "unipt_norm", "unipt_gate", "unipt_proj", "unipt_proj_norm", "unipt_up")


class UniPTLayer(ReaderLayer):
    """The one layer of UniPT, a child of the model named `unipt`: the leaves of the side network, and `unipt_head`."""

    adapter_layer_names = (*SIDE, "unipt_head")
    unipt_down: nn.ModuleDict
    unipt_norm: nn.ModuleDict
    unipt_gate: nn.ModuleDict
    unipt_proj: nn.ModuleDict
    unipt_proj_norm: nn.ModuleDict
    unipt_up: nn.ModuleDict
    unipt_head: nn.ModuleDict

    child = CHILD
    method = "UniPT"
    keeps = "hidden states"
    configs: dict[str, UniPTConfig]

    # Making adapters

    def update_layer(self, adapter_name: str, config: UniPTConfig, **kwargs: Any) -> None:
        width = self.width
        if width % config.reduction_factor:
            raise ValueError(
                f"`reduction_factor` is {config.reduction_factor}, which does not divide the width {width}."
            )
        if config.layers_to_transform is not None and config.layers_to_transform in ([], set(), ()):
            raise ValueError("`layers_to_transform` is empty, so no layer would be read; leave it out to read all.")
        self.configs[adapter_name] = config
        self._own_labels(config)
        assert config.id2label is not None
        states, channels = len(self.blocks(adapter_name)) + 1, width // config.reduction_factor
        self.unipt_down[adapter_name] = SideLinears(states, width, channels)
        if config.identity == "attention":
            self.unipt_norm[adapter_name] = SideNorms(states, channels)
            self.unipt_proj[adapter_name] = SideLinear(channels, channels)
            self.unipt_proj_norm[adapter_name] = SideNorms(1, channels)
        self.unipt_gate[adapter_name] = SideLinear(channels, 1, bias=False)
        self.unipt_up[adapter_name] = SideLinear(channels, width)
        self.unipt_head[adapter_name] = ReaderHead(width * self.family.class_tokens, len(config.id2label))
        self.reset_parameters(adapter_name)
        self.start_at_random(adapter_name, config)
        self._move_to_model(adapter_name)
        self.train(self.model.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def side_leaves(self, adapter: str) -> dict[str, Any]:
        """The leaves of the side network of `adapter`, by what they do."""
        containers = {name.removeprefix(f"{CHILD}_"): getattr(self, name) for name in SIDE}
        return {name: leaves[adapter] for name, leaves in containers.items() if adapter in leaves}

    def side(self, adapter: str) -> SideNetwork:
        """The side network of `adapter`."""
        leaves: dict[str, Any] = {"norm": None, "proj": None, "proj_norm": None, **self.side_leaves(adapter)}
        return SideNetwork(**leaves, residual=self.configs[adapter].residual, first_row=self._has_first_row())

    def _has_first_row(self) -> bool:
        """Whether the first token stands for the input: of images, where there is a class token; of texts, always."""
        config: Any = self.backbone.config
        architecture = architecture_of(config.model_type)
        is_image = hasattr(config, "patch_size")
        return not is_image or (architecture is not None and architecture.leading_rows > 0)

    @torch.no_grad()
    def reset_parameters(self, adapter: str) -> None:
        """The start that the config asks for; see `UniPTConfig`."""
        as_published = self.configs[adapter].init_weights == "published"
        for leaf in self.side_leaves(adapter).values():
            leaf.reset_parameters()
        if not as_published:  # so that the network changes nothing
            for parameter in self.unipt_up[adapter].parameters():
                parameter.zero_()
        head: Any = self.unipt_head[adapter]
        stock = self.model.get_submodule(self.family.head)
        is_alike = type(stock) is nn.Linear and stock.weight.shape == head.weight.shape and stock.bias is not None
        if is_alike and not as_published and not stock.weight.is_meta:
            head.weight.copy_(stock.weight)
            head.bias.copy_(stock.bias)
            return
        nn.init.normal_(head.weight, std=getattr(self.model.config, "initializer_range", 0.02))
        nn.init.zeros_(head.bias)

    def merged_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        raise ValueError(
            f"Cannot merge adapter {adapter_name!r}: UniPT is a network of its own beside the model, which no weight of "
            "the model can hold. Keep the adapter: `save_pretrained` writes the side network and the head, which load "
            "on the untouched base model."
        )

    # One forward

    def _run_backbone(self, reading: Reading, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reading.grad = torch.is_grad_enabled()
        backbone, side = self.backbone, self.side(reading.adapter)
        trains_backbone, rerun = self._modes(reading)
        if self.cache is not None and not records_outputs(backbone, kwargs):
            kept = self.cache.look_up(self, reading.adapter, args, kwargs)
            if kept is not None:
                with skipped_blocks(self.all_blocks, side(kept.states.unbind(1), kept.mask)):
                    return forward(*args, **kwargs)
        mask = padding_mask(backbone, args, kwargs)

        def make(states: list[torch.Tensor]) -> torch.Tensor:
            if trains_backbone:
                return side(states, mask)
            states = [state.detach() for state in states]
            return self._rerunnable(reading.adapter, states, mask, args, kwargs) if rerun else side(states, mask)

        with (
            torch.set_grad_enabled(reading.grad and trains_backbone),
            self._capture(reading.adapter, make, reading.grad),
        ):
            return forward(*args, **kwargs)

    def _capture(
        self, adapter: str, on_states: Callable[[list[torch.Tensor]], torch.Tensor], grad: bool = False
    ) -> StatesCapture:
        return StatesCapture(list(self.blocks(adapter).values()), self.all_blocks[-1], on_states, grad)

    def _rerunnable(
        self,
        adapter: str,
        states: list[torch.Tensor],
        mask: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """The side network's output, with a backward that runs the frozen pass again."""
        backbone, side = self.backbone, self.side(adapter)
        own = [parameter for leaf in self.side_leaves(adapter).values() for parameter in leaf.parameters()]
        leaves = [parameter for parameter in own if parameter.requires_grad]
        if not leaves:
            return side(states, mask)
        with torch.no_grad():
            output = side(states, mask)
        inputs, call_again = split_call(args, kwargs)
        autocast = same_autocast(output.device.type)

        def replay(
            _: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
        ) -> Sequence[Any]:
            again, named = call_again(tensors)
            padding = padding_mask(backbone, tuple(again), named)
            may_stop = may_be_cut_short(backbone)
            found: list[Sequence[Any]] = []

            def read(states: list[torch.Tensor]) -> torch.Tensor:
                with torch.enable_grad():
                    made = side(states, padding)
                found.append(torch.autograd.grad(made, leaves, grads[0], allow_unused=True))
                if may_stop:
                    raise AllFound
                return states[-1]

            if backbone.training:
                backbone.eval()
            with torch.no_grad(), autocast(), self._capture(adapter, read), suppress(AllFound):
                backbone(*again, **named)
            return found[0]

        (made,) = with_backward(replay, leaves, [output], inputs)
        return made

    def _logits(self, reading: Reading, class_token: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.unipt_head[reading.adapter](class_token)
        return logits

    # Looking at the frozen pass

    def frozen_states(
        self, adapter: str, inputs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor, BackboneCall]:
        """The states that `adapter` reads, the padding mask, what the stock head reads, and the backbone's arguments."""
        found: list[torch.Tensor] = []

        def note(states: list[torch.Tensor]) -> torch.Tensor:
            found.extend(states)
            return states[-1]

        class_token, call = self.run_paused(adapter, inputs, self._capture(adapter, note))
        return found, padding_mask(self.backbone, *call), class_token, call

    def to_keep(self, adapter: str, inputs: Mapping[str, Any]) -> tuple[Kept, BackboneCall]:
        """The states of each layer that is read, the last one's output, and which tokens are padding."""
        states, mask, class_token, call = self.frozen_states(adapter, inputs)
        if mask is not None:
            mask = mask.expand(len(class_token), -1)
        return Kept(torch.stack(states, dim=1), states[-1].dtype, class_token[:, :0], mask), call

    @torch.no_grad()
    def confidence(self, adapter: str, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """By layer, how much it counts in each sample, `(B,)`."""
        states, mask, _, _ = self.frozen_states(adapter, inputs)
        found = self.side(adapter).confidence(states, mask)
        return dict(zip(self.blocks(adapter), found.unbind(1), strict=True))
