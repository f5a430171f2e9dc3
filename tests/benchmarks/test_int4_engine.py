"""What of the engine's benchmark needs no GPU: torch's own layers under their keys, and the figures of other scripts."""

import argparse
import json
import runpy
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


def test_the_quantizers_figures_are_renewed_without_a_gpu(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calibrated = tmp_path / "before.json", tmp_path / "calibrated.json"
    before.write_text(json.dumps({"linears_speedup_w4a8": 1.5, "calibrated_seconds": None}))
    calibrated.write_text(json.dumps({"total_seconds": 3.0, "commit": "abc"}))
    line = ["x", "--timings", before, "--out", before, "--commit", "other", "--calibrated", calibrated]
    monkeypatch.setattr("sys.argv", [str(word) for word in line])
    assert engine.main() == 0
    renewed = json.loads(before.read_text())
    assert (renewed["linears_speedup_w4a8"], renewed["calibrated_seconds"]) == (1.5, 3.0)
    assert renewed["quantizer_commits"]["calibrated"] == "abc"
    assert "commit" not in renewed, "its timings are of the run that made them"


def test_one_command_makes_the_files_that_it_was_not_given(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each script takes the options that it is called with, up to where it would begin."""
    asked: list[list[str]] = []
    monkeypatch.setattr(engine.subprocess, "run", lambda line, check: asked.append(line[1:]))
    accuracy = tmp_path / "given.json"
    given = argparse.Namespace(
        out=tmp_path / "results" / "engine.json", commit="abc", shapes="flux", work=tmp_path / "work",
        quantizer=None, calibrated=None, accuracy=accuracy,
    )  # fmt: skip
    assert engine._command(given).endswith("--shapes flux --out engine.json --accuracy given.json --work work")
    engine.make_missing(given)
    assert [Path(line[0]).name for line in asked] == ["quantizer.py", "quantizer.py"]
    assert [line[1] for line in asked] == ["stream", "calibrated"]
    assert (given.quantizer, given.calibrated, given.accuracy) == (
        tmp_path / "results" / "quantizer.json", tmp_path / "results" / "calibrated.json", accuracy,
    )  # fmt: skip
    given.accuracy = None
    engine.make_missing(given)
    assert Path(asked[-1][0]).name == "quantizer_accuracy.py"
    given.accuracy = given.work = None
    engine.make_missing(given)
    assert len(asked) == 3 and given.accuracy is None
    for script, *options in asked:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("argparse.ArgumentParser.parse_args", _parsed(options))
            patch.syspath_prepend(str(BENCHMARKS))
            with pytest.raises(ParsedError):
                runpy.run_path(script, run_name="__main__")


class ParsedError(Exception):
    """The options were accepted."""


def _parsed(options: list[str]) -> Callable[[argparse.ArgumentParser], None]:
    def parse(parser: argparse.ArgumentParser) -> None:
        _, unknown = parser.parse_known_args(options)
        assert unknown == []
        raise ParsedError

    return parse
