"""The quantizer's benchmarks at a size for a CPU: a FLUX-shaped folder, one measured run, and the plain SVDQuant they compare with."""

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loragraft.backbones.architectures import FLUX, open_model, plan_model
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.settings import QuantSettings


@pytest.fixture(scope="module")
def streaming(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("quantizer", beside="flux_calibration")


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
    assert streaming.is_made(_arguments(tmp_path))
    assert not streaming.is_made(_arguments(tmp_path, scale=0.08))
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
    """From the folder and from the generator: the same statistics to the byte, noted phase by phase."""
    streaming.write_model(streaming.GeneratedSource(streaming.flux_config(0.02), 0, "cpu"), tmp_path / "model")
    noted: dict[str, object] = {}
    for name in ("folder", "generated"):
        source, architecture, _ = streaming.open_source(_arguments(tmp_path, no_input_file=name == "generated"))
        layers = list(plan_model(source, architecture, QuantSettings(search="subsampled")))
        layers = [layer for layer in layers if "norm" not in layer]
        streaming.collect_stats(
            source, layers, tmp_path / f"{name}.safetensors", scale=0.02, passes=2, seed=0, note=noted.update
        )
    assert streaming.digest(tmp_path / "folder.safetensors") == streaming.digest(tmp_path / "generated.safetensors")
    assert noted["passes_done"] == 2
    assert all(noted[f"{phase}_seconds"] > 0 for phase in ("load", "pass", "passes", "save"))  # type: ignore[operator]
    result = streaming.child(_arguments(tmp_path, stats=tmp_path / "folder.safetensors"))
    assert result["smoothed"] > 10
    assert result["fitted_to_inputs"] > 10
    assert result["mean_output_error"] < 0.5 * result["mean_plain_error"]
    assert all(seconds > 0 for seconds in result["part_seconds"].values())
    assert sum(result["part_seconds"].values()) < result["seconds"]


def test_a_run_leaves_its_figures_where_it_was_ended(
    streaming: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JSON of a calibrated run whose quantizer fails: what was measured until then, marked as incomplete."""
    monkeypatch.setattr(
        streaming, "start_child", lambda *_: subprocess.Popen(["false"], stdout=subprocess.PIPE, text=True)
    )
    out = tmp_path / "out.json"
    line = f"quantizer.py calibrated --work {tmp_path / 'work'} --out {out} --scale 0.02 --passes 1 --no-input-file"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(RuntimeError, match="ended with 1"):
        streaming.main()
    found = json.loads(out.read_text())
    assert not found["complete"]
    assert found["excluded"][-1] == "reading the 16-bit weights from a file"
    assert found["statistics_seconds"] > found["passes_seconds"] > 0
    assert "total_seconds" not in found
    assert "--out out.json" in found["command"]
    assert not (tmp_path / "work" / "model").exists()


def test_a_work_folder_without_room_is_named(
    streaming: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(40e9, 10e9, 30e9))  # type: ignore[attr-defined]
    given = {"what": "calibrated", "scale": 1.0, "kill": None}
    reason = streaming.lacking_room(_arguments(tmp_path, **given))
    assert f"{tmp_path} has 30.0 GB free, this run writes 33.3" in reason
    assert streaming.lacking_room(_arguments(tmp_path, **given, no_input_file=True)) is None


def test_a_child_is_watched(streaming: ModuleType) -> None:
    looks: list[int] = []
    process = subprocess.Popen(["sh", "-c", "sleep 1.2; echo '{}'"], stdout=subprocess.PIPE, text=True)
    assert streaming.finish_child(process, lambda: looks.append(1)) == {}
    assert looks == [1]


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
