"""Quantised modules: their weight dequantised, and the gradient of a loss with respect to it.

A quantised weight has no gradient, but the weight W that it stands for has one, which the module's input and the gradient of
its output give: for y = x W^T it is dL/dy^T x. `QuantisedWeight` takes W's place in a sensitivity pass; W itself is not made.

bitsandbytes reorders 4-bit weights in a forward without gradients on some CPUs, and multiplies with reordered weights by a
kernel that has no backward: after an evaluation nothing is trained any more, without an error. `keep_order` prevents it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from .offloading import is_offloaded, onloaded, working_device
from .targets import linear_features


_REORDERS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it may reorder
_ORDER = "_peft_ext_may_reorder"  # on such a module: what that was before


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is a Linear of which a backend that PEFT knows has quantised the weight."""
    weight = getattr(module, "weight", None)
    if type(weight).__module__.startswith("torchao."):
        return True
    if not hasattr(module, "W_q") and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return False
    return linear_features(module) is not None


class QuantisedWeight(nn.Parameter):
    """Stands for the weight `(outputs, inputs)` of a quantised or offloaded Linear in a pass; its values take no memory.

    Once `attach` is called, a backward through the module adds the gradient of the dequantised weight to its `grad`.
    """

    module: nn.Module

    @staticmethod
    def of(module: nn.Module) -> QuantisedWeight:
        features = linear_features(module)
        assert features is not None
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else torch.device(getattr(module, "device", "cpu"))
        device = working_device(module, device)
        weight = QuantisedWeight(torch.zeros(1, device=device).expand(features[1], features[0]))
        weight.module = module
        return weight

    def attach(self) -> Any:
        """Hooks it to its module; returns the handle."""

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            product = _WithWeight.apply(output, args[0].detach(), self)
            assert isinstance(product, torch.Tensor)
            return product

        return self.module.register_forward_hook(hook)

    def values(self) -> torch.Tensor:
        """The dequantised weight; see `dequantised`."""
        return dequantised("", self.module)


class _WithWeight(torch.autograd.Function):
    """The output of a quantised module, to which the gradient of its weight is tied."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x,) = grads, ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).float()
        return grad, None, rows.T @ x.reshape(-1, x.shape[-1]).float()


def weight_of(module: nn.Module) -> nn.Parameter:
    """What a sensitivity pass looks at of a module: its weight, or what stands for a quantised or offloaded one."""
    has_none = is_quantised(module) or (isinstance(module, nn.Linear) and is_offloaded(module))
    weight: Any = QuantisedWeight.of(module) if has_none else module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def dequantised(name: str, module: Any) -> torch.Tensor:
    """The weight of a module, dequantised if need be; `name` is for the error.

    Raises:
        ValueError: PEFT cannot undo this quantisation.
    """
    put_in_order(module)
    with onloaded(module):
        weight = _dequantised(name, module)
        return weight.clone() if is_offloaded(module) else weight


def _dequantised(name: str, module: Any) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    try:
        if type(weight).__module__.startswith("torchao."):  # whose backend wants to know how to quantise again
            return weight.dequantize()  # type: ignore[union-attr]
        # not `dequantize_module_weight`, which makes a new 8-bit weight that has lost its scales
        backend = resolve_quantization_backend(module)
        return module.weight.detach() if backend is None else backend.get_base_weight(module).detach()
    except (TypeError, AttributeError, NotImplementedError) as error:
        where = f" of {name!r}" if name else ""
        raise ValueError(
            f"The weight{where}, a {type(module).__name__}, cannot be dequantised ({error}). Calibrate on the model "
            "loaded without quantisation; the config that comes out fits both:\n"
            "    dense = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16)\n"
            "    config = peft_ext.calibrate(dense, config, dataloader)"
        ) from error


def put_in_order(module: nn.Module) -> None:
    """Puts a weight back in order that bitsandbytes has reordered."""
    # not `module.weight`, which PEFT's wrapper of trained tokens computes anew each time
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        module.state_dict()


def keep_order(model: nn.Module) -> None:
    """Lets no module of bitsandbytes reorder its weight, and puts those back in order that are; see above."""
    for module in model.modules():
        if getattr(module, _REORDERS, False):
            setattr(module, _ORDER, True)
            setattr(module, _REORDERS, False)
        put_in_order(module)


def allow_order(model: nn.Module) -> None:
    """Undoes `keep_order`."""
    for module in model.modules():
        if _ORDER in vars(module):
            delattr(module, _ORDER)
            setattr(module, _REORDERS, True)


@contextmanager
def in_order(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes reorders no weights; those that may be reordered afterwards are those that could be before."""
    before = [module for module in model.modules() if getattr(module, _REORDERS, False)]
    keep_order(model)
    try:
        yield
    finally:
        for module in before:
            delattr(module, _ORDER)
            setattr(module, _REORDERS, True)
