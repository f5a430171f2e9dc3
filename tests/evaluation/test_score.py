"""The score end to end on coloured squares: which sets, which figures, which files, which words."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loragraft.evaluation.report import verdicts, write_report
from loragraft.evaluation.retrieval import Towers
from loragraft.evaluation.score import DRIFT_IMAGES, Measured, ScorePlan, measure_score, render_score, score_folders
from loragraft.evaluation.standard import Result, StandardMetrics
from loragraft.recipes.schema import EvalConfig

from .conftest import EDGE, Studio, make_adapter

CONFIG = EvalConfig(images=12, steps=2, seed=7)
SMALL = ["base", "adapter"]
FULL = ["base", "adapter", "wrong-other", "untrained", "adapter-short", "drift-base", "drift-adapter", "base-short"]


class FakeText:
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        states = torch.zeros(len(captions), 4, 384)
        for row, caption in enumerate(captions):
            states[row, 0] = torch.randn(384, generator=torch.Generator().manual_seed(sum(map(ord, caption))))
        return {"prompt_embeds": states, "pooled_prompt_embeds": states[:, 0]}


@pytest.fixture(autouse=True)
def light_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random projections in the place of Lite0, MiniLM and the towers."""
    torch.manual_seed(0)
    project = torch.randn(EDGE * EDGE * 3, 1280, dtype=torch.float64) / 50

    def features(_: Any, images: list[Image.Image]) -> torch.Tensor:
        pixels = np.stack([np.asarray(image.convert("RGB").resize((EDGE, EDGE))) for image in images])
        return torch.from_numpy(pixels.reshape(len(images), -1) / 255) @ project

    monkeypatch.setattr("loragraft.evaluation.features.load_lite0", lambda _: None)
    monkeypatch.setattr("loragraft.evaluation.features.lite0_features", features)
    monkeypatch.setattr("loragraft.evaluation.score.MiniLMEncoder", FakeText)
    monkeypatch.setattr("loragraft.evaluation.score.load_towers", lambda: (Towers(8, 4).eval(), {"date": "today"}))


@pytest.fixture
def samples(tmp_path: Path) -> list[Any]:
    """Ten held-out and ten training images; a row may carry a short caption."""
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        path = tmp_path / f"real{i:02d}.png"
        Image.fromarray(rng.integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)).save(path)
        caption, short = f"a thing number {i} on a wall", f"thing {i}"
        rows.append(SimpleNamespace(image=path, caption=caption, short=short, split="test" if i < 10 else "train"))
    return rows


@pytest.fixture
def plan(samples: list[Any]) -> ScorePlan:
    return ScorePlan(
        adapter=make_adapter("mine"),
        config=CONFIG,
        held_out=tuple(samples[:10]),
        train=tuple(samples[10:]),
        controls=(make_adapter("other", seed=1),),
        full=True,
    )


def run(plan: ScorePlan, backbone: Any, root: Path) -> tuple[Measured, list[str]]:
    said: list[str] = []
    folders = render_score(backbone, plan, root)
    return measure_score(plan, folders, root, "cpu", EDGE, said.append), said


def test_which_sets_are_drawn(plan: ScorePlan) -> None:
    assert [entry.name for entry in plan.sets()] == FULL
    assert [entry.name for entry in replace(plan, full=False, controls=()).sets()] == SMALL
    by_name = {entry.name: entry for entry in plan.sets()}
    assert {by_name[name].count for name in FULL if not name.startswith("drift")} == {12}
    assert by_name["drift-adapter"].count == DRIFT_IMAGES
    assert by_name["adapter-short"].prompts[3] == "thing 3"
    assert by_name["adapter-short"].adapter is plan.adapter
    assert by_name["base-short"].adapter is None


def test_two_controls_of_one_name_and_a_name_that_is_no_file_name(plan: ScorePlan) -> None:
    twins = (make_adapter("a/b", seed=1), make_adapter("a/b", seed=2))
    assert [e.name for e in replace(plan, full=False, controls=twins).sets()][2:] == ["wrong-a_b", "wrong-a_b-1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": ()}, "the test split has 0; raise data.test_fraction"),
        ({"config": replace(CONFIG, images=3)}, "at least 4 images per set"),
        ({"references": 2}, "not 2"),
        ({"references": -5}, "not -5"),
        ({"controls": (make_adapter("mine again"),)}, "is the scored adapter itself"),
    ],
)
def test_plans_that_cannot_be_measured(plan: ScorePlan, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan, **change)


def test_a_control_of_another_base_is_refused_before_drawing(
    plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path
) -> None:
    foreign = make_adapter("foreign", seed=4, base_id="c" * 64)
    with pytest.raises(ValueError, match="'foreign' was trained on base c"):
        render_score(backbone, replace(plan, controls=(foreign,)), tmp_path)
    with pytest.raises(ValueError, match="'foreign' was trained on base c"):
        score_folders(backbone, replace(plan, controls=(foreign,)), tmp_path)
    assert studio.drawn == []


def test_report_files_and_figures(plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path) -> None:
    root = tmp_path / "run" / "score"
    measured, said = run(plan, backbone, root)
    assert said == []
    text = write_report(plan, measured, root, EDGE, {"base": "squares", "device": "cpu", "versions": {"torch": "2"}})
    result = json.loads((root / "score.json").read_text())
    assert json.loads((root.parent / "score.json").read_text()) == result
    assert "NaN" not in (root / "score.json").read_text()
    assert list(result["sets"]) == [name for name in FULL if not name.startswith("drift")]
    assert result["images"] == 12
    assert result["references"] == 10
    assert result["retrieval"]["gallery"] == 10, "no more captions than held-out samples"
    assert result["retrieval"]["chance"] == pytest.approx(0.5)
    assert result["kid_lite0_base"] == result["sets"]["base"]["kid_lite0"]
    assert result["kid_lite0_floor"] == result["floors"]["kid_lite0"]["value"]
    assert set(result["controls"]) == {"wrong-other", "untrained"}
    assert set(result["short_gap"]) == {"base", "adapter"}
    assert result["drift"]["images"] == DRIFT_IMAGES
    assert result["memorisation"]["training_images"] == 10
    assert result["verdicts"].keys() == {"kid", "retrieval", "controls", "short", "drift", "memorisation"}
    assert "N = 12 images per set against M = 10 held-out images (test split)" in text
    for name in ("grid.png", "nearest.png"):
        assert Image.open(root / name).width > 8 * EDGE
    rows = list(csv.DictReader((root / "score.csv").read_text().splitlines()))
    (row,) = [r for r in rows if (r["set"], r["metric"]) == ("untrained", "kid_lite0")]
    assert float(row["value"]) == result["sets"]["untrained"]["kid_lite0"]["value"]
    assert {"adapter minus wrong-other", "adapter-short minus adapter", "drift", "memorisation"} <= {
        r["set"] for r in rows
    }


def test_measuring_twice_draws_nothing_and_says_the_same(
    plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path
) -> None:
    first, _ = run(plan, backbone, tmp_path)
    count = len(studio.drawn)
    torch.manual_seed(0)
    second, _ = run(plan, backbone, tmp_path)
    assert len(studio.drawn) == count == 6 * 12 + 2 * DRIFT_IMAGES
    assert first.result["sets"]["base"]["kid_lite0"] == second.result["sets"]["base"]["kid_lite0"]


def test_unfinished_sets_are_left_out_and_named(plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path) -> None:
    folders = render_score(backbone, plan, tmp_path)
    (folders["untrained"] / "0005.png").unlink()
    (folders["adapter"] / "0008.png").unlink()
    said: list[str] = []
    measured = measure_score(plan, folders, tmp_path, "cpu", EDGE, said.append)
    assert measured.result["images"] == 8, "every set at one N"
    assert {entry["images"] for entry in measured.result["sets"].values()} == {8}
    assert "untrained" not in measured.result["sets"]
    assert said == ["untrained: left out, 5 of 8 images are there", "every set: measured at N = 8, 12 were asked for"]
    (folders["base"] / "0002.png").unlink()
    with pytest.raises(ValueError, match="only 2 common"):
        measure_score(plan, folders, tmp_path, "cpu", EDGE, said.append)


def test_without_short_captions_the_short_sets_are_left_out(
    plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path
) -> None:
    plain = [SimpleNamespace(**{**vars(sample), "short": ""}) for sample in plan.held_out]
    measured, said = run(replace(plan, held_out=tuple(plain)), backbone, tmp_path)  # type: ignore[arg-type]
    assert said == ["base-short, adapter-short: left out, the data gives no short captions"]
    assert "short" not in verdicts(measured.result)


def changed(result: dict[str, Any], **deeper: Any) -> dict[str, Any]:
    """A deep copy with `a__b=value` put at result["a"]["b"]."""
    copy = json.loads(json.dumps(result))
    for key, value in deeper.items():
        *path, last = key.split("__")
        place = copy
        for step in path:
            place = place[step.replace("_of_", "-")]
        place[last] = value
    return copy


def test_verdicts_say_no_where_it_is_no(plan: ScorePlan, studio: Studio, backbone: Any, tmp_path: Path) -> None:
    measured, _ = run(plan, backbone, tmp_path)
    lower = {"value": 0.1, "low": 0.09, "high": 0.11}
    higher = {"value": 0.3, "low": 0.28, "high": 0.32}
    wide = {"value": 0.1, "low": 0.05, "high": 0.29}
    good = changed(measured.result, sets__base__kid_lite0=higher, sets__adapter__kid_lite0=lower)
    assert "KID falls by 67%" in verdicts(good)["kid"]
    assert verdicts(good)["kid"].endswith("overlap: no.")
    assert verdicts(changed(good, sets__adapter__kid_lite0=wide))["kid"].endswith("overlap: yes.")
    assert (
        "RISES by 200%" in verdicts(changed(good, sets__base__kid_lite0=lower, sets__adapter__kid_lite0=higher))["kid"]
    )
    zero = {"value": -0.001, "low": -0.01, "high": 0.01}
    assert "meaningless" in verdicts(changed(good, sets__base__kid_lite0=zero))["kid"]
    worse = {"value": -0.1, "low": -0.2, "high": 0.01}
    surely = {"value": -0.1, "low": -0.2, "high": -0.01}
    for name in ("wrong_of_other", "untrained"):
        good = changed(good, **{f"controls__{name}__kid_lite0": surely})
    assert "KID yes;" in verdicts(good)["controls"]
    assert (
        "KID no (not told apart from, or behind: untrained);"
        in verdicts(changed(good, controls__untrained__kid_lite0=worse))["controls"]
    )
    assert "not measured" in verdicts({**good, "controls": {}})["controls"]
    assert "may have been trained on" in verdicts({**good, "same_data": False})["data"]
    assert "data" not in verdicts({**good, "same_data": None})


def test_standard_metrics_stand_beside_with_their_full_names(
    plan: ScorePlan, backbone: Any, studio: Studio, tmp_path: Path
) -> None:
    small = replace(plan, full=False, controls=())
    folders = render_score(backbone, small, tmp_path / "score")
    metrics = StandardMetrics("psnr,ssim", None, "cpu", tmp_path / "store")
    measured = measure_score(small, folders, tmp_path / "score", "cpu", EDGE, print, metrics)
    (psnr, ssim) = measured.result["standard"]["adapter against base"]
    assert psnr["n"] == ssim["n"] == CONFIG.images
    text = write_report(small, measured, tmp_path / "score", EDGE, {})
    assert "| adapter against base | " in text
    assert "| set | PSNR in dB (mean of images, range 1; N = 12 pairs; higher is better) | SSIM (" in text
    with (tmp_path / "score" / "score.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["metric"] == psnr["header"]]
    assert [(row["set"], float(row["value"])) for row in rows] == [("adapter against base", psnr["value"])]


def test_standard_metrics_of_references_and_prompts_see_every_set(
    plan: ScorePlan, backbone: Any, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which files and captions reach the metric; the metric itself is a stand-in."""
    asked: list[Any] = []

    def with_prompts(_: Any, images: Any, prompts: Any) -> list[Result]:
        asked.append((len(images), prompts[0], prompts[10]))
        return [Result("clip", len(images), 0, 20.0, 19.0, 21.0, ("cut",), {})]

    monkeypatch.setattr(StandardMetrics, "with_prompts", with_prompts)
    folders = render_score(backbone, plan, tmp_path / "score")
    metrics = StandardMetrics("psnr", None, "cpu", tmp_path / "store")
    measured = measure_score(plan, folders, tmp_path / "score", "cpu", EDGE, print, metrics)
    main = [name for name in FULL if not name.startswith("drift-")]
    assert set(measured.result["standard"]) == {*main, "adapter against base"}
    assert asked == [(12, plan.captions[0], plan.captions[0])] * len(main), "caption i modulo 10"
    text = write_report(plan, measured, tmp_path / "score", EDGE, {})
    assert "| base + adapter | 20.00 [19.00, 21.00] |" in text
    assert text.count("Note: CLIP score: cut.") == 1
