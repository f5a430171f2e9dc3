"""The precision table: what may be compared, and the figures for images that differ by a known amount."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SETTINGS = {"images": 6, "prompts": 6, "steps": 2, "guidance": 3.0, "seed": 0, "dtype": "float32"}


@pytest.fixture(scope="module")
def precision(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("precision")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Reference images, and variants that are 10 and 20 levels darker."""
    rng = np.random.default_rng(0)
    plan = {}
    pictures = [rng.integers(40, 255, (32, 32, 3)) for _ in range(6)]
    for name, darker in (("16bit", 0), ("rtn-w4a4", 20), ("svdq-w4a4", 10)):
        folder = tmp_path / "key" / name
        folder.mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray((picture - darker).astype(np.uint8)).save(folder / f"{i:04d}.png")
        plan[name] = {"folder": f"key/{name}", **SETTINGS}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def fake_features(_: Any, images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([[float(np.asarray(image).mean()) / 255] * 4 for image in images], dtype=torch.float64)


def measure(precision: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("loragraft.evaluation.features.load_lite0", lambda _: None)
    monkeypatch.setattr("loragraft.evaluation.features.lite0_features", fake_features)
    precision.measure(argparse.Namespace(work=work, out=work / "out.json", commit="abc"))
    found: dict[str, Any] = json.loads((work / "out.json").read_text())
    return found


def test_figures_of_a_known_difference(
    precision: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measure(precision, work, monkeypatch)
    expected = {name: 20 * np.log10(255 / darker) for name, darker in (("rtn-w4a4", 20), ("svdq-w4a4", 10))}
    for name, psnr in expected.items():
        assert result["variants"][name]["psnr_db"]["value"] == pytest.approx(psnr, abs=1e-4)
        assert result["variants"][name]["st_lpips"]["value"] > 0
    gain = result["psnr_gain_of_svdq_over_rtn_w4a4_db"]
    assert gain["value"] == pytest.approx(20 * np.log10(2), abs=1e-4)
    assert "| rtn-w4a4 | 22.11 [22.11, 22.11] |" in capsys.readouterr().out


def test_what_may_not_be_compared(precision: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "key" / "rtn-w4a4" / "0003.png").unlink()
    with pytest.raises(ValueError, match="rtn-w4a4 has 3 of 6 images"):
        measure(precision, work, monkeypatch)
    plan = json.loads((work / "plan.json").read_text())
    del plan["rtn-w4a4"]
    plan["svdq-w4a4"]["steps"] = 3
    (work / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="svdq-w4a4 was drawn with other steps than 16bit"):
        measure(precision, work, monkeypatch)
    del plan["16bit"]
    (work / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="16bit images are missing"):
        measure(precision, work, monkeypatch)


def test_mistakes_are_one_sentence(
    precision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["precision.py", "measure", "--work", str(tmp_path), "--out", str(tmp_path / "x.json")]
    )
    assert precision.main() == 2
    assert "plan.json is missing: run" in capsys.readouterr().err


def test_prompts_are_distinct_and_begin_with_what_the_base_knows(
    precision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "DOMAINS", {})
    assert precision.prompts() == precision.GENERAL_PROMPTS
