"""Folders of images: three caption styles, splits, and every fault named with its file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from loragraft.data.images import load_pixels
from loragraft.data.sources import DataError, Sample, check_source, open_source
from loragraft.data.splits import split_concepts
from loragraft.recipes.schema import DataConfig


def _image(path: Path, colour: str = "red", size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def _open(folder: Path, **options: object) -> list[Sample]:
    return open_source(DataConfig(folder=str(folder), **options), 64, folder / "unused")  # type: ignore[arg-type]


def _metadata(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_jsonl(tmp_path: Path, column: str) -> None:
    _image(tmp_path / "sub/a.png")
    _image(tmp_path / "b.png").with_suffix(".txt").write_text("not this")
    _metadata(
        tmp_path,
        {"file_name": "sub/a.png", column: "first", "split": "val", "license": "CC0-1.0"},
        {"file_name": "b.png", column: "second", "split": "train", "concept": "thing"},
    )
    first, second = _open(tmp_path)
    assert first == Sample(tmp_path / "sub/a.png", "first", "validation", "first", "CC0-1.0")
    assert second == Sample(tmp_path / "b.png", "second", "train", "thing", "unspecified")


def test_metadata_csv(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, square"\n')
    assert [s.caption for s in _open(tmp_path)] == ["red, square"]


def test_text_files_and_trigger(tmp_path: Path) -> None:
    _image(tmp_path / "a.png").with_suffix(".txt").write_text(" a red square\n")
    assert [s.caption for s in _open(tmp_path, trigger="in my style")] == ["in my style, a red square"]


def test_file_names(tmp_path: Path) -> None:
    for name in ("red-bicycle_03.png", "Blue car (2).png"):
        _image(tmp_path / name)
    assert [s.caption for s in _open(tmp_path)] == ["Blue car", "red bicycle"]


def test_caption_column(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    _metadata(tmp_path, {"file_name": "a.png", "text": "short", "prompt": "long"})
    assert _open(tmp_path, caption_column="prompt")[0].caption == "long"
    with pytest.raises(DataError, match=r"metadata.jsonl:1 has no column 'promt'; did you mean prompt\?"):
        _open(tmp_path, caption_column="promt")


@pytest.mark.parametrize(
    "name", ["red disc.png.txt", "red disc.TXT", "red disc.caption", "captions.csv", "sub/metadata.jsonl"]
)
def test_captions_under_a_name_that_is_not_read_are_an_error(tmp_path: Path, name: str) -> None:
    _image(tmp_path / "red disc.png"), _image(tmp_path / "sub/blue disc.png")
    (tmp_path / "notes.txt").write_text("of no image")
    assert [s.caption for s in _open(tmp_path, validation_fraction=0, test_fraction=0)] == ["red disc", "blue disc"]
    (tmp_path / name).write_text("a caption")
    with pytest.raises(DataError, match=rf"{name}: by the name captions, and not read. Captions stand in red disc.txt"):
        _open(tmp_path)


def test_hidden_folders_are_left_alone(tmp_path: Path) -> None:
    _image(tmp_path / "red disc.png"), _image(tmp_path / ".thumbs/red disc.png")
    assert len(_open(tmp_path, validation_fraction=0, test_fraction=0)) == 1


def test_pictures_of_a_kind_that_is_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"a phone's")
    with pytest.raises(DataError, match=r"holds no image; known suffixes are .*; convert IMG_1.HEIC"):
        _open(tmp_path)
    _image(tmp_path / "red disc.png")
    _open(tmp_path, validation_fraction=0, test_fraction=0)
    assert "left out until converted: IMG_1.HEIC" in caplog.text


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_where_pillow_reads_it(tmp_path: Path) -> None:
    _image(tmp_path / "red disc.avif")
    assert len(_open(tmp_path, validation_fraction=0, test_fraction=0)) == 1


def test_one_caption_for_photos_without_any(tmp_path: Path) -> None:
    for i in range(10):
        _image(tmp_path / f"IMG_{i:04d}.png")
    _image(tmp_path / "summer_final.png")  # a name that says nothing about the picture
    samples = _open(tmp_path, caption="a photo in sks style", trigger="sks style")
    assert {s.caption for s in samples} == {"a photo in sks style"}, "the trigger is there already"
    assert {s.split for s in samples} == {"train", "validation", "test"}, "the split goes by image"
    (tmp_path / "IMG_0003.txt").write_text("a dog")
    captions = {s.image.name: s.caption for s in _open(tmp_path, caption="a photo", trigger="sks style")}
    assert captions.pop("IMG_0003.png") == "sks style, a dog"
    assert set(captions.values()) == {"sks style, a photo"}


def test_one_caption_fills_the_gaps_of_metadata(tmp_path: Path) -> None:
    _image(tmp_path / "a.png"), _image(tmp_path / "b.png")
    _metadata(tmp_path, {"file_name": "a.png", "text": "mine"}, {"file_name": "b.png", "text": ""})
    assert [s.caption for s in _open(tmp_path, caption="a photo")] == ["mine", "a photo"]


def test_a_folder_that_is_yours_to_give_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.folder=\./photos data\.trigger"):
        check_source(DataConfig(folder=""))
    check_source(DataConfig(folder=str(tmp_path)))
    check_source(DataConfig(domain="marketing"))


def test_short_captions_replace_a_fixed_share_of_the_training_captions(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        _image(tmp_path / f"{i}.png")
        split = "test" if i >= 50 else "train"
        rows.append({"file_name": f"{i}.png", "text": f"long {i}", "short": f"s {i}", "split": split})
    _metadata(tmp_path, *rows)
    long = _open(tmp_path, trigger="x")
    assert {s.caption[:7] for s in long} == {"x, long"}
    assert {s.short[:4] for s in long} == {"x, s"}
    mixed = _open(tmp_path, trigger="x", short_captions=0.3)
    shortened = [s.image.name for s in mixed if s.caption == s.short]
    assert 6 <= len(shortened) <= 26
    assert all(s.caption != s.short for s in mixed if s.split == "test")
    assert mixed == _open(tmp_path, trigger="x", short_captions=0.3)
    more = [s.image.name for s in _open(tmp_path, trigger="x", short_captions=0.6) if s.caption == s.short]
    assert set(shortened) < set(more)
    assert all(s.caption == s.short for s in _open(tmp_path, short_captions=1.0) if s.split == "train")


def test_short_captions_without_any_are_an_error(tmp_path: Path) -> None:
    _image(tmp_path / "a.png").with_suffix(".txt").write_text("a dog")
    with pytest.raises(DataError, match=r"no training image of .* has a short caption; add a column `short`"):
        _open(tmp_path, short_captions=0.25)


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        _open(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"does not exist; did you mean .*photos\?"):
        _open(tmp_path / "photo")
    with pytest.raises(DataError, match="is a file"):
        _open(_image(tmp_path / "photos/x.png"))
    _image(tmp_path / "IMG_0001.png")
    with pytest.raises(DataError, match=r"have no caption: IMG_0001\.png; put a \.txt"):
        _open(tmp_path)
    (tmp_path / "IMG_0001.txt").write_text("a dog")
    with pytest.raises(DataError, match=r"1 images .* have a .txt caption beside them and 1 do not: photos/x.png"):
        _open(tmp_path)
    _metadata(tmp_path, {"file_name": "IMG_0001.png", "text": "a dog"})
    with pytest.raises(DataError, match=r"1 images are not listed in .*: photos/x\.png"):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "aa.png", "text": "x"}], r"names .*aa.png, which does not exist; near: a.png"),
        ([{"file_name": "a.png", "text": ""}], "1 images of .* have no caption: a.png"),
        ([{"text": "x"}], "has no file_name"),
        ([{"file_name": "a.png", "text": "x", "split": "tran"}], "unknown split 'tran'"),
        ([{"file_name": "a.png", "text": "x", "split": "test"}], "no image in the train split"),
        (
            [{"file_name": "a.png", "text": "x", "split": "train"}, {"file_name": "a.png", "text": "y"}],
            "have no split while others have",
        ),
    ],
)
def test_faults_of_metadata(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    _image(tmp_path / "a.png")
    _metadata(tmp_path, *rows)
    with pytest.raises(DataError, match=message):
        _open(tmp_path)


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{oops\n')
    with pytest.raises(DataError, match=r"metadata.jsonl:2 is not JSON"):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.jsonl", '{"file_name": "a.png", "text": "ö"}'), ("metadata.csv", "ö,text")]
)
def test_metadata_in_another_encoding_is_named(tmp_path: Path, name: str, text: str) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text"):
        _open(tmp_path)


def test_unreadable_and_truncated_images_are_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut.jpg is not a readable image"):
        load_pixels(tmp_path / "cut.jpg", 16)
    (tmp_path / "text.png").write_text("no image at all")
    with pytest.raises(DataError, match=r"text.png is not a readable image"):
        _open(tmp_path)


def test_pixels_orientation_transparency_and_crop(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 20, 20))  # left half white; orientation 6 turns it so that the top is white
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = load_pixels(tmp_path / "turned.png", 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 2].min() > 0.9
    assert pixels[:, 13].max() < -0.9
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_pixels(tmp_path / "clear.png", 8).min() == 1.0
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))  # only the middle third is kept
    wide.save(tmp_path / "wide.png")
    assert load_pixels(tmp_path / "wide.png", 16)[:, :, 2:14].min() > 0.9


def test_sixteen_bit_grey_keeps_its_tones_and_values_without_a_white_are_refused(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        row = load_pixels(tmp_path / name, 64)[0, 0]
        assert row[0] == -1 and row[-1] == 1 and abs(row[32]) < 0.05
        (tmp_path / name).unlink()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "linear.tif")
    with pytest.raises(DataError, match=r"linear.tif is not a readable image \(32 bits a value"):
        _open(tmp_path)


def test_splits_follow_the_concept(tmp_path: Path) -> None:
    for i in range(40):
        _image(tmp_path / f"{i}.png").with_suffix(".txt").write_text(f"thing {'abcdefghij'[i // 4]}")
    samples = _open(tmp_path)
    assert {s.split for s in samples} == {"train", "validation", "test"}
    assert len({(s.caption, s.split) for s in samples}) == 10
    assert {s.split for s in _open(tmp_path, validation_fraction=0.0, test_fraction=0.0)} == {"train"}
    few = _open(tmp_path, limit=10)
    assert len(few) == 10
    assert {s.split for s in few} == {"train", "validation", "test"}


def test_split_concepts_ignores_order_and_repeats() -> None:
    names = [f"c{i}" for i in range(50)]
    splits = split_concepts(names, 0, 0.1, 0.2)
    assert split_concepts([*reversed(names), *names], 0, 0.1, 0.2) == splits
    assert [list(splits.values()).count(s) for s in ("train", "validation", "test")] == [35, 5, 10]
    assert split_concepts(names, 1, 0.1, 0.2) != splits
    assert sorted(split_concepts(names[:5], 0, 0.1, 0.1).values()) == ["test", "train", "train", "train", "validation"]
    assert set(split_concepts(names[:2], 0, 0.1, 0.1).values()) == {"train"}


def test_captions_with_a_byte_order_mark_and_in_another_encoding(tmp_path: Path) -> None:
    beside = _image(tmp_path / "a.png").with_suffix(".txt")
    beside.write_bytes("a red square".encode("utf-8-sig"))
    assert [s.caption for s in _open(tmp_path)] == ["a red square"]
    beside.write_bytes("caf\xe9".encode("cp1252"))
    with pytest.raises(
        DataError, match=r"a\.txt is not UTF-8 text \(unexpected end of data at byte 3\); save it as UTF-8"
    ):
        _open(tmp_path)
