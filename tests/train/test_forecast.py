"""The prediction beside a run: made by another process, told before and after, and never in the way."""

import json
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


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch, gib: float = 79.2) -> Any:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    card = SimpleNamespace(total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
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
    assert "this GPU" not in before
    after = made.after(GIB, step_seconds=1.0)
    assert after.startswith("memory: predicted 0.")
    assert "measured 1.0 GiB (-" in after
    assert "\ntime: predicted 0.0" in after and "s a step, measured 1 s (-9" in after


def test_a_gpu_that_is_too_small_is_told_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forecast.start("marketing", ["train.batch_size=64", "adapter.rank=4"], _on_a_gpu(monkeypatch, 1.0))
    told = made.before(patience=100)
    made.close()
    assert "preflight: this GPU has 1.0 GiB, so the run may end for lack of memory; it fits (" in told
    assert "GiB) with train.checkpointing=" in told or "GiB) with train.batch_size=" in told


def _reported(card: int, code: str, **found: object) -> Forecast:
    """A process that has written its report and then runs `code`."""
    figures = {"peak": 9 * GIB, "needed": 10 * GIB, "stages": {"train": 9 * GIB}, "machines": [], **found}
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / forecast.REPORT).write_text(json.dumps(figures))
    return Forecast(subprocess.Popen([sys.executable, "-c", code]), folder, card)


def test_the_search_for_what_fits_is_waited_for_and_ended() -> None:
    searching = _reported(8 * GIB, "import time; time.sleep(60)")
    told = searching.before(patience=0.1, remedy_patience=0.1)
    assert "9.0 GiB to train" in told
    assert "this GPU has 8.0 GiB" in told and "stop it and ask `loragraft preflight`" in told
    assert searching._process is not None
    assert searching._process.poll() is not None, "it goes on beside the run"
    assert "measured 8.0 GiB (+12 %)" in searching.after(8 * GIB)
    hopeless = _reported(2 * GIB, "raise SystemExit(1)", fit={"card": 2 * GIB, "overrides": None, "needed": None})
    assert "nothing that a recipe can change would make it fit" in hopeless.before(patience=120)
    hopeless.close()


def test_a_slow_prediction_is_ended() -> None:
    slow = _process("import time; time.sleep(60)")
    assert "not ready yet" in slow.before(patience=0.2)
    assert slow.after(GIB) == "preflight: not ready when training was, and ended\n"
    assert slow._process is not None
    assert slow._process.returncode is not None


def test_a_failed_prediction_says_why_once() -> None:
    failed = _process("raise ValueError('no such thing')")
    assert failed.before(patience=120) == "preflight failed, training goes on: ValueError: no such thing\n"
    assert failed.after(GIB) == ""


def test_a_prediction_that_fails_late_says_why_at_the_end(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    failed = _process(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    )
    assert "not ready yet" in failed.before(patience=0.1)
    gate.touch()
    assert failed._process is not None
    failed._process.wait(timeout=120)
    assert failed.after(GIB) == "preflight failed, training goes on: exit code 3\n"


def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    failed = _process("import not_a_package_of_anyone.part")
    told = failed.before(patience=120)
    failed.close()
    assert "No module named 'not_a_package_of_anyone'; pip install --upgrade loragraft" in told
    assert told.endswith("brings it\n")
