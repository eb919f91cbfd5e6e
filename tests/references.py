"""The equations of the methods, dense and in float64: what a module's parameters become under one adapter.

`reference(base, adapter, config, training)`: see `peft_ext.testing.dense`. Written from the papers' formulas and the
files' formats, without the layers.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_ext.sparse import decode


Tensors = dict[str, torch.Tensor]


def ssf(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """y = gamma * h + beta; gamma is stored as its offset from one."""
    gamma = 1 + adapter["ssf_scale.weight"]
    weight = base["weight"]
    result = {"weight": weight * gamma.view(-1, *[1] * (weight.ndim - 1))}
    if "bias" in base:
        result["bias"] = base["bias"] * gamma
    if "ssf_shift.weight" in adapter:
        result["bias"] = result.get("bias", torch.zeros_like(gamma)) + adapter["ssf_shift.weight"]
    return result


def added(parameter: torch.Tensor, adapter: Tensors, leaf: str) -> torch.Tensor:
    """A parameter and the sparse delta of this leaf."""
    values = adapter[f"{leaf}.weight"]
    indices = decode(adapter[f"{leaf}.index"], len(values), parameter.numel()).long()
    return parameter.flatten().index_add(0, indices, values).view(parameter.shape)


def sparse_ft(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + S, b + s."""
    leaves = {"weight": "sparse_ft_delta", "bias": "sparse_ft_bias"}
    return {key: added(base[key], adapter, leaf) for key, leaf in leaves.items() if f"{leaf}.weight" in adapter}


def spt(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + S or W + scale B A, b + s."""
    leaves = {"weight": "spt_delta", "bias": "spt_bias"}
    result = {key: added(base[key], adapter, leaf) for key, leaf in leaves.items() if f"{leaf}.weight" in adapter}
    if "spt_up.weight" in adapter:
        product = adapter["spt_up.weight"] @ adapter["spt_down.weight"]
        result["weight"] = result.get("weight", base["weight"]) + config.scale * product
    return result


def mask_pruning(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """(W + scale B A) diag(m), before the masks begin to learn: m is one in training, [a > 0] in evaluation."""
    weight = base["weight"]
    if "mask_pruning_up.weight" in adapter:
        weight = weight + config.scale * (adapter["mask_pruning_up.weight"] @ adapter["mask_pruning_down.weight"])
    if "mask_pruning_gate.weight" in adapter:
        kept = adapter["mask_pruning_gate.kept"]
        if (kept >= 0).all():
            weight = weight * kept
        elif not training:
            weight = weight * (adapter["mask_pruning_gate.weight"] > 0)
    return {"weight": weight}


def gain(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """(1 + g) (W x + b)."""
    gains = 1 + adapter["gain_vector.weight"]
    result = {"weight": gains[:, None] * base["weight"]}
    return result | {"bias": gains * base["bias"]} if "bias" in base else result


def binary_low_rank(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + scale U D, with 32 bits: a file of fewer has no latents, so that these are not what they were after loading."""
    weight = base["weight"]
    update = config.scale * adapter["binary_low_rank_up.weight"] @ adapter["binary_low_rank_down.weight"]
    return {"weight": weight + (update if update.shape == weight.shape else update.T)}


def s2ft(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W with a dense block added to chosen columns, or to chosen rows where the block is as wide as W."""
    weight, block, chosen = base["weight"], adapter["s2ft_block.weight"], adapter["s2ft_block.indices"].long()
    dim = 1 if block.shape == (len(weight), len(chosen)) else 0
    return {"weight": weight.index_add(dim, chosen, block)}


def low_rank_core(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + B R A."""
    down, core, up = (adapter[f"low_rank_core_matrix.{part}"] for part in ("down", "weight", "up"))
    return {"weight": base["weight"] + up @ core @ down}


def sct(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + E M E^T W, b + E M E^T b + E c."""
    select = torch.eye(len(base["weight"]), dtype=torch.float64)[adapter["sct_map.indices"].long()]
    change = torch.eye(len(base["weight"]), dtype=torch.float64) + select.T @ adapter["sct_map.weight"] @ select
    bias = change @ base["bias"] if "bias" in base else 0.0
    shift = adapter["sct_map.bias"] @ select if "sct_map.bias" in adapter else 0.0
    return {"weight": change @ base["weight"], "bias": bias + shift}


def snell(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + D g(D): distances of points, above their quantile; no gradient goes through the gate."""
    outputs, inputs = adapter["snell_outputs.weight"], adapter["snell_inputs.weight"]
    near, far = (torch.linalg.vector_norm(outputs[h][:, None] - inputs[h], dim=-1) for h in (0, 1))
    matrix = 0.1 * (near - far)
    size = matrix.detach().abs()
    return {"weight": base["weight"] + matrix * (size - torch.quantile(size, config.sparsity)).clamp_min(0)}


def fused_low_rank(base: Tensors, adapter: Tensors, config: Any, training: bool) -> Tensors:
    """W + sum of w_i s_i B_i A_i, of modules with coefficients of their own."""
    coefficients = adapter["fused_low_rank_coefficients.weight"]
    down, up = adapter["fused_low_rank_factors.down"], adapter["fused_low_rank_factors.up"]
    scales = adapter["fused_low_rank_factors.scales"]
    weight, start = base["weight"], 0
    for i, rank in enumerate(config.ranks):
        rows = slice(start, start + rank)
        weight = weight + coefficients[i] * scales[i] * up[:, rows] @ down[rows]
        start += rank
    return {"weight": weight}
