"""`kill -9` and ctrl-C anywhere in the line: the same bytes in the end. See kill9.py, which runs in a process of its own
because a forked child must not inherit the thread pools of other tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The comparison with the uninterrupted run is made there: it ends with an error where one byte differs."""
    command = [sys.executable, str(Path(__file__).with_name("kill9.py")), "--kills", "20", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def test_twenty_random_kills_lose_nothing_but_the_step_in_flight(report: dict[str, Any]) -> None:
    assert report["kills"] >= 20
    assert report["files_compared"] > 30
    assert sum(count > 0 for count in report["phases"].values()) >= 5, report["phases"]


def test_a_kill_around_every_rename_and_within_every_line_loses_nothing(report: dict[str, Any]) -> None:
    for name in (
        "cache/domains/",
        "cache/encoded/",
        "recipe.yaml",
        "checkpoint.pt",
        "samples/",
        "adapter/",
        "summary.json",
    ):
        for side in ("before", "after"):
            hit = any(site.startswith(side) and name in site for site in report["renames"])
            assert hit, f"never killed {side} the rename of {name}"
    assert any(site.startswith("within metrics.jsonl") for site in report["renames"])


def test_ctrl_c_says_how_to_go_on_in_every_phase(report: dict[str, Any]) -> None:
    assert list(report["interrupted"]) == ["drawing", "encoding", "training", "saving", "end"]
    for phase, last_line in report["interrupted"].items():
        assert "again to go on" in last_line, f"{phase}: {last_line}"
    assert "stopped at step" in report["interrupted"]["training"]
