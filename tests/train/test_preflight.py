"""Preflight on `pocket`, and of FLUX.1 [dev]'s true shapes where that is quick enough; times by hand-made machines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loragraft import cli
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import OptimConfig, Recipe
from loragraft.train.dry_run import DryRun
from loragraft.train.op_cost import OpCost, Part
from loragraft.train.preflight import (
    GIB,
    Preflight,
    open_subject,
    preflight,
    sample_runs,
    train_run,
)
from loragraft.train.preflight_command import look_at_data, run
from loragraft.train.roofline import (
    CARDS,
    Host,
    Machine,
    load_machine,
    machine_file,
    machine_for,
    rounded_up,
    save_machine,
    seconds,
)

UNITS = ("int8", "gemm", "gemm32", "attention", "attention_backward", "conv", "memory")
MACHINE = Machine(
    "Card X", 8 * GIB, dict.fromkeys(UNITS, 1e12), 1e9, Host(1e-5, 1e-4), Host(2e-5, 2e-4, 0.5), 1e-6, 5e-6, 3e-6,
    calibrated=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("marketing", ["train.batch_size=4"])


@pytest.fixture(scope="module")
def found(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Preflight:
    return preflight(recipe, tmp_path_factory.mktemp("cache"))


def test_every_stage_is_there_and_the_largest_decides(found: Preflight) -> None:
    assert [stage.name for stage in found.stages] == [
        "encode captions", "encode images", "train", "validate", "sample", "save",
    ]  # fmt: skip
    assert found.peak == max(stage.peak for stage in found.stages) == found.train.peak
    assert found.train.unknown == found.unknown == ()
    assert 0.9 * found.train.peak < sum(found.train.at_peak.values()) <= found.train.peak
    assert found.fits(found.needed)
    assert not found.fits(found.needed - 1)


def test_pockets_weights_are_counted_exactly(recipe: Recipe, tmp_path: Path) -> None:
    subject = open_subject(recipe, tmp_path)
    run, parameters, rests, _ = train_run(recipe, subject, 128)
    assert rests == 0
    model = subject.transformer()
    nn.Module.to(model, dtype=torch.bfloat16)
    nbytes = sum(-(-t.nbytes // 512) * 512 for t in (*model.parameters(), *model.buffers()))
    assert run.at_peak["INT4 weights"] + run.at_peak["16-bit weights"] == nbytes
    assert parameters * 4 == pytest.approx(run.at_peak["adapter"], rel=0.02)


def test_between_captured_steps_a_card_that_is_full_is_tidied(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients stay on a card with room; on another they and the joined factors go (`GraphStep.pause`)."""
    subject = open_subject(recipe, tmp_path)
    _, parameters, rests, _ = train_run(recipe, subject, 128, captured=True)
    assert rests == 4 * parameters
    monkeypatch.setattr("loragraft.train.preflight.fills_card", lambda model: True)
    _, _, rests, _ = train_run(recipe, subject, 128, captured=True)
    w4a8 = sum(
        m.in_features + m.out_features for m in subject.transformer().modules() if getattr(m, "numerics", "") == "w4a8"
    )
    assert rests == -2 * recipe.adapter.rank * w4a8


def test_on_a_card_that_is_full_previews_are_drawn_one_at_a_time(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = sample_runs(recipe, open_subject(recipe, tmp_path), 128)
    monkeypatch.setattr("loragraft.train.previews.fills_card", lambda model: True)
    alone = sample_runs(recipe, open_subject(recipe, tmp_path), 128)
    assert (together[2], alone[2]) == (8, 1)
    assert alone[0].peak < together[0].peak


def test_the_knobs_of_a_recipe_turn_the_prediction(recipe: Recipe, tmp_path: Path) -> None:
    subject = open_subject(recipe, tmp_path)

    def dry(changed: Recipe) -> DryRun:
        return train_run(changed, subject, 128)[0]

    plain = dry(recipe)
    checkpointed = replace(recipe, train=replace(recipe.train, checkpointing="block"))
    kept = dry(checkpointed)
    assert kept.peak < plain.peak
    offloaded = dry(replace(checkpointed, train=replace(checkpointed.train, offload_activations=True)))
    assert offloaded.saved < kept.saved
    small = dry(replace(recipe, optim=OptimConfig(name="adamw8bit")))
    assert small.peak < plain.peak
    assert small.unknown == ()
    assert small.at_peak["optimizer"] == pytest.approx(2.05 / 8 * plain.at_peak["optimizer"], rel=0.02)


def test_the_roofline_by_hand() -> None:
    bound_by_compute, bound_by_memory = Part("gemm", 2 * 10**9, 1000), Part("memory", 0, 10**6)
    ours = OpCost("loragraft::x", (bound_by_compute, bound_by_memory))
    short = OpCost("aten::add", (Part("memory", 0, 8),))
    stands_for_torchs = OpCost("loragraft::dry_rms_norm", (Part("memory", 0, 8),))
    assert seconds([(ours, 2)], MACHINE) == pytest.approx(2 * (2e-3 + 1e-3 + 5e-6))
    assert seconds([(short, 100)], MACHINE) == pytest.approx(100 * 1e-5)  # Python is slower than the kernel
    assert seconds([(stands_for_torchs, 100)], MACHINE) == pytest.approx(100 * 1e-5)
    assert seconds([(short, 100)], MACHINE, host=False) == pytest.approx(100 * (8e-9 + 1e-6))
    assert seconds([(OpCost("aten::empty", ()), 100)], MACHINE) == 0
    slower = replace(MACHINE, correction=2.0)
    assert seconds([(ours, 1)], slower) == pytest.approx(2 * 3e-3 + 5e-6)
    launched = OpCost("loragraft::x", (Part("memory", 0, 8),), launches=3)
    assert seconds([(launched, 10)], MACHINE) == pytest.approx(10 * (1e-5 + 3e-4))
    assert seconds([(launched, 10)], MACHINE, trains=False) == pytest.approx(0.5 + 10 * (2e-5 + 6e-4))
    assert seconds([(short, 100)], MACHINE, trains=False) == pytest.approx(0.5 + 100 * 2e-5)
    assert seconds([(launched, 10)], MACHINE, host=False) == pytest.approx(10 * (8e-9 + 5e-6))
    gradient = OpCost("loragraft::x_dgrad", (bound_by_compute, bound_by_memory))
    assert seconds([(gradient, 2)], MACHINE) == pytest.approx(2 * (2e-3 + 1e-3 + 3e-6))


def test_a_product_of_few_tiles_takes_whole_rounds() -> None:
    card = replace(MACHINE, processors=100)
    assert [rounded_up(tiles, card) for tiles in (0, 1, 50, 100, 101, 1000)] == [1, 100, 2, 1, 200 / 101, 1]
    halves = OpCost("loragraft::x", (Part("int8", 10**9, 0, 50),))
    assert seconds([(halves, 1)], card, host=False) == pytest.approx(2e-3 + 5e-6)
    by_memory = OpCost("loragraft::x", (Part("int8", 10**9, 10**7, 50),))
    assert seconds([(by_memory, 1)], card, host=False) == pytest.approx(1e-2 + 5e-6)


def test_figures_are_kept_per_card(tmp_path: Path) -> None:
    assert machine_for("NVIDIA H100 80GB HBM3", tmp_path) is next(card for card in CARDS if card.name == "H100")
    assert machine_for("Unheard-of card", tmp_path) is None
    assert machine_for("NVIDIA L40S", tmp_path) is None, "no L4"
    measured = replace(MACHINE, name="NVIDIA H100 80GB HBM3")
    save_machine(measured, tmp_path)
    assert machine_for("NVIDIA H100 80GB HBM3", tmp_path) == measured
    file = machine_file(measured.name, tmp_path)
    file.write_text(file.read_text().replace('"version": 4', '"version": 3'))
    assert load_machine(measured.name, tmp_path) is None


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path))
    report = tmp_path / "report.json"
    assert cli.main(["preflight", "marketing", "train.batch_size=2", "--fit", "8GiB", "--json", str(report)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "marketing on pocket",
        "decides",
        "fits cards of 8 GiB and more",
        "not calibrated",
        "it fits as it is",
    ):
        assert expected in text
    assert "2400 images of the domain 'marketing'" in text
    assert '"seconds_per_step"' in report.read_text()


def test_own_images_are_looked_through_and_sorted_into_buckets(tmp_path: Path) -> None:
    for i, size in enumerate([(160, 128), (128, 160), (160, 128), (64, 64)]):
        low = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(low).resize(size).save(tmp_path / f"red bicycle number {'abcd'[i]}.png")
    overrides = [f"data.folder={tmp_path}", "data.domain=null", "data.buckets=true", "train.batch_size=2"]
    recipe = load_recipe(
        "marketing", [*overrides, "data.test_fraction=0", "data.validation_fraction=0", "data.short_captions=0"]
    )
    lines, refused = look_at_data(recipe, 128, tmp_path / "cache")
    text = "\n".join(lines)
    assert not refused
    assert "data: 4 train" in text
    assert "1 images have an edge below 128 pixels" in text
    assert "bucket (W x H)" in text


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preflight"]) == 2
    assert "name a recipe" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="calibration measures a GPU"):
            run(["--calibrate"])
    with pytest.raises(SystemExit):
        run(["marketing", "--fit", "large"])


@pytest.mark.slow
def test_flux_dev_with_checkpointing_fits_twelve_gib(tmp_path: Path) -> None:
    recipe = load_recipe("marketing", ["base=flux1-dev", "train.batch_size=1", "train.checkpointing=block"])
    run, parameters, *_ = train_run(recipe, open_subject(recipe, tmp_path), 1024)
    assert parameters == 65_372_160
    assert 6.2 * GIB < run.at_peak["INT4 weights"] < 6.5 * GIB
    assert run.peak < 10 * GIB
    assert run.saved == pytest.approx(57 * 4608 * 3072 * 2, rel=0.1)  # one block input each
