"""What a first step waits for, begun early and beside it: the compiler's worker processes, and the layers' Triton kernels.

    start_workers()      as soon as it is known that blocks will be compiled: while weights are read
    warm_layers(...)     when the first micro-batch is there: the workers compile every layer's kernels while blocks are traced

Triton compiles a kernel at its first launch, one after the other and in the way of tracing, which needs Python just as much; the
worker processes do so all at once, before they have anything else to do.
"""

import os
import threading
from collections.abc import Collection
from concurrent.futures import Future

import torch
from torch import nn

from loragraft.adapters.inject import SVDQuantLoraLinear
from loragraft.backbones.attention import Attention
from loragraft.kernels.adamw8bit import BLOCK, adamw8bit
from loragraft.kernels.attention import attention
from loragraft.kernels.precompile import Launch, compile_recorded, recorded
from loragraft.quantization.linear import SVDQuantLinear

HEADS = (24, 128)
"""How many and how wide, FLUX.1's: the size for which the wait is worth shortening. Others are compiled at first use."""


def start_workers(name: Attention = "sdpa", device: torch.device | None = None) -> threading.Thread:
    """Imports the compiler and starts the processes that compile its kernels, on a thread: else the first block does, and waits
    for them. FlashAttention-4, if that is the attention's `name`, compiles its kernels for `device` there too.

    Join the thread before attention is used: that compiler is not made for several threads.
    """

    def run() -> None:
        from torch._inductor import compile_fx  # noqa: F401  (seconds of imports)
        from torch._inductor.async_compile import AsyncCompile
        from triton.runtime.cache import triton_key

        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()
        triton_key()  # a hash of all of Triton's files, which is remembered
        if name == "flash_attn_4" and device is not None and device.type == "cuda":
            with torch.cuda.device(device):  # a thread begins with the first
                q, k, v = torch.zeros(3, 1, 256, *HEADS, dtype=torch.bfloat16, device=device).requires_grad_()
                torch.autograd.backward(attention(q, k, v, name).sum())

    thread = threading.Thread(target=run, name="start-compile-workers", daemon=True)
    thread.start()
    return thread


def warm_layers(transformer: nn.Module, tokens: Collection[int], batch: int, dtype: torch.dtype) -> threading.Thread:
    """Has the worker processes compile what one layer of every kind launches, forward and backward; returns a thread that waits
    for them.

    tokens: row counts of the layers, except for W4A16 ones, which read a row a sample (modulation): batch. The optimizer's
    kernel comes along.
    """
    kinds = layer_kinds(transformer)
    launches: dict[torch.device, list[Launch]] = {}
    for device in {base.qweight.device for base, _ in kinds}:
        # The backward pass on this thread, as it is this thread's launches that are recorded.
        with torch.cuda.device(device), torch.autograd.set_multithreading_enabled(False), recorded() as found:
            launch_kinds([kind for kind in kinds if kind[0].qweight.device == device], tokens, batch, dtype)
        launches[device] = found
    waiting = [future for device, found in launches.items() for future in compile_beside(found, device)]

    def run() -> None:
        for future in waiting:
            future.result()

    thread = threading.Thread(target=run, name="warm-kernels", daemon=True)
    thread.start()
    return thread


def compile_beside(launches: Collection[Launch], device: torch.device) -> list[Future[None]]:
    """Hands kernels to Inductor's worker processes; to none if it has none (`compile_threads` of 1).

    Inductor moves Triton's cache when it makes its first kernel. It is moved now, as what is compiled here is looked up later.
    """
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    if get_compile_threads() <= 1:
        return []
    cache = os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
    pool = AsyncCompile.process_pool()
    return [pool.submit(compile_recorded, launch, cache, device.type == "cuda") for launch in launches]


Kind = tuple[SVDQuantLinear, nn.Module]
"""A layer, and what is called: itself or the adapter's layer around it."""


def layer_kinds(transformer: nn.Module) -> list[Kind]:
    """One layer for every set of kernels."""
    kinds: dict[tuple[object, ...], Kind] = {}
    adapted: set[nn.Module] = set()
    for module in transformer.modules():  # what is around a layer comes before it
        if module in adapted or not isinstance(module, SVDQuantLoraLinear | SVDQuantLinear):
            continue
        base = module.get_base_layer() if isinstance(module, SVDQuantLoraLinear) else module
        if type(base) is not SVDQuantLinear:  # other formats have no kernels of ours, and a convolution reads pictures
            continue
        adapted.add(base)
        numbers = (base.in_features, base.out_features, base.numerics, base.hadamard, base.smoothed, base.bias is None)
        kinds.setdefault((type(module), *numbers), (base, module))
    return list(kinds.values())


def launch_kinds(kinds: Collection[Kind], tokens: Collection[int], batch: int, dtype: torch.dtype) -> None:
    """What a training step launches for these layers, and the optimizer's kernel; what comes out is not looked at."""
    for base, module in kinds:
        modulation, device = base.numerics == "w4a16", base.qweight.device
        for rows in {batch} if modulation else sorted(tokens):
            x = torch.zeros(rows, base.in_features, device=device, dtype=dtype, requires_grad=not modulation)
            y = module(x)
            trained = [t for t in (x, *module.parameters()) if t.requires_grad]
            if trained:
                torch.autograd.grad(y, trained, torch.zeros_like(y))
    for device in {base.qweight.device for base, _ in kinds}:
        factor = torch.zeros(1, device=device)
        codes, scales = torch.zeros(2, BLOCK, dtype=torch.uint8, device=device), torch.zeros(2, 1, device=device)
        adamw8bit([factor], [factor], codes, scales, step=1, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
