"""Near-duplicates: found across formats and sizes, not between pictures that only look alike; leaks are errors."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from loragraft.data.images import load_pixels
from loragraft.data.overlap import check_overlap, perceptual_hash
from loragraft.data.sources import DataError, Sample
from loragraft.data.splits import Split
from loragraft.recipes.schema import DataConfig


def _picture(seed: int, edge: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((edge, edge), Image.Resampling.BICUBIC)


def _sample(path: Path, image: Image.Image, split: Split = "train", **options: object) -> Sample:
    image.save(path, **options)
    return Sample(path, path.stem, split, path.stem, "")


def _check(folder: Path, *samples: Sample, **options: object) -> None:
    check_overlap(samples, DataConfig(folder=str(folder), **options), folder / "cache")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_equal_bytes_across_splits_are_an_error_with_names_and_remedy(tmp_path: Path, split: Split) -> None:
    one = _sample(tmp_path / "one.png", _picture(0))
    copy = _sample(tmp_path / "copy.png", _picture(0), split)
    with pytest.raises(
        DataError, match=rf"1 held-out .* one\.png \(train\) and copy\.png \({split}\).*allow_overlap=true"
    ):
        _check(tmp_path, one, copy)


@pytest.mark.parametrize("change", ["jpeg", "small", "large", "brighter", "blurred"])
def test_near_duplicates_across_splits_are_an_error(tmp_path: Path, change: str) -> None:
    image = _picture(1)
    changed = {
        "jpeg": image,
        "small": image.resize((48, 48), Image.Resampling.LANCZOS),
        "large": image.resize((200, 200), Image.Resampling.BICUBIC),
        "brighter": ImageEnhance.Brightness(image).enhance(1.04),
        "blurred": image.filter(ImageFilter.GaussianBlur(1)),
    }[change]
    suffix, options = (".jpg", {"quality": 75}) if change == "jpeg" else (".png", {})
    samples = [_sample(tmp_path / "a.png", image), _sample(tmp_path / f"b{suffix}", changed, "test", **options)]
    samples += [_sample(tmp_path / f"other{i}.png", _picture(10 + i), "test") for i in range(5)]
    with pytest.raises(DataError, match=r"1 held-out images are .* a\.png \(train\) and b\.\w+ \(test\)"):
        _check(tmp_path, *samples)


def test_pictures_that_only_look_alike_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Simple shapes share a perceptual hash: the same disc in another colour, or somewhat larger, is another picture."""
    samples = []
    for i in range(12):
        picture = Image.new("RGB", (96, 96), "white")
        edge = 30 + 4 * (i // 3)
        ImageDraw.Draw(picture).ellipse(
            (48 - edge, 48 - edge, 48 + edge, 48 + edge), fill=["red", "green", "blue"][i % 3]
        )
        samples.append(_sample(tmp_path / f"{i}.png", picture, "test" if i % 4 == 3 else "train"))
    samples += [_sample(tmp_path / f"flat {c}.png", Image.new("RGB", (8, 8), c), "test") for c in ("red", "teal")]
    _check(tmp_path, *samples)
    assert not caplog.records


def test_repeats_within_the_training_split_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [_sample(tmp_path / f"{name}.png", _picture(2)) for name in ("a", "b")]
    samples += [_sample(tmp_path / "c.jpg", _picture(3)), _sample(tmp_path / "d.png", _picture(3))]
    with caplog.at_level(logging.WARNING):
        _check(tmp_path, *samples)
    (record,) = caplog.records
    assert "2 pairs of training images are the same or almost: " in record.getMessage()
    assert "a.png (train) and b.png (train)" in record.getMessage()


def test_overlap_can_be_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [_sample(tmp_path / "a.png", _picture(4)), _sample(tmp_path / "b.png", _picture(4), "test")]
    with caplog.at_level(logging.WARNING):
        _check(tmp_path, *samples, allow_overlap=True)
    assert "1 held-out images are also trained on (data.allow_overlap): a.png" in caplog.text


def test_a_second_look_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [_sample(tmp_path / "a.png", _picture(5)), _sample(tmp_path / "b.jpg", _picture(5), "test")]
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.png .*b\.jpg"):
            _check(tmp_path, *samples)
        monkeypatch.setattr("loragraft.data.overlap.load_pixels", lambda *args: pytest.fail("decoded again"))


def test_generated_domains_are_exempt(tmp_path: Path) -> None:
    samples = [_sample(tmp_path / "a.png", _picture(6)), _sample(tmp_path / "b.png", _picture(6), "test")]
    check_overlap(samples, DataConfig(domain="marketing"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_hash_is_that_of_the_picture_and_not_of_its_brightness(tmp_path: Path) -> None:
    image = _picture(7)
    image.save(tmp_path / "a.png")
    ImageEnhance.Brightness(image).enhance(0.5).save(tmp_path / "b.png")
    _picture(8).save(tmp_path / "c.png")
    a, b, c = (int(perceptual_hash(load_pixels(tmp_path / f"{name}.png", 32).numpy())) for name in "abc")
    assert (a ^ b).bit_count() <= 4
    assert (a ^ c).bit_count() > 16
    assert 24 <= a.bit_count() <= 32
