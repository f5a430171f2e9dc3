"""Calibration's arithmetic at a size for a CPU: every figure is there, positive, and makes the measured step come out again."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from loragraft.quantization.linear import SVDQuantLinear
from loragraft.train import machine_calibration as calibration
from loragraft.train.preflight import GIB
from loragraft.train.roofline import CARDS, Machine, run_seconds


def _once(run: Callable[[], object], repeats: int = 1, together: int = 1) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _Launched:
    """A step that is launched anew each time, in the place of a CUDA graph."""

    def __init__(self, loss: Callable[[object], torch.Tensor], *_: object) -> None:
        self.loss = loss

    def __call__(self, tensors: dict[str, torch.Tensor], *, last: bool) -> None:
        torch.autograd.backward(self.loss(tensors))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "time_of", _once)
    monkeypatch.setattr(calibration, "GraphStep", _Launched)
    monkeypatch.setattr(calibration, "replayed", lambda run: run)
    sizes: dict[str, object] = {"M": 64, "D": 128, "MLP": 256, "HEADS": 1, "COPIED": 2**16, "BLOCKS": 1}
    sizes |= {
        "LINEAR": (2, 4, 16),
        "DEPTHWISE": (8, 8),
        "GROUP_NORM": (32, 8),
        "NARROW": (1, 64, 16),
        "MIDDLE": (1, 64, 16),
        "LARGE": (1, 128, 16),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.mark.usefixtures("_small")
def test_every_figure_is_measured() -> None:
    cpu = torch.device("cpu")
    machine = calibration._rates(calibration.unmeasured("here", GIB), cpu)
    assert machine.rates.keys() == CARDS[0].rates.keys()
    assert min(machine.rates.values()) > 0
    assert machine.bandwidth > 0
    machine = calibration._host(machine, cpu)
    assert 0 < machine.host_op <= machine.host_custom
    assert 0 < machine.host_infer_op <= machine.host_infer
    machine = calibration._corrected(machine, cpu)
    assert 0 <= machine.gpu_op <= min(machine.gpu_forward, machine.gpu_gradient)


def test_layers_are_rotated_as_the_bases_are() -> None:
    """Then what reads one x shares its codes: quantizing is an op of its own, and a layer's op launches something else."""
    timed = calibration.flux(1, 1)
    layers = [module for module in timed.modules() if isinstance(module, SVDQuantLinear) and module.numerics == "w4a8"]
    assert layers
    assert all(layer.hadamard and not layer.smoothed for layer in layers)


@pytest.mark.usefixtures("_small")
def test_the_corrected_steps_come_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps that took what a known machine predicts give that machine's figures back."""
    known = replace(CARDS[0], gpu_op=3e-6, gpu_forward=4e-5, gpu_gradient=2e-5, correction=1.2)
    timed = calibration._timed

    def as_predicted(*args: Any, **kwargs: Any) -> calibration.Timed:
        run = timed(*args, **kwargs).run
        return calibration.Timed(run_seconds(run, known, host=False), run)

    monkeypatch.setattr(calibration, "_timed", as_predicted)
    plain = replace(known, gpu_op=0.0, gpu_forward=0.0, gpu_gradient=0.0, correction=1.0)
    # The plain step's own roofline is taken as it is, so that it must not be corrected here.
    monkeypatch.setattr(calibration.Timed, "roofline", _corrected_where_plain(calibration.Timed.roofline))
    found = calibration._corrected(plain, torch.device("cpu"))
    assert found.gpu_op == pytest.approx(3e-6)
    assert found.gpu_forward == pytest.approx(4e-5)
    assert found.gpu_gradient == pytest.approx(2e-5)
    assert found.correction == pytest.approx(1.2)


def _corrected_where_plain(
    roofline: Callable[[calibration.Timed, Machine], float],
) -> Callable[[calibration.Timed, Machine], float]:
    return lambda timed, machine: roofline(timed, machine) * (1.2 if sum(timed.counts()[1:]) == 0 else 1.0)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration measures a GPU"):
        calibration.calibrate(torch.device("cpu"))
