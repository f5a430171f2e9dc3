"""Files and folders that appear whole or not at all, and a full disk told in one sentence. Below every other module.

Whatever is written goes to a hidden scratch name beside its target, `.<name>.<token>.writing`, is flushed to the disk and
renamed. `kill -9` leaves a scratch name at most, which nobody reads and `sweep` removes.
"""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".writing"
SWEPT = (f".*{SCRATCH}", ".tmp??????")
"""Scratch names: ours, and those of the safetensors library, which writes beside its target as well."""
FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
}
"""errno -> what it means to a user."""


class DiskFullError(OSError):
    """No room for a file; the message names it, what it takes, what is left and how to go on."""


def full_disk_reason(error: BaseException) -> str | None:
    """What `error` says about a full disk; None if it is about something else.

    Rust libraries (safetensors) give the number in their text only: "No space left on device (os error 28)".
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    found = re.search(r"os error (\d+)", str(error))
    return FULL.get(int(found[1])) if found else None


@contextmanager
def naming_full_disk(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns a "no space" error of the block into a DiskFullError about `path`, which takes `needed` bytes (0: unknown)."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        reason = full_disk_reason(error)
        if reason is None:
            raise
        existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
        left = shutil.disk_usage(existing).free
        takes = f"it takes {readable_bytes(needed)} and " if needed else ""
        raise DiskFullError(
            f"{path} is not written: {reason} ({takes}{readable_bytes(left)} are left). What was there before is whole. "
            "Make room, or choose another place (--out for a run, LORAGRAFT_CACHE for caches), and give the same command "
            "again: it goes on where it was"
        ) from error


@contextmanager
def replacing_file(path: Path, needed: int = 0) -> Iterator[Path]:
    """A scratch name beside `path` for the block to write; flushed and renamed if the block ends well, removed if not.

    Raises DiskFullError where there is no room, `needed` being the file's size in bytes for that message, and OSError naming `path`.
    """
    scratch = scratch_name(path)
    with naming_full_disk(path, needed):
        try:
            yield scratch
            flush(scratch)
            os.replace(scratch, path)
            flush(path.parent)
        except OSError as error:
            if error.filename == str(scratch):
                error.filename = str(path)  # the name that the user gave, not one that is gone
            raise
        finally:
            scratch.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """`content` under the name `path`: the old file or the new one, never half of it. Raises DiskFullError."""
    with replacing_file(path, len(content)) as scratch:
        scratch.write_bytes(content)


@contextmanager
def replacing_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well, and vanishes when it does not.

    Raises FileExistsError if `folder` exists and `overwrite` is false, DiskFullError where there is no room.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_name(folder)
    with naming_full_disk(folder):
        try:
            scratch.mkdir()
            yield scratch
            for path in scratch.rglob("*"):
                flush(path)
            if folder.exists():  # a folder cannot be renamed onto a full one: move the old one aside first
                old = scratch_name(folder)
                os.replace(folder, old)
                os.replace(scratch, folder)
                shutil.rmtree(old)
            else:
                os.replace(scratch, folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def sweep(folder: Path, older_than_hours: float) -> None:
    """Removes scratch names in `folder` that have not changed for so long: what a killed process left."""
    for path in (p for pattern in SWEPT for p in folder.glob(pattern)):
        try:
            if time.time() - path.stat().st_mtime < 3600 * older_than_hours:
                continue
        except FileNotFoundError:  # its process renamed it just now
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def scratch_name(path: Path) -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{SCRATCH}")


def flush(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
