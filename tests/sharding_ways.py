"""The ways in which `sharding.py` wraps a model, and the device that it does it on.

`PEFT_EXT_DEVICE=cuda` takes the GPU, with one process and nccl; otherwise two processes run on the CPU with gloo.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel


DEVICE = os.environ.get("PEFT_EXT_DEVICE", "cpu")
PROCESSES, BACKEND = (2, "gloo") if DEVICE == "cpu" else (1, "nccl")
ROWS = 4  # of a micro-batch, over all processes


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    # a large eps: Adam makes whole steps of gradients that are nothing but rounding
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, eps=1e-3, weight_decay=0.1)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    kinds = set(model.get_base_model()._no_split_modules)  # type: ignore[operator]
    return [module for module in model.modules() if type(module).__name__ in kinds]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: nn.Module, use_orig_params: bool, leaves: bool = True) -> nn.Module:
    kinds = {type(block) for block in blocks_of(model)}
    policy = (
        fsdp_auto_wrap_policy(model) if leaves else (lambda module, recurse, **_: recurse or type(module) in kinds)
    )
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu" if DEVICE == "cpu" else f"{DEVICE}:0"),
    )


def fsdp2(model: nn.Module, units: str) -> nn.Module:
    mesh = dist.init_device_mesh(DEVICE, (dist.get_world_size(),))
    if units == "policy":
        policy: Any = fsdp_auto_wrap_policy(model)
        chosen = [m for m in model.modules() if m is not model and policy(m, recurse=False, nonwrapped_numel=0)]
    else:
        chosen = blocks_of(model) if units == "blocks" else []
    for module in [*reversed(chosen), model]:
        fully_shard(module, mesh=mesh)
    return model


def zero(model: nn.Module, stage: int) -> Any:
    """DeepSpeed's engine, which makes the steps itself."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=BACKEND)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = optimizer_for(model)
    (group,) = (
        optimizer.param_groups
    )  # what must not decay has a group of its own, as under DeepSpeed users must have it
    undecayed = [
        p for key, p in model.named_parameters() if p.requires_grad and re.search(r"\.(ssf_|mask_.*_gate)", key)
    ]
    if undecayed:
        kept = {id(parameter) for parameter in undecayed}
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in kept]
        optimizer.add_param_group({"params": undecayed, "weight_decay": 0.0})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp,
    "fsdp2-policy": partial(fsdp2, units="policy"),
    "fsdp2-blocks": partial(fsdp2, units="blocks"),
    "fsdp2-root": partial(fsdp2, units="root"),
    "fsdp1-orig": partial(fsdp1, use_orig_params=True),
    "fsdp1-orig-blocks": partial(fsdp1, use_orig_params=True, leaves=False),
    "fsdp1-flat": partial(fsdp1, use_orig_params=False),
    **{f"zero{stage}": partial(zero, stage=stage) for stage in (1, 2, 3)},
}
TITLES = {
    "ddp": "DDP",
    "fsdp2-policy": "FSDP2, PEFT's policy",
    "fsdp2-blocks": "FSDP2, blocks",
    "fsdp2-root": "FSDP2, root",
    "fsdp1-orig": "FSDP1 `use_orig_params`, PEFT's policy",
    "fsdp1-orig-blocks": "FSDP1 `use_orig_params`, blocks",
    "fsdp1-flat": "FSDP1 flat, PEFT's policy",
    **{f"zero{stage}": f"DeepSpeed ZeRO-{stage}" for stage in (1, 2, 3)},
}
