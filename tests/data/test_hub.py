"""Data sets of `datasets`: every local form gives the same samples, nothing is fetched, every fault is named."""

import io
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from loragraft.data.hub import build_dataset
from loragraft.data.sources import DataError, Sample, open_source
from loragraft.recipes.schema import DataConfig

COLOURS = ["red", "green", "blue", "orange", "black", "white"]


def _jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def _rows(**extra: list[object]) -> datasets.Dataset:
    columns = {
        "picture": [{"bytes": _jpeg(c), "path": None} for c in COLOURS],
        "text": [f"a {c} thing" for c in COLOURS],
    }
    return datasets.Dataset.from_dict({**columns, **extra}).cast_column("picture", datasets.Image())


def _on_disk(folder: Path) -> Path:
    _rows().save_to_disk(folder / "saved")
    return folder / "saved"


def _dict_on_disk(folder: Path) -> Path:
    datasets.DatasetDict({"train": _rows(), "test": _rows().select([0])}).save_to_disk(folder / "splits")
    return folder / "splits"


def _parquet(folder: Path) -> Path:
    _rows().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def _parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    _rows().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "data"


def _image_folder(folder: Path) -> Path:
    (folder / "images").mkdir()
    lines = []
    for i, colour in enumerate(COLOURS):
        (folder / "images" / f"{i}.jpg").write_bytes(_jpeg(colour))
        lines.append(f"{i}.jpg,a {colour} thing")
    (folder / "images" / "metadata.csv").write_text("file_name,text\n" + "\n".join(lines))
    return folder / "images"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"network use: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _open(path: Path | str, cache: Path, **options: object) -> list[Sample]:
    return open_source(DataConfig(dataset=str(path), **options), 64, cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [_on_disk, _dict_on_disk, _parquet, _parquet_folder, _image_folder])
def test_every_local_form_gives_the_same_samples(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = make(tmp_path), tmp_path / "cache"
    samples = _open(path, cache, trigger="in my style")
    assert [s.caption for s in samples] == [f"in my style, a {c} thing" for c in COLOURS]
    assert [s.image.read_bytes() for s in samples] == [_jpeg(c) for c in COLOURS], "bytes are copied as they are"
    assert all(s.image.is_relative_to(cache) and s.image.suffix == ".jpeg" for s in samples)
    monkeypatch.setattr("loragraft.data.hub._write", lambda *args: pytest.fail("written a second time"))
    assert _open(path, cache, trigger="in my style") == samples


def test_other_columns_pass_through_and_other_content_is_another_folder(tmp_path: Path) -> None:
    config = DataConfig(dataset=str(tmp_path / "saved"))
    _rows(split=["train"] * 5 + ["test"], short=["s"] * 6, concept=list("abcdef")).save_to_disk(tmp_path / "saved")
    samples = open_source(config, 64, tmp_path / "cache")
    assert [s.split for s in samples] == ["train"] * 5 + ["test"]
    assert {s.short for s in samples} == {"s"}
    first = build_dataset(config, tmp_path / "cache")
    _rows().select([0, 1, 2]).save_to_disk(tmp_path / "other")
    assert build_dataset(DataConfig(dataset=str(tmp_path / "other")), tmp_path / "cache") != first


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = _parquet(tmp_path)
    assert len(_open(path, tmp_path / "cache")) == 6
    _rows().select([1, 2, 3]).to_parquet(path)
    assert [s.caption for s in _open(path, tmp_path / "cache")] == ["a green thing", "a blue thing", "a orange thing"]


def test_labels_one_caption_and_strange_formats(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PPM")
    labels = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    content = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 2, "label": [1, 0]}
    datasets.Dataset.from_dict(content, features=labels).save_to_disk(tmp_path / "labels")
    samples = _open(tmp_path / "labels", tmp_path / "cache", caption_column="label")
    assert [(s.caption, s.image.suffix) for s in samples] == [("dog", ".png"), ("cat", ".png")]
    samples = _open(tmp_path / "labels", tmp_path / "cache", caption="a pet", validation_fraction=0, test_fraction=0)
    assert [s.caption for s in samples] == ["a pet"] * 2


def test_a_phones_picture_of_two_frames_stays_upright(tmp_path: Path) -> None:
    exif, buffer, picture = Image.Exif(), io.BytesIO(), Image.new("RGB", (12, 8), "red")
    exif[0x0112] = 6
    picture.save(buffer, "MPO", exif=exif, save_all=True, append_images=[picture])
    rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}], "text": ["a thing"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "phone")
    (sample,) = _open(tmp_path / "phone", tmp_path / "cache", validation_fraction=0, test_fraction=0)
    with Image.open(sample.image) as image:
        assert image.size == (8, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "pictur"}, r"data.image_column: .* has no column 'pictur'; did you mean picture\?"),
        ({"image_column": "number"}, "the column 'number' holds no images"),
        ({"caption_column": "txt"}, r"data.caption_column: .* did you mean text\?"),
        ({"caption_column": "number"}, "row 0 of .* 'number' must be text, not int"),
        ({"dataset_split": "trian"}, r"has no split 'trian'; did you mean train\? it has train"),
        ({"dataset_split": "qq"}, r"has no split 'qq'; it has train"),
    ],
)
def test_faults_of_columns_and_splits(tmp_path: Path, options: dict[str, object], message: str) -> None:
    datasets.DatasetDict({"train": _rows(number=list(range(6)))}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        _open(tmp_path / "d", tmp_path / "cache", **options)
    assert not list((tmp_path / "cache").glob("own/*")), "nothing half-written is left"


def test_faults_of_content(tmp_path: Path) -> None:
    broken = {"image": [{"bytes": _jpeg("red"), "path": None}, {"bytes": b"no image", "path": None}], "x": ["a", "b"]}
    rows = datasets.Dataset.from_dict(
        broken, features=datasets.Features(image=datasets.Image(), x=datasets.Value("string"))
    )
    rows.save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"no column `text` or `caption` among image, x; name the captions with"):
        _open(tmp_path / "d", tmp_path / "cache")
    with pytest.raises(DataError, match=r"row 1 of .* is not a readable image"):
        _open(tmp_path / "d", tmp_path / "cache", caption_column="x")
    with pytest.raises(DataError, match="does not exist"):
        _open(tmp_path / "nowhere", tmp_path / "cache")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a.txt is no file that is read here \(.parquet"):
        _open(tmp_path / "a.txt", tmp_path / "cache")


def test_nothing_is_fetched_unless_allowed(tmp_path: Path) -> None:
    """The guard on sockets would fail the test, not raise a DataError."""
    with pytest.raises(DataError, match=r"nothing is fetched unless you say data\.allow_download=true"):
        _open("someone/flowers", tmp_path / "cache")
    assert not datasets.config.HF_HUB_OFFLINE, "the setting is put back"
