"""In a timed region nothing else moves: never two at once, the others stopped with all they started, and let go afterwards."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TICKER = """
import sys, time
from pathlib import Path
for number in range(100000):
    Path(sys.argv[1]).write_text(str(number).zfill(6))
    time.sleep(0.01)
"""
WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import timed_alone
timed_alone.DRAIN_SECONDS = 0.05
folder, name, scheduler, ticker = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
timed_alone.end_with(scheduler)
for kind, own_session in (("group", False), ("session", True)):
    subprocess.Popen([sys.executable, "-S", "-c", ticker, str(folder / f"{name}.{kind}.tick")], start_new_session=own_session)
while len(list(folder.glob("*.tick"))) < 6:
    time.sleep(0.01)
def ticks():
    return {file.name: file.read_text() for file in folder.glob("*.tick")}
def moved():
    after = ticks()
    return sorted(file for file in after if after[file] != before[file])
alone = timed_alone.Alone(folder, scheduler)
for turn in range(2):
    with alone:
        if name == "dies":
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        begin, before = time.monotonic(), ticks()
        while time.monotonic() < begin + 0.15 or len(moved()) < 2:
            time.sleep(0.01)
        (folder / f"{name}.{turn}.json").write_text(json.dumps([begin, time.monotonic(), moved(), alone.figures()]))
"""

LEADER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-S", "-c", *sys.argv[1:]], start_new_session=True)
sys.stdin.read()
"""
HOLDER = """
import sys, time
from pathlib import Path
import psutil, timed_alone
scheduler, leader, tick, act = int(sys.argv[1]), psutil.Process(int(sys.argv[2])), Path(sys.argv[3]), sys.argv[4]
(stray,), look, before = leader.children(), timed_alone._others, tick.read_text()
def first_look(scheduler):
    timed_alone._others = look
    leader.kill()
    return [leader]
if act == "ends":
    timed_alone._others = first_look
if act == "goes on":
    timed_alone.STOP_SECONDS, timed_alone._signal_all = 0.05, lambda *_: None
try:
    with timed_alone.others_stopped(scheduler):
        before = tick.read_text()
        time.sleep(0.1)
        print(leader.status(), stray.status(), tick.read_text() == before)
except TimeoutError as error:
    print("TimeoutError", f"pid={stray.pid}" in str(error))
while tick.read_text() == before:
    time.sleep(0.01)
"""


@pytest.fixture
def module(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("side_by_side", "timed_alone")


def run_beside(module: ModuleType, folder: Path, names: list[str]) -> dict[str, Any]:
    def command(name: str) -> tuple[str, ...]:
        return (sys.executable, "-c", WORKER, str(BENCHMARKS), str(folder), name, str(os.getpid()), TICKER)

    jobs = [module.Job(name, command(name), 10, 5) for name in names]
    ended = module.SideBySide(jobs, folder, module.Limits(timeout=120), lambda _: None).run()
    return {one.job.name: one for one in ended}


def test_only_one_is_timed_and_only_it_moves(module: ModuleType, tmp_path: Path) -> None:
    ended = run_beside(module, tmp_path, ["a", "b", "c"])
    assert {one.how for one in ended.values()} == {"done"}, [one.log for one in ended.values()]
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(found) == 6
    for name, (_, _, moved, _) in found.items():
        assert moved == [f"{name[0]}.group.tick", f"{name[0]}.session.tick"]
    in_order = sorted(found.values())
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(in_order))
    assert in_order[0][3] == {"timed_alone": True, "others_stopped": 2}
    assert max(one.waited for one in ended.values()) > 0.1


def test_a_holder_that_is_killed_leaves_nobody_stopped(module: ModuleType, tmp_path: Path) -> None:
    ended = run_beside(module, tmp_path, ["a", "dies", "b"])
    assert (tmp_path / "died").exists()
    assert {name: one.how for name, one in ended.items()} == {"a": "done", "b": "done", "dies": "failed"}


@pytest.fixture
def leader(module: ModuleType, tmp_path: Path) -> Iterator[int]:
    """A child that has started another process, in a session of its own, which writes to `tick`."""
    module.adopt_orphans(True)
    tick, earlier = tmp_path / "tick", psutil.Process().children()
    with subprocess.Popen([sys.executable, "-c", LEADER, TICKER, str(tick)], stdin=subprocess.PIPE) as leader:
        while not tick.exists():
            time.sleep(0.01)
        yield leader.pid
        module.kill_tree(leader.pid)
    for orphan in psutil.Process().children():
        if orphan not in earlier:
            orphan.kill()
            orphan.wait()
    module.adopt_orphans(False)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("stops", "stopped stopped True"),
        ("ends", "zombie stopped True"),
        ("goes on", "TimeoutError True"),
    ],
)
def test_what_a_child_started_stands_still_too(leader: int, tmp_path: Path, act: str, said: str) -> None:
    """Also if the child ends between being listed and being stopped. What does not stop is told; afterwards all goes on."""
    command = [sys.executable, "-c", HOLDER, str(os.getpid()), str(leader), str(tmp_path / "tick"), act]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (said, 0), done.stderr


def test_by_hand_there_is_only_the_lock(benchmark_module: Callable[..., ModuleType], tmp_path: Path) -> None:
    module = benchmark_module("timed_alone")
    alone = module.Alone(tmp_path, None)
    with alone, module.lock(tmp_path / module.LOCK, wait=False) as free:
        assert not free
    with module.lock(tmp_path / module.LOCK, wait=False) as free:
        assert free
    assert alone.figures() == {"timed_alone": None, "others_stopped": 0}


def test_a_process_that_is_not_the_parent_is_refused() -> None:
    code = "import timed_alone; timed_alone.end_with(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not the parent" in done.stderr
