"""What a first step waits for, begun early and beside it: Inductor's worker processes, and the layers' Triton kernels.

    start_workers()      as soon as it is known that blocks will be compiled: while weights are read
    warm_layers(...)     when the first micro-batch is there: while one thread traces blocks, another launches every layer once

Triton compiles a kernel at its first launch, one after the other, and needs Python for little of that time; so does tracing
the other way round. What is computed here is thrown away.
"""

import threading
from collections.abc import Collection

import torch
from torch import nn

from loragraft.adapters.inject import SVDQuantLoraLinear
from loragraft.kernels.adamw8bit import BLOCK, adamw8bit
from loragraft.quantization.linear import SVDQuantLinear


def start_workers() -> threading.Thread:
    """Imports the compiler and starts the processes that compile its kernels, on a thread: else the first block does, and waits
    for them."""

    def run() -> None:
        from torch._inductor import compile_fx  # noqa: F401  (seconds of imports)
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()

    thread = threading.Thread(target=run, name="start-compile-workers", daemon=True)
    thread.start()
    return thread


def warm_layers(transformer: nn.Module, tokens: Collection[int], batch: int, dtype: torch.dtype) -> threading.Thread:
    """Starts a thread that runs one layer of every kind forward and backward; returns it.

    tokens: row counts of the layers, except for W4A16 ones, which read a row a sample (modulation): batch. The optimizer's
    kernel comes along.
    """
    kinds = layer_kinds(transformer)

    def run() -> None:
        for device in {base.qweight.device for base, _ in kinds}:
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                launch_kinds(kinds, tokens, batch, dtype)

    thread = threading.Thread(target=run, name="warm-kernels", daemon=True)
    thread.start()
    return thread


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
