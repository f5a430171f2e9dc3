"""What the Gluon kernels for Hopper (sm_90) share: the names that moved between Triton 3.6 and 3.9, and when they run."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


def on_hopper(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x lies on an sm_90 device and the arithmetic around it is in 16 bits."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and is_half and torch.cuda.get_device_capability(x.device) == (9, 0)
