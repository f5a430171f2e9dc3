"""A run that stands still says where, whatever it waits for."""

import signal
import subprocess
import sys
import time

import pytest

from loragraft.train.stall import moved, watched

STANDING = """
import sys, threading, time
from loragraft.train.stall import moved, show_on_signal, watched

def waits_for(lock):
    lock.acquire()

show_on_signal()
lock = threading.Lock()
lock.acquire()
threading.Thread(target=waits_for, args=(lock,), daemon=True).start()
print("ready", flush=True)
"""


def started(then: str) -> "subprocess.Popen[str]":
    """A process that has said that it is ready, and goes on with `then`."""
    run = subprocess.Popen(
        [sys.executable, "-c", STANDING + then], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


def test_a_signal_shows_every_thread_and_the_run_goes_on() -> None:
    run = started("time.sleep(2); print('done')")
    run.send_signal(signal.SIGUSR1)
    said, shown = run.communicate(timeout=60)
    assert (run.returncode, said) == (0, "done\n")
    assert "in waits_for" in shown
    assert "in <module>" in shown


def test_a_watched_block_shows_itself_once_nothing_moves() -> None:
    moving = "with watched(5):\n    for _ in range(12):\n        time.sleep(0.5); moved()\n"
    said, shown = started(moving + "print('done')").communicate(timeout=60)
    assert (said, shown) == ("done\n", "")
    standing = "with watched(0.5):\n    time.sleep(1.3)\nprint('left', file=sys.stderr, flush=True)\ntime.sleep(0.7)"
    _, shown = started(standing).communicate(timeout=60)
    within, after = shown.split("left\n")
    assert within.count("Timeout (0:00:00.500000)!") >= 2, "again and again"
    assert "in waits_for" in within
    assert after == "", "but not after the block"


def test_seconds_below_zero_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--stall is -1"), watched(-1):
        pass
    with watched(0):
        time.sleep(0.05)
        moved()
    assert capfd.readouterr().err == ""
