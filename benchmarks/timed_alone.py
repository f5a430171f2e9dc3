"""A timed region with the GPU and the CPU for itself, though other variants run beside it: they are stopped meanwhile.

`side_by_side.py` starts variants as its children, each the leader of a process group. One that is about to time something takes the
lock of the parts folder, stops the others and all that they started (SIGSTOP), waits until the GPU has done what they had queued, times,
lets them go on and gives the lock back, in this order. Who waits for the lock may be stopped: the kernel asks for it again afterwards.
A holder that is killed gives the lock back by that; the scheduler then lets the others go on. Nothing may be compiled in the region: a
stopped process can hold the lock of a compiler's cache.
"""

import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

LOCK = "timing.lock"
DRAIN_SECONDS = 0.5
"""What the others had queued is done by then: a step at most."""
STOP_SECONDS = 30.0
"""Until those that were asked to stop must have done so; one stops when the system call that it is in lets it."""
_LOOK_SECONDS = 0.002
_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""Runs no code of its own once it was asked to stop: a disk sleep, which a driver's call or starting a program may be, ends in that."""
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


@contextmanager
def others_stopped(scheduler: int) -> Iterator[int]:
    """All that descends from `scheduler`, but this process and what it started, stands still; yields how many children that are.

    A signal is only a request, a process may start another before it follows, and one that ends leaves what it started to `scheduler`:
    so they are asked until two looks in a row find the same processes, each still. Raises TimeoutError, naming it, of one that goes
    on. Afterwards they are let go, the youngest first: as long as one is stopped, so is its leader, which is where one looks."""
    others: list[psutil.Process] = []
    until = time.monotonic() + STOP_SECONDS
    try:
        while True:
            before, others = others, _others(scheduler)
            moving = [one for one in others if _status(one) not in _STILL]
            if not moving and others == before:
                break
            if time.monotonic() > until:
                raise TimeoutError(f"asked to stop, and goes on after {STOP_SECONDS:.0f} s: {moving or others}")
            _signal_all(others, signal.SIGSTOP)
            time.sleep(_LOOK_SECONDS)
        yield len([child for child in psutil.Process(scheduler).children() if child in others])
    finally:
        _signal_all(reversed(others), signal.SIGCONT)


def _others(scheduler: int) -> list[psutil.Process]:
    """Parents before what they started."""
    this = psutil.Process()
    ours = {this, *this.children(recursive=True)}
    return [one for one in psutil.Process(scheduler).children(recursive=True) if one not in ours]


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def _stop_tree(leader: int) -> None:
    """Asks the group of `leader` to stop, then its strays, until there is no new one."""
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
    _stop_tree(leader)
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
        with ExitStack() as stack:
            stack.enter_context(lock(self.file))
            others = 0 if self.scheduler is None else stack.enter_context(others_stopped(self.scheduler))
            self.stopped.append(others)
            if others:
                time.sleep(DRAIN_SECONDS)
            self._held = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        """They go on before the lock is free: whoever has it next stops them anew."""
        self._held.close()

    def figures(self) -> dict[str, Any]:
        """For the part: whether nothing else of this benchmark ran while it was timed, and how many were stopped for it at most.

        `timed_alone` is None of a variant that was started by hand: what else ran is not known."""
        return {
            "timed_alone": None if self.scheduler is None else bool(self.stopped),
            "others_stopped": max(self.stopped, default=0),
        }
