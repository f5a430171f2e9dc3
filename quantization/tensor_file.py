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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all. Raises DiskFullError where there is no room."""
    with replacing_file(path, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch, metadata)


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
