"""Where the weights of a model come from when the model itself is never built: names and shapes first, then one at a time.

folder of a diffusers transformer    *.safetensors.index.json and its shards, or one safetensors file, beside config.json
single file                          one safetensors file, with config.json beside it or without
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loragraft.quantization.tensor_file import CheckpointError, read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""
PLAIN_NAME = "diffusion_pytorch_model.safetensors"
"""What diffusers reads unless it is told of a variant."""
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Named tensors that are read one at a time, in any order and from any thread."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> dict[str, Any] | None:
        """The model's configuration; None if none lies beside the weights."""
        ...

    @property
    def identity(self) -> str:
        """Changes with the weights: a half-done quantization goes on only from the same ones."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU or wherever it was made."""
        ...


class FileSource:
    """A safetensors file, or a diffusers folder of one or more of them."""

    def __init__(self, path: Path | str) -> None:
        """Reads the headers. Raises CheckpointError naming the file, shard or tensor that is missing or damaged."""
        self.path = Path(path)
        folder = self.path if self.path.is_dir() else self.path.parent
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._tensors: dict[str, TensorInfo] = {}
        digest = hashlib.sha256()
        for file in _files(self.path):
            header, _ = read_header(file)
            with file.open("rb") as opened:
                start = 8 + int.from_bytes(opened.read(8), "little")
            for name, entry in header.items():
                if name in self._places:
                    raise CheckpointError(f"tensor {name!r} is in {self._places[name][0].name} and in {file.name}")
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(f"{file}: tensor {name!r} has dtype {entry['dtype']}, which is not read")
                begin, end = entry["data_offsets"]
                self._places[name] = file, start + begin, end - begin
                self._tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
            digest.update(json.dumps(header, sort_keys=True).encode())
        self._identity = digest.hexdigest()
        self._config = _config(folder / "config.json")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def config(self) -> dict[str, Any] | None:
        return self._config

    @property
    def identity(self) -> str:
        return self._identity

    def read(self, name: str) -> Tensor:
        """A copy in memory, page-locked where there is a GPU; a map of the file would count as this process's memory.

        Raises CheckpointError where the file ends early: it was changed since its header was read.
        """
        file, start, count = self._places[name]
        info = self._tensors[name]
        if count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        data = torch.empty(count, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        view = memoryview(data.numpy().data)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            done = 0
            while done < count:
                got = os.preadv(descriptor, [view[done:]], start + done)
                if got == 0:
                    raise CheckpointError(f"{file} ended inside tensor {name!r}: it was changed while it was read")
                done += got
        finally:
            os.close(descriptor)
        return data.view(info.dtype).view(info.shape)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a folder (all shards of its index) or the file itself."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no safetensors file; convert it first (safetensors.torch.save_file)")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"no file or folder {path}")
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    singles = sorted(path.glob("*.safetensors"))
    if len(singles) > 1 and not indices and path / PLAIN_NAME in singles:
        singles = [path / PLAIN_NAME]  # beside it may lie its variants: .fp16, .non_ema
    if len(indices) > 1 or (not indices and len(singles) != 1):
        found = ", ".join(file.name for file in indices or singles) or "none"
        raise CheckpointError(
            f"{path}: expected one *{INDEX_SUFFIX} or one *.safetensors file, found {found}; name the file itself"
        )
    if not indices:
        return singles
    try:
        names = json.loads(indices[0].read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{indices[0]} is not a weight index: {error}") from error
    shards = [path / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{path}: shard {missing[0]} of {indices[0].name} is missing; fetch it")
    return shards


def _config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no model configuration")
    return config
