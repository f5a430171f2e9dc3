"""The roofline of the committed figures: what a point stands for, and that it is drawn for any card."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def roofline(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install loragraft[dev]")
    return benchmark_module("roofline")


def test_points_are_work_over_traffic_and_time(roofline: ModuleType) -> None:
    row = {"M": 512, "N": 3072, "K": 3072, "bf16": 18.0, "w4a8": 29.0, "fp8": 18.0}
    result = {"forward_us": {"text attention out": row, "SDXL ff in": row}}
    ((name, intensity, rate),) = roofline.points(result, "bf16")
    assert name == "text attention out"
    assert intensity == pytest.approx(2 * 512 * 3072**2 / (2 * 512 * 6144 + 2 * 3072**2))
    assert rate == pytest.approx(2 * 512 * 3072**2 / 18e-6)
    assert roofline.points(result, "w4a8")[0][1] > 2 * intensity  # the same work on a quarter of the weight's bytes


def test_the_committed_figures_stay_under_their_roofs(roofline: ModuleType) -> None:
    result = json.loads(roofline.RESULT.read_text(encoding="utf-8"))
    roofs = roofline.ROOFS[result["device"]]
    for kind in roofline.KINDS:
        top = roofs["16 bits" if kind == "bf16" else "8 bits"]
        found = roofline.points(result, kind)
        assert len(found) == 10
        assert all(rate < min(top, intensity * roofs["bandwidth"]) for _, intensity, rate in found)


def test_an_unknown_card_is_drawn_with_its_measured_bandwidth(roofline: ModuleType, tmp_path: Path) -> None:
    result = json.loads(roofline.RESULT.read_text(encoding="utf-8"))
    roofline.draw({**result, "device": "another"}, tmp_path / "roofline.png")
    assert Image.open(tmp_path / "roofline.png").width > 600
