"""The look through a data set: each kind of mistake is planted once and found once."""

from pathlib import Path

import numpy as np
from PIL import Image

from loragraft.data.scan import scan_samples
from loragraft.data.sources import LeftOut, Sample
from loragraft.recipes.schema import DataConfig


def _noise(path: Path, size: tuple[int, int], seed: int) -> Path:
    low = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def _sample(path: Path, caption: str = "a thing", split: str = "train") -> Sample:
    return Sample(path, caption, split, caption, "CC0-1.0")  # type: ignore[arg-type]


def test_a_good_set_has_no_findings(tmp_path: Path) -> None:
    samples = [_sample(_noise(tmp_path / f"{i}.png", (96, 64), i)) for i in range(4)]
    scan = scan_samples(samples, 64, tmp_path / "cache", per_step=4)
    assert scan.refused == scan.noted == ()
    assert scan.splits == {"train": 4}
    assert scan.sizes == {"96x64": 4}


def test_one_caption_for_all_and_pictures_of_another_kind_are_noted(tmp_path: Path) -> None:
    samples = [_sample(_noise(tmp_path / f"scene {i}.png", (96, 64), i), "scene") for i in range(3)]
    unsaid = DataConfig(folder=str(tmp_path))
    left_out = LeftOut(not_read=[tmp_path / "a.heic"])
    noted = "\n".join(scan_samples(samples, 64, tmp_path / "cache", left_out=left_out, config=unsaid).noted)
    assert "all 3 images have the same caption, 'scene'" in noted
    assert "1 images are of a kind that is not read, and left out until converted: a.heic" in noted
    wanted = DataConfig(folder=str(tmp_path), caption="scene")
    assert scan_samples(samples, 64, tmp_path / "cache", config=wanted).noted == ()


def test_every_mistake_is_found(tmp_path: Path) -> None:
    good = _noise(tmp_path / "good.jpg", (128, 128), 0)
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(good.read_bytes())
    small = _noise(tmp_path / "small.png", (128, 32), 1)
    samples = [
        _sample(good),
        _sample(copy, split="test"),
        _sample(small, caption="far too many words"),
        _sample(_noise(tmp_path / "mute.png", (128, 128), 2), caption=" "),
    ]
    scan = scan_samples(samples, 64, tmp_path / "cache", readable=lambda text: text[:10], per_step=8)
    refused, noted = "\n".join(scan.refused), "\n".join(scan.noted)
    assert "1 images have an edge below 64 pixels and are enlarged: small.png (128x32)" in noted
    assert "1 images have no caption: mute.png" in refused
    assert "1 images have a caption longer than the text encoder reads (data.long_captions): small.png" in refused
    assert "are in training and held out, or almost: good.jpg = copy.jpg" in refused
    assert "a step takes 8 samples" in noted
    assert (len(scan.refused), len(scan.noted)) == (3, 2)


def test_what_a_recipe_accepts_is_not_refused(tmp_path: Path) -> None:
    good = _noise(tmp_path / "good.png", (128, 128), 0)
    copy = tmp_path / "copy.png"
    copy.write_bytes(good.read_bytes())
    samples = [_sample(good, caption="far too many words"), _sample(copy, split="test")]
    config = DataConfig(folder=str(tmp_path), long_captions="cut", allow_overlap=True)
    scan = scan_samples(samples, 64, tmp_path / "cache", readable=lambda text: text[:10], config=config)
    assert (len(scan.refused), len(scan.noted)) == (0, 2)


def test_a_truncated_file_is_found_and_named(tmp_path: Path) -> None:
    whole = _noise(tmp_path / "whole.jpg", (256, 256), 0)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:2000])
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(whole.read_bytes())
    scan = scan_samples([_sample(whole), _sample(cut), _sample(copy)], 64, tmp_path / "cache")
    assert len(scan.refused) == 1
    assert scan.refused[0].startswith("1 images cannot be read: cut.jpg (")
    assert scan.noted == ("1 images are there twice in training, or almost: whole.jpg = copy.jpg",)


def test_a_picture_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    path = _noise(tmp_path / "turned.jpg", (96, 64), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    assert scan_samples([_sample(path)], 64, tmp_path / "cache").sizes == {"64x96": 1}
