"""Photo captions say what the metadata says, in other words; fillers add words and change no picture."""

import io
import json
import random
import zipfile

import numpy as np
import pytest
from PIL import Image

photos = pytest.importorskip("photos")
fillers = pytest.importorskip("fillers")
captions = pytest.importorskip("captions")


def row(number: int, caption: str, label: str, split: str = "train") -> dict:
    return {
        "file_name": f"{number}.jpg", "caption": caption, "label": label, "split": split, "license": "MIT", "source": "s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "subject", "place"),
    [
        ("product photo of a pink t-shirt", "pink t-shirt", ""),
        ("photo of Royal Gala apple on a grocery store shelf", "royal gala apple", "a grocery store shelf"),
        ("product packshot of Carrots on white background. The orange colour.", "carrots", "white background"),
    ],
)
def test_captions_are_taken_apart_and_said_again(caption: str, subject: str, place: str) -> None:
    photo = photos.parse_photo(row(0, caption, "x"))
    assert (photo.subject, photo.place) == (subject, place)
    rng = random.Random(0)
    said = {photos.photo_caption(photo, rng) for _ in range(50)}
    assert len(said) > 4
    assert all(subject in text and "photo" in text for text in said)


def test_shrunk_photos_are_balanced_and_keep_their_split(tmp_path) -> None:
    rows = [row(i, "photo of Kiwi", "kiwi") for i in range(5)] + [row(5, "photo of Lime", "lime")]
    rows += [row(6 + i, "photo of Lime", "lime", "test") for i in range(3)]
    source, target = tmp_path / "photos.zip", tmp_path / "small.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for entry in rows:
            packed = io.BytesIO()
            Image.new("RGB", (128, 128), (200, 30, 40)).save(packed, "JPEG")
            archive.writestr(entry["file_name"], packed.getvalue())
        archive.writestr("metadata.jsonl", "\n".join(json.dumps(entry) for entry in rows))
    assert photos.shrink_photos(source, target, per_label=2, held_out=2) == 5
    kept, pixels = photos.read_photos(target)
    assert sorted(photo.split for photo in kept) == ["photo", "photo", "train", "train", "train"]
    assert pixels.shape == (5, 3, 128, 128)
    assert np.abs(pixels.mean((0, 2, 3)) - (200, 30, 40)).max() < 6
    drawn, texts = photos.draw_photos(kept, "photo", 20, 1)
    assert {kept[i].split for i in drawn[:, 0]} == {"photo"}
    assert len(texts) == 20


def test_fillers_keep_the_caption_whole_and_name_no_colour_or_place() -> None:
    rng = random.Random(3)
    made = [fillers.with_filler("red heart on a blue background", rng) for _ in range(500)]
    assert all("red heart on a blue background" in text for text in made)
    assert 0.3 < sum(text != "red heart on a blue background" for text in made) / 500 < 0.5
    said = {"small", "large", "light", "icon", "top", "bottom", "left", "right", *captions.COLOURS}
    assert said.isdisjoint(fillers.WORDS)
