"""The quantizer's benchmarks at a size for a CPU: a FLUX-shaped folder, one measured run, and the plain SVDQuant they compare with."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loragraft.backbones.architectures import FLUX, open_model, plan_model
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.settings import QuantSettings


@pytest.fixture(scope="module")
def streaming(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("quantizer")


@pytest.fixture(scope="module")
def accuracy(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("quantizer_accuracy")


def _arguments(work: Path, **more: object) -> argparse.Namespace:
    given = {"work": work, "scale": 0.02, "seed": 0, "group_size": 64, "gptq": False, "passes": 1, "stats": None}
    return argparse.Namespace(**{**given, "no_input_file": False, "name": "whole", **more})


def test_at_full_scale_it_is_flux_dev(streaming: ModuleType) -> None:
    source = streaming.GeneratedSource(streaming.flux_config(1.0), 0, "cpu")
    plan = plan_model(source, FLUX, QuantSettings(rank=32, smoothing="auto", search="subsampled"))
    sizes = {path: torch.Size(source.tensors[f"{path}.weight"].shape).numel() for path in plan}
    assert sum(info_numel(info.shape) for info in source.tensors.values()) == 11_901_408_320
    assert sum(settings.numerics == "w4a16" for settings in plan.values()) == 76
    assert sum(settings.numerics == "w4a8" for settings in plan.values()) == 19 * 12 + 38 * 5
    assert max(sizes.values()) == 18432 * 3072


def info_numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_folder_and_generator_hold_the_same_weights_and_give_the_same_file(
    streaming: ModuleType, tmp_path: Path
) -> None:
    source = streaming.GeneratedSource(streaming.flux_config(0.02), 0, "cpu")
    streaming.write_model(source, tmp_path / "model", shard_bytes=2e5)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    read, _, config = open_model(tmp_path / "model")
    assert config == json.loads(json.dumps(source.config))
    assert all(torch.equal(read.read(name), source.read(name)) for name in source.tensors)
    from_folder = streaming.child(_arguments(tmp_path))
    generated = streaming.child(_arguments(tmp_path, no_input_file=True, name="generated"))
    assert streaming.digest(tmp_path / "whole" / streaming.WEIGHTS_NAME) == streaming.digest(
        tmp_path / "generated" / streaming.WEIGHTS_NAME
    )
    assert from_folder["mean_output_error"] == generated["mean_output_error"] < 0.1
    assert from_folder["layers"] == 20
    assert from_folder["peak_host_gib"] > 0


def test_statistics_of_random_passes_calibrate(streaming: ModuleType, tmp_path: Path) -> None:
    streaming.write_model(streaming.GeneratedSource(streaming.flux_config(0.02), 0, "cpu"), tmp_path / "model")
    streaming.collect_stats(_arguments(tmp_path), tmp_path / "stats.safetensors")
    result = streaming.child(_arguments(tmp_path, stats=tmp_path / "stats.safetensors"))
    assert result["smoothed"] > 10


def test_exact_low_rank_is_the_svd(accuracy: ModuleType) -> None:
    for shape in ((20, 30), (30, 20)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, right = accuracy.exact_low_rank(matrix, 5)
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert relative_rms(left @ right, (U[:, :5] * S[:5]) @ Vh[:5]) < 1e-6


def test_ratios_of_small_layers(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "GRID", 3)
    monkeypatch.setattr(accuracy, "MOST_ROUNDS", 5)
    cases = list(accuracy.synthetic_cases(128))
    assert len(cases) == 10
    rows = [accuracy.layer_row(case) for case in (cases[0], cases[2], cases[6])]
    found = accuracy.summary(rows)
    assert found["auto_over_w4a4"]["worst"] < 0.7
    assert found["auto_g128_over_w4a4"]["worst"] < 0.75
    assert found["w4a4_over_plain"]["mean"] < 1.05
    assert found["refinement"]["kinds"].keys() == {"gaussian", "loud inputs", "heavy tails"}
