"""Processes side by side as far as memory allows, in the order of their importance; `timed_alone.py` says how they are timed.

A job starts if its expected memory fits into what the running ones leave, if fewer than so many run, and if it would not keep the first
one that waits from going on when the largest of those that run is done. One that is `alone` runs with nothing beside it. One that needs
less at first (`before`) asks for the rest (`wait_for_memory`) and is given it by the same rule; none starts that would leave some of
them waiting for one another. Nothing starts or grows while another is timed. One that fails or takes too long is told and the others go
on; time in which a job is stopped or waits for memory does not count for it. At the deadline, or on a signal, all that runs is ended at
once, and told. When the scheduler ends, nothing that it started is left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil
from timed_alone import LOCK, adopt_orphans, continue_tree, kill_tree, lock

POLL_SECONDS = 0.1
How = Literal["done", "failed", "too slow", "cut short", "not started"]
"""too slow: beyond `Limits.timeout`. cut short, not started: for the deadline, or a signal."""


@dataclass(frozen=True)
class Job:
    """One process. gib: expected peak of the GPU's memory, context included. seconds: expected, beside others, without what it waits."""

    name: str
    command: tuple[str, ...]
    gib: float
    seconds: float
    alone: bool = False
    before: float | None = None
    """GiB until it calls `wait_for_memory`; None: it does not."""

    @property
    def early(self) -> float:
        """GiB that it starts with."""
        return self.gib if self.before is None else self.before


@dataclass(frozen=True)
class Held:
    """A job that runs. grown: it may take all of its memory. asks: it waits for that."""

    job: Job
    grown: bool = True
    asks: bool = False

    @property
    def gib(self) -> float:
        """What it may take now."""
        return self.job.gib if self.grown else self.job.early


@dataclass(frozen=True)
class Limits:
    """timeout: seconds of one job. deadline: seconds after `SideBySide.run` was called; what would pass it is not started."""

    gib: float = 77.0
    jobs: int = 4
    timeout: float = 240.0
    deadline: float = inf


@dataclass(frozen=True)
class Ended:
    """seconds: from start to end; `waited` of them it was stopped, or lacked memory. log: the end of what it said, if it failed."""

    job: Job
    how: How
    seconds: float = 0.0
    waited: float = 0.0
    log: str = ""


@dataclass(eq=False)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    asking: Path
    """A file that is there once it waits for memory."""
    grown: bool
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def held(self) -> Held:
        return Held(self.job, self.grown, not self.grown and self.asking.exists())

    def is_over(self) -> bool:
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def is_stopped(self) -> bool:
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED  # a child that is not waited for yet


def wait_for_memory(parts: Path, name: str) -> None:
    """In a job with `before`: returns when all of its memory is there for it; its standard input is the scheduler's."""
    _asking(parts, name).touch()
    sys.stdin.readline()


def _asking(parts: Path, name: str) -> Path:
    return parts / f"{name}.asks"


def pick(waiting: Sequence[Job], running: Sequence[Held], limits: Limits) -> Job | None:
    """The first that may start, of `waiting`, or grow, of `running`; None: none may."""
    if any(held.job.alone for held in running):
        return None
    asking = [held.job for held in running if held.asks]
    queue = [*asking, *(waiting if len(running) < limits.jobs else ())]
    if not queue or not running:
        return queue[0] if queue else None
    first, used = queue[0], sum(held.gib for held in running)
    rest = used - max((held.gib for held in running if held.grown), default=0.0)
    needed = first.gib - (first.early if first in asking else 0.0)
    for job in queue:
        more = job.gib - job.early if job in asking else job.early
        fits = used + more <= limits.gib and (job is first or rest + more + needed <= limits.gib)
        if fits and not job.alone and (job in asking or _all_can_grow(job, running, limits)):
            return job
        if len(running) == 1 and job in asking:  # larger than the limit: then with nothing beside it
            return job
    return None


def _all_can_grow(job: Job, running: Sequence[Held], limits: Limits) -> bool:
    """Whether each of those that are yet to grow, `job` among them, could as the first of them, once the grown ones are done."""
    early = [held.job for held in running if not held.grown] + [job] * (job.before is not None)
    together = sum(one.early for one in early)
    return all(together - one.early + one.gib <= limits.gib for one in early)


class SideBySide:
    """Runs `jobs`, the first the most important; logs go to `parts`/NAME.log, the lock is `parts`/timing.lock.

    say: told each line. about: what to add to the line of a job that is done."""

    def __init__(
        self,
        jobs: Sequence[Job],
        parts: Path,
        limits: Limits,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        about: Callable[[str], str] = lambda _: "",
    ) -> None:
        self.waiting, self.parts, self.limits, self.say, self.about = list(jobs), parts, limits, say, about
        self.running: list[_Running] = []
        self.ended: list[Ended] = []
        self.signal: signal.Signals | None = None
        """What ended it, if it was SIGINT, SIGTERM or SIGHUP."""
        parts.mkdir(parents=True, exist_ok=True)
        self.file = parts / LOCK

    def run(self) -> list[Ended]:
        """Every job, in the order in which they ended; on SIGINT, SIGTERM or SIGHUP early, with `signal` set."""
        self.start = self._last = time.monotonic()
        self._earlier = {child.pid for child in psutil.Process().children()}
        adopt_orphans(True)
        with _signals_noted() as noted:
            try:
                while self.waiting or self.running:
                    if noted or self.seconds() >= self.limits.deadline:
                        self.signal = noted[0] if noted else None
                        self._cut()
                        break
                    self._poll()
                    if self.running:
                        time.sleep(min(POLL_SECONDS, max(0.0, self.limits.deadline - self.seconds())))
            finally:
                self._kill_all()
                for one in self.running:
                    self._kill(one)
                self.running.clear()
                self._end_orphans()
                adopt_orphans(False)
        return self.ended

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def _poll(self) -> None:
        now = time.monotonic()
        passed, self._last = now - self._last, now
        for one in list(self.running):
            self._look(one, passed)
        with lock(self.file, wait=False) as nobody_times:
            if nobody_times:
                for one in self.running:  # their holder was killed
                    if one.is_stopped():
                        continue_tree(one.process.pid)
                self._start()

    def _look(self, one: _Running, passed: float) -> None:
        if one.is_over():
            self._end(one, None)
        elif one.is_stopped() or one.held().asks:
            one.waited += passed
        elif one.seconds() - one.waited > self.limits.timeout:
            self._end(one, "too slow")

    def _cut(self) -> None:
        """Ends and tells all that runs or waits. The GPU takes seconds to free what a process held: so all are killed first."""
        self.say(f"{self.seconds():6.1f} s  {self.signal.name if self.signal else 'the deadline'}: what runs is ended")
        over = [one for one in self.running if one.is_over()]
        self._kill_all()
        for one in list(self.running):
            self._end(one, None if one in over else "cut short")
        for job in self.waiting:
            self._tell(Ended(job, "not started"))
        self.waiting.clear()

    def _kill_all(self) -> None:
        """Waits for none of them."""
        for one in self.running:
            kill_tree(one.process.pid)

    def _end(self, one: _Running, how: How | None) -> None:
        """how: None if it ended by itself; its number is not another's until it is waited for here."""
        code = self._kill(one)
        how = how or ("failed" if code else "done")
        one.asking.unlink(missing_ok=True)
        self.running.remove(one)
        self._end_orphans()
        log = "" if how == "done" else one.log.read_text(errors="replace")[-1500:]
        self._tell(Ended(one.job, how, one.seconds(), one.waited, log))

    def _kill(self, one: _Running) -> int:
        """What is left of it too; returns its exit code."""
        kill_tree(one.process.pid)
        if one.process.stdin is not None:
            one.process.stdin.close()
        return one.process.wait()

    def _end_orphans(self) -> None:
        """What jobs that have ended left in other groups."""
        ours = self._earlier | {one.process.pid for one in self.running}
        while orphans := [child for child in psutil.Process().children() if child.pid not in ours]:
            for orphan in orphans:
                kill_tree(orphan.pid)
                orphan.wait()

    def _start(self) -> None:
        for job in [job for job in self.waiting if self.seconds() + job.seconds > self.limits.deadline]:
            self.waiting.remove(job)
            self._tell(Ended(job, "not started"))
        while (chosen := pick(self.waiting, [one.held() for one in self.running], self.limits)) is not None:
            grows = next((one for one in self.running if one.job is chosen), None)
            if grows is None:
                self._start_one(chosen)
            else:
                grows.asking.unlink()
                grows.grown = True
                self._answer(grows)
            together = sum(one.held().gib for one in self.running)
            what = "starts" if grows is None else "takes its memory"
            self.say(
                f"{self.seconds():6.1f} s  {chosen.name} {what}; {len(self.running)} run, {together:.0f} GiB expected"
            )

    def _start_one(self, job: Job) -> None:
        self.waiting.remove(job)
        log, asking = self.parts / f"{job.name}.log", _asking(self.parts, job.name)
        asking.unlink(missing_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                job.command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        self.running.append(_Running(job, process, log, asking, grown=job.before is None))

    def _answer(self, one: _Running) -> None:
        assert one.process.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended: the next look tells
            one.process.stdin.write(b"\n")
            one.process.stdin.flush()

    def _tell(self, ended: Ended) -> None:
        self.ended.append(ended)
        name, still = ended.job.name, f", {ended.waited:.0f} s of it waiting" if ended.waited >= 1 else ""
        line = f"{self.seconds():6.1f} s  {name}: {ended.how}"
        line += "" if ended.how == "not started" else f" after {ended.seconds:.0f} s{still}"
        about = self.about(name) if ended.how == "done" else ""
        self.say(line + (f"; {about}" if about else "") + (f"\n{ended.log}" if ended.log else ""))


def table(ended: Sequence[Ended]) -> str:
    """A line a job: how it ended, its seconds, those that were expected, those in which it waited for others."""
    wide = max((len(one.job.name) for one in ended), default=0)
    lines = [f"{'':{wide}}  how          seconds  expected   waited"]
    for one in ended:
        lines.append(
            f"{one.job.name:{wide}}  {one.how:11}  {one.seconds:7.0f}  {one.job.seconds:8.0f}  {one.waited:7.0f}"
        )
    return "\n".join(lines)


@contextmanager
def _signals_noted() -> Iterator[list[signal.Signals]]:
    """Yields the list of what came of SIGINT, SIGTERM and SIGHUP: an exception amid starting a process would lose it."""
    noted: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
