"""Kernels that our ops launch from Python, against those that Triton's interpreter was asked to run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import empty
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from loragraft.kernels import hopper_gemm, hopper_quant
from loragraft.train.launches import PRODUCT, QUANTIZER, Launches, launches_of
from loragraft.train.op_cost import _COSTS


def test_ops_launch_what_is_counted() -> None:
    command = [sys.executable, str(Path(__file__).with_name("count_launches.py"))]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line for line in lines if line[1] != line[2]] == []
    elsewhere = {
        name for name in _COSTS if name.startswith(("attention", "dry_"))
    }  # launched by others' code, or by none
    assert {name for name, *_ in lines} == _COSTS.keys() - elsewhere


def test_nothing_is_launched_for_no_rows() -> None:
    assert launches_of("quantize_activation", (empty(0, 64),)) == Launches()
    assert launches_of("quantize_activation", (empty(1, 64),)) == Launches(quantizers=1)


def test_descriptors_make_a_launch_slow() -> None:
    """A layer that shares codes prepares the product alone; a small kernel is the unit."""
    x = empty(4, 64)
    alone, shared = (launches_of("w4a8_linear", (x,) * 13 + rest) for rest in ((), (x, x)))
    assert (shared.weight, alone.weight) == (PRODUCT, PRODUCT + QUANTIZER)
    assert launches_of("w4a16_dx", (x,) * 6).weight == 1 < QUANTIZER < PRODUCT


class _Launch:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


def test_hoppers_kernels_have_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of a product, two of a quantizer: what PRODUCT and QUANTIZER were measured with."""
    made = []
    real = TensorDescriptor.from_tensor

    def noted(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(TensorDescriptor, "from_tensor", staticmethod(noted))
    monkeypatch.setattr(hopper_gemm, "hopper_gemm_kernel", _Launch())
    monkeypatch.setattr(hopper_quant, "hopper_quant_kernel", _Launch())
    card = SimpleNamespace(name="card", multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    x, codes = empty(8, 128, dtype=torch.bfloat16), empty(8, 128, dtype=torch.int8)
    scale, h, up = empty(8, 1), empty(8, 32, dtype=torch.bfloat16), empty(64, 32, dtype=torch.bfloat16)
    weight, words = empty(64, 64, dtype=torch.uint8), empty(1, 64, dtype=torch.int32)
    hopper_gemm.hopper_gemm(codes, scale, weight, words, empty(64), h, up, None)
    assert len(made) == 5
    hopper_quant.hopper_quantize_down(x, None, True, empty(32, 128, dtype=torch.bfloat16))
    assert len(made) == 7
