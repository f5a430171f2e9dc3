"""Who encodes what: several processes, or several runs, on one store, each sample once.

A process claims keys in a hidden file `.<token>.claim` of the store, which lists them and which it keeps locked (flock)
for as long as it encodes them. The kernel drops the lock when the process ends, `kill -9` included, so a claim whose lock
can be had is a dead one and is removed; nothing has to expire. Looking and claiming happen under the lock of a
file `lock`, which stays, empty, and is held for milliseconds.
"""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


class Claim:
    """Keys that this process encodes. Made under `exclusively`, ended by `release`."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self._path = folder / f".{secrets.token_hex(8)}.claim"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        os.write(self._descriptor, json.dumps(self.keys).encode())

    def release(self) -> None:
        """Lets those who wait go on."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Nobody else looks or claims in `folder` while the block runs; waits for whoever does."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what is open for writing
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def claimed(folder: Path) -> dict[Path, set[str]]:
    """Claims of living processes and their keys; dead ones are removed. To be called under `exclusively`."""
    living = {}
    for path in sorted(folder.glob(".*.claim")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # it may be released just now
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                living[path] = set(json.loads(file.read()))
            else:
                path.unlink()
    return living


def wait_for(claim: Path) -> None:
    """Returns once the claim is released or its process has ended."""
    with contextlib.suppress(FileNotFoundError), claim.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
