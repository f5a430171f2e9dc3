"""The breakdown of a first step adds up and prints."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def test_phases_are_timed_once_and_listed(
    benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_step = benchmark_module("first_step")
    now = iter([0.0, 1.5, 4.0])
    monkeypatch.setattr(first_step.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    metrics: Any = {"_compile.compile_inner": [2.0, 0.5], "short": [0.2]}
    monkeypatch.setattr(torch._dynamo.utils, "compilation_time_metrics", metrics)
    phases = first_step.Phases()
    for name in ("injected", "micro-batch", "injected"):
        phases(name)
    assert phases.seconds == {"injected": 1.5, "micro-batch": 2.5}
    parts = first_step.first_step_parts(phases, {"capture": 0.75}, {"small": 1.0, "large": 3.0})
    assert parts["compiler"] == {"_compile.compile_inner": 2.5}
    assert parts["triton_kernels"] == 4.0
    assert first_step.phase_lines(parts) == [
        "to the first optimizer step: 4.0 s",
        "     1.50 s  injected",
        "     2.50 s  micro-batch",
        "of it, the first micro-batch: 0.8 s",
        "     0.75 s  capture",
        "torch's compiler, nested",
        "     2.50 s  _compile.compile_inner",
        "Triton kernels, in this process: 4.0 s",
        "     3.00 s  large",
        "     1.00 s  small",
    ]


def test_progress_is_kept_in_a_file_as_it_comes(
    benchmark_module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_step = benchmark_module("first_step")
    now = iter([0.0, 1.5, 4.0])
    monkeypatch.setattr(first_step.time, "perf_counter", lambda: next(now))
    file = tmp_path / "parts" / "one.partial"
    progress = first_step.Progress(file)
    progress("model built", static_gib=7.0, steps_ms=[])
    assert json.loads(file.read_text()) == {"reached_seconds": {"model built": 1.5}, "static_gib": 7.0, "steps_ms": []}
    progress("step 1", steps_ms=[900.0])
    found = json.loads(file.read_text())
    assert found["reached_seconds"] == {"model built": 1.5, "step 1": 4.0}
    assert (found["static_gib"], found["steps_ms"]) == (7.0, [900.0])
    assert capsys.readouterr().err.split("\n")[:2] == ["    1.5 s  model built", "    4.0 s  step 1"]
