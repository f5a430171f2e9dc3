"""Safetensors files, written whole or not at all and read with errors that name the tensor.

The `safetensors` library reads and writes; this module adds the atomic rename, the flush to disk, and a look at the header
first, because the library reports a truncated file without saying which tensors are gone.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A weight file or folder that cannot be trusted; the message names the file and the tensor."""


HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors format's own limit."""


@contextmanager
def replacing_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well, and vanishes when it does not.

    Raises FileExistsError if `folder` exists and `overwrite` is false.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    scratch = folder.with_name(f".{folder.name}.{token}.writing")
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.iterdir():
            _flush(path)
        if folder.exists():  # a folder cannot be renamed onto a full one: move the old one aside first
            old = folder.with_name(f".{folder.name}.{token}.old")
            os.replace(folder, old)
            os.replace(scratch, folder)
            shutil.rmtree(old)
        else:
            os.replace(scratch, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically: a scratch file beside it is flushed, then renamed."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        _flush(scratch)
        os.replace(scratch, path)
        _flush(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(name -> {"dtype", "shape", "data_offsets"}, metadata) of a complete safetensors file.

    Raises CheckpointError for a file that is missing, is not safetensors or ends too early; the last names the first tensor
    that is cut off.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT:
            raise CheckpointError(f"{path} is not a safetensors file")
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header: {size} bytes of at least {8 + length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    metadata = header.pop("__metadata__", {})
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} needs bytes up to {8 + length + entry['data_offsets'][1]}, "
                f"the file has {size}; fetch it again"
            )
    return header, metadata


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(all tensors, metadata) of a safetensors file. Raises as `read_header` does."""
    header, metadata = read_header(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in header}, metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
