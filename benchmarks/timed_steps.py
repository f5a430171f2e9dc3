"""Steps queued as `train/loop.py` queues them: the figures of one are read when the next is queued, so the GPU never waits for Python.

    time of step n = mark n - mark n-1,        a mark being an event between what two steps queued

Between two steps nothing waits for the GPU, and Python runs at most one step ahead of it. A time holds all that is queued, the loss's
way to the CPU too, and whatever the GPU stands still because Python is late.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from loragraft.train.measured import Measured


class Event(Protocol):
    """`torch.cuda.Event` as it is used here."""

    def record(self) -> object: ...
    def synchronize(self) -> object: ...
    def elapsed_time(self, end: Any, /) -> float: ...


def cuda_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


class TimedSteps:
    """losses and times (milliseconds) of the steps that were read so far."""

    def __init__(
        self,
        step: Callable[[int | None], tuple[Tensor, Tensor]],
        rate: float,
        tell: Callable[[int], None] = lambda _: None,
        event: Callable[[], Event] = cuda_event,
    ) -> None:
        """step: queues that of a number, counted from 0, or (None) one that changes nothing; returns loss and gradient norm, scalars on
        the device. rate: of learning. tell: called with how many steps were read."""
        self.step, self.rate, self.tell, self.event = step, rate, tell, event
        self.losses: list[float] = []
        self.times: list[float] = []

    def __call__(self, numbers: Iterable[int | None]) -> None:
        """Queues them one behind another and returns when all are done; those that are None leave no figures.

        Raises ValueError for a loss that is not finite."""
        behind: Callable[[], None] | None = None
        begin, count = self._mark(), len(self.losses)
        for number in numbers:
            count += number is not None
            made = Measured(count, *self.step(number), self.rate)
            end = self._mark()
            if behind is not None:
                behind()
            behind, begin = partial(self._read, made, begin, end, number is not None), end
        if behind is not None:
            behind()

    def _mark(self) -> Event:
        made = self.event()
        made.record()
        return made

    def _read(self, made: Measured, begin: Event, end: Event, counts: bool) -> None:
        """Waits for that step alone."""
        end.synchronize()
        loss = made.read()["loss"]
        if counts:
            self.losses.append(loss)
            self.times.append(begin.elapsed_time(end))
            self.tell(len(self.losses))


def settling(seconds: float) -> Iterator[None]:
    """None, again and again until `seconds` after this call: a card's clock depends on what it has done just before."""
    end = time.monotonic() + seconds

    def repeat() -> Iterator[None]:
        while time.monotonic() < end:
            yield None

    return repeat()
