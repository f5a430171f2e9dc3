"""Processes run side by side as memory allows, are ended in time, and none is left; sleepers stand for variants."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SLEEPER = """
import json, os, sys, time
from pathlib import Path
begin = time.monotonic()
time.sleep(float(sys.argv[2]))
Path(sys.argv[1]).write_text(json.dumps([begin, time.monotonic()]))
"""


@pytest.fixture
def module(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("side_by_side", "timed_alone")


def sleeper(module: ModuleType, folder: Path, name: str, gib: float, seconds: float = 0.3, **options: Any) -> Any:
    command = (sys.executable, "-c", SLEEPER, str(folder / f"{name}.json"), str(seconds))
    return module.Job(name, command, gib, options.pop("expected", seconds), **options)


def schedule(module: ModuleType, folder: Path, queue: list[Any], **limits: Any) -> tuple[dict[str, Any], list[str]]:
    """How each job ended, and the lines that were told."""
    lines: list[str] = []
    ended = module.SideBySide(queue, folder, module.Limits(**limits), lines.append).run()
    return {one.job.name: one for one in ended}, lines


def spans(folder: Path) -> dict[str, tuple[float, float]]:
    return {file.stem: tuple(json.loads(file.read_text())) for file in folder.glob("*.json")}


def test_memory_and_number_are_kept_to(module: ModuleType, tmp_path: Path) -> None:
    gib = {"first": 30.0, "large": 50.0, "middle": 30.0, "small": 20.0, "smaller": 10.0, "tiny": 5.0}
    jobs = [sleeper(module, tmp_path, name, size, alone=name == "first") for name, size in gib.items()]
    ended, lines = schedule(module, tmp_path, jobs, gib=77, jobs=3)
    assert {one.how for one in ended.values()} == {"done"}
    times = spans(tmp_path)
    for begin, _ in times.values():
        together = [name for name, (start, end) in times.items() if start <= begin < end]
        assert sum(gib[name] for name in together) <= 77, together
        assert len(together) <= 3
        assert "first" not in together or together == ["first"]
    assert min(times, key=lambda name: times[name][0]) == "first"
    overlap = max(sum(start <= begin < end for start, end in times.values()) for begin, _ in times.values())
    assert overlap >= 2, "nothing ran side by side"
    assert len(lines) == 2 * len(gib)


def test_what_waits_first_is_not_kept_waiting_by_small_ones(module: ModuleType) -> None:
    """Beside 52 of 77 GiB there is room for 24, but 58 come next, and 58 + 24 do not fit."""
    jobs = {name: module.Job(name, (), gib, 60) for name, gib in {"a": 52.0, "b": 58.0, "c": 24.0, "d": 12.0}.items()}
    held = {name: module.Held(job) for name, job in jobs.items()}
    limits = module.Limits()
    assert module.pick([jobs["b"], jobs["c"], jobs["d"]], [held["a"]], limits) is jobs["d"]
    assert module.pick([jobs["b"], jobs["c"]], [held["a"], held["d"]], limits) is None
    assert module.pick([jobs["b"], jobs["c"]], [held["d"]], limits) is jobs["b"]
    assert module.pick([module.Job("too large for any", (), 99, 60)], [], limits).gib == 99


def test_what_is_yet_to_grow_can(module: ModuleType) -> None:
    """Two of 25 GiB now and 50 later fit into 77, not into 74; nothing starts that would leave them waiting for one another."""
    one, other = (module.Job(name, (), 50, 60, before=25) for name in ("one", "other"))
    small, limits = module.Job("small", (), 20, 60, before=2), module.Limits(gib=77)
    grown, waits, asks = (module.Held(one, *state) for state in ((True, False), (False, False), (False, True)))
    assert module.pick([other], [grown], limits) is other
    assert module.pick([small], [waits, module.Held(other, False)], limits) is small
    tight = module.Limits(gib=74)
    assert module.pick([other], [waits], tight) is None
    assert module.pick([], [asks, module.Held(other, False)], limits) is one
    assert module.pick([], [module.Held(other), asks], limits) is None
    assert module.pick([small], [module.Held(other), asks], limits) is small
    assert module.pick([], [module.Held(module.Job("too large", (), 99, 60, before=1), False, True)], limits).gib == 99


GROWING = """
import json, sys, time
from pathlib import Path
from side_by_side import wait_for_memory
folder, name = Path(sys.argv[1]), sys.argv[2]
begin = time.monotonic()
(folder / f"{name}.begun").touch()
wait_for_memory(folder, name)
grown = time.monotonic()
while len(list(folder.glob("*.begun"))) < 3:
    time.sleep(0.01)
(folder / f"{name}.json").write_text(json.dumps([begin, grown, time.monotonic()]))
"""


def test_memory_is_asked_for_when_it_is_needed(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    names = ("a", "b", "c")
    commands = {name: (sys.executable, "-c", GROWING, str(tmp_path), name) for name in names}
    ended, lines = schedule(module, tmp_path, [module.Job(n, commands[n], 60, 1, before=8) for n in names])
    assert {one.how for one in ended.values()} == {"done"}, [one.log for one in ended.values()]
    in_order = sorted(
        (json.loads((tmp_path / f"{name}.json").read_text()) for name in names), key=lambda times: times[1]
    )
    assert all(begin < in_order[0][2] for begin, _, _ in in_order), "they began together"
    assert all(earlier[2] <= later[1] for earlier, later in pairwise(in_order)), "they had their memory in turn"
    assert sum("takes its memory" in line for line in lines) == 3
    assert list(tmp_path.glob("*.asks")) == []


def test_failures_and_slow_ones_are_told_and_the_others_go_on(module: ModuleType, tmp_path: Path) -> None:
    failing = module.Job("failing", (sys.executable, "-c", "raise SystemExit('no such weights')"), 10, 1)
    jobs = [failing, sleeper(module, tmp_path, "slow", 10, 60, expected=1), sleeper(module, tmp_path, "fine", 10, 0.1)]
    ended, lines = schedule(module, tmp_path, jobs, timeout=4.0)
    assert {name: one.how for name, one in ended.items()} == {"failing": "failed", "slow": "too slow", "fine": "done"}
    assert any("no such weights" in line for line in lines)
    assert "too slow" in module.table(list(ended.values()))


def test_nothing_passes_the_deadline(module: ModuleType, tmp_path: Path) -> None:
    """One that would not be done is not started, a shorter one is; one that takes longer than it should is cut short."""
    jobs = [
        sleeper(module, tmp_path, "longer than told", 10, 600, expected=0.5),
        sleeper(module, tmp_path, "too long", 10, 600),
        sleeper(module, tmp_path, "short", 10, 0.1),
    ]
    begin = time.monotonic()
    ended, _ = schedule(module, tmp_path, jobs, deadline=4.0)
    assert time.monotonic() - begin < 60
    assert {name: one.how for name, one in ended.items()} == {
        "longer than told": "cut short", "too long": "not started", "short": "done",
    }  # fmt: skip


def test_at_the_deadline_all_is_ended_though_one_is_timed(module: ModuleType, tmp_path: Path) -> None:
    """The lock, which nobody gives back, keeps the scheduler from starting, not from ending."""
    code = "import sys, time\nfrom pathlib import Path\nfrom timed_alone import lock\n"
    code += "with lock(Path(sys.argv[1])): time.sleep(600)"
    command = ("env", f"PYTHONPATH={BENCHMARKS}", sys.executable, "-c", code)
    jobs = [module.Job("timed", (*command, str(tmp_path / "timing.lock")), 10, 0.1)]
    jobs += [sleeper(module, tmp_path, name, 10, 600, expected=0.1) for name in ("a", "b")]
    jobs += [sleeper(module, tmp_path, "large", 70, 600, expected=0.1)]
    begin = time.monotonic()
    ended, lines = schedule(module, tmp_path, jobs, deadline=1.0)
    assert 1.0 <= time.monotonic() - begin < 60
    assert {name: one.how for name, one in ended.items()} == {
        "timed": "cut short", "a": "cut short", "b": "cut short", "large": "not started",
    }  # fmt: skip
    assert any("the deadline: what runs is ended" in line for line in lines)


SCHEDULER = """
import os, sys
from pathlib import Path
from side_by_side import Job, Limits, SideBySide
worker, folder = sys.argv[1], sys.argv[2]
jobs = [Job(name, (sys.executable, "-c", worker, folder, name, str(os.getpid())), 10, 60) for name in ("stops", "stopped")]
beside = SideBySide(jobs, Path(folder), Limits())
beside.run()
(Path(folder) / "ended").write_text(f"{beside.signal.name} {len(beside.ended)}")
"""
WORKER = """
import subprocess, sys, time
from pathlib import Path
from timed_alone import Alone, end_with
folder, name, scheduler = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
end_with(scheduler)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
(folder / f"{name}.pid").write_text(str(child.pid))
while len(list(folder.glob("*.pid"))) < 2:
    time.sleep(0.02)
if name == "stops":
    with Alone(folder, scheduler):
        (folder / "timing").touch()
        time.sleep(600)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_scheduler_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Nor what is stopped; of SIGKILL, which cannot be met, the variants know (what they started in other sessions does not)."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    scheduler = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER, WORKER, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        begin = time.monotonic()
        while not (tmp_path / "timing").exists():
            assert time.monotonic() - begin < 60
            time.sleep(0.02)
        workers = psutil.Process(scheduler.pid).children()
        below = [psutil.Process(int(file.read_text())) for file in tmp_path.glob("*.pid")]
        assert sorted(worker.status() == psutil.STATUS_STOPPED for worker in workers) == [False, True]
        scheduler.send_signal(number)
        assert scheduler.wait(60) == (-number if number == signal.SIGKILL else 0)
        if number != signal.SIGKILL:
            assert (tmp_path / "ended").read_text() == f"{number.name} 2"
        watched = workers if number == signal.SIGKILL else [*workers, *below]
        assert len(watched) in (2, 4)
        _, alive = psutil.wait_procs(watched, timeout=60)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        scheduler.kill()
        for file in tmp_path.glob("*.pid"):
            if psutil.pid_exists(pid := int(file.read_text())):
                os.kill(pid, signal.SIGKILL)
