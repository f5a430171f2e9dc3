"""A base that is quantized on first use: killed while it is written, no room for it, damaged afterwards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("kill9_base.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def test_killed_while_it_is_written_the_base_is_whole_or_absent(report: dict[str, Any]) -> None:
    sites = report["sites"]
    assert any(site.startswith("before replace") for site in sites)
    assert any(site.startswith("after replace") for site in sites)
    assert len(sites) >= 8
    assert report["equal"], "quantized after kills, it is another base"


def test_a_damaged_one_names_the_folder_to_delete(report: dict[str, Any]) -> None:
    code, output = report["damaged"]
    assert code == 2
    assert "is truncated: tensor" in output
    assert "small-native-" in output
    assert "is a cache: delete it, and it is quantized again" in output
    assert "Traceback" not in output


def test_no_room_for_it_leaves_nothing_and_says_so(report: dict[str, Any]) -> None:
    code, output = report["full"]
    assert code == 2
    assert "diffusion_pytorch_model.safetensors is not written" in output
    assert "are left" in output
    assert "LORAGRAFT_CACHE for caches" in output
    assert "Traceback" not in output
    assert report["left_by_full"] == []
    assert report["after_full"] == 0
