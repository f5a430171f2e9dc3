"""Kernels are compiled beside the caller and not launched, on one stream and from every thread that uses it."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from loragraft.kernels.adamw8bit import BLOCK, adamw8bit_kernel
from loragraft.kernels.row_product import row_product_kernel
from loragraft.train import warm

OURS, OTHER = "the warming stream", "another stream"


class Hopper:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[tuple[str, str]]]:
    """(kernel, thread) of everything that is compiled, for a GPU that is not there."""
    found: list[tuple[str, str]] = []

    def listen(*, src: Any, **_: Any) -> None:
        found.append((src.name, threading.current_thread().name))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: OURS)
    kernels = (adamw8bit_kernel, row_product_kernel)
    caches = [dict(kernel.device_caches) for kernel in kernels]
    monkeypatch.setattr(driver, "_active", Hopper())
    for kernel in kernels:
        kernel.device_caches.clear()
    try:
        yield found
    finally:
        for kernel, cache in zip(kernels, caches, strict=True):
            kernel.device_caches.clear()
            kernel.device_caches.update(cache)


def optimizer_launch() -> None:
    numbers = (1.0, 0.1, 0.9, 0.1, 0.99, 0.01, 1.0, 1e-8)
    tables = (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32))
    state = (torch.zeros(2, BLOCK, dtype=torch.uint8), torch.zeros(2, 1))
    adamw8bit_kernel[(1,)](*tables, *state, BLOCK, 1, *numbers, BLOCKS=4, BLOCK=BLOCK, E_M=3, M_M=4, E_R=3, M_R=5)


def product_launch(rows: int = 64) -> None:
    left, right = torch.zeros(rows, 16, dtype=torch.bfloat16), torch.zeros(rows, 64, dtype=torch.bfloat16)
    sizes = {"BM": 64, "BR": 16, "BC": 64}
    row_product_kernel[(1, 1)](
        left, right, None, torch.zeros(16, 64), rows, 16, 64, 16, 64, rows, HAS_SCALE=False, **sizes
    )


def test_launches_become_compilations_on_other_threads(compiled: list[tuple[str, str]]) -> None:
    with warm.compiling_only(OURS):  # type: ignore[arg-type]
        optimizer_launch()
        backward = threading.Thread(target=product_launch)  # as autograd's thread does
        backward.start()
        backward.join()
        product_launch(128)  # the same kernel once more
    assert sorted(name for name, _ in compiled) == ["adamw8bit_kernel", "row_product_kernel"]
    assert all(thread.startswith("compile") for _, thread in compiled)
    (cache, *_) = row_product_kernel.device_caches[0]
    assert [type(kernel).__name__ for kernel in cache.values()] == ["CompiledKernel"]  # what a launch looks for


def test_other_streams_launch_as_ever(compiled: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[bool] = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, warmup, **options: launched.append(warmup))
    before = triton.JITFunction.run
    with warm.compiling_only(OURS):  # type: ignore[arg-type]
        optimizer_launch()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: OTHER)
        optimizer_launch()
    assert launched == [True, False]
    assert triton.JITFunction.run is before


def test_one_layer_of_every_kind_is_launched(tiny_flux: Any) -> None:
    """At the rows that a step gives it: modulation reads one a sample, and its layers need no adapter to be warmed."""
    model, parameters = tiny_flux()
    kinds = warm.layer_kinds(model)
    shapes = {(base.in_features, base.out_features): (base.numerics, type(module).__name__) for base, module in kinds}
    assert len(shapes) == len(kinds) == 6
    assert shapes[128, 512] == shapes[640, 128] == ("w4a8", "SVDQuantLoraLinear")
    assert shapes[128, 768] == shapes[128, 384] == ("w4a16", "SVDQuantLinear")
    seen: list[tuple[tuple[int, ...], bool]] = []
    for _, module in kinds:
        module.register_forward_pre_hook(lambda _, args: seen.append((tuple(args[0].shape), args[0].requires_grad)))
    latents, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 64)
    tokens = warm.token_counts({"latents": latents, "prompt_embeds": text})
    warm.launch_kinds(kinds, tokens, 2, torch.float32)
    assert sorted(seen) == sorted(
        [((2, 128), False)] * 2 + [((rows, K), True) for rows in (32, 10, 42) for K in (128, 128, 512, 640)]
    )
    assert all(parameter.grad is None for parameter in parameters)


def test_workers_are_started_beside_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    begun: list[str] = []
    for name in ("warm_pool", "wakeup"):
        monkeypatch.setattr(
            AsyncCompile, name, lambda name=name: begun.append(f"{name} on {threading.current_thread().name}")
        )
    warm.start_workers().join()
    assert begun == ["warm_pool on start-compile-workers", "wakeup on start-compile-workers"]
