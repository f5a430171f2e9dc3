"""Published prompt sets: MJHQ-30K, sDCI and COCO captions, read from their own files, with SVDQuant's subset and seeds.

    mjhq    FOLDER/meta_data.json {name: {category, prompt}},   images FOLDER[/mjhq30k_imgs]/<category>/<name>.jpg
    sdci    FOLDER/sDCI.yaml {name: caption},                   images FOLDER[/sDCI]/<name>.jpg
    coco    FOLDER/dataset_coco.json (Karpathy's split), captions_*.json (2014 or 2017), or coco_30k.csv;
            images FOLDER[/train2014 ...]/COCO_val2014_<12 digits>.jpg or <12 digits>.jpg

Nothing is fetched: images are found where they lie, or not at all, and prompts need none. SVDQuant evaluates the first 5,000
names (1,024 in its quick runs) of `random.Random(0).shuffle`, sorted, each drawn from the seed

    h = 0;  for c in name:  h = (31 h + ord c) mod (10^9 + 7)

with torch's CPU generator. Its FID compares with the set's own images of the same names. Licences: MJHQ Playground's community
licence, sDCI CC-BY-NC-4.0, COCO's captions CC-BY-4.0 (its photographs: Flickr's terms). There is no COCO of 2024.
Source: Li et al., "SVDQuant" (2025), and deepcompressor's `app/diffusion`.
"""

import csv
import difflib
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loragraft.data.errors import DataError, in_utf8
from loragraft.data.splits import SPLITS, split_concepts
from loragraft.disk import write_atomic

SVDQUANT_COUNT = 5000
VALIDATION_SHARE = 0.02
"""Of the entries to train on."""
_COCO_FOLDERS = ("", "train2014", "val2014", "test2014", "train2017", "val2017", "images")


@dataclass(frozen=True, slots=True)
class Entry:
    """One published prompt."""

    name: str
    prompt: str
    image: Path | None
    """The set's own image, where it is on this machine."""
    category: str = ""
    split: str = ""
    """The set's own split, where it has one (COCO)."""

    @property
    def seed(self) -> int:
        """SVDQuant's seed of this name."""
        return seed_of(self.name)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A published set on this machine."""

    title: str
    licence: str
    entries: tuple[Entry, ...]
    """In the order of its file, which the subset depends on."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Steps and guidance of a base in SVDQuant's evaluation."""

    steps: int
    guidance: float | None
    """None = the pipeline's default, which for schnell and SDXL-Turbo is none at all."""


SVDQUANT_SAMPLING: Mapping[str, Sampling] = {
    "flux1-dev": Sampling(50, 3.5),
    "flux1-schnell": Sampling(4, None),
    "pixart-sigma": Sampling(20, 4.5),
    "sana-16b": Sampling(20, 4.5),
    "sdxl": Sampling(30, None),
    "sdxl-turbo": Sampling(4, None),
}
"""By the name of the base; 1024 pixels (SDXL-Turbo 512)."""


def seed_of(name: str) -> int:
    """SVDQuant's seed for a file name without suffix."""
    value = 0
    for character in name:
        value = (value * 31 + ord(character)) % (10**9 + 7)
    return value


def svdquant_subset(entries: Sequence[Entry], count: int = SVDQUANT_COUNT) -> list[Entry]:
    """The entries that SVDQuant evaluates, sorted by name. Raises DataError where there are fewer than `count`.

    `entries` in the order of the set's file: the shuffle is of positions.
    """
    if not 0 < count <= len(entries):
        raise DataError(
            f"{count} prompts were asked for, and the set has {len(entries)}: ask for 1 to {len(entries)} with --count (SVDQuant's "
            f"figures are of {SVDQUANT_COUNT}, and scores at different N do not compare)"
        )
    names = [entry.name for entry in entries]
    random.Random(0).shuffle(names)
    by_name = {entry.name: entry for entry in entries}
    return [by_name[name] for name in sorted(names[:count])]


def read_prompt_set(which: str, folder: Path) -> PromptSet:
    """`mjhq`, `sdci` or `coco` below `folder`. Raises DataError naming the file at fault, and the nearest name."""
    if which not in READERS:
        near = difflib.get_close_matches(which.lower(), READERS, n=1)
        raise DataError(
            f"there is no prompt set {which!r}; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(READERS)}")
        )
    found = READERS[which](folder)
    names = [entry.name for entry in found.entries]
    if len(set(names)) != len(names):
        raise DataError(f"{folder}: {len(names) - len(set(names))} names of {found.title} come twice")
    empty = [entry.name for entry in found.entries if not entry.prompt.strip()]
    if empty or not names:
        raise DataError(
            f"{folder}: {found.title} has {len(empty)} empty prompts of {len(names)}: {', '.join(empty[:3])}"
        )
    return found


def split_for_training(entries: Sequence[Entry], evaluation: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """(entries to train on, entries left out): nothing with a name, an image or a prompt of the evaluation subset.

    Prompts are compared without case and spacing. Raises DataError where nothing is left.
    """
    names, prompts = {e.name for e in evaluation}, {_plain(e.prompt) for e in evaluation}
    images = {e.image for e in evaluation if e.image}
    kept: list[Entry] = []
    left: list[Entry] = []
    for entry in entries:
        if entry.name in names:
            continue
        (left if _plain(entry.prompt) in prompts or entry.image in images else kept).append(entry)
    if not kept:
        raise DataError(
            f"all {len(entries)} prompts are evaluated on or say the same as one that is: none is left to train on"
        )
    return kept, left


def write_folder(found: PromptSet, evaluation: Sequence[Entry], folder: Path) -> dict[str, int]:
    """A folder for `data.folder`: links to the images and metadata.jsonl, the evaluation subset as the test split.

    Training then looks for the same picture in both splits (`overlap.py`), and refuses. Entries that repeat an evaluated
    prompt are in neither split. Returns how many are in each. Raises DataError where an image is missing or `folder` exists.
    """
    if folder.exists():
        raise DataError(f"{folder} exists; give a new folder")
    kept, left = split_for_training(found.entries, evaluation)
    drawn = split_concepts([entry.name for entry in kept], 0, VALIDATION_SHARE, 0)
    rows = [*((entry, "test") for entry in evaluation), *((entry, drawn[entry.name]) for entry in kept)]
    missing = [entry.name for entry, _ in rows if entry.image is None]
    if missing:
        raise DataError(
            f"{len(missing)} images of {found.title} are not on this machine: {', '.join(missing[:3])}, ..."
        )
    folder.mkdir(parents=True)
    lines = []
    for entry, split in rows:
        assert entry.image is not None
        link = folder / f"{entry.name}{entry.image.suffix}"
        link.symlink_to(entry.image.resolve())
        row = {
            "file_name": link.name,
            "text": entry.prompt,
            "split": split,
            "concept": entry.name,
            "licence": found.licence,
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomic(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    splits = [split for _, split in rows]
    return {split: splits.count(split) for split in SPLITS} | {"left out": len(left)}


def show(which: str, folder: Path, count: int | None, training_folder: str | None) -> int:
    """`loragraft prompts SET --from DIR`: the subset as JSON lines, or a folder to train on. Raises DataError."""
    found = read_prompt_set(which, folder)
    chosen = svdquant_subset(found.entries, SVDQUANT_COUNT if count is None else count)
    if training_folder:
        counts = write_folder(found, chosen, Path(training_folder))
        print(f"{training_folder}: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
        return 0
    for entry in chosen:
        about = {"name": entry.name, "prompt": entry.prompt, "seed": entry.seed, "category": entry.category}
        about |= {"split": entry.split, "image": str(entry.image) if entry.image else None}
        print(json.dumps(about, ensure_ascii=False))
    print(f"{len(chosen)} of {len(found.entries)} prompts of {found.title} ({found.licence})", file=sys.stderr)
    said = (f"{base} {s.steps} steps, guidance {s.guidance or 'its own'}" for base, s in SVDQUANT_SAMPLING.items())
    print(f"SVDQuant's settings: {'; '.join(said)}", file=sys.stderr)
    return 0


def _mjhq(folder: Path) -> PromptSet:
    path = folder / "meta_data.json"
    table = _json(path)
    if not isinstance(table, dict):
        raise DataError(f"{path} is no table of names, each with category and prompt")
    entries = []
    for name, about in table.items():
        if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in ("category", "prompt")):
            raise DataError(f"{path}: {name!r} has no category and prompt")
        file = Path(about["category"]) / f"{name}.jpg"
        entries.append(Entry(name, about["prompt"], _first(folder, ("mjhq30k_imgs", ""), file), about["category"]))
    return PromptSet("MJHQ-30K", "Playground v2.5 Community License", tuple(entries))


def _sdci(folder: Path) -> PromptSet:
    path = folder / "sDCI.yaml"
    try:
        table = yaml.load(_text(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise DataError(f"{path} must give one caption per name")
    entries = (Entry(str(n), text, _first(folder, ("sDCI", ""), Path(f"{n}.jpg"))) for n, text in table.items())
    return PromptSet("sDCI", "CC-BY-NC-4.0", tuple(entries))


def _coco(folder: Path) -> PromptSet:
    karpathy, table = folder / "dataset_coco.json", folder / "coco_30k.csv"
    official = sorted(folder.glob("captions_*.json"))
    images = {path.name: path for place in _COCO_FOLDERS for path in (folder / place).glob("*.jpg")}
    if karpathy.is_file():
        entries = _karpathy(karpathy, images)
    elif official:
        entries = [entry for path in official for entry in _coco_captions(path, images)]
    elif table.is_file():
        with in_utf8(table), table.open(encoding="utf-8", newline="") as lines:
            entries = _coco_table(csv.DictReader(lines), table, images)
    else:
        raise DataError(f"{folder} has none of dataset_coco.json, captions_*.json and coco_30k.csv")
    return PromptSet("COCO captions", "CC-BY-4.0", tuple(entries))


def _karpathy(path: Path, images: Mapping[str, Path]) -> list[Entry]:
    """Each image with its first sentence and Karpathy's split."""
    content = _json(path)
    try:
        return [
            Entry(
                Path(image["filename"]).stem,
                image["sentences"][0]["raw"].strip(),
                images.get(image["filename"]),
                split=image["split"],
            )
            for image in content["images"]
        ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not Karpathy's split: {error!r}") from error


def _coco_captions(path: Path, images: Mapping[str, Path]) -> list[Entry]:
    """Each image with its caption of the lowest id, by image id."""
    content = _json(path)
    try:
        first: dict[int, tuple[int, str]] = {}
        for note in content["annotations"]:
            image = note["image_id"]
            first[image] = min(first.get(image, (note["id"], note["caption"])), (note["id"], note["caption"]))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        split = path.stem.removeprefix("captions_")
        return [
            Entry(Path(files[i]).stem, first[i][1].strip(), images.get(files[i]), split=split) for i in sorted(first)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a COCO caption file: {error!r}") from error


def _coco_table(rows: "csv.DictReader[str]", path: Path, images: Mapping[str, Path]) -> list[Entry]:
    lacking = {"image_id", "prompt"} - set(rows.fieldnames or ())
    if lacking:
        raise DataError(
            f"{path} has no column {' and '.join(sorted(lacking))}; found {', '.join(rows.fieldnames or ())}"
        )
    entries = []
    for row in rows:
        if not row["image_id"] or row["prompt"] is None:
            raise DataError(f"{path}:{rows.line_num} has no image_id and prompt")
        entries.append(_coco_entry(row["image_id"], row["prompt"], images))
    return entries


def _coco_entry(image: str, prompt: str, images: Mapping[str, Path]) -> Entry:
    names = (f"COCO_val2014_{image}.jpg", f"COCO_train2014_{image}.jpg", f"{image}.jpg")
    return Entry(image, prompt.strip(), next((images[name] for name in names if name in images), None))


def _first(folder: Path, places: Sequence[str], file: Path) -> Path | None:
    return next((path for place in places if (path := folder / place / file).is_file()), None)


def _text(path: Path) -> str:
    try:
        with in_utf8(path):
            return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: it holds the set's prompts") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _plain(prompt: str) -> str:
    return " ".join(prompt.lower().split())


READERS: Mapping[str, Callable[[Path], PromptSet]] = {"mjhq": _mjhq, "sdci": _sdci, "coco": _coco}
