"""What is made of finished runs: curves, table, plot; and which pictures are compared with which."""

import argparse
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
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


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Pictures that are named and never drawn, and features by their names."""

    def replace(module: ModuleType) -> None:
        def features(store: object, paths: list[Path]) -> torch.Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(str(paths[0]).encode()))
            return torch.randn(6, 4, generator=generator).double()

        monkeypatch.setattr(module, "pictures", lambda args, recipe, on, name: [Path(on) / name])
        monkeypatch.setattr(module, "features_of", features)
        monkeypatch.setattr(module, "real_features", lambda store, recipe: features(store, [Path("real")]))
        monkeypatch.setattr(module, "recipe_of", lambda *_: None)
        shared = module.about.__globals__  # pocket_runs.py's
        monkeypatch.setitem(shared, "trained_on", lambda *_: ["an H100"])
        monkeypatch.setitem(shared, "rendered_on", lambda paths: sorted(map(str, paths)))

    return replace


def test_every_variant_is_scored_against_16_bit(
    convergence: ModuleType, scored: Callable[[ModuleType], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(convergence)
    monkeypatch.setattr(convergence, "curves", lambda run: {"steps": 2, "validation": [(0, 0.6), (2, 0.5)]})
    out = tmp_path / "out.json"
    args = argparse.Namespace(
        work=tmp_path, out=out, recipe="marketing", images=6, variants=["16-bit", "W4A8"], overrides=[], commit=""
    )
    convergence.measure_all(args)
    result = json.loads(out.read_text())
    assert result["trained_on"] == ["an H100"]
    assert result["drawn_on"] == ["16bit/16bit", "native/16bit", "native/native"]
    assert set(result["kid_over_16bit"]) == set(result["kid_change_to_16bit"]) == {"W4A8", convergence.TRANSFER}
    kid = {name: entry["value"] for name, entry in result["kid_lite0"].items()}
    assert result["kid_over_16bit"]["W4A8"] == pytest.approx(kid["W4A8"] / kid["16-bit"])


def test_the_sweep_has_a_row_for_every_number_of_steps(
    sampling: ModuleType, scored: Callable[[ModuleType], None], tmp_path: Path
) -> None:
    scored(sampling)
    args = argparse.Namespace(
        work=tmp_path, out=tmp_path / "out.json", plot=None, recipe="marketing", images=6, variants=["W4A8", "16-bit"],
        steps=[4, 10], overrides=[], commit="",
    )  # fmt: skip
    names = [sampling.set_name(numerics, steps) for numerics in ("native", "16bit") for steps in (4, 10)]
    for seconds, name in enumerate(names, start=1):
        file = sampling.times_file(args, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"seconds_per_image": seconds, "guidance": 3.0, "timed_on": "an H100", "threads": 1})
        )
    sampling.measure_all(args)
    result = json.loads(args.out.read_text())
    rows = [(row["numerics"], row["steps"], row["seconds_per_image"]) for row in result["rows"]]
    assert rows == [("native", 4, 1), ("native", 10, 2), ("16bit", 4, 3), ("16bit", 10, 4)]
    assert all(row["references"] == 6 and row["kid_lite0"]["low"] <= row["kid_lite0"]["high"] for row in result["rows"])
    assert result["drawn_on"] == sorted(f"{name.split('-')[0]}/{name}" for name in names)
