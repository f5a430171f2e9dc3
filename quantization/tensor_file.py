"""Safetensors files, written whole or not at all and read with errors that name the tensor.

The `safetensors` library reads and writes; this module adds the atomic rename and a look at the header
first, because the library reports a truncated file without saying which tensors are gone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loragraft.disk import replacing_file


class CheckpointError(ValueError):
    """A weight file or folder that cannot be trusted; the message names the file and the tensor."""


HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors format's own limit."""


IN_ITS_PLACE = {
    b"version ": "a Git LFS pointer, which stands for the weights: `git lfs pull` in its repository brings them",
    b"<!doctyp": "a web page: what was saved is the download's page, not the file",
    b"<html": "a web page: what was saved is the download's page, not the file",
}
"""First bytes, in lower case, of what people often have instead of a file of weights."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all. Raises DiskFullError where there is no room."""
    with replacing_file(path, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
        scratch.touch()
        mode = scratch.stat().st_mode
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        scratch.chmod(mode)  # safetensors 0.8 leaves a file that its owner alone can read


def read_header(path: Path, header_limit: int = HEADER_LIMIT) -> tuple[dict[str, Any], dict[str, str]]:
    """(name -> {"dtype", "shape", "data_offsets"}, metadata) of a complete safetensors file.

    Raises CheckpointError for a file that is missing, is not safetensors, has a header of more than `header_limit` bytes or
    ends too early; the last names the first tensor that is cut off.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        for begins, what in IN_ITS_PLACE.items():
            if start.lower().startswith(begins) and length > header_limit:
                raise CheckpointError(f"{path} is not a safetensors file but {what}")
        if size < 8:
            raise CheckpointError(f"{path} is not a safetensors file")
        if length > header_limit:
            raise CheckpointError(
                f"{path} is not a safetensors file, or a hostile one: it announces a header of {length} bytes, at most "
                f"{header_limit} are read"
            )
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header: {size} bytes of at least {8 + length}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    metadata = _check_entries(path, header)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} needs bytes up to {8 + length + entry['data_offsets'][1]}, "
                f"the file has {size}; fetch it again"
            )
    return header, metadata


def _check_entries(path: Path, header: Any) -> dict[str, str]:
    """Takes the metadata out of a parsed header; raises CheckpointError where its structure is not that of the format."""
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is not a safetensors file: its metadata are not strings by name")
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(isinstance(at, int) and at >= 0 for at in offsets)
        ):
            raise CheckpointError(f"{path} is not a safetensors file: its header does not say where tensor {name!r} is")
    return metadata


def read_tensors(
    path: Path, device: torch.device | str = "cpu", header_limit: int = HEADER_LIMIT
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(all tensors, metadata) of a safetensors file. Raises as `read_header` does."""
    header, metadata = read_header(path, header_limit)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in header}, metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
