"""Kernels compiled from recorded launches are the ones that the launches ask for, on a GPU that is not there."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import driver

from loragraft.kernels.hopper_quant import hopper_quantize_down
from loragraft.kernels.precompile import compile_recorded, recorded
from loragraft.kernels.row_product import row_product

pytestmark = pytest.mark.not_interpreted
DEVICE = 77  # of its own, as kernels remember what a device is


class Driver:
    """Compute capability 9.0; launching counts."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *kernel: (object(), 0, 32, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(*arguments: Any) -> None:
            self.launches += 1

        return run


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read again at each call: ops on the CPU launch their kernels
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    return made


def compute() -> None:
    """A Triton and a Gluon kernel: absent pointers, numbers that are 1, that 16 divides and that it does not."""
    codes, dy = torch.zeros(40, 320, dtype=torch.int8), torch.zeros(40, 5, dtype=torch.bfloat16)
    row_product(dy, codes, torch.zeros(40, 1))
    row_product(dy, dy)
    x = torch.zeros(40, 320, dtype=torch.bfloat16)
    hopper_quantize_down(x, None, True, x[:16])
    hopper_quantize_down(x, None, True, x[:0])


@pytest.fixture
def another_assembler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Says that it is of another release, and assembles nothing."""
    file = tmp_path_factory.mktemp("bin") / "ptxas"
    file.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.1'\n")
    file.chmod(0o755)
    return str(file)


def test_what_was_recorded_is_found(
    gpu: Driver, tmp_path: Path, another_assembler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded() as launches:
        compute()
        compute()
    assert (gpu.launches, list(tmp_path.iterdir())) == (0, [])
    ours = ["row_product_kernel", "sum_parts_kernel"]
    assert [launch.name for launch in launches] == [*ours, *ours] + ["hopper_quant_kernel"] * 2
    monkeypatch.setenv("TRITON_PTXAS_PATH", another_assembler)  # Inductor's doing, in its workers and later on here
    for launch in launches:
        compile_recorded(launch, str(tmp_path))
    assert os.environ["TRITON_PTXAS_PATH"] == another_assembler
    get_ptxas_version.cache_clear()
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    get_ptxas_version(90)  # what the launching process remembers since it recorded
    monkeypatch.setenv("TRITON_PTXAS_PATH", another_assembler)
    hits: list[bool] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        compute()
    assert hits == [True] * 6
    assert gpu.launches == 6


def test_only_this_threads_launches_of_ours_are_held_back(gpu: Driver) -> None:
    asked: list[str] = []

    def other_hook(*, fn: Any, **_: Any) -> bool:
        asked.append(fn.name)
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = other_hook
        with recorded() as launches:
            elsewhere = triton.runtime.jit.JitFunctionInfo("elsewhere", "theirs", None)
            assert triton.knobs.runtime.jit_cache_hook(fn=elsewhere, compile={})
            thread = threading.Thread(target=row_product, args=(torch.zeros(33, 3), torch.zeros(33, 7)))
            thread.start()
            thread.join()
        assert triton.knobs.runtime.jit_cache_hook is other_hook
    assert (launches, asked[:2]) == ([], ["theirs", "row_product_kernel"])
