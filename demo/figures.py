"""Memory and model size: what was measured on this process, and what follows from the shapes of its tensors."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.quantization.branched import BranchedLinear

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of this process, in MiB."""

    resident: float
    peak_resident: float
    """Highest since the process began."""
    peak_cuda: float | None
    """Highest that torch held allocated on the GPU; None without one."""


def memory(device: torch.device) -> Memory:
    """Now. `ru_maxrss` counts KiB on Linux and bytes on macOS (getrusage(2))."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = psutil.Process().memory_info().rss / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
    return Memory(
        resident=resident,
        peak_resident=max(peak, resident),  # the kernel updates the peak in batches, so it may lag behind
        peak_cuda=torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None,
    )


@dataclass(frozen=True)
class ModelSize:
    """Of a transformer, in MiB, counted from its tensors."""

    int4: float | None
    """Codes, scales, branches and what stays in 16 bits; None for a model that is not quantized."""
    full: float
    """The same layers with 16-bit weights."""


def model_size(transformer: nn.Module) -> ModelSize:
    """INT4: bytes of every INT4 layer's buffers, plus 2 for each other parameter. 16-bit: 2 (N K + bias) per layer.

    Parameters that a CPU holds in float32 to compute with count as the 16 bits that they are on disk. Call it before
    grafting: a graft makes branches longer.
    """
    packed, unpacked, others = 0, 0, 0
    for module in transformer.modules():
        if isinstance(module, BranchedLinear):
            packed += module.nbytes
            bias = module.out_features if module.bias is not None else 0
            unpacked += 2 * (module.in_features * module.out_features + bias)
        else:
            others += sum(2 * parameter.numel() for parameter in module.parameters(recurse=False))
    return ModelSize((packed + others) / MIB if packed else None, (unpacked + others) / MIB)


def adapter_size(adapters: Sequence[Adapter]) -> float:
    """MiB of the factors in 16 bits, as a graft holds them."""
    return sum(2 * factor.numel() for adapter in adapters for pair in adapter.pairs.values() for factor in pair) / MIB
