"""SDNQ's products compiled beside one another and tuned before its first step; the figures are those of its own choices.

Its Triton product is compiled anew for each M, N, K and presence of a bias, in each of 18 tiles, one after the other: a step over
FLUX.1 has 18 such products, 324 compilations of 0.5 to 1 s each, beside some 30 graphs of torch's compiler (4 quantize, 4
dequantize, 22 round to INT8). A rehearsed step that launches no product compiles all of them in threads; a second one lets the
package time its tiles as it does anyway, for 25 ms each instead of 100. Every tile stays in the choice.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor

TUNE_MS, WARM_MS = 25, 5


def rehearse(step: Callable[[], object], tell: Callable[[str], None]) -> None:
    """Runs `step` (forward and backward) twice: compiling, then choosing tiles. Gradients of the first are of no use."""
    from sdnq.kernels.triton_scaled_mm import sdnq_scaled_mm_kernel as kernel

    products = compile_beside(kernel, step)
    tell(f"{products} products compiled")
    with patch.object(kernel, "_do_bench", partial(triton.testing.do_bench, warmup=WARM_MS, rep=TUNE_MS)):
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
