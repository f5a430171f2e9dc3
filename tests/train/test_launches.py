"""Kernels that our ops launch from Python, against those that Triton's interpreter was asked to run."""

import os
import subprocess
import sys
from pathlib import Path

from torch import empty

from loragraft.train.launches import launches_of
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
    assert launches_of("quantize_activation", (empty(0, 64),)) == 0
    assert launches_of("quantize_activation", (empty(1, 64),)) == 1
