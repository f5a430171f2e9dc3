"""A stream of `datasets` into the cache: rows are read once, encoded by the hundred and forgotten.

    <cache root>/streams/<name>-<key>/index.jsonl      a line for every row: captions, concept, size, sha256 of its image
                                      held_out/        the validation and test images, which a score needs
                                      .reading/        the images that are being encoded: at most ROWS_AT_ONCE

The key names the data set's files, its columns, `limit`, the shuffling and the shares of the splits. The index grows with
every batch of rows that is in the cache, so `kill -9` costs the rows being encoded; a lock of the folder (`claims.py`) makes
a second run wait for the first. A split is drawn for each concept by itself, since the others are not known yet: shares hold
on average.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from loragraft.data.buckets import image_size
from loragraft.data.captions import as_shown
from loragraft.data.claims import exclusively
from loragraft.data.errors import DataError
from loragraft.data.hub import Stream, network, open_stream
from loragraft.data.sample import Sample
from loragraft.data.splits import SPLITS, Split
from loragraft.disk import naming_full_disk
from loragraft.recipes.schema import DataConfig

STREAM_VERSION = 1
"""Part of the folder's key: raise it whenever the same stream would give another index."""
ROWS_AT_ONCE = 256

Encode = Callable[[list[Sample]], object]
"""Puts samples into the cache; their files are there while it runs."""
Lacking = Callable[[Sequence[Sample]], list[Sample]]
"""Those of the samples that the cache lacks."""


def read_stream(config: DataConfig, cache_root: Path, encode: Encode, lacking: Lacking) -> list[Sample]:
    """All samples of the stream's first `limit` rows, every one of them in the cache. Raises DataError naming the row."""
    with network(config.allow_download):
        stream = open_stream(config, cache_root)
        folder = _folder(config, stream, cache_root)
        (folder / "held_out").mkdir(parents=True, exist_ok=True)
        with exclusively(folder):
            shutil.rmtree(folder / ".reading", ignore_errors=True)
            index = _read_index(folder)
            wanted = {s.image.name for s in lacking(as_shown(_samples(index, folder), config))}
            if wanted:  # of another base, or a cache that was emptied
                _read(config, stream, folder, encode, range(len(index)), wanted)
            if not _complete(index):
                _cut(folder)
                _read(config, stream, folder, encode, range(len(index), config.limit), None)
            index = _read_index(folder)
    samples = as_shown(_samples(index, folder), config)
    if not any(sample.split == "train" for sample in samples):
        raise DataError(
            f"the {len(samples)} rows of data.dataset {config.dataset!r} have no image in the train split; raise data.limit, "
            "or lower data.validation_fraction and test_fraction"
        )
    return samples


def stored_stream(config: DataConfig, cache_root: Path) -> list[Sample]:
    """What `read_stream` has read. Raises DataError where it has not been at its end."""
    with network(config.allow_download):
        folder = _folder(config, open_stream(config, cache_root), cache_root)
    index = _read_index(folder) if folder.is_dir() else []
    if not _complete(index):
        raise DataError(
            f"of data.dataset {config.dataset!r} {len(index)} of {config.limit} rows have been read so far; a stream is "
            "read by training: run that first, with the same data block"
        )
    return as_shown(_samples(index, folder), config)


def _folder(config: DataConfig, stream: Stream, cache_root: Path) -> Path:
    shares = [config.validation_fraction, config.test_fraction]
    key = json.dumps([STREAM_VERSION, stream.fingerprint, config.limit, config.shuffle_buffer, config.seed, *shares])
    return cache_root / "streams" / f"{Path(stream.name).stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _read(
    config: DataConfig, stream: Stream, folder: Path, encode: Encode, wanted: range, only: set[str] | None
) -> None:
    """Encodes the rows `wanted` and appends them to the index; or those of them named in `only`, which are in it."""
    rows = stream.rows
    if config.shuffle_buffer:
        rows = rows.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
    numbered = enumerate(rows.skip(wanted.start).take(len(wanted)), start=wanted.start)
    with tqdm(total=wanted.stop, initial=wanted.start, desc="streaming", unit="row") as bar, naming_full_disk(folder):
        while batch := list(itertools.islice(numbered, ROWS_AT_ONCE)):
            lines = list(_written(stream, batch, folder / ".reading", config, only))
            try:
                encode(as_shown(_samples(lines, folder, reading=True), config))
            except ValueError as error:
                raise DataError(
                    f"data.dataset {stream.name!r}, a row by the number in the file's name: {error}"
                ) from error
            for line in lines:
                if line["split"] != "train":
                    (folder / ".reading" / line["file_name"]).replace(folder / "held_out" / line["file_name"])
            shutil.rmtree(folder / ".reading")
            if only is None:
                _append(folder, lines)
            bar.update(len(batch))
    if only is None:
        _append(folder, [{"end": True}])


def _written(
    stream: Stream, batch: list[tuple[int, dict[str, Any]]], scratch: Path, config: DataConfig, only: set[str] | None
) -> Iterator[dict[str, Any]]:
    """Lines of the index; the images are under `scratch` from then on."""
    scratch.mkdir(exist_ok=True)
    for number, row in batch:
        content, entry = stream.row(number, row)
        if only is not None and entry["file_name"] not in only:
            continue
        captions = entry["text"] if isinstance(entry["text"], list) else [entry["text"]]
        captions = [caption for caption in captions if caption] or [config.caption]
        if not captions[0]:
            raise DataError(
                f"row {number} of data.dataset {stream.name!r} has no caption; give one for those without: data.caption"
            )
        (scratch / entry["file_name"]).write_bytes(content)
        concept = str(entry.get("concept") or (captions[0] if entry["text"] else entry["file_name"]))
        sample = Sample(scratch / entry["file_name"], captions[0], "train", concept, "")
        yield entry | {
            "text": captions,
            "concept": concept,
            "split": _split(entry, concept, config, number),
            "licence": str(entry.get("licence") or entry.get("license") or config.licence),
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": image_size(sample),
        }


def _split(entry: dict[str, Any], concept: str, config: DataConfig, number: int) -> Split:
    """The split that the row gives, else one by sha256(seed, concept), uniform in [0, 1)."""
    if given := str(entry.get("split") or "").lower():
        if given not in SPLITS:
            raise DataError(f"row {number} of data.dataset {config.dataset!r}: unknown split {given!r}; use {SPLITS}")
        return given
    digest = hashlib.sha256(f"{config.seed}/{concept}".encode()).digest()
    chance = int.from_bytes(digest[:8], "big") / 2**64
    held_out = config.test_fraction + config.validation_fraction
    return "test" if chance < config.test_fraction else "validation" if chance < held_out else "train"


def _samples(lines: Sequence[dict[str, Any]], folder: Path, reading: bool = False) -> list[Sample]:
    """Samples of lines of the index; `reading`: while their files are."""
    samples = []
    for line in lines:
        if "end" in line:
            continue
        place = folder / (".reading" if reading or line["split"] == "train" else "held_out")
        captions = tuple(line["text"]) if len(line["text"]) > 1 else ()
        sample = Sample(
            place / line["file_name"], line["text"][0], line["split"], line["concept"], line["licence"],
            str(line.get("short") or ""), captions,
        )  # fmt: skip
        samples.append(replace(sample, digest=bytes.fromhex(line["sha256"]), size=(line["size"][0], line["size"][1])))
    return samples


def _read_index(folder: Path) -> list[dict[str, Any]]:
    """Its whole lines, without what a killed process left half-written."""
    file = folder / "index.jsonl"
    content = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return [json.loads(line) for line in content.split("\n")[:-1]]


def _cut(folder: Path) -> None:
    """Takes a half-written line off the index."""
    file = folder / "index.jsonl"
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def _append(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    with (folder / "index.jsonl").open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _complete(index: Sequence[dict[str, Any]]) -> bool:
    return bool(index) and "end" in index[-1]
