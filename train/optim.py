"""The optimizer over the adapter's float32 factors, and its learning-rate schedule (diffusers' `get_scheduler`).

    adamw       torch's; on a GPU its fused kernel, one launch for all factors        8 bytes of state a parameter
    adamw8bit   bitsandbytes': both moments in 8 bits, a scale per 256 values         2 bytes, factors below 4096 values 8

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Dettmers et al., "8-bit Optimizers via
Block-wise Quantization" (2022).
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from loragraft.recipes.schema import OptimConfig

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimConfig, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """(optimizer, schedule). Raises ValueError where `adamw8bit` lacks bitsandbytes."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                'optim.name=adamw8bit needs bitsandbytes: pip install "loragraft[adamw8bit]", or set optim.name=adamw'
            )
        optimizer: torch.optim.Optimizer = import_module("bitsandbytes.optim").AdamW8bit(parameters, **settings)
    else:
        on_gpu = all(parameter.is_cuda for parameter in parameters)
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True if on_gpu else None)
    schedule = get_scheduler(
        SCHEDULES[config.schedule], optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps
    )
    return optimizer, schedule


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments and what belongs to them, each storage once; 0 before the first step."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())
