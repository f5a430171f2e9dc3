"""An orderly stop: a signal is noted, and all processes leave after the same step.

Each process gets its signal at a moment of its own. If each looked for itself, one could leave after a step whose successor another
has begun, and which waits for the first for ever. So a step carries along what each process was asked, beside its loss.
"""

import contextlib
import signal
from collections.abc import Iterator

from tqdm import tqdm


class Stop:
    """`asked`: a signal came to this process. `requested`: stop after this step."""

    def __init__(self, alone: bool = True) -> None:
        """alone: there is no other process to agree with."""
        self.asked = False
        self._alone, self._agreed = alone, False

    @property
    def requested(self) -> bool:
        return self.asked if self._alone else self._agreed

    def learn(self, asked: bool) -> None:
        """asked: whether any process was, when it began the step whose figures have just been read."""
        self._agreed |= asked


@contextlib.contextmanager
def stop_on_signal(alone: bool = True) -> Iterator[Stop]:
    """ctrl-C or SIGTERM: finish the step, write a checkpoint, return. A second ctrl-C stops at once."""
    stop = Stop(alone)

    def handler(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        tqdm.write("stopping after this step (again to stop at once)")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
