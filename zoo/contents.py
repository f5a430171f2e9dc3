"""A finished run -> the folder that is published: weights, card, pictures, score, and the entry that names them all.

    pytorch_lora_weights.safetensors   as training wrote it, but for a name that was asked for
    start.safetensors                  what a compensating adapter was trained from
    README.md                          the card
    score.json                         if the run was scored
    images/0000.png, ...               pictures that `loragraft generate` drew with this adapter, with their prompts
    images/samples.png                 the last validation samples
    loragraft.json                     the entry

The folder is a function of the run: twice the same run gives twice the same bytes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter, load_adapter, rename_adapter
from loragraft.adapters.formats.contract import COMPENSATING, START_NAME, check_start, contract_of
from loragraft.evaluation.image_sets import adapter_hash
from loragraft.zoo.card import Picture, adapter_card
from loragraft.zoo.entry import (
    ENTRY,
    VERSION,
    BaseRef,
    Entry,
    FileRecord,
    Licence,
    ZooError,
    check,
    entry_from_dict,
    sha256_file,
)
from loragraft.zoo.licences import licence_for, repository_of
from loragraft.zoo.scores import scores_of

WEIGHTS, CARD, SCORE, IMAGES = "pytorch_lora_weights.safetensors", "README.md", "score.json", "images"
SAMPLES = f"{IMAGES}/samples.png"
GALLERY = 12
"""Pictures at most."""
FIRST_VERSION = "1.0.0"


def collect(
    run: Path,
    folder: Path,
    *,
    name: str | None = None,
    version: str = FIRST_VERSION,
    licence: str | None = None,
    pictures: Path | None = None,
) -> Entry:
    """Writes what is published of `run` into the empty `folder`; returns its entry.

    `name`: what it is called there, if not as its recipe. `pictures`: a folder that `loragraft generate` drew into; default
    `run`/images, where there is one. Raises ZooError for a run that is not finished, a score of another adapter, a name or version that a zoo cannot have, and as `licence_for` does.
    """
    source = run / "adapter" / WEIGHTS
    if not source.exists():
        near = f", {run.parent}" if (run.absolute().parent / "adapter" / WEIGHTS).exists() else ""
        raise ZooError(f"{run} holds no finished adapter: give the folder that training wrote{near}, after it ended")
    if VERSION.fullmatch(version) is None:
        raise ZooError(f"--version {version}: a version is MAJOR.MINOR.PATCH, such as {FIRST_VERSION}")
    adapter = load_adapter(source)
    if name is None:
        name = adapter.name
        shutil.copyfile(source, folder / WEIGHTS)
    else:
        rename_adapter(source, folder / WEIGHTS, name)
    if contract_of(adapter.metadata) == COMPENSATING:
        _copy_start(source.with_name(START_NAME), adapter, folder)
    score = _score(run, adapter)
    if score is not None:
        shutil.copyfile(run / SCORE, folder / SCORE)
    gallery = _gallery(pictures or run / IMAGES, adapter, folder, asked=pictures is not None)
    sheets = sorted((run / "samples").glob("*.png"))
    if sheets:
        (folder / IMAGES).mkdir(exist_ok=True)
        shutil.copyfile(sheets[-1], folder / SAMPLES)
    entry = _entry(adapter, name, version, licence_for(adapter.metadata["base"], licence), score)
    (folder / CARD).write_text(
        adapter_card(entry, adapter.metadata, gallery, SAMPLES if sheets else None), encoding="utf-8"
    )
    entry = entry_with_files(entry, folder)
    (folder / ENTRY).write_bytes(entry.to_bytes())
    return entry


def _copy_start(start: Path, adapter: Adapter, folder: Path) -> None:
    """Raises ZooError where it is gone, ValueError where it is another adapter's."""
    if not start.is_file():
        raise ZooError(
            f"{start} is gone: without it nobody could make the compensating adapter {adapter.name!r} portable; put it back"
        )
    check_start(adapter.metadata, start)
    shutil.copyfile(start, folder / START_NAME)


def entry_with_files(entry: Entry, folder: Path) -> Entry:
    """`entry` with a record of every file of `folder`, checked by its schema. Raises ZooError naming what a zoo cannot have."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_file(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / ENTRY
    }
    entry = replace(entry, files=files)
    plain = json.loads(entry.to_bytes())
    check(plain, ENTRY, f"{entry.name} {entry.version} cannot be published")
    return entry_from_dict(plain)


def _score(run: Path, adapter: Adapter) -> dict[str, Any] | None:
    file = run / SCORE
    if not file.exists():
        return None
    score: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if score.get("adapter_hash") != adapter_hash(adapter):
        raise ZooError(f"{file} was measured on another adapter than {run / 'adapter'}: loragraft score {run}")
    if score.get("same_data") is False:
        raise ZooError(
            f"{file} was measured on data that has changed since training, so held-out images may have been trained on: put back "
            f"what was there and loragraft score {run} again, or delete the score"
        )
    return score


def _gallery(source: Path, adapter: Adapter, folder: Path, *, asked: bool) -> list[Picture]:
    """Copies the pictures of `source` that were drawn with this adapter alone. Raises ZooError if none is and some were `asked` for."""
    found: list[Picture] = []
    for path in sorted(source.glob("*.png")) if source.is_dir() else []:
        with Image.open(path) as image:
            settings = json.loads(image.info.get("loragraft", "{}"))
        if [part["name"] for part in settings.get("adapters", [])] != [adapter.name]:
            continue
        if settings.get("base_id") != adapter.base_id or len(found) == GALLERY:
            continue
        (folder / IMAGES).mkdir(exist_ok=True)
        name = f"{IMAGES}/{len(found):04d}.png"
        shutil.copyfile(path, folder / name)
        found.append(Picture(file=name, prompt=settings["prompt"], settings=settings))
    if asked and not found:
        raise ZooError(
            f"{source} holds no picture that `loragraft generate` drew with {adapter.name!r} alone on base {adapter.base_id[:12]}"
        )
    return found


def _entry(adapter: Adapter, name: str, version: str, licence: Licence, score: Mapping[str, Any] | None) -> Entry:
    """All but the files."""
    about = adapter.metadata
    data = about.get("recipe", {}).get("data", {})
    return Entry(
        name=name,
        version=version,
        created=str(about.get("created", "")),
        base=BaseRef(
            name=about["base"],
            id=adapter.base_id,
            profile=about.get("profile", ""),
            repository=repository_of(about["base"]),
        ),
        rank=adapter.rank,
        parameters=parameters(adapter.pairs.values()),
        contract=contract_of(about),
        recipe_hash=str(about.get("recipe_hash", "")),
        data_fingerprint=str(about.get("data_fingerprint", "")),
        domain=data.get("domain") or "",
        trigger=data.get("trigger") or "",
        licence=licence,
        scores=scores_of(score) if score is not None else (),
        files={},
        versions={str(key): str(value) for key, value in about.get("versions", {}).items()},
    )


def parameters(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Numbers in all factors."""
    return sum(down.numel() + up.numel() for down, up in pairs)
