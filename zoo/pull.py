"""Fetch an adapter out of a zoo into a folder that appears whole and checked, or not at all."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from loragraft.disk import SCRATCH, replacing_folder
from loragraft.zoo.entry import (
    ENTRY,
    SIGNATURE,
    Entry,
    FileRecord,
    Listed,
    NotAsPublishedError,
    ZooError,
    entry_from_bytes,
    sha256_file,
)
from loragraft.zoo.file_place import FilePlace, open_files
from loragraft.zoo.places import Place, choose

Say = Callable[[str], None]


def pull(place: Place, wanted: str, out: Path, *, key: Path | None = None, say: Say = print) -> Path:
    """`out`/NAME with the files of `wanted` (NAME or NAME@VERSION); returns it. What is there already is checked, not fetched.

    key: a public key that must have signed it. Raises ZooError for an unknown name, for anything that is not as its entry says,
    and if `out`/NAME holds something else.
    """
    item = choose(place, wanted)
    entry, target = item.entry, out / item.entry.name
    for word, text in item.status.to_dict().items():
        say(f"note: {entry.name} {entry.version} is {word}: {text}")
    if target.exists():
        if (target / ENTRY).is_file() and sha256_file(target / ENTRY) == item.entry_sha256:
            check_files(target, item)
            _check_signature(target, item, key)
            return target
        raise ZooError(f"{target} holds {_holds(target, entry)}: move it away, or give another folder with --out")
    with replacing_folder(target, overwrite=False) as scratch:
        place.fetch(item, scratch)
        check_files(scratch, item, f"{entry.name} {entry.version} of {place.url}: ")
        _check_signature(scratch, item, key)
    return target


def _holds(folder: Path, wanted: Entry) -> str:
    """What is in the way, in words."""
    if not (folder / ENTRY).is_file():
        return "something that is no pulled adapter"
    there = entry_from_bytes((folder / ENTRY).read_bytes(), str(folder / ENTRY))
    if (there.name, there.version) != (wanted.name, wanted.version):
        return f"{there.name} {there.version}, not {wanted.version}"
    return f"another {there.name} {there.version}, or a changed one"


def _check_signature(folder: Path, item: Listed, key: Path | None) -> None:
    if key is None:
        return
    if not item.signed:
        raise ZooError(f"{item.entry.name} {item.entry.version} is not signed, and --key asks for a signature")
    from loragraft.zoo.signing import verify_signature

    verify_signature(folder, key)


def check_files(folder: Path, item: Listed, fetched: str = "") -> None:
    """Raises NotAsPublishedError unless `folder` holds exactly the files of `item`, byte for byte.

    fetched: what the message says in the folder's place, where that is a scratch copy of something.
    """
    shown = fetched or f"{folder}/"
    if sha256_file(folder / ENTRY) != item.entry_sha256:
        raise NotAsPublishedError(f"{shown}{ENTRY} is not the entry that the index names: somebody changed one of them")
    entry = entry_from_bytes((folder / ENTRY).read_bytes(), f"{shown}{ENTRY}")
    if entry != item.entry:
        raise NotAsPublishedError(
            f"{shown}{ENTRY} says something else than the index about {entry.name} {entry.version}"
        )
    check_records(folder, entry.files, shown)


def check_records(folder: Path, files: Mapping[str, FileRecord], shown: str = "") -> None:
    """Raises NotAsPublishedError naming the first file of `folder` that is missing, changed, or not among `files`.

    shown: what the message says before the file's name; default the folder.
    """
    shown = shown or f"{folder}/"
    for name, record in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise NotAsPublishedError(f"{shown}{name} is missing")
        if path.stat().st_size != record.size:
            raise NotAsPublishedError(f"{shown}{name} has {path.stat().st_size} bytes, its entry says {record.size}")
        found = sha256_file(path)
        if found != record.sha256:
            raise NotAsPublishedError(f"{shown}{name} has sha256 {found}, its entry says {record.sha256}")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(present - set(files) - {ENTRY, SIGNATURE})
    if foreign:
        raise NotAsPublishedError(f"{shown}{foreign[0]} is not in the entry: nobody published it")


def mirror(place: Place, folder: Path, *, key: Path | None = None, say: Say = print) -> FilePlace:
    """A copy of the whole zoo as a folder, to be used without a network; returns it. Whatever is there already is not fetched again.

    Yanked versions are copied with their flag. Raises as `pull` does; versions that came before stay.
    """
    copy, items = open_files(str(folder)), place.listed()
    folder.mkdir(parents=True, exist_ok=True)
    present = {(i.entry.name, i.entry.version): i for i in (copy.listed() if (folder / "index.json").exists() else [])}
    for item in items:
        entry = item.entry
        known = present.get((entry.name, entry.version))
        if known is None or known.entry_sha256 != item.entry_sha256:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-", suffix=SCRATCH) as temporary:
                scratch = Path(temporary)
                place.fetch(item, scratch)
                check_files(scratch, item, f"{entry.name} {entry.version} of {place.url}: ")
                _check_signature(scratch, item, key)
                copy.publish(entry, scratch)
            say(f"fetched {entry.name} {entry.version}")
        if known is None or known.status != item.status:
            copy.set_status(entry.name, entry.version, item.status)
    copy.write_index()
    return copy
