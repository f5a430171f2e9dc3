"""Claims of encoding work: seen by others while their process lives, gone with it, however it ends."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loragraft.data.claims import Claim, claimed, exclusively, wait_for

HOLDER = """
import sys, time
from pathlib import Path
from loragraft.data.claims import Claim, exclusively
with exclusively(Path(sys.argv[1])):
    claim = Claim(Path(sys.argv[1]), ["a", "b"])
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that has claimed a and b."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n", process.communicate()[1]
    return process


def test_a_claim_is_seen_until_it_is_released(tmp_path: Path) -> None:
    claim = Claim(tmp_path, ["a", "b"])
    ((path, keys),) = claimed(tmp_path).items()
    assert keys == {"a", "b"}
    claim.release()
    assert claimed(tmp_path) == {}
    wait_for(path)  # returns at once
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_holds_nothing(tmp_path: Path, holder: "subprocess.Popen[str]", number: int) -> None:
    assert list(claimed(tmp_path).values()) == [{"a", "b"}]
    holder.send_signal(number)
    holder.wait(timeout=60)
    assert claimed(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["lock"], "the dead claim is taken away"


def test_who_waits_goes_on_when_the_holder_is_killed(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    (path,) = claimed(tmp_path)
    waiter = threading.Thread(target=wait_for, args=(path,))
    waiter.start()
    time.sleep(0.2)
    assert waiter.is_alive()
    holder.kill()
    waiter.join(timeout=60)
    assert not waiter.is_alive()
    holder.wait(timeout=60)


def test_only_one_looks_and_claims_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with exclusively(tmp_path):
            order.append("second")

    with exclusively(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "second"]
