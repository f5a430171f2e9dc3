"""Steps are queued one ahead of what is read, as the product queues them; a clock that ticks with every queued step is the GPU's."""

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def module(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("timed_steps")


class Device:
    """Step n takes n + 1 ms, one of no number 100 ms; notes what is queued and what is waited for."""

    def __init__(self) -> None:
        self.clock, self.queued = 0, 0
        self.seen: list[tuple[str, int]] = []

    def step(self, number: int | None) -> tuple[Tensor, Tensor]:
        self.clock += 100 if number is None else number + 1
        self.queued += 1
        self.seen.append(("queued", self.queued))
        return torch.tensor(math.nan if number == 13 else float(self.clock)), torch.tensor(1.0)

    def event(self) -> "Mark":
        return Mark(self)


class Mark:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at, self.number = self.device.clock, self.device.queued

    def synchronize(self) -> None:
        self.device.seen.append(("waited for", self.number))

    def elapsed_time(self, end: "Mark") -> float:
        return float(end.at - self.at)


def test_a_step_is_waited_for_when_the_next_is_queued(module: ModuleType) -> None:
    device, told = Device(), list[int]()
    steps = module.TimedSteps(device.step, 1e-4, told.append, device.event)
    steps(range(4))
    assert device.seen == [
        ("queued", 1), ("queued", 2), ("waited for", 1), ("queued", 3), ("waited for", 2), ("queued", 4), ("waited for", 3),
        ("waited for", 4),
    ]  # fmt: skip
    assert steps.times == [1, 2, 3, 4]
    assert steps.losses == [1, 3, 6, 10]
    assert told == [1, 2, 3, 4]


def test_settling_leaves_no_figures_and_no_gap(module: ModuleType) -> None:
    device = Device()
    steps = module.TimedSteps(device.step, 1e-4, event=device.event)
    steps(range(1))
    steps([1, None, None, 2])
    assert steps.times == [1, 2, 3]
    assert steps.losses == [1, 3, 206]
    assert device.seen[2:] == [
        ("queued", 2), ("queued", 3), ("waited for", 2), ("queued", 4), ("waited for", 3), ("queued", 5), ("waited for", 4),
        ("waited for", 5),
    ]  # fmt: skip


def test_settling_takes_its_time_from_the_call_on(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    repeats = module.settling(4)
    now = 103.9
    assert next(repeats) is None
    now = 104.0
    assert next(repeats, "over") == "over"
    assert list(module.settling(0)) == []


def test_a_loss_that_is_not_finite_is_an_error(module: ModuleType) -> None:
    device = Device()
    steps = module.TimedSteps(device.step, 1e-4, event=device.event)
    with pytest.raises(ValueError, match="the loss is nan at step 14"):
        steps(range(15))


@pytest.mark.gpu
def test_on_a_gpu_times_are_those_of_its_work(module: ModuleType) -> None:
    """Ten products at once take five times as long as two; marks lie on the GPU's clock, not on Python's."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def step(number: int | None) -> tuple[Tensor, Tensor]:
        for _ in range(10 if number else 2):
            x @ x
        return x[0, 0].float(), x[0, 1].float()

    steps = module.TimedSteps(step, 1e-4)
    steps([0, *[None] * 100, *[0] * 20, *range(1, 21)])
    short, long = sorted(steps.times[1:21])[10], sorted(steps.times[21:])[10]
    assert 3 < long / short < 7
    assert steps.losses == [x[0, 0].item()] * 41
