"""Calibration's arithmetic at a size for a CPU: every figure is there, positive, and makes the measured step come out again."""

import time
from collections.abc import Callable

import pytest
import torch

from loragraft.train import machine_calibration as calibration
from loragraft.train.op_cost import OpCost
from loragraft.train.preflight import GIB
from loragraft.train.roofline import CARDS, Machine, run_seconds


def _once(run: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "time_of", _once)
    sizes = {"M": 64, "D": 128, "MLP": 256, "HEADS": 1, "COPIED": 2**16, "EDGE": 64, "TOKENS": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.mark.usefixtures("_small")
def test_every_figure_is_measured() -> None:
    cpu = torch.device("cpu")
    machine = Machine("here", GIB, {}, 0.0, 0.0, 0.0, calibrated=True)
    machine = calibration._rates(machine, cpu)
    assert machine.rates.keys() == CARDS[0].rates.keys()
    assert min(machine.rates.values()) > 0
    assert machine.bandwidth > 0
    machine = calibration._host(machine, cpu)
    assert 0 < machine.host_op <= machine.host_custom
    assert calibration._corrected(machine, cpu).correction > 0


@pytest.mark.usefixtures("_small")
def test_the_correction_makes_the_block_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = CARDS[0]
    step = calibration._timed_step(1, 1, 64, 16, torch.device("cpu"), quantized=True)
    monkeypatch.setattr(calibration, "_timed_step", lambda *args, **kwargs: step)
    corrected = calibration._corrected(machine, torch.device("cpu"))
    assert run_seconds(step[1], corrected, host=False) == pytest.approx(step[0])
    assert all(isinstance(cost, OpCost) for counts in step[1].ops.values() for cost in counts)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration measures a GPU"):
        calibration.calibrate(torch.device("cpu"))
