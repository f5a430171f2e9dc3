"""A safetensors file that is written piece by piece in any order and survives a killed process.

All shapes are known beforehand, so the header and every offset are fixed when the file is created. A journal beside it
holds one line of JSON per finished piece, appended after the piece's bytes are on the disk:

    <folder>/<weights>       header, then the tensors at their places
    <folder>/journal.jsonl   {"key": ...}, then {"piece": name, "result": {...}} per piece

A process that finds both goes on where the journal ends; a last line that was cut off counts as not written. The file's bytes
depend only on its tensors, not on how often it was interrupted. Layout as the safetensors library's own: by falling
alignment, then by name.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loragraft.disk import flush, naming_full_disk
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import DTYPES, TensorInfo

JOURNAL = "journal.jsonl"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(the file's first bytes, name -> (start, count) of each tensor's bytes in the file)."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans, end = {}, 0
    for name in ordered:
        info = tensors[name]
        count = info.dtype.itemsize * torch.Size(info.shape).numel()
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + count],
        }
        spans[name] = end, count
        end += count
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned
    head = len(text).to_bytes(8, "little") + text
    return head, {name: (len(head) + start, count) for name, (start, count) in spans.items()}


class PartialFile:
    """The file under construction; a context manager that closes it and keeps what is there."""

    def __init__(self, folder: Path, name: str, tensors: Mapping[str, TensorInfo], key: str) -> None:
        """Creates the file in `folder` or opens what an interrupted process left there.

        `key` stands for everything that decides the bytes. Raises CheckpointError where the folder holds another key's
        work or another process is at work in it, DiskFullError where there is no room.
        """
        self.path, self._journal_path = folder / name, folder / JOURNAL
        self.done: dict[str, dict[str, Any]] = {}
        """Finished piece -> the result that was journalled with it."""
        head, self._spans = file_header(tensors)
        self._infos = dict(tensors)
        self.nbytes = max((start + count for start, count in self._spans.values()), default=len(head))
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = -1
        try:
            self._lock()
            self._recover(key, head)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is writing {self.path.parent}; wait for it or choose another folder"
            ) from error

    def _recover(self, key: str, head: bytes) -> None:
        text = self._journal_path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0].get("key") != key:
            raise CheckpointError(
                f"{self.path.parent} holds the half of a quantization with other weights, settings, device or version; "
                "delete it to begin anew, or give the same command as then"
            )
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not lines:  # nothing is journalled before the header is on the disk
            with naming_full_disk(self.path, self.nbytes):
                os.ftruncate(self._file, 0)
                self._write(0, head)
                os.ftruncate(self._file, self.nbytes)
                os.fsync(self._file)
                flush(self.path.parent)
                os.ftruncate(self._journal, 0)
                self._append({"key": key})
            return
        if os.fstat(self._file).st_size != self.nbytes or os.pread(self._file, len(head), 0) != head:
            raise CheckpointError(f"{self.path} is not the file of its journal; delete {self.path.parent}")
        os.ftruncate(self._journal, len(whole))
        self.done = {line["piece"]: line["result"] for line in lines[1:]}

    def write(self, piece: str, tensors: Mapping[str, Tensor], result: dict[str, Any]) -> None:
        """Puts the tensors of one piece in their places, waits for the disk, then journals the piece.

        Raises ValueError naming a tensor that is not what the header says, DiskFullError where there is no room.
        """
        with naming_full_disk(self.path, self.nbytes):
            for name, tensor in tensors.items():
                info, found = self._infos.get(name), TensorInfo(tensor.dtype, tuple(tensor.shape))
                if info != found:
                    raise ValueError(f"tensor {name!r} is {found}; the header of {self.path.name} says {info}")
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                self._write(self._spans[name][0], data.data)
            os.fdatasync(self._file)
            self._append({"piece": piece, "result": result})
        self.done[piece] = result

    def _write(self, start: int, data: bytes | memoryview) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], start + done)

    def _append(self, line: dict[str, Any]) -> None:
        os.lseek(self._journal, 0, os.SEEK_END)
        os.write(self._journal, json.dumps(line).encode() + b"\n")
        os.fsync(self._journal)

    def close(self) -> None:
        """Closes the file and its journal, and lets go of the lock."""
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
