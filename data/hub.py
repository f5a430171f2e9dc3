"""A data set of Hugging Face's `datasets` -> a folder of images with `metadata.jsonl`, written once.

From there on it is a folder like any other. Image bytes are copied as they are. Nothing is fetched unless the recipe says
`data.allow_download: true`: until then the Hub's client is offline, also for names, which then only find what a cache
already holds.
"""

import contextlib
import difflib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from loragraft.data.captions import caption_lines
from loragraft.data.errors import DataError
from loragraft.data.folders import build_once
from loragraft.data.images import SUFFIXES, eight_bits, png_bytes
from loragraft.recipes.schema import DataConfig

BUILD_VERSION = 2
"""Part of the folder's key: raise it whenever the same data set would be written differently."""
_KEPT = ("short", "split", "concept", "licence", "license")
"""Text columns that a folder's metadata understands."""
_FILES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def build_dataset(config: DataConfig, cache_root: Path) -> Path:
    """The folder with the data set's images and `metadata.jsonl`; written if it is not there yet.

    Its key is the fingerprint that `datasets` gives the split, with the columns asked for. Raises DataError.
    """
    assert config.dataset is not None
    with network(config.allow_download):
        rows = _open_split(config, cache_root / "datasets")
        assert isinstance(rows, datasets.Dataset)
        image, caption = _image_column(rows, config), _caption_column(rows, config)
        key = json.dumps([BUILD_VERSION, rows._fingerprint, image, caption])
        folder = cache_root / "own" / f"{Path(config.dataset).name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return build_once(folder, lambda scratch: _write(rows, image, caption, str(config.dataset), scratch))


@dataclass(frozen=True)
class Stream:
    """Rows of a data set that are read as they are asked for."""

    rows: datasets.IterableDataset
    """Images undecoded."""
    image: str
    caption: str | None
    name: str
    fingerprint: str
    """Of its files (names and times or revisions) and columns."""

    def row(self, number: int, row: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """(the image's bytes, its line of metadata without splits). Raises DataError naming the row."""
        kept = [column for column in _KEPT if column in row and column not in (self.image, self.caption)]
        return _entry(row, number, self.name, self.image, self.caption, self._labels, kept)

    @property
    def _labels(self) -> Any:
        return self.rows.features[self.caption] if self.caption else None


def open_stream(config: DataConfig, cache_root: Path) -> Stream:
    """The split of `config.dataset`, to be read under `network`. Raises DataError."""
    rows = _open_split(config, cache_root / "datasets")
    assert isinstance(rows, datasets.IterableDataset)
    if rows.features is None:
        rows = rows._resolve_features()
    image, caption = _image_column(rows, config), _caption_column(rows, config)
    key = json.dumps([_fingerprint(config, cache_root / "datasets"), config.dataset_split, image, caption])
    rows = _undecoded(rows, image, str(config.dataset))
    return Stream(rows, image, caption, str(config.dataset), hashlib.sha256(key.encode()).hexdigest())


def _fingerprint(config: DataConfig, cache: Path) -> str:
    name = str(config.dataset)
    path = Path(name)
    if _is_saved(path):
        return json.dumps(sorted((str(p), p.stat().st_mtime) for p in path.rglob("*") if p.is_file()))
    files = {"data_files": name} if path.is_file() else {}
    kind = _FILES[path.suffix] if path.is_file() else name
    found = datasets.load_dataset_builder(kind, cache_dir=str(cache), **files).config.data_files
    return json.dumps({str(split): [list(listed), listed.origin_metadata] for split, listed in found.items()})


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


@contextlib.contextmanager
def network(allowed: bool) -> Iterator[None]:
    """The Hub's client offline unless allowed. The variable HF_HUB_OFFLINE is read at import, which is long past."""
    before = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    if not allowed:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _open_split(config: DataConfig, cache: Path) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of the split; read as they are asked for with `config.streaming`."""
    name = config.dataset or ""
    path = Path(name)
    how = {"cache_dir": str(cache), "streaming": config.streaming}
    try:
        if _is_saved(path):
            found = datasets.load_from_disk(name)
        elif path.is_file():
            if path.suffix not in _FILES:
                raise DataError(f"data.dataset {path} is no file that is read here ({', '.join(_FILES)})")
            found = datasets.load_dataset(_FILES[path.suffix], data_files=name, **how)
        elif path.is_absolute() and not path.exists():
            raise DataError(f"data.dataset {path} does not exist")
        else:
            found = datasets.load_dataset(name, **how)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        if isinstance(error, DataError):
            raise
        remedy = (
            ""
            if path.exists() or config.allow_download
            else ("; it is no path on this machine, and nothing is fetched unless you say data.allow_download=true")
        )
        raise DataError(f"data.dataset {name!r} cannot be opened ({error}){remedy}") from error
    if isinstance(found, datasets.Dataset | datasets.IterableDataset):
        return _streamed(found, config)
    if config.dataset_split not in found:
        near = difflib.get_close_matches(config.dataset_split, found, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(
            f"data.dataset {name!r} has no split {config.dataset_split!r}{hint or ';'} it has "
            f"{', '.join(map(str, found))}: choose with data.dataset_split"
        )
    return _streamed(found[config.dataset_split], config)


def _streamed(
    rows: datasets.Dataset | datasets.IterableDataset, config: DataConfig
) -> datasets.Dataset | datasets.IterableDataset:
    """What was saved to disk is opened whole (it is mapped into memory) and then read like any stream."""
    return rows.to_iterable_dataset() if config.streaming and isinstance(rows, datasets.Dataset) else rows


def _image_column(rows: datasets.Dataset | datasets.IterableDataset, config: DataConfig) -> str:
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if config.image_column:
        return _known(rows, config.image_column, "data.image_column", config)
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"data.dataset {config.dataset!r} has {len(images)} image columns among {', '.join(rows.column_names)}; "
        "name one with data.image_column"
    )


def _caption_column(rows: datasets.Dataset | datasets.IterableDataset, config: DataConfig) -> str | None:
    """The column, or None where `data.caption` serves for all."""
    if config.caption_column:
        return _known(rows, config.caption_column, "data.caption_column", config)
    for name in ("text", "caption"):
        if name in rows.column_names:
            return name
    if config.caption:
        return None
    raise DataError(
        f"data.dataset {config.dataset!r} has no column `text` or `caption` among {', '.join(rows.column_names)}; name "
        "the captions with data.caption_column, or give one for all with data.caption"
    )


def _known(rows: datasets.Dataset | datasets.IterableDataset, column: str, key: str, config: DataConfig) -> str:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(rows.column_names)}"
        raise DataError(f"{key}: data.dataset {config.dataset!r} has no column {column!r}; {remedy}")
    return column


def _write(rows: datasets.Dataset, image: str, caption: str | None, name: str, folder: Path) -> None:
    """Images by row number, and one line of metadata each. Raises DataError naming the row."""
    labels = rows.features[caption] if caption else None
    kept = [column for column in _KEPT if column in rows.column_names and column not in (image, caption)]
    rows = _undecoded(rows, image, name)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number, row in enumerate(tqdm(rows, desc="writing images", unit="image", leave=False)):
            content, entry = _entry(row, number, name, image, caption, labels, kept)
            (folder / entry["file_name"]).write_bytes(content)
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _undecoded(rows: Any, image: str, name: str) -> Any:
    """The rows with the images' files in place of their pixels."""
    try:
        return rows.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"data.dataset {name!r}: the column {image!r} holds no images ({error})") from error


def _entry(
    row: dict[str, Any], number: int, name: str, image: str, caption: str | None, labels: Any, kept: list[str]
) -> tuple[bytes, dict[str, Any]]:
    """An image's bytes and its line of metadata: `file_name`, `text` (a list where the row has several) and `kept`."""
    place = f"row {number} of data.dataset {name!r}"
    text = row[caption] if caption else ""
    if isinstance(labels, datasets.ClassLabel) and text is not None:
        text = labels.int2str(text)
    captions = caption_lines(text)
    if captions is None:
        raise DataError(f"{place}: {caption!r} must be text, not {type(text).__name__}")
    content, suffix = _image_bytes(row[image], place)
    said = captions if isinstance(text, list) else text or ""
    return content, {"file_name": f"{number:06d}{suffix}", "text": said, **{column: row[column] for column in kept}}


def _read(path: str) -> bytes:
    """A file on this machine, or one that a stream names by its address."""
    with xopen(path, "rb") as file:
        content: bytes = file.read()
    return content


def _image_bytes(value: dict[str, Any] | None, place: str) -> tuple[bytes, str]:
    """The file's bytes and its suffix; formats that the line does not read become PNG."""
    if value is None or (value["bytes"] is None and not value["path"]):
        raise DataError(f"{place} has no image")
    try:
        content = bytes(value["bytes"]) if value["bytes"] is not None else _read(value["path"])
        with Image.open(io.BytesIO(content)) as opened:
            suffix = f".{(opened.format or '').lower()}"
            if suffix in SUFFIXES:
                return content, suffix
            return png_bytes(eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")), ".png"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place} is not a readable image ({error})") from error
