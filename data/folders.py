"""Folders of the cache that are either complete or not there."""

import shutil
from collections.abc import Callable
from pathlib import Path

from loragraft.disk import naming_full_disk, scratch_name, sweep


def build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, filled by `fill` if it is not there yet. Raises DiskFullError.

    It is filled under a temporary name beside it and renamed at the end, so a folder of the final name is complete, and
    whatever happens before leaves nothing of that name; what a killed process left is swept up a day later.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, older_than_hours=24)
    scratch = scratch_name(folder)
    with naming_full_disk(folder):
        try:
            scratch.mkdir()
            fill(scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
