"""Products are compiled once each and not launched, also where the launch comes from another thread; the kernel is left as it was."""

import threading
from collections.abc import Callable
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime._async_compile import active_mode

TILES = 3


class Kernel:
    """An autotuned kernel as Triton's: `warmup` compiles each tile, within the active mode if there is one."""

    def __init__(self) -> None:
        self.compiled: list[tuple[int, int]] = []

    def run(self, *args: Any, grid: Any, warmup: bool) -> None:
        raise AssertionError("launched")

    def warmup(self, *args: Any, grid: Any) -> None:
        mode = active_mode.get()
        assert mode is not None
        ends = [lambda *_: None] * (
            len(signature(mode.submit).parameters) - 2
        )  # one or, in later releases of Triton, two
        for tile in range(TILES):
            mode.submit((args[-1], tile), partial(self.compile, args[-1], tile), *ends)

    def compile(self, size: int, tile: int) -> None:
        if tile == 0:
            raise RuntimeError("too large for the chip")
        self.compiled.append((size, tile))


@pytest.fixture(scope="module")
def rehearsal(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("sdnq_rehearsal")


def test_each_product_is_compiled_once_and_none_launched(rehearsal: ModuleType) -> None:
    kernel = Kernel()

    def launch(*sizes: int) -> None:
        for size in sizes:
            kernel.run(torch.empty(1), None, size, grid=None, warmup=False)

    def step() -> None:
        launch(16, 32, 16)
        backward = threading.Thread(target=launch, args=(32, 64))
        backward.start()
        backward.join()

    assert rehearsal.compile_beside(kernel, step) == 3
    assert sorted(kernel.compiled) == [(size, tile) for size in (16, 32, 64) for tile in range(1, TILES)]
    with pytest.raises(AssertionError, match="launched"):
        launch(16)


def test_a_step_that_fails_leaves_the_kernel_as_it_was(rehearsal: ModuleType) -> None:
    kernel = Kernel()

    def step() -> None:
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        rehearsal.compile_beside(kernel, step)
    assert "run" not in vars(kernel)
    assert active_mode.get() is None
