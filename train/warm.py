"""What a first step waits for, begun early and beside it: Inductor's worker processes, and the layers' Triton kernels.

    start_workers()      as soon as it is known that blocks will be compiled: while weights are read
    warm_layers(...)     when the first micro-batch is there: every layer's kernels at the sizes to come, on threads of their own

Triton lets go of Python's lock while it lowers a kernel and while ptxas runs, 95 % of the time that a kernel takes: so several
are compiled at once, and the thread that traces the blocks hardly notices.
"""

import contextvars
import os
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

from loragraft.adapters.inject import SVDQuantLoraLinear
from loragraft.kernels.adamw8bit import BLOCK, adamw8bit
from loragraft.quantization.linear import SVDQuantLinear

THREADS = 16
"""Kernels compiled at once, at most; never more than there are cores."""


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


def token_counts(tensors: dict[str, Tensor]) -> set[int]:
    """How many rows the linear layers of a transformer over 2x2 patches get from this micro-batch: image, text, both."""
    b, _c, h, w = tensors["latents"].shape
    image, text = b * (h // 2) * (w // 2), b * tensors["prompt_embeds"].shape[1]
    return {image, text, image + text}


def warm_layers(transformer: nn.Module, tokens: Collection[int], batch: int, dtype: torch.dtype) -> threading.Thread:
    """Starts a thread that compiles what one layer of every kind launches, forward and backward; returns it.

    tokens: row counts of the layers, except for W4A16 ones, which read a row a sample (modulation): batch. The optimizer's
    kernel comes along.
    """
    kinds = layer_kinds(transformer)

    def run() -> None:
        for device in {base.qweight.device for base, _ in kinds}:
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(device), torch.cuda.stream(stream), compiling_only(stream):
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
        assert isinstance(base, SVDQuantLinear)
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


@contextmanager
def compiling_only(stream: torch.cuda.Stream) -> Iterator[None]:
    """Triton kernels launched on `stream` are compiled, all at once on threads of their own, and not run; when this is left,
    they are done. Other streams are left alone.

    The stream says whose launch it is: a backward pass launches from autograd's thread, on the stream of the forward pass.
    """
    launch = JITFunction.run
    with (
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "compile") as executor,
        triton.AsyncCompileMode(executor),
    ):
        mode = contextvars.copy_context()  # the mode belongs to this thread's context, which autograd's thread lacks

        def run(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
            if torch.cuda.current_stream() == stream:
                return mode.run(launch, kernel, *args, warmup=True, **options)
            return launch(kernel, *args, warmup=warmup, **options)

        with mock.patch.object(JITFunction, "run", run):
            yield
