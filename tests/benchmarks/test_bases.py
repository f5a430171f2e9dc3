"""The benchmark of all bases without its GPU: every base has a row with every key, one failure is a row, no row is lost."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loragraft.backbones.load import list_bases, shipped_bases

PREDICTED = {
    "params": 10**9, "file_gb": 0.5, "file_gb_16bit": 2.0, "preflight_gib": 4.0, "step": "train", "checkpointing": True,
}  # fmt: skip
MEASURED = {"step_ms": 100.0, "peak_gib": 4.2, "reserved_gib": 4.5}


@pytest.fixture(scope="module")
def benchmark(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("bases", "preflight")


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["bases.py", "--out", str(out), *words])
    return benchmark.main(), json.loads(out.read_text())


def answering(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, **peaks: Any) -> list[tuple[str, str]]:
    """In the place of the processes: what each base is said to need, by default 4.2 GiB; the calls, in order."""
    asked: list[tuple[str, str]] = []

    def answer(what: str, base: str, eager: bool) -> dict[str, Any]:
        asked.append((what, base))
        found = peaks.get(base.replace("-", "_"), 4.2)
        if what == "prediction":
            return dict(PREDICTED)
        return {"error": "measurement: out of memory"} if found is None else MEASURED | {"peak_gib": found}

    monkeypatch.setattr(benchmark, "in_its_own_process", answer)
    return asked


def test_every_base_has_a_row_with_every_key(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(benchmark, monkeypatch)
    monkeypatch.setattr(benchmark, "CONV_BASE", "flux1-dev")
    (tmp_path / "conv.json").write_text(json.dumps({"batches": {"1": {"conv_vs_cudnn": 1.25}}}))
    code, result = run(benchmark, monkeypatch, tmp_path / "bases.json", "--conv", str(tmp_path / "conv.json"))
    assert code == 0
    assert list(benchmark.SHIPPED) == shipped_bases()
    assert list(result["bases"]) == [name for name in list_bases() if name != "pocket"]
    for row in result["bases"].values():
        assert tuple(row)[: len(benchmark.KEYS)] == benchmark.KEYS
        assert row["memory_pct"] == pytest.approx(100 * (4.0 / 4.2 - 1)) and row["memory_holds"]
    assert [row["conv_vs_cudnn"] for row in result["bases"].values()].count(1.25) == 1


def test_a_failure_is_a_row_and_the_exit_code(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(benchmark, monkeypatch, flux1_dev=None)
    code, result = run(benchmark, monkeypatch, tmp_path / "bases.json")
    assert code == 1
    assert result["bases"]["flux1-dev"]["error"] == "measurement: out of memory"
    assert result["bases"]["flux1-dev"]["params"] == 10**9, "what was predicted is kept"
    assert result["bases"]["flux1-schnell"]["step_ms"] == 100
    assert "FAILED measurement: out of memory" in capsys.readouterr().out
    answering(benchmark, monkeypatch, flux1_dev=5.0)
    assert run(benchmark, monkeypatch, tmp_path / "other.json", "--only", "flux1-dev")[0] == 1, "20 % off passed"


def test_one_base_is_measured_again_and_the_others_stay(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(benchmark, monkeypatch)
    _, before = run(benchmark, monkeypatch, tmp_path / "bases.json")
    asked = answering(benchmark, monkeypatch, flux1_dev=4.1)
    _, after = run(benchmark, monkeypatch, tmp_path / "bases.json", "--only", "flux1-dev")
    assert sorted(asked) == [("measurement", "flux1-dev"), ("prediction", "flux1-dev")]
    changed = {name for name, row in after["bases"].items() if row != before["bases"][name]}
    assert changed == {"flux1-dev"}


def test_a_process_says_its_row_or_why_not(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "part.py"
    monkeypatch.setattr(benchmark, "__file__", str(script))
    script.write_text("print('noise')\nprint('row: {\"params\": 3}')")
    assert benchmark.in_its_own_process("prediction", "x", False) == {"params": 3}
    script.write_text("raise SystemExit('no such card')")
    assert benchmark.in_its_own_process("measurement", "x", False) == {"error": "measurement: no such card"}
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(benchmark, "TIMEOUT", 0.5)
    assert benchmark.in_its_own_process("measurement", "x", False) == {"error": "measurement was not done after 0.5 s"}


def test_sizes_and_preflight_of_true_shapes(benchmark: ModuleType) -> None:
    row = benchmark.prediction("pixart-sigma")
    assert row["params"] == pytest.approx(0.611e9, rel=0.005)
    assert row["file_gb"] <= 0.42 and row["unknown_ops"] == []
    assert row["pixels"] == 1024 and row["step"] == "train"
    assert 1 < row["preflight_gib"] < 8
    assert row["captured"] and not benchmark.configuration("pixart-sigma", eager=True).captured
    assert benchmark.configuration("flux1-schnell").trains is False


def test_an_unknown_base_is_named(benchmark: ModuleType) -> None:
    with pytest.raises(ValueError, match="Did you mean 'flux1-dev'"):
        benchmark.bases(["flux1-devv"])
