"""Which size an image gets, and what is told about it."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from loragraft.data.buckets import (
    MOST_ASPECT,
    BucketReport,
    Sizes,
    bucket_shapes,
    image_size,
    nearest_bucket,
    warn_enlarged,
)
from loragraft.data.images import load_pixels
from loragraft.data.sample import Sample
from loragraft.recipes.schema import DataConfig


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (768, 48), (512, 32), (256, 16), (128, 16), (2048, 64)])
def test_shapes_are_multiples_and_never_larger_than_the_square(resolution: int, step: int) -> None:
    shapes = bucket_shapes(resolution)
    assert (resolution, resolution) in shapes
    assert set(shapes) == {(w, h) for h, w in shapes}, "lying and standing"
    for h, w in shapes:
        assert h % step == w % step == 0 and step % 16 == 0
        assert 0.8 * resolution**2 < h * w <= resolution**2 or resolution == 128
        assert max(h, w) / min(h, w) <= MOST_ASPECT + 0.3
    ratios = [w / h for h, w in shapes]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (768, 64), (512, 32), (320, 32)])
def test_shapes_keep_to_a_coarser_grain(resolution: int, step: int) -> None:
    shapes = bucket_shapes(resolution, 32)
    assert (resolution, resolution) in shapes
    assert all(h % step == w % step == 0 for h, w in shapes)


def test_at_1024_they_are_the_usual_ones() -> None:
    lying = [shape for shape in bucket_shapes(1024) if shape[1] > shape[0]]
    assert {(896, 1152), (832, 1216), (768, 1344), (640, 1536)} <= set(lying)
    assert len(bucket_shapes(1024)) == 19


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((1000, 1000), (1024, 1024)),
        ((3000, 2000), (832, 1216)),
        ((2000, 3000), (1216, 832)),
        ((1920, 1080), (768, 1344)),
        ((5000, 400), (640, 1600)),
        ((1020, 1000), (1024, 1024)),
    ],
)
def test_nearest_aspect_ratio(image: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(*image, 1024) == bucket


def _sample(
    folder: Path, width: int, height: int, split: str = "train", orientation: int = 1, suffix: str = ".jpg"
) -> Sample:
    path = folder / f"{width}x{height}-{split}-{orientation}{suffix}"
    image = Image.new("RGB", (width, height), "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return Sample(path, "a", split, "c", "CC0-1.0")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_picture_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    sample = _sample(tmp_path, 40, 20, orientation=orientation, suffix=suffix)
    expected = (20, 40) if orientation >= 5 else (40, 20)
    assert image_size(sample) == expected
    assert load_pixels(sample.image, (16, 32)).shape == (3, 16, 32)


def test_a_png_is_not_decoded_for_its_size(tmp_path: Path) -> None:
    sample = _sample(tmp_path, 400, 200, suffix=".png")
    Image.effect_noise((400, 200), 50).save(sample.image)
    content = sample.image.read_bytes()
    sample.image.write_bytes(content[: len(content) // 2])
    assert image_size(sample) == (400, 200)


def test_several_resolutions_take_what_needs_no_enlarging(tmp_path: Path) -> None:
    sizes = Sizes((64, 128, 256), buckets=True)
    assert sizes.of(_sample(tmp_path, 300, 300)) == [(64, 64), (128, 128), (256, 256)]
    assert sizes.of(_sample(tmp_path, 200, 200)) == [(64, 64), (128, 128)]
    assert sizes.of(_sample(tmp_path, 200, 130)) == [(48, 80), (96, 160)]
    assert sizes.of(_sample(tmp_path, 30, 20)) == [(48, 80)], "the smallest, enlarged"
    assert sizes.of(_sample(tmp_path, 300, 300, "test")) == [(256, 256)], "held out: once"
    assert Sizes((64, 128), buckets=False).of(_sample(tmp_path, 130, 300)) == [(64, 64), (128, 128)]


def test_an_edge_off_the_bases_grain_is_refused_with_its_neighbours() -> None:
    config = DataConfig(domain="marketing", resolution=528)
    assert Sizes.asked(config, 1024) == Sizes((528,), buckets=False)
    with pytest.raises(ValueError, match=r"multiples of 32 px, and 528 is none: .* 512 or 544"):
        Sizes.asked(config, 1024, 32)
    with pytest.raises(ValueError, match="48 is none"):
        Sizes.asked(DataConfig(domain="marketing", resolutions=(64, 48)), 1024, 32)
    assert Sizes.asked(DataConfig(domain="marketing", buckets=True), 768, 32) == Sizes((768,), buckets=True, grain=32)


def test_plain_squares_of_a_small_base_ask_for_nothing() -> None:
    config = DataConfig(domain="marketing")
    assert Sizes.asked(config, 128) is None
    assert Sizes.asked(config, 1024) == Sizes((1024,), buckets=False)
    assert Sizes.asked(DataConfig(domain="marketing", buckets=True), 128) == Sizes((128,), buckets=True)
    several = DataConfig(domain="marketing", resolutions=(128, 64))
    assert Sizes.asked(several, 1024) == Sizes((64, 128), buckets=False)


def test_report_counts_images_batches_and_buckets_that_are_too_small() -> None:
    shapes = [(64, 64)] * 21 + [(48, 80)] * 3
    report = BucketReport.of(shapes, batch_size=2, accumulation=3, processes=2)
    assert report.counts == {(64, 64): 21, (48, 80): 3}
    assert report.small == {(48, 80): 3}
    table = report.table()
    assert "    64 x 64           21           5.25" in table
    assert "24 images in 2 buckets: an epoch is 6.00 batches of 4, 2.00 steps" in table
    assert "80 x 48 (3)" in table
    assert "fewer images" not in BucketReport.of(shapes, batch_size=3).table()


def test_enlarged_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [_sample(tmp_path, 300, 300), _sample(tmp_path, 30, 20)]
    with caplog.at_level(logging.WARNING):
        warn_enlarged(samples, [(256, 256), (48, 80)])
    assert "1 of 2 images are smaller" in caplog.text
    assert "30x20" in caplog.text


def test_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        Sizes((64,), buckets=True).of(Sample(tmp_path / "a.png", "a", "train", "c", ""))
