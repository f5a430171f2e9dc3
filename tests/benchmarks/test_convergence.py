"""What is made of finished runs: curves, table, plot; and which pictures are compared with which."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def convergence(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("convergence", beside="pocket_runs")


@pytest.fixture(scope="module")
def sampling(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("sampling_steps", beside="pocket_runs")


def kid(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def test_curves_are_those_of_the_metrics(convergence: ModuleType, tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "validation_loss": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"validation_loss_start": 0.6, "device": "cpu", "train_seconds": 3.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = convergence.curves(tmp_path)
    assert found["loss"] == [0.5, 0.25]
    assert found["validation"] == [(0, 0.6), (2, 0.3)]
    assert convergence.smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_the_16_bit_adapter_is_also_drawn_in_the_4_bit_base(convergence: ModuleType) -> None:
    sets = convergence.drawn_sets(["16-bit", "W4A8"])
    transfer = ("native", "16bit")
    assert sets == {"16-bit": ("16bit", "16bit"), "W4A8": ("native", "native"), convergence.TRANSFER: transfer}
    assert convergence.TRANSFER not in convergence.drawn_sets(["W4A8", "W4A4"])


def test_table_and_plots(convergence: ModuleType, sampling: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install loragraft[dev]")
    curve = {"steps": 3, "loss": [0.5, 0.4, 0.3], "validation": [[0, 0.6], [3, 0.4]]}
    result = {
        "variants": {"16-bit": curve, "W4A8": curve},
        "kid_lite0": {"16-bit": kid(0.10), "W4A8": kid(0.11), convergence.TRANSFER: kid(0.2)},
        "kid_over_16bit": {"W4A8": 1.1, convergence.TRANSFER: 2.0},
        "kid_change_to_16bit": {"W4A8": kid(0.01), convergence.TRANSFER: kid(0.1)},
    }
    lines = convergence.table(result).splitlines()
    assert len(lines) == 5
    assert "| 1.100 |" in lines[3]
    (tmp_path / "out.json").write_text(json.dumps(result))
    convergence.plot(argparse.Namespace(plot=tmp_path / "curves.png", out=tmp_path / "out.json"))
    rows = [
        {"numerics": name, "steps": steps, "seconds_per_image": steps / 10, "kid_lite0": kid(1 / steps)}
        for name in ("native", "16bit")
        for steps in (4, 10)
    ]
    sampling.plot(rows, tmp_path / "steps.png")
    assert sampling.table(rows).count("native") == 2
    for name in ("curves.png", "steps.png"):
        assert Image.open(tmp_path / name).width > 600
