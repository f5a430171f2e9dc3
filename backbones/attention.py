"""Which kernels a diffusers model's attention runs: PyTorch's own, or those of `kernels/attention.py`.

diffusers dispatches on a closed list of names. Ours takes the place of `flash_4_hub`, whose kernel diffusers would fetch from a
hub: the same kernels, and no network.
"""

import logging
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from loragraft.kernels.attention import BACKENDS, attention, attention_runs

AttentionName = Literal["auto", "sdpa", "cudnn", "flash_attn_4"]
_log = logging.getLogger(__name__)
_PLACE = AttentionBackendName.FLASH_4_HUB


def set_attention(transformer: nn.Module, name: AttentionName, device: torch.device) -> str:
    """Makes every attention of `transformer` run `name`; returns the name of what runs.

    `auto` is the first of flash_attn_4, cudnn and sdpa that runs on `device`. Raises ValueError, with the reason, where the
    one asked for does not.
    """
    reasons = {backend: attention_runs(backend, device) for backend in BACKENDS}
    if name == "auto":
        name = next((backend for backend in BACKENDS if not reasons[backend]), "sdpa")  # type: ignore[assignment]
    elif name != "sdpa" and reasons[name]:
        raise ValueError(f"train.attention={name}: {reasons[name]}")
    processors = {
        id(processor): processor
        for module in transformer.modules()
        if hasattr(processor := getattr(module, "processor", None), "_attention_backend")
    }
    if not processors and name != "sdpa":
        raise ValueError(
            f"train.attention={name}: this model's attention cannot be exchanged; use train.attention=sdpa"
        )
    if name != "sdpa":
        _AttentionBackendRegistry._backends[_PLACE] = _BY_NAME[name]
        _AttentionBackendRegistry._supported_arg_names[_PLACE] = {"query", "key", "value", "attn_mask", "scale"}
    for processor in processors.values():
        processor._attention_backend = None if name == "sdpa" else _PLACE
    return name


def _dispatched(backend: str) -> Any:
    def run(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        if attn_mask is not None or scale is not None:
            raise ValueError(f"{backend} attention takes no mask and no scale of its own; use train.attention=sdpa")
        if query.dtype == torch.float32:
            raise ValueError(f"{backend} attention takes 16-bit tensors; use train.attention=sdpa")
        return attention(query, key, value, backend)

    return run


_BY_NAME = {backend: _dispatched(backend) for backend in BACKENDS}
