"""What the preflight says about a data set of mixed sizes, without reading more than headers of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from loragraft import cli
from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train import preflight_command
from loragraft.train.preflight_command import bucket_lines, look_at_data, unknown_card
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
    assert "the first 700 rows of a stream" in "".join(look_at_data(stream, 128, tmp_path / "cache")[0])


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


def test_random_weights_is_said_as_in_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(recipe: Recipe, *_: object, **named: object) -> None:
        raise ValueError(f"random {recipe.weights.random}")

    monkeypatch.setattr(preflight_command, "preflight", stop)
    assert cli.main(["preflight", "marketing", "base=flux1-dev", "--random-weights", "train.steps=3"]) == 2
    assert "random True" in capsys.readouterr().err
    assert cli.main(["preflight", "marketing", "base=flux1-dev", "--random-weights", "weights.path=./x"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_images_that_are_still_to_be_given_are_asked_for_before_the_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight_command, "preflight", lambda *_, **__: pytest.fail("predicted"))
    assert cli.main(["preflight", "personal"]) == 2
    assert "images of your own" in capsys.readouterr().err


def test_a_base_that_training_refuses_is_refused_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preflight", "marketing", "base=flux1-schnell"]) == 2
    assert "Train on base=flux1-dev" in capsys.readouterr().err


def test_weights_that_training_would_not_find_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight_command, "preflight", lambda *_, **__: SimpleNamespace(resolution=128))
    monkeypatch.setattr(preflight_command, "report_lines", lambda *_: [])
    (tmp_path / "flux").mkdir()
    for path, said in (
        ("fluks", f"no such file or folder; did you mean {tmp_path}/flux?"),
        ("flux", "a transformer alone"),
    ):
        assert cli.main(["preflight", "marketing", "base=flux1-dev", f"weights.path={tmp_path / path}"]) == 1
        told = capsys.readouterr().out
        assert "training refuses the weights until this is mended: " in told and said in told
    assert cli.main(["preflight", "marketing", "base=flux1-dev"]) == 0, "a prediction needs no weights"


@pytest.mark.parametrize("wrong", ["0", "-1", "two"])
def test_no_processes_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["preflight", "marketing", f"--processes={wrong}"])
    assert stop.value.code == 2
    assert f"'{wrong}' is no number of GPUs: 1 is one GPU alone" in capsys.readouterr().err


def test_too_few_images_for_a_score_are_a_finding(recipe: Recipe, tmp_path: Path) -> None:
    told = "\n".join(look_at_data(recipe, 128, tmp_path / "cache")[0])
    assert "needs 4 images of the test split, and of these 10 images 0 are in it: data.test_fraction=0.35 holds" in told


def test_a_data_set_full_of_mistakes_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What training would stop at one after the other: no image, half an image, no caption, an empty one, one too long."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing number {i}")
    (folder / "0.png").write_bytes(b"no image")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:9000])
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_text(" ")
    (folder / "4.txt").write_text("word " * 60)
    (folder / "6.png").write_bytes((folder / "5.png").read_bytes())
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: _base\ndata: {folder: ./photos, test_fraction: 0, validation_fraction: 0}\n")
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight_command, "preflight", lambda *_, **__: SimpleNamespace(resolution=128))
    monkeypatch.setattr(preflight_command, "report_lines", lambda *_: [])
    assert cli.main(["preflight", str(mine), "train.batch_size=1"]) == 1
    told = capsys.readouterr().out
    refused, noted = told.split("training refuses this until it is mended:")[1].split("1 images are there twice")
    assert "2 images cannot be read: 0.png (" in refused and "1.png (" in refused
    assert "2 images have no caption: 2.png, 3.png" in refused
    assert "1 images have a caption longer than the text encoder reads (data.long_captions): 4.png" in refused
    assert "5.png = 6.png" in noted
    assert (
        cli.main(["preflight", str(mine), "train.batch_size=1", "data.caption=a thing", "data.long_captions=cut"]) == 1
    )
    told = capsys.readouterr().out
    assert "have no caption" not in told
    assert "4.png" not in told.split("is mended:")[1].split("2 images cannot be read")[0]
    for name in ("0.png", "1.png"):
        (folder / name).unlink()
    assert (
        cli.main(["preflight", str(mine), "train.batch_size=1", "data.caption=a thing", "data.long_captions=cut"]) == 0
    )


def test_nothing_but_mistakes_is_told_too(recipe: Recipe, tmp_path: Path) -> None:
    for image in tmp_path.glob("*.png"):
        image.write_bytes(b"no image")
    lines, refused = look_at_data(recipe, 128, tmp_path / "cache")
    assert refused
    assert "data: nothing that can be used; images none" in lines
    assert "10 images cannot be read" in "".join(lines)
