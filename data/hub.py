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
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from PIL import Image
from tqdm.auto import tqdm

from loragraft.data.errors import DataError
from loragraft.data.folders import build_once
from loragraft.data.images import SUFFIXES, png_bytes
from loragraft.recipes.schema import DataConfig

BUILD_VERSION = 1
"""Part of the folder's key: raise it whenever the same data set would be written differently."""
_KEPT = ("short", "split", "concept", "licence", "license")
"""Text columns that a folder's metadata understands."""
_FILES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def build_dataset(config: DataConfig, cache_root: Path) -> Path:
    """The folder with the data set's images and `metadata.jsonl`; written if it is not there yet.

    Its key is the fingerprint that `datasets` gives the split, with the columns asked for. Raises DataError.
    """
    assert config.dataset is not None
    with _network(config.allow_download):
        rows = _open_split(config, cache_root / "datasets")
        image, caption = _image_column(rows, config), _caption_column(rows, config)
        key = json.dumps([BUILD_VERSION, rows._fingerprint, image, caption])
        folder = cache_root / "own" / f"{Path(config.dataset).name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return build_once(folder, lambda scratch: _write(rows, image, caption, str(config.dataset), scratch))


@contextlib.contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """The Hub's client offline unless allowed. The variable HF_HUB_OFFLINE is read at import, which is long past."""
    before = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    if not allowed:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _open_split(config: DataConfig, cache: Path) -> datasets.Dataset:
    name = config.dataset or ""
    path = Path(name)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        elif path.is_file():
            if path.suffix not in _FILES:
                raise DataError(f"data.dataset {path} is no file that is read here ({', '.join(_FILES)})")
            found = datasets.load_dataset(_FILES[path.suffix], data_files=name, cache_dir=str(cache))
        elif path.is_absolute() and not path.exists():
            raise DataError(f"data.dataset {path} does not exist")
        else:
            found = datasets.load_dataset(name, cache_dir=str(cache))
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        if isinstance(error, DataError):
            raise
        remedy = (
            ""
            if path.exists() or config.allow_download
            else ("; it is no path on this machine, and nothing is fetched unless you say data.allow_download=true")
        )
        raise DataError(f"data.dataset {name!r} cannot be opened ({error}){remedy}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if config.dataset_split not in found:
        near = difflib.get_close_matches(config.dataset_split, found, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(
            f"data.dataset {name!r} has no split {config.dataset_split!r}{hint} It has {', '.join(map(str, found))}; "
            "choose with data.dataset_split"
        )
    return found[config.dataset_split]


def _image_column(rows: datasets.Dataset, config: DataConfig) -> str:
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if config.image_column:
        return _known(rows, config.image_column, "data.image_column", config)
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"data.dataset {config.dataset!r} has {len(images)} image columns among {', '.join(rows.column_names)}; "
        "name one with data.image_column"
    )


def _caption_column(rows: datasets.Dataset, config: DataConfig) -> str | None:
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


def _known(rows: datasets.Dataset, column: str, key: str, config: DataConfig) -> str:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(rows.column_names)}"
        raise DataError(f"{key}: data.dataset {config.dataset!r} has no column {column!r}; {remedy}")
    return column


def _write(rows: datasets.Dataset, image: str, caption: str | None, name: str, folder: Path) -> None:
    """Images by row number, and one line of metadata each. Raises DataError naming the row."""
    labels = rows.features[caption] if caption else None
    kept = [column for column in _KEPT if column in rows.column_names and column not in (image, caption)]
    try:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"data.dataset {name!r}: the column {image!r} holds no images ({error})") from error
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number, row in enumerate(tqdm(rows, desc="writing images", unit="image", leave=False)):
            place = f"row {number} of data.dataset {name!r}"
            text = row[caption] if caption else ""
            if isinstance(labels, datasets.ClassLabel) and text is not None:
                text = labels.int2str(text)
            if not isinstance(text, str | None):
                raise DataError(f"{place}: {caption!r} must be text, not {type(text).__name__}")
            content, suffix = _image_bytes(row[image], place)
            file_name = f"{number:06d}{suffix}"
            (folder / file_name).write_bytes(content)
            entry = {"file_name": file_name, "text": text or "", **{column: row[column] for column in kept}}
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _image_bytes(value: dict[str, Any] | None, place: str) -> tuple[bytes, str]:
    """The file's bytes and its suffix; formats that the line does not read become PNG."""
    if value is None or (value["bytes"] is None and not value["path"]):
        raise DataError(f"{place} has no image")
    try:
        content = Path(value["path"]).read_bytes() if value["bytes"] is None else bytes(value["bytes"])
        with Image.open(io.BytesIO(content)) as opened:
            suffix = f".{(opened.format or '').lower()}"
            if suffix in SUFFIXES:
                return content, suffix
            return png_bytes(opened.convert("RGBA")), ".png"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place} is not a readable image ({error})") from error
