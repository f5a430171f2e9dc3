"""Calibration's arithmetic at a size for a CPU: every figure is there, positive, and makes the measured step come out again."""

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loragraft.backbones.skeleton import randomize
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.train import machine_calibration as calibration
from loragraft.train.preflight import GIB
from loragraft.train.roofline import CARDS, Host, Machine, run_seconds


def _once(run: Callable[[], object], repeats: int = 1, together: int = 1, warm: int = 0) -> float:
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
    sizes: dict[str, object] = {"M": 64, "D": 128, "MLP": 256, "HEADS": 1, "COPIED": 2**16, "BLOCKS": 2}
    sizes |= {
        "LINEAR": (2, 4, 16),
        "DEPTHWISE": (8, 8),
        "GROUP_NORM": (32, 8),
        "WEIGHT_ONLY": (20, 64, (64, 2048)),
        "NARROW": (1, 64, 16),
        "MIDDLE": (1, 64, 16),
        "LARGE": (1, 128, 16),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.mark.usefixtures("_small")
def test_every_figure_is_measured() -> None:
    cpu = torch.device("cpu")
    machine = calibration._rates(calibration.unmeasured("here", GIB, 132), cpu)
    assert machine.rates.keys() == CARDS[0].rates.keys()
    assert min(machine.rates.values()) > 0
    assert machine.bandwidth > 0
    machine = calibration._corrected(machine, cpu)
    assert 0 <= machine.gpu_op <= min(machine.gpu_forward, machine.gpu_gradient)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("trains", [True, False])
def test_a_known_host_comes_out_again(trains: bool) -> None:
    """Narrow models that took what a host predicts, four times in five, give it back."""
    known = Host(op=3e-5, launch=4e-4, fixed=7e-3)
    times = calibration.HostTimes(torch.device("cpu"), trains=trains)
    shallow, deep, ours = times.counts
    assert shallow.launches == deep.launches == 0 < ours.launches
    assert shallow.ops < deep.ops
    assert (ours.gradients > 0) == trains
    for _ in range(2):
        times.round()
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.seconds)
    exact = [known.fixed + counts.ops * known.op + counts.launches * known.launch for counts in times.counts]
    times.seconds = [[second, 5 * second, second, second] for second in exact]
    found = times.host()
    assert (found.op, found.launch, found.fixed) == pytest.approx((known.op, known.launch, known.fixed))


@pytest.mark.usefixtures("_small")
def test_a_captured_pass_holds_the_weights_that_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses only."""
    drawn: list[weakref.ref[torch.nn.Module]] = []

    def noted(model: torch.nn.Module, *args: Any) -> torch.nn.Module:
        drawn.append(weakref.ref(model))
        return randomize(model, *args)

    monkeypatch.setattr(calibration, "randomize", noted)
    monkeypatch.setattr(calibration, "replayed", lambda _: lambda: None)
    cpu, how = torch.device("cpu"), {"quantized": True, "trains": False, "captured": True}
    prepared = calibration._prepared(calibration.NARROW, 1, cpu, **how)
    gc.collect()
    assert drawn[0]() is not None
    del prepared
    gc.collect()
    assert drawn[0]() is None


def test_contradicting_times_cost_nothing_less_than_nothing() -> None:
    counts = calibration.Counts(100, 0, 0, 0), calibration.Counts(200, 0, 0, 0), calibration.Counts(180, 20, 0, 40)
    assert calibration.host_of((3e-3, 2e-3, 8e-3), counts) == Host(0.0, (8e-3 - 2e-3) / 40, 2e-3)
    assert calibration.host_of((1e-3, 3e-3, 4e-3), counts) == Host(2e-5, 2e-5, 0.0)


def test_the_host_is_timed_in_turn_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the rates, between, and at the end."""
    order: list[str] = []

    class Times:
        def __init__(self, device: torch.device, *, trains: bool) -> None:
            self.name = "step" if trains else "pass"

        def round(self) -> None:
            order.append(self.name)

        def host(self) -> Host:
            return Host(1.0, 2.0) if self.name == "step" else Host(3.0, 4.0)

    def noted(name: str) -> Callable[[Machine, torch.device], Machine]:
        return lambda machine, _: order.append(name) or machine  # type: ignore[func-returns-value]

    monkeypatch.setattr(calibration, "HostTimes", Times)
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(calibration, "_rates", noted("rates"))
    monkeypatch.setattr(calibration, "_corrected", noted("corrected"))
    card = SimpleNamespace(name="here", total_memory=GIB, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    machine = calibration.calibrate(torch.device("cuda"))
    rounds = ["step", "pass"] * 2
    assert order == [*rounds, "rates", *rounds, "corrected", *rounds]
    assert machine.processors == 7
    assert (machine.host, machine.host_infer) == (Host(1.0, 2.0), Host(3.0, 4.0))


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
    return lambda timed, machine: roofline(timed, machine) * (1.2 if timed.counts().launches == 0 else 1.0)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration measures a GPU"):
        calibration.calibrate(torch.device("cpu"))
