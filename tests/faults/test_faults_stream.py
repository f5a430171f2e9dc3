"""Weights on disk, quantized layer by layer: killed anywhere it goes on, redoes nothing that was done and ends with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("kill9_stream.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def test_killed_anywhere_it_ends_with_the_same_bytes(report: dict[str, Any]) -> None:
    sites = report["sites"]
    for call in ("pwrite", "fdatasync", "fsync", "replace", "unlink"):
        assert any(site.startswith(f"before {call}") for site in sites), call
        assert any(site.startswith(f"after {call}") for site in sites), call
    assert len(sites) >= 30
    assert report["equal"]
    assert report["left"] == ["clean", "full", "killed", "model"]


def test_a_layer_in_the_journal_is_never_redone(report: dict[str, Any]) -> None:
    assert report["redone"] == []
    assert report["times_quantized"] > 1, "no layer was killed before it was journalled: the test sees nothing"


def test_a_full_disk_is_named_and_the_same_command_goes_on(report: dict[str, Any]) -> None:
    code, output = report["full"]
    assert code == 2
    assert "diffusion_pytorch_model.safetensors is not written" in output
    assert "it goes on where it was" in output
    assert "Traceback" not in output
    assert report["after_full"] == 0
    assert report["equal_after_full"]
