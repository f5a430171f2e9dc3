"""A timed region with the GPU and the CPU for itself, though other variants run beside it: they are stopped meanwhile.

`side_by_side.py` starts variants as its children, each the leader of a process group. One that is about to time something takes the
lock of the parts folder, stops the others (SIGSTOP: each group at once, then what left its group), waits until the GPU has done what
they had queued, times, lets them go on and gives the lock back, in this order. Who waits for the lock may be stopped: the kernel asks
for it again afterwards. A holder that is killed gives the lock back by that; the scheduler then lets the others go on. Nothing may be
compiled in the region: a stopped process can hold the lock of a compiler's cache.
"""

import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

LOCK = "timing.lock"
DRAIN_SECONDS = 0.5
"""What the others had queued is done by then: a step at most."""
_PARENT_DEATH_SIGNAL, _CHILD_SUBREAPER = 1, 36  # options of prctl(2)


@contextmanager
def lock(file: Path, wait: bool = True) -> Iterator[bool]:
    """The exclusive lock of `file`, which is made where it is missing; yields whether it was had, at once or after waiting."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by programs that are started
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def strays(leader: int) -> list[psutil.Process]:
    """Processes that `leader` or its children started and that left its group."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(leader).children(recursive=True):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) != leader:
                    found.append(process)
    return found


def stop_tree(leader: int) -> None:
    """Stops the group of `leader`, then its strays, until there is no new one: what is stopped starts nothing."""
    _signal_group(leader, signal.SIGSTOP)
    stopped: set[psutil.Process] = set()
    while new := set(strays(leader)) - stopped:
        _signal_all(new, signal.SIGSTOP)
        stopped |= new


def continue_tree(leader: int) -> None:
    """The strays first: as long as one of them is stopped, so is the leader, which is where one looks."""
    _signal_all(strays(leader), signal.SIGCONT)
    _signal_group(leader, signal.SIGCONT)


def kill_tree(leader: int) -> None:
    """Ends all of it, compile workers too; of a leader that is gone, its group."""
    stop_tree(leader)
    _signal_all(strays(leader), signal.SIGKILL)
    _signal_group(leader, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> None:
    """An adopted orphan may lead no group."""
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            send(leader, number)


def _signal_all(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end_with(scheduler: int) -> None:
    """This process is killed when its parent `scheduler` ends, whatever ends that. Raises RuntimeError if it is not the parent."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != scheduler:
        raise RuntimeError(f"process {scheduler}, given as --beside, is not the parent of this one: run without it")


def adopt_orphans(on: bool) -> None:
    """What a child leaves behind when it ends becomes a child of this process instead of the system's first one, or no longer."""
    ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, int(on))


class Alone:
    """`with alone:` around what is timed; once or several times.

    scheduler: the process whose other children are stopped; None: there are none, and only the lock is taken."""

    def __init__(self, parts: Path, scheduler: int | None) -> None:
        self.file, self.scheduler = parts / LOCK, scheduler
        self.stopped: list[int] = []
        """How many others, each time."""

    def __enter__(self) -> None:
        self._lock = lock(self.file)
        self._lock.__enter__()
        self._others: list[int] = []
        try:
            if self.scheduler is not None:
                children = psutil.Process(self.scheduler).children()
                self._others = [child.pid for child in children if child.pid != os.getpid()]
            for leader in self._others:
                stop_tree(leader)
        except BaseException:
            self.__exit__()
            raise
        self.stopped.append(len(self._others))
        if self._others:
            time.sleep(DRAIN_SECONDS)

    def __exit__(self, *_: object) -> None:
        """Goes on before the lock is free: whoever has it next stops them anew."""
        for leader in self._others:
            continue_tree(leader)
        self._lock.__exit__(None, None, None)

    def figures(self) -> dict[str, Any]:
        """For the part: whether nothing else of this benchmark ran while it was timed, and how many were stopped for it at most.

        `timed_alone` is None of a variant that was started by hand: what else ran is not known."""
        return {
            "timed_alone": None if self.scheduler is None else bool(self.stopped),
            "others_stopped": max(self.stopped, default=0),
        }
