"""The run under compute-sanitizer without a GPU: cases on torch's path, verdicts by a script that stands in for the tool."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.compiler.compiler import LazyDict

from loragraft.kernels.compile_table import TABLE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitizer.py"
RAN: dict[str, Any] = {
    "checks": 3, "wrong": [], "kernels": {build.kernel.__name__: 1 for build in TABLE}, "device": "card", "capability": [9, 0],
    "torch": "2", "triton": "3",
}  # fmt: skip
PYTHON = """#!/bin/sh
echo 'RESULT {}'
"""
SANITIZER = """#!/bin/sh
if [ "$1" = --version ]; then echo 'Version 1'; exit; fi
tool=$2
for name; do :; done
echo '========= COMPUTE-SANITIZER'
if [ "$name" = "$SLOW" ]; then sleep 60 & wait; fi
if [ "$name" = "$BAD" ] || { [ "$name" = planted ] && [ "$tool" = memcheck ] && [ -z "$BLIND" ]; }; then
    echo '========= Invalid __global__ read of size 4 bytes'
    echo "=========     at ${name}_kernel+0x1b0"
    echo '========= ERROR SUMMARY: 24 errors'
    exit 9
fi
while [ "$1" != "$PYTHON_AT" ]; do shift; done
"$@"
echo '========= ERROR SUMMARY: 0 errors'
"""


@pytest.fixture(scope="module")
def sanitizer(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("sanitizer", beside="sanitizer_cases")


@pytest.fixture(scope="module")
def cases(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("sanitizer_cases")


@pytest.fixture
def report(
    sanitizer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """(words of `all`, ran=what a case prints, variables of the fake tool) -> exit code and report."""

    def run(*words: str, ran: dict[str, Any] = RAN, **variables: str) -> tuple[int, dict[str, Any]]:
        python, out = tmp_path / "python", tmp_path / "sanitizer.json"
        for file, text in (
            (python, PYTHON.format(json.dumps(ran))),
            (tmp_path / "compute-sanitizer", SANITIZER),
        ):
            file.write_text(text)
            file.chmod(0o755)
        monkeypatch.setattr(sanitizer.sys, "executable", str(python))
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        for name, value in {"PYTHON_AT": str(python), **variables}.items():
            monkeypatch.setenv(name, value)
        code = sanitizer.main(["all", "--out", str(out), "--commit", "abc", "--jobs", "2", *words])
        return code, json.loads(out.read_text())

    return run


def test_every_case_is_right_on_a_cpu(cases: ModuleType) -> None:
    for name in cases.CASES:
        if name != cases.PLANTED:
            result = cases.run_case(name, "cpu")
            assert result["wrong"] == [], name
            assert result["checks"] >= 2, name
            assert result["kernels"] == {}, name


def test_wrong_results_and_exceptions_are_told(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.quantize_activation
    monkeypatch.setattr(cases, "quantize_activation", lambda *args: (right(*args)[0], 2 * right(*args)[1]))
    monkeypatch.setattr(cases, "w4a8_group", lambda *_, **__: 1 / 0)
    scaled, raised = cases.run_case("quantizers", "cpu"), cases.run_case("group", "cpu")
    assert len(scaled["wrong"]) == scaled["checks"]
    assert "relative error 1, must be below" in scaled["wrong"][0]
    assert len(raised["wrong"]) == raised["checks"] == 2
    assert "ZeroDivisionError" in raised["wrong"][0]
    with pytest.raises(ValueError, match="run it on a GPU"):
        cases.run_case(cases.PLANTED, "cpu")


def test_launches_are_counted_where_triton_tells_of_them(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = triton.knobs.runtime.launch_enter_hook

    def launched() -> dict[str, tuple[float, float]]:
        for name in ("a_kernel", "b_kernel", "a_kernel"):
            hook(LazyDict({"name": name}))
        return {"y": (0.0, 1.0)}

    monkeypatch.setitem(cases.CASES, "conv", lambda device, dtype: iter([("label", launched)]))
    result = cases.run_case("conv", "cpu")
    assert result == {"checks": 1, "wrong": [], "kernels": {"a_kernel": 2, "b_kernel": 1}}
    assert hook.calls == []


def test_portable_cases_are_off_hopper_while_they_run(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.kernels.hopper_gemm.on_hopper", lambda *_: True)
    from loragraft.kernels.hopper_gemm import hopper_gemm_runs

    def seen(device: str, dtype: torch.dtype) -> Any:
        yield "runs", lambda: hopper_gemm_runs(torch.zeros(8, 8), dtype, torch.zeros(8, 8))

    inside = [compute() for _, compute in cases.portable(seen, "cpu", torch.bfloat16)]
    outside = [compute() for _, compute in seen("cpu", torch.bfloat16)]
    assert (inside, outside) == ([False], [True])


def test_the_source_of_the_kernels_runs_through_a_case() -> None:
    """In Triton's interpreter; a CPU's run counts no launches."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "case", "adamw8bit", "--device", "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert (result["checks"], result["wrong"], result["kernels"]) == (4, [], {})


def test_all_kernels_are_known(sanitizer: ModuleType) -> None:
    assert sanitizer.our_kernels() == {build.kernel.__name__ for build in TABLE}


@pytest.mark.parametrize(
    ("tool", "code", "ran", "summary", "verdict"),
    [
        ("memcheck", 0, RAN, "========= ERROR SUMMARY: 0 errors", "clean"),
        ("racecheck", 0, RAN, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        ("alone", 0, RAN, "", "clean"),
        ("memcheck", 0, RAN, "========= ERROR SUMMARY: 2 errors", "errors"),
        ("memcheck", 9, None, "========= ERROR SUMMARY: 1 error", "errors"),
        ("racecheck", 9, RAN, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "errors"),
        ("memcheck", 0, RAN, "", "failed"),
        ("memcheck", 0, None, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("memcheck", 1, RAN, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("memcheck", 0, {**RAN, "wrong": ["y"]}, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("memcheck", 0, {**RAN, "kernels": {}}, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("memcheck", None, RAN, "========= ERROR SUMMARY: 0 errors", "not finished"),
    ],
)
def test_verdicts(
    sanitizer: ModuleType, tool: str, code: int | None, ran: dict[str, Any] | None, summary: str, verdict: str
) -> None:
    line = "" if ran is None else f"RESULT {json.dumps(ran)}"
    found = sanitizer.judge(tool, code, f"========= COMPUTE-SANITIZER\n{line}\n{summary}\n")
    assert found["verdict"] == verdict
    assert bool(found["why"]) == (verdict != "clean")


def test_a_report_passes_if_all_is_clean_and_the_planted_error_found(
    sanitizer: ModuleType, report: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    code, result = report()
    assert code == 0
    assert result["passed"] and result["planted_found"] and result["not_clean"] == []
    assert result["not_launched"] == {"memcheck": [], "synccheck": []}
    assert result["cases"].keys() == sanitizer.CASES.keys()
    assert all(
        one.keys() == {"alone", "memcheck", "synccheck"} for name, one in result["cases"].items() if name != "planted"
    )
    assert (result["commit"], result["sanitizer"], result["device"]) == ("abc", "Version 1", "card")


def test_a_tool_that_does_not_find_the_planted_error_proves_nothing(
    report: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    code, result = report("--cases", "conv", BLIND="1")
    assert (code, result["planted_found"], result["not_clean"]) == (1, False, [])


def test_errors_and_their_kernel_are_in_the_report(report: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, result = report("--cases", "conv", "w4a4", BAD="w4a4")
    assert code == 1
    assert sorted(result["not_clean"]) == ["w4a4, memcheck: errors", "w4a4, synccheck: errors"]
    found = result["cases"]["w4a4"]["memcheck"]
    assert (found["errors"], found["why"][1].strip()) == (24, "at w4a4_kernel+0x1b0")


def test_a_case_that_does_not_end_is_not_clean(report: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    start = time.perf_counter()
    code, result = report("--cases", "conv", "w4a4", "--timeout", "1", SLOW="conv")
    assert time.perf_counter() - start < 15
    assert code == 1
    assert sorted(result["not_clean"]) == ["conv, memcheck: not finished", "conv, synccheck: not finished"]


def test_a_kernel_that_no_case_launched_fails_the_whole_report(
    report: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    kernels = {name: 1 for name in RAN["kernels"] if name != "gemv_kernel"}
    code, result = report(ran={**RAN, "kernels": kernels})
    assert code == 1
    assert result["not_launched"] == {"memcheck": ["gemv_kernel"], "synccheck": ["gemv_kernel"]}
    assert report("--cases", "conv", ran={**RAN, "kernels": kernels})[0] == 0
    elsewhere = {name: 1 for name in RAN["kernels"] if not name.startswith("hopper_")}
    assert report(ran={**RAN, "kernels": elsewhere, "capability": [8, 0]})[0] == 0


def test_without_the_tool_it_says_what_to_install(sanitizer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="CUDA toolkit"):
        sanitizer.main(["all"])
