"""The prediction beside a run: made by another process, told before and after, and never in the way."""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loragraft.train import forecast
from loragraft.train.forecast import GIB, Forecast

RECIPE = ["train.batch_size=2", "adapter.rank=4"]


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    return SimpleNamespace(device=torch.device("cuda"), is_main_process=True, num_processes=1)


def _process(code: str) -> Forecast:
    folder = tempfile.TemporaryDirectory()
    with (Path(folder.name) / forecast.ERRORS).open("w") as errors:
        return Forecast(subprocess.Popen([sys.executable, "-c", code], stderr=errors), folder)


def test_a_cpu_has_no_forecast() -> None:
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, num_processes=1)
    nothing = Forecast.start("marketing", [], on_cpu)
    assert nothing.before() == nothing.after() == ""


def test_a_run_is_told_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forecast.start("marketing", RECIPE, _on_a_gpu(monkeypatch))
    before = made.before(patience=100)
    assert before.startswith("preflight: 0.")
    assert "s a step; needs a card of" in before
    after = made.after(GIB)
    assert after.startswith("memory: predicted 0.")
    assert "measured 1.0 GiB (-" in after


def test_a_slow_prediction_is_ended() -> None:
    slow = _process("import time; time.sleep(60)")
    assert "not ready yet" in slow.before(patience=0.2)
    assert slow.after(GIB) == "preflight: not ready when training was, and ended\n"
    assert slow._process is not None
    assert slow._process.returncode is not None


def test_a_failed_prediction_says_why_once() -> None:
    failed = _process("raise ValueError('no such thing')")
    assert failed.before(patience=30) == "preflight failed, training goes on: ValueError: no such thing\n"
    assert failed.after(GIB) == ""


def test_a_prediction_that_fails_late_says_why_at_the_end(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    failed = _process(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    )
    assert "not ready yet" in failed.before(patience=0.1)
    gate.touch()
    assert failed._process is not None
    failed._process.wait(timeout=30)
    assert failed.after(GIB) == "preflight failed, training goes on: exit code 3\n"


def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    failed = _process("import not_a_package_of_anyone.part")
    told = failed.before(patience=30)
    failed.close()
    assert "No module named 'not_a_package_of_anyone'; pip install --upgrade loragraft" in told
    assert told.endswith("brings it\n")
