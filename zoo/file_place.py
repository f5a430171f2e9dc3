"""A zoo of files: a folder on this machine, or whatever fsspec opens (S3, GCS, SFTP, WebDAV, memory, HTTP to read).

    PLACE/index.json                          what readers read; written last, in one piece
    PLACE/NAME/status.json                    yanked, deprecated
    PLACE/NAME/VERSION/loragraft.json         the entry: written after all files that it names
    PLACE/NAME/VERSION/...                    the files; a version's never change

What a killed publisher leaves is a VERSION without an entry, which no index names and which the next attempt replaces, or
a complete one that the index does not name yet: the next attempt writes the index, and sends what has been lost or damaged since. Two who publish different adapters under one
name and version at the same moment may mix their files; whoever fetches the mixture is told by its sums.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from loragraft.disk import replacing_file, sweep, write_atomic
from loragraft.zoo.entry import (
    ENTRY,
    INDEX,
    SIGNATURE,
    SIZE_LIMIT,
    STATUS,
    Entry,
    FileRecord,
    Listed,
    NotAsPublishedError,
    Status,
    ZooError,
    another,
    entry_from_bytes,
    index_from_bytes,
    index_to_bytes,
    statuses_from_bytes,
    statuses_to_bytes,
)
from loragraft.zoo.places import VARIABLE

AGAIN = "whoever published it gives the same `loragraft publish` once more, which sends what is lost"
CHUNK = 1 << 20
NOT_FOUND = 404
"""HTTP's word for a file that is not there."""
ATTEMPTS = 10
"""How often an index is written anew because another publisher added to the place meanwhile."""


@dataclass(frozen=True)
class FilePlace:
    """A zoo in `root` of `fs`. `put` copies a file to a name, and `write` bytes, each whole or not at all."""

    url: str
    fs: Any
    root: str
    put: Callable[[Path, str], None]
    write: Callable[[bytes, str], None]

    def names(self) -> list[str]:
        return sorted({item.entry.name for item in self.listed()})

    def listed(self) -> list[Listed]:
        path = f"{self.root}/{INDEX}"
        try:
            with self._telling():
                content = self._read(path, INDEX)
        except (FileNotFoundError, NotADirectoryError):
            if self.fs.exists(self.root):
                raise ZooError(
                    f"{self.url} has no {INDEX}, so it is no zoo: name one with --zoo or ${VARIABLE}. `loragraft publish RUN --to "
                    "PLACE` makes one, `loragraft zoo index PLACE` mends one whose index is lost"
                ) from None
            raise ZooError(
                f"{self.url} is no folder: name a zoo with --zoo or ${VARIABLE}, a folder that `loragraft publish --to` wrote, a "
                "URL, or hf://OWNER"
            ) from None
        return index_from_bytes(content, path)

    def versions(self, name: str) -> list[Listed]:
        return [item for item in self.listed() if item.entry.name == name]

    def fetch(self, item: Listed, folder: Path) -> None:
        entry = item.entry
        with tqdm(total=entry.size, unit="B", unit_scale=True, desc=f"{entry.name} {entry.version}") as bar:
            for name in item.files:
                with self._telling():
                    self._copy(f"{self._folder(entry)}/{name}", name, entry, folder / name, bar)

    def _copy(self, source: str, name: str, entry: Entry, target: Path, bar: "tqdm[Any]") -> None:
        """No more bytes than promised reach the disk."""
        record = entry.files.get(name)
        limit = record.size if record is not None else SIZE_LIMIT[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.fs.open(source, "rb") as remote, target.open("wb") as local:
                while chunk := remote.read(min(CHUNK, limit + 1 - local.tell())):
                    local.write(chunk)
                    bar.update(len(chunk) if record is not None else 0)
                got = local.tell()
        except FileNotFoundError:
            raise NotAsPublishedError(f"{source} is not there, though {INDEX} promises it: {AGAIN}") from None
        if got > limit or (record is not None and got != limit):
            said = f"{limit} bytes" if record is not None else f"at most {limit} bytes"
            raise NotAsPublishedError(
                f"{source} has {'more than ' if got > limit else 'only '}{min(got, limit)} bytes, not {said}: {AGAIN}"
            )

    def publish(self, entry: Entry, folder: Path) -> bool:
        target = self._folder(entry)
        if self.fs.exists(f"{target}/{ENTRY}"):
            present = entry_from_bytes(self._read(f"{target}/{ENTRY}", ENTRY), f"{target}/{ENTRY}")
            if present != entry:
                entries = self.fs.glob(f"{self.root}/{entry.name}/*/{ENTRY}")
                raise another(self.url, entry, [path.split("/")[-2] for path in entries])
            lost = [name for name in entry.files if not self._is_whole(f"{target}/{name}", entry.files[name])]
            for name in lost:
                self.put(folder / name, f"{target}/{name}")
            self.write_index()
            return bool(lost)
        if self.fs.exists(target):  # a killed publisher's
            self.fs.rm(target, recursive=True)
        signature = [SIGNATURE] if (folder / SIGNATURE).exists() else []
        with tqdm(total=entry.size, unit="B", unit_scale=True, desc=f"publishing {entry.name}") as bar:
            for name in (*sorted(entry.files), *signature):
                self.put(folder / name, f"{target}/{name}")
                bar.update(entry.files[name].size if name in entry.files else 0)
        self.write(entry.to_bytes(), f"{target}/{ENTRY}")
        self.write_index()
        return True

    def set_status(self, name: str, version: str, status: Status) -> None:
        self.write(statuses_to_bytes({**self._statuses(name), version: status}), f"{self.root}/{name}/{STATUS}")
        self.write_index()

    def write_index(self) -> None:
        """From what lies there, until it agrees with it: another publisher may add to the place meanwhile.

        Raises ZooError for an entry that is damaged, or if the place does not come to rest.
        """
        content = index_to_bytes(self._scan())
        for _ in range(ATTEMPTS):
            if not self.fs.exists(f"{self.root}/{INDEX}") or self._read(f"{self.root}/{INDEX}", INDEX) != content:
                self.write(content, f"{self.root}/{INDEX}")
            again = index_to_bytes(self._scan())
            if again == content:
                return
            content = again
        raise ZooError(f"{self.url} is being changed all the time: give the same command again")

    def _scan(self) -> list[Listed]:
        self.fs.invalidate_cache()
        found = []
        for path in sorted(self.fs.glob(f"{self.root}/*/*/{ENTRY}")):
            folder = path.rpartition("/")[0]
            name, version = folder.split("/")[-2:]
            signed = self.fs.exists(f"{folder}/{SIGNATURE}")
            item = Listed.read(self._read(path, ENTRY), path, signed=signed, statuses=self._statuses(name))
            if (name, version) != (item.entry.name, item.entry.version):
                raise ZooError(
                    f"{path} says that it is {item.entry.name} {item.entry.version}: move it to where it belongs"
                )
            found.append(item)
        return found

    def _statuses(self, name: str) -> dict[str, Status]:
        path = f"{self.root}/{name}/{STATUS}"
        return statuses_from_bytes(self._read(path, STATUS), path) if self.fs.exists(path) else {}

    def _is_whole(self, path: str, record: FileRecord) -> bool:
        """Whether the file is there, byte for byte as published."""
        if not self.fs.exists(path) or self.fs.size(path) != record.size:
            return False
        with self.fs.open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == record.sha256

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns a URL that cannot be read into one sentence. Over HTTP a file that is not there and a host that is not are both a
        FileNotFoundError; what it was raised from tells them apart."""
        try:
            yield
        except OSError as error:
            cause: BaseException | None = error
            while isinstance(cause, FileNotFoundError):
                cause = cause.__cause__
            if cause is None or getattr(cause, "status", None) == NOT_FOUND or isinstance(self.fs, LocalFileSystem):
                raise
            raise ZooError(
                f"{self.url} cannot be read ({str(cause) or type(cause).__name__}): look at the address and at your connection, and "
                "give the same command again"
            ) from error

    def _folder(self, entry: Entry) -> str:
        return f"{self.root}/{entry.name}/{entry.version}"

    def _read(self, path: str, kind: str) -> bytes:
        with self.fs.open(path, "rb") as file:
            content: bytes = file.read(SIZE_LIMIT[kind] + 1)
        return content


def open_files(text: str) -> FilePlace:
    """A folder by its path, anything else by its URL. Raises ZooError where fsspec lacks the package for a protocol."""
    if "://" not in text:
        folder = Path(text).expanduser()
        return FilePlace(text, LocalFileSystem(), str(folder.absolute()), _put_local, _write_local)
    try:
        fs, root = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise ZooError(f"{text} cannot be opened: {error}") from error
    if isinstance(fs, LocalFileSystem):
        return FilePlace(text, fs, root, _put_local, _write_local)
    if "http" in fs.protocol:

        def refuse(_: Path | bytes, __: str) -> None:
            raise ZooError(
                f"{text} can only be read: publish to a folder, s3://bucket/zoo or hf://OWNER, and serve that"
            )

        return FilePlace(text, fs, root.rstrip("/"), refuse, refuse)

    def put(source: Path, target: str) -> None:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(source), target)

    def write(content: bytes, target: str) -> None:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(target, content)  # one object, in one request: object stores replace it whole

    return FilePlace(text, fs, root.rstrip("/"), put, write)


def _put_local(source: Path, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(Path(target), source.stat().st_size) as scratch:
        shutil.copyfile(source, scratch)


def _write_local(content: bytes, target: str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(target), content)
    sweep(Path(target).parent, older_than_hours=24)  # scratch names of killed publishers
