"""Streams: the cache fills row by row, nothing else is kept, a killed run goes on, a row at fault is named."""

import functools
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from loragraft.data import stream
from loragraft.data.buckets import Sizes
from loragraft.data.dataset import LatentCache
from loragraft.data.encode import encode_dataset, not_encoded
from loragraft.data.overlap import check_overlap
from loragraft.data.sample import Sample
from loragraft.data.sources import DataError, open_source
from loragraft.data.stream import read_stream, stored_stream
from loragraft.recipes.load import RecipeError, load_recipe
from loragraft.recipes.schema import DataConfig

SIZES = Sizes((32,), buckets=True)


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", [(40, 40), (80, 30), (30, 80)][number % 3], (number * 9, 0, 255 - number)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_parquet(folder: Path, count: int = 20, damaged: int = -1) -> Path:
    images: list[dict[str, Any]] = [{"bytes": _jpeg(i), "path": None} for i in range(count)]
    if damaged >= 0:
        whole = io.BytesIO()
        Image.effect_noise((64, 64), 60).save(whole, "JPEG")
        images[damaged]["bytes"] = whole.getvalue()[: len(whole.getvalue()) // 2]
    rows = {"image": images, "text": [[f"thing {i}", f"object {i}"] for i in range(count)]}
    path = folder / "rows.parquet"
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    return path


class Line:
    """A user's cache, and an encoder that remembers what it saw and how much lay on the disk meanwhile."""

    def __init__(self, path: Path, cache: Path, **options: Any) -> None:
        self.config = DataConfig(dataset=str(path), streaming=True, **({"limit": 20} | options))
        self.cache, self.encoder_id = cache, "enc"
        self.images, self.most_files = 0, 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        self.most_files = max(self.most_files, len(list(self.cache.glob("streams/*/.reading/*"))))
        return pixels[:, :, ::8, ::8]

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.ones(len(prompts), 3, 5), "pooled_prompt_embeds": torch.ones(len(prompts), 2)}

    def encode(self, samples: Sequence[Sample]) -> LatentCache:
        arguments = (samples, self.encode_images, self.encode_text, self.encoder_id, 32, self.cache)
        return encode_dataset(*arguments, progress=False, sizes=SIZES)

    def read(self) -> list[Sample]:
        lacking = functools.partial(not_encoded, encoder_id=self.encoder_id, cache_root=self.cache, sizes=SIZES)
        return read_stream(self.config, self.cache, self.encode, lacking)


@pytest.fixture(autouse=True)
def five_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS_AT_ONCE", 5)


def test_rows_are_encoded_and_only_held_out_images_are_kept(tmp_path: Path) -> None:
    line = Line(make_parquet(tmp_path), tmp_path / "cache", trigger="sks")
    samples = line.read()
    assert line.images == 20
    assert line.most_files == 5, "never more than are read at once"
    cache = line.encode(samples)
    assert line.images == 20, "all of it was there"
    assert len(cache) == 20
    assert next(s.caption for s in samples if s.split == "train").startswith("sks, thing")
    held_out = {s.image.name for s in samples if s.split != "train"}
    assert 0 < len(held_out) < 12
    kept = [p for p in (tmp_path / "cache" / "streams").rglob("*") if p.suffix == ".jpeg"]
    assert {p.name for p in kept} == held_out
    number = next(i for i, s in enumerate(samples) if s.split != "train")
    assert samples[number].image.read_bytes() == _jpeg(number)
    assert open_source(line.config, 32, tmp_path / "cache") == samples, "what a score finds"


def test_nothing_is_read_again_unless_the_cache_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(make_parquet(tmp_path), tmp_path / "cache")
    first = line.read()
    reads = stream._read
    monkeypatch.setattr(stream, "_read", lambda *_: pytest.fail("read again"))
    assert Line(tmp_path / "rows.parquet", tmp_path / "cache").read() == first
    monkeypatch.setattr(stream, "_read", reads)
    other = Line(tmp_path / "rows.parquet", tmp_path / "cache")
    other.encoder_id = "another base"
    assert other.read() == first
    assert other.images == 20
    latents = other.encode(first).store.folder
    shutil.rmtree(latents)
    assert other.read() == first
    assert other.images == 40
    line = Line(make_parquet(tmp_path, 12), tmp_path / "cache")
    assert len(line.read()) == 12, "another file is another stream, and one shorter than the limit ends"


def test_limit_and_shuffling_choose_the_rows(tmp_path: Path) -> None:
    path = make_parquet(tmp_path)
    plain = Line(path, tmp_path / "cache", limit=8).read()
    assert [s.caption for s in plain] == [f"thing {i}" for i in range(8)]
    mixed = Line(path, tmp_path / "cache", limit=8, shuffle_buffer=10).read()
    assert sorted(s.caption for s in mixed) != sorted(s.caption for s in plain)
    assert Line(path, tmp_path / "cache2", limit=8, shuffle_buffer=10).read()[0].caption == mixed[0].caption


def test_killed_while_reading_goes_on_after_the_rows_that_are_there(tmp_path: Path) -> None:
    make_parquet(tmp_path)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_stream as t
t.stream.ROWS_AT_ONCE = 5
class Dying(t.Line):
    def encode_images(self, pixels):
        if self.images >= 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)
folder = Path({str(tmp_path)!r})
Dying(folder / "rows.parquet", folder / "cache").read()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (index,) = (tmp_path / "cache" / "streams").glob("*/index.jsonl")
    assert len(index.read_text().splitlines()) == 10
    with pytest.raises(DataError, match=r"10 of 20 rows have been read so far; a stream is read by training"):
        open_source(Line(tmp_path / "rows.parquet", tmp_path).config, 32, tmp_path / "cache")
    with index.open("a") as file:
        file.write('{"file_name": "000010.jp')  # half a line
    line = Line(tmp_path / "rows.parquet", tmp_path / "cache")
    samples = line.read()
    assert line.images <= 10
    whole = Line(tmp_path / "rows.parquet", tmp_path / "other")
    assert [(s.caption, s.split, s.digest) for s in samples] == [(s.caption, s.split, s.digest) for s in whole.read()]
    assert line.encode(samples).fingerprint == whole.encode(whole.read()).fingerprint
    assert not list(index.parent.glob(".reading"))


def test_a_row_at_fault_is_named_and_what_was_read_stays(tmp_path: Path) -> None:
    line = Line(make_parquet(tmp_path, damaged=13), tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"a row by the number in the file's name: .*000013\.jpeg is not a readable image"
    ):
        line.read()
    (index,) = (tmp_path / "cache" / "streams").glob("*/index.jsonl")
    assert len(index.read_text().splitlines()) == 10
    rows = {"image": [{"bytes": _jpeg(0), "path": None}], "text": [None]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"row 0 of .* has no caption; give one for those without: data.caption"):
        Line(tmp_path / "saved", tmp_path / "cache").read()
    assert Line(
        tmp_path / "saved", tmp_path / "cache", caption="a thing", test_fraction=0, validation_fraction=0
    ).read()


def test_equal_images_in_two_splits_are_found_without_their_files(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": _jpeg(i % 2), "path": None} for i in range(4)], "text": list("abcd")}
    rows["split"] = ["train", "train", "test", "train"]
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    line = Line(tmp_path / "rows.parquet", tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"1 held-out images are also in the training split.*000000.jpeg \(train\) and 000002"
    ):
        check_overlap(line.read(), line.config, tmp_path / "cache")


def test_what_a_stream_needs_is_said_when_the_recipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.streaming needs data.limit"):
        load_recipe("marketing", ["data.domain=null", "data.dataset=./x", "data.streaming=true"])
    with pytest.raises(RecipeError, match=r"data\.streaming reads data.dataset, and none is given"):
        load_recipe("marketing", ["data.streaming=true"])
    with pytest.raises(DataError, match="0 of 20 rows"):
        stored_stream(Line(make_parquet(tmp_path), tmp_path).config, tmp_path / "cache")
