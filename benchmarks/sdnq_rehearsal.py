"""SDNQ's products compiled beside one another and tuned before its first step; the figures are those of its own choices.

Its Triton product is compiled anew for each M, N, K and presence of a bias, in each of 18 tiles, one after the other, and each is
timed for 100 ms: a step over FLUX.1 has 18 such products, which makes 324 compilations of 0.3 s or more, beside 34 graphs of torch's
compiler (4 quantize, 4 dequantize, 26 round to INT8). A rehearsed step that launches no product compiles them all in threads; a
second one lets the package choose among all its tiles as it does anyway, from 25 ms of each.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor

TUNE_MS, WARM_MS = 25, 5
NOTHING = nullcontext()


def rehearse(
    step: Callable[[], object], tell: Callable[[str], None], alone: AbstractContextManager[None] = NOTHING
) -> None:
    """Runs `step` (forward and backward) twice: compiling, then choosing tiles. Gradients of the first are of no use.

    alone: around the second, whose choice must not depend on what else the GPU does."""
    from sdnq.kernels.triton_scaled_mm import sdnq_scaled_mm_kernel as kernel

    products = compile_beside(kernel, step)
    tell(f"{products} products compiled")
    with alone, patch.object(kernel, "_do_bench", partial(triton.testing.do_bench, warmup=WARM_MS, rep=TUNE_MS)):
        step()
    tell("tiles chosen")


def compile_beside(kernel: Any, step: Callable[[], object]) -> int:
    """Calls `step` with every launch of the autotuned `kernel` replaced by compiling all its tiles in threads.

    Returns how many distinct products were met, after all are compiled; what `step` computes is undefined. A tile that cannot be
    compiled is left to the tuning, which passes it over."""
    met = set()
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        context = (
            contextvars.copy_context()
        )  # backward passes run in a thread of their own, which does not see the mode

        def compile_only(*args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            product = tuple(arg for arg in args if not isinstance(arg, Tensor))
            if product not in met:
                met.add(product)
                context.run(kernel.warmup, *args, grid=grid, **options)

        with patch.object(kernel, "run", compile_only):
            step()
    return len(met)
