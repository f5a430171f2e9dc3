"""What of the engine's benchmark needs no GPU: torch's own layers under their keys, and the figures of other scripts."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def engine(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("int4_engine", beside=("rivals", "timing"))


def test_the_librarys_layers_are_those_of_the_rivals(engine: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 128, generator=generator).bfloat16() for rows in (32, 64))
    steps = engine.library(x, weight)
    assert steps.keys() == {"fp8", "fp8_product_only", "int_mm_product_only"}
    expected = (x @ weight.T).float()
    assert (steps["fp8_product_only"]().float() - expected).norm() < 0.06 * expected.norm()
    sums = steps["int_mm_product_only"]()
    assert sums.dtype == torch.int32
    scales = [rows.abs().amax(1).float() / 127 for rows in (x, weight)]
    assert (sums * scales[0][:, None] * scales[1] - expected).norm() < 0.02 * expected.norm()


def test_figures_of_the_quantizers_benchmarks_are_taken_over(engine: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "calibrated.json").write_text(
        json.dumps({"statistics_seconds": 1.0, "seconds": 2.0, "total_seconds": 3.0})
    )
    results = BENCHMARKS / "results"
    found = engine.from_other_scripts(
        argparse.Namespace(
            quantizer=results / "quantizer.json",
            calibrated=tmp_path / "calibrated.json",
            accuracy=results / "quantizer_accuracy.json",
        )
    )
    assert found["calibrated_seconds"] == 3.0
    assert 0 < found["auto_error_ratio"] <= 0.7
    assert found["quantize_seconds"] > 0
    assert found["quantize_peak_gib"] > 0
    assert found["file_gb"] > 6
