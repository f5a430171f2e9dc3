"""Where a run stands: the traceback of every thread, on a signal or once nothing has moved for long.

    kill -USR1 PID                        at any time; the run goes on
    with watched(300): ... moved() ...    by itself, whenever 300 s pass without a call of `moved`

Both are written to stderr by C code (`faulthandler`) that waits for no lock of Python's: a run that stands still inside a library,
on a GPU or on another process shows where.
"""

import faulthandler
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STDERR = 2
REARMED_EVERY = 1.0
"""Seconds: a timer costs a thread, and steps may take milliseconds."""


@dataclass
class _Watch:
    seconds: float = 0.0
    armed_at: float = 0.0


_watch = _Watch()


def show_on_signal() -> None:
    """SIGUSR1, which would end the process, writes the tracebacks instead, from here to the process's last moment."""
    faulthandler.register(signal.SIGUSR1, file=STDERR, all_threads=True)


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Tracebacks after every `seconds` within the block in which nothing moved; 0: never. Raises ValueError below 0."""
    if seconds < 0:
        raise ValueError(
            f"--stall is {seconds:g}: give the seconds after which a run is to say where it stands, or 0 for never"
        )
    _watch.seconds = seconds
    _arm()
    try:
        yield
    finally:
        _watch.seconds = 0.0
        faulthandler.cancel_dump_traceback_later()


def moved() -> None:
    """Something was finished: a step, a validation, a picture, a file."""
    if _watch.seconds and time.monotonic() - _watch.armed_at >= min(REARMED_EVERY, _watch.seconds / 4):
        _arm()


def _arm() -> None:
    _watch.armed_at = time.monotonic()
    if _watch.seconds:
        faulthandler.dump_traceback_later(_watch.seconds, repeat=True, file=STDERR)
