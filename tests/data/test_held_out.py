"""Too few images for a score: said before training, with a number that is true."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from loragraft.data.held_out import SCORED, few_held_out, warn_few_held_out
from loragraft.data.sample import Sample
from loragraft.data.sources import open_source
from loragraft.recipes.schema import DataConfig, EvalConfig


def _folder(path: Path, count: int) -> DataConfig:
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path / f"thing called {chr(97 + i)}.png")
    return DataConfig(domain=None, folder=str(path))


def _held(samples: list[Sample], split: str) -> int:
    return sum(sample.split == split for sample in samples)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("count", [9, 12, 20])
def test_the_fraction_that_is_named_does(tmp_path: Path, count: int, split: str) -> None:
    data, score = _folder(tmp_path / "images", count), EvalConfig(split=split)  # type: ignore[arg-type]
    samples = open_source(data, 8, tmp_path)
    told = few_held_out(samples, data, score)
    assert told is not None
    assert f"needs 4 images of the {split} split, and of these {count} images {_held(samples, split)} are in it" in told
    assert f"data.{split}_fraction=" in told
    fraction = float(told.partition("_fraction=")[2].split()[0])
    for given, enough in ((fraction, True), (fraction - 0.01, False)):
        changed = replace(data, test_fraction=given) if split == "test" else replace(data, validation_fraction=given)
        raised = open_source(changed, 8, tmp_path)
        assert (_held(raised, split) >= SCORED) is enough
        assert (few_held_out(raised, changed, score) is None) is enough


def test_other_remedies_where_no_fraction_helps(tmp_path: Path) -> None:
    data, score = _folder(tmp_path / "images", 6), EvalConfig()
    samples = open_source(data, 8, tmp_path)
    assert "add images" in str(few_held_out(samples, data, score))
    assert "raise data.limit" in str(few_held_out(samples, replace(data, limit=6), score))
    assert "raise data.count" in str(few_held_out(samples, DataConfig(domain="marketing"), score))
    moved = [replace(sample, split="train") for sample in samples]
    assert "give more of them the split 'test'" in str(few_held_out(moved, data, score))


def test_nothing_is_said_where_a_score_is_possible_or_not_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = _folder(tmp_path / "images", 12)
    samples = open_source(data, 8, tmp_path)
    warn_few_held_out(samples, data, EvalConfig(images=0))
    warn_few_held_out([replace(sample, split="test") for sample in samples], data, EvalConfig())
    assert caplog.messages == []
    warn_few_held_out(samples, data, EvalConfig())
    assert len(caplog.messages) == 1
