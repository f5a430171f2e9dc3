"""What the preflight says about a data set of mixed sizes, without reading more than headers of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from loragraft import cli
from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train import preflight_command
from loragraft.train.preflight_command import bucket_lines, data_lines, unknown_card
from loragraft.train.roofline import CARDS, machine_for, save_machine


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Ten pictures, every second one wide, in buckets."""
    for i in range(10):
        image = Image.new("RGB", (200, 100) if i % 2 else (140, 140), (i * 20, 0, 0))
        image.save(tmp_path / f"disc number {i} x.png")
    options = ["data.domain=null", f"data.folder={tmp_path}", "data.buckets=true", "data.validation_fraction=0"]
    return load_recipe("marketing", [*options, "data.short_captions=0", "data.test_fraction=0", "train.batch_size=2"])


def test_buckets_are_counted_against_batches(recipe: Recipe, tmp_path: Path) -> None:
    samples = open_source(recipe.data, 128, tmp_path / "cache")
    told = "\n".join(bucket_lines(recipe, samples, 128, processes=3))
    assert "128 x 128           5" in told
    assert "10 images in 2 buckets: an epoch is 1.67 batches of 6" in told
    assert "fewer images than a batch" in told
    plain = load_recipe("marketing")
    assert bucket_lines(plain, samples, 128, 1) == []


def test_a_damaged_header_is_said_and_a_stream_is_left_for_training(recipe: Recipe, tmp_path: Path) -> None:
    samples = open_source(recipe.data, 128, tmp_path / "cache")
    samples[3].image.write_text("no image")
    assert "buckets: not counted" in bucket_lines(recipe, samples, 128, 1)[0]
    options = ["data.domain=null", "data.dataset=./rows.parquet", "data.streaming=true", "data.limit=700"]
    stream = load_recipe("marketing", [*options, "data.short_captions=0"])
    assert "the first 700 rows of a stream" in "".join(data_lines(stream, 128, tmp_path / "cache"))


def test_an_unknown_card_is_told_the_nearest_and_all(tmp_path: Path) -> None:
    told = unknown_card("H10", tmp_path)
    assert "Did you mean 'H100'?" in told
    assert all(card.name in told for card in CARDS)
    assert "Did you mean 'RTX 4090'?" in unknown_card("rtx 4090", tmp_path)
    assert "Did you mean" not in unknown_card("Voodoo", tmp_path)
    mine = replace(CARDS[0], name="Card of mine", calibrated=True)
    save_machine(mine, tmp_path)
    assert "'Card of mine'?" in unknown_card("card of min", tmp_path)
    assert machine_for("Card of mine", tmp_path) == mine


def test_an_unknown_card_is_said_before_the_memory_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **named: object) -> None:
        raise ValueError("the prediction begins")

    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(preflight_command, "preflight", stop)
    for card, unknown in (("H10", True), ("H100", False)):
        assert cli.main(["preflight", "marketing", "--card", card]) == 2
        assert ("Did you mean 'H100'?" in capsys.readouterr().out) is unknown


@pytest.mark.parametrize("wrong", ["0", "-1", "two"])
def test_no_processes_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["preflight", "marketing", f"--processes={wrong}"])
    assert stop.value.code == 2
    assert f"'{wrong}' is no number of GPUs: 1 is one GPU alone" in capsys.readouterr().err


def test_too_few_images_for_a_score_are_a_finding(recipe: Recipe, tmp_path: Path) -> None:
    told = "\n".join(data_lines(recipe, 128, tmp_path / "cache"))
    assert "needs 4 images of the test split, and of these 10 images 0 are in it: data.test_fraction=0.35 holds" in told
