"""A recipe's `data` block -> a list of samples: image file, caption, split, concept, licence.

Nothing is decoded here; mistakes in a data set (no caption, no such file, two caption styles mixed) are found before
any model is loaded, and each error names the files at fault.
"""

import csv
import difflib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from loragraft.data.captions import as_shown, caption_lines
from loragraft.data.domains import build_domain
from loragraft.data.errors import DataError, in_utf8
from loragraft.data.images import NOT_READ, SUFFIXES, check_white
from loragraft.data.sample import Sample
from loragraft.data.splits import SPLITS, Split, split_concepts
from loragraft.recipes.schema import DataConfig

__all__ = ["DataError", "Sample", "check_source", "open_source"]

_SPLIT_NAMES: dict[str, Split] = {
    **{split: split for split in SPLITS},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
}
_CAPTION_SUFFIXES = frozenset({".txt", ".caption", ".captions", ".tags"})
_TABLE_SUFFIXES = frozenset({".txt", ".json", ".jsonl", ".csv", ".tsv"})
_log = logging.getLogger(__name__)
_CAMERA_NAME = re.compile(r"(img|dsc|dscn|dscf|pxl|image|photo|picture|screenshot|p)?[\W\d_]*", re.IGNORECASE)


@dataclass
class LeftOut:
    """Images of a folder that training refuses, for who wants to name them all at once."""

    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    """With the reason; what has no image's header."""
    without_caption: list[Path] = field(default_factory=list)
    not_read: list[Path] = field(default_factory=list)
    """Pictures of a kind that has to be converted first, which training warns of and leaves out."""


def open_source(config: DataConfig, resolution: int, cache_root: Path, left_out: LeftOut | None = None) -> list[Sample]:
    """The samples of a recipe's data, in a fixed order; a domain is drawn first where the cache lacks it.

    resolution: edge in pixels at which a domain is drawn, the largest of `config.edges`. Of a stream, it is what an earlier
    run has read, the training images without their files. left_out: where unusable images of a folder are noted, instead of the
    first being an error. Raises DataError.
    """
    check_source(config)
    if config.domain is not None:
        folder = build_domain(config, resolution, cache_root)
    elif config.streaming:
        from loragraft.data.stream import stored_stream

        return stored_stream(config, cache_root)
    elif config.dataset is not None:
        from loragraft.data.hub import build_dataset  # `datasets` takes a second to import

        folder = build_dataset(config, cache_root)
        config = replace(config, caption_column="")  # what was built has `text`
    else:
        folder = Path(config.folder or "")
    samples = _read_folder(folder, config, left_out)
    if samples or left_out is None:
        _check_short(samples, config, folder)
    return as_shown(_limit(samples, config.limit), config)


def check_source(config: DataConfig) -> None:
    """What can be said before anything is opened: raises DataError where there is no folder, or no such one, or where
    class images are wanted of nothing."""
    if config.folder == "":
        wanted = ' data.prior.prompt="mug icon"' if config.prior.images else ""
        raise DataError(
            "this recipe trains on images of your own: say where they are and what to call them, for example\n"
            f'  accelerate launch train/lora.py --recipe personal data.folder=./photos data.trigger="sks mug"{wanted}'
        )
    if config.prior.images and not config.prior.prompt:
        raise DataError(
            f"data.prior.images is {config.prior.images}, but data.prior.prompt is empty: say what kind of thing it is, "
            'such as data.prior.prompt="mug icon", or train without class images: data.prior.images=0'
        )
    if config.folder is None:
        return
    folder = Path(config.folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.folder {folder} is a file; give the folder that holds the images")
    if not folder.exists():
        parent = next(p for p in folder.parents if p.is_dir())
        near = difflib.get_close_matches(
            folder.relative_to(parent).parts[0], [p.name for p in parent.iterdir() if p.is_dir()], n=1, cutoff=0.5
        )
        remedy = f"; did you mean {parent / near[0]}?" if near else ""
        raise DataError(f"data.folder {folder} does not exist{remedy}")


def _check_short(samples: list[Sample], config: DataConfig, folder: Path) -> None:
    if config.short_captions and not any(sample.short for sample in samples if sample.split == "train"):
        raise DataError(
            f"data.short_captions is {config.short_captions:g}, but no training image of {folder} has a short caption; "
            "add a column `short` to its metadata, or set data.short_captions=0"
        )


def _read_folder(folder: Path, config: DataConfig, left_out: LeftOut | None) -> list[Sample]:
    found, strange = _of_suffix(folder, SUFFIXES), _of_suffix(folder, NOT_READ)
    kinds = f"known suffixes are {', '.join(sorted(SUFFIXES))}"
    if not found:
        convert = f"; convert {_listed(strange, folder)}" if strange else ""
        raise DataError(f"{folder} holds no image; {kinds}{convert}")
    if left_out is not None:
        left_out.not_read += strange
    elif strange:
        _log.warning("left out until converted: %s; %s", _listed(strange, folder), kinds)
    unreadable = dict(_unreadable(found)) if config.domain is None else {}
    if left_out is not None:
        left_out.unreadable += unreadable.items()
    elif unreadable:
        path, reason = next(iter(unreadable.items()))
        more = f" (and {len(unreadable) - 1} more; `loragraft preflight` lists them)" if len(unreadable) > 1 else ""
        raise DataError(f"{path} is not a readable image ({reason}); repair it, or take it out{more}")
    rows = [row for row in _rows(folder, found, config, left_out) if row["image"] not in unreadable]
    empty = [row for row in rows if not row["caption"]]
    if empty and not config.caption:
        if left_out is None:
            raise DataError(
                f"{len(empty)} images of {folder} have no caption: {_listed([row['image'] for row in empty], folder)}; put a "
                ".txt beside each image, or write metadata.jsonl with lines such as "
                '{"file_name": "a.png", "text": "a red bicycle"}, or name the files after what they show, or give one '
                'caption for all, such as data.caption="a photo in sks style"'
            )
        left_out.without_caption += [row["image"] for row in empty]
        rows = [row for row in rows if row["caption"]]
    for row in empty:  # many images share the caption, so each is a concept of its own: the split goes by image
        row |= {"caption": config.caption, "concept": row.get("concept") or str(row["image"].relative_to(folder))}
    return _with_splits(rows, folder, config) if rows or left_out is None else []


def _of_suffix(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files at any depth, without hidden ones and those in hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _rows(folder: Path, images: list[Path], config: DataConfig, left_out: LeftOut | None) -> list[dict[str, Any]]:
    """One row an image, its caption perhaps empty: from metadata, else from `.txt` files, else from the images' names."""
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    with_text = {image for image in images if image.with_suffix(".txt").is_file()}
    if jsonl.is_file() or table.is_file():
        return _rows_of_metadata(jsonl if jsonl.is_file() else table, images, config)
    if with_text:
        missing = sorted(set(images) - with_text)
        if missing and not config.caption and left_out is None:
            raise DataError(
                f"{len(with_text)} images of {folder} have a .txt caption beside them and {len(missing)} do not: "
                f"{_listed(missing, folder)}; write the missing ones, use metadata.jsonl for all, or give "
                "data.caption for those without"
            )
        return [{"image": i, "caption": _text_beside(i) if i in with_text else ""} for i in images]
    if misnamed := _misnamed_captions(folder, images):
        raise DataError(
            f"{_listed(misnamed, folder)}: by the name captions, and not read. Captions stand in {images[0].with_suffix('.txt').name} "
            f"beside {images[0].name}, or in metadata.jsonl or metadata.csv in {folder} itself; rename what is there, or take "
            "it out of the folder"
        )
    if config.caption:
        return [{"image": image, "caption": ""} for image in images]
    return [{"image": image, "caption": _caption_of_name(image.stem)} for image in images]


def _misnamed_captions(folder: Path, images: Iterable[Path]) -> list[Path]:
    """Files that were meant as captions: `a.jpg.txt`, `a.TXT` or `a.caption` beside `a.jpg`, `captions.csv`, a table further down."""
    names = {image.with_name(name) for image in images for name in (image.name, image.stem)}
    texts = _of_suffix(folder, _CAPTION_SUFFIXES | _TABLE_SUFFIXES)
    return [
        path
        for path in texts
        if (path.suffix.lower() in _CAPTION_SUFFIXES and path.with_name(path.stem) in names)
        or (path.suffix.lower() in _TABLE_SUFFIXES and path.stem.lower() in ("metadata", "captions"))
    ]


def _text_beside(image: Path) -> str:
    path = image.with_suffix(".txt")
    with in_utf8(path):
        return path.read_text(encoding="utf-8-sig").strip()


def _unreadable(images: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """What is no image at all, with the reason: every file is opened as far as its header. A truncated file shows when it is
    read."""
    for path in images:
        try:
            with Image.open(path) as image:
                check_white(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield path, str(error)


def _rows_of_metadata(path: Path, images: list[Path], config: DataConfig) -> list[dict[str, Any]]:
    """Rows of `metadata.jsonl` or `metadata.csv`, the convention of datasets' imagefolder: `file_name` + columns."""
    rows = []
    for place, row in _parse_metadata(path):
        if not isinstance(row.get("file_name"), str):
            raise DataError(f"{place} has no file_name; it has {', '.join(row)}")
        image = path.parent / row["file_name"]
        if not image.is_file():
            known = [str(p.relative_to(path.parent)) for p in images]
            near = difflib.get_close_matches(row["file_name"], known, n=1)
            raise DataError(f"{place} names {image}, which does not exist" + (f"; near: {near[0]}" if near else ""))
        column = config.caption_column or ("text" if "text" in row else "caption")
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(row)}."
            lacking = f"column {column!r}" if config.caption_column else "column 'text' or 'caption'"
            raise DataError(f"{place} has no {lacking}; {remedy} Choose with data.caption_column")
        text = row[column] if isinstance(row[column], list) else str(row[column] or "")
        captions = caption_lines(text)
        if captions is None:
            raise DataError(f"{place}: {column} must be text or a list of texts, not {row[column]!r}")
        rows.append(
            {**row, "image": image, "caption": captions[0] if captions else "", "captions": tuple(captions[1:])}
        )
    missing = sorted(set(images) - {row["image"] for row in rows})
    if missing:
        raise DataError(f"{len(missing)} images are not listed in {path}: {_listed(missing, path.parent)}")
    return rows


def _parse_metadata(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(place for error messages, row)."""
    with in_utf8(path), path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            for number, fields in enumerate(csv.DictReader(lines), start=2):
                yield f"{path}:{number}", {str(key): value for key, value in fields.items()}
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} must be an object such as {{'file_name': ..., 'text': ...}}")
            yield f"{path}:{number}", row


def _caption_of_name(stem: str) -> str:
    """`red-bicycle_03` -> `red bicycle`; a camera's own name (`IMG_1234`, `0007`) says nothing and gives ""."""
    if _CAMERA_NAME.fullmatch(stem):
        return ""
    return re.sub(r"\s*\(?\d*\)?$", "", re.sub(r"[-_\s]+", " ", stem)).strip()


def _with_splits(rows: list[dict[str, Any]], folder: Path, config: DataConfig) -> list[Sample]:
    """Samples with the split that the rows give, else one by concept (the caption, where no concept is given)."""
    given = [row for row in rows if row.get("split")]
    if given and len(given) < len(rows):
        bare = [row["image"] for row in rows if not row.get("split")]
        raise DataError(f"{len(bare)} rows of {folder} have no split while others have: {_listed(bare, folder)}")
    concepts = [str(row.get("concept") or row["caption"]) for row in rows]
    drawn = split_concepts(concepts, config.seed, config.validation_fraction, config.test_fraction)
    samples = []
    for row, concept in zip(rows, concepts, strict=True):
        name = str(row.get("split") or drawn[concept]).lower()
        if name not in _SPLIT_NAMES:
            raise DataError(f"{row['image']}: unknown split {name!r}; use one of {', '.join(SPLITS)}")
        licence = str(row.get("licence") or row.get("license") or config.licence)
        short = str(row.get("short") or "").strip()
        more = row.get("captions") or ()
        captions = (row["caption"], *more) if more else ()
        samples.append(Sample(row["image"], row["caption"], _SPLIT_NAMES[name], concept, licence, short, captions))
    if not any(sample.split == "train" for sample in samples):
        raise DataError(f"{folder} has no image in the train split; lower data.validation_fraction and test_fraction")
    return samples


def _limit(samples: list[Sample], limit: int) -> list[Sample]:
    """At most `limit` samples, evenly spaced over each split, in the original order."""
    if not 0 < limit < len(samples):
        return samples
    by_split = sorted(range(len(samples)), key=lambda i: SPLITS.index(samples[i].split))
    kept = {by_split[i * len(samples) // limit] for i in range(limit)}
    return [sample for i, sample in enumerate(samples) if i in kept]


def _listed(paths: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
