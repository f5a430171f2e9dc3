"""Tensors read one at a time from one or several safetensors files, each error naming the file and the tensor."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loragraft.quantization.names import nearest
from loragraft.quantization.tensor_file import CheckpointError, read_header

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
FLOATS = (*SIXTEEN_BIT, torch.float32)


class TensorFiles:
    """The tensors of `paths` under one roof. Opening reads headers only; `unread` says what nobody asked for.

    Raises CheckpointError for a file that is missing, foreign or truncated, and for a name that two files claim.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._handles: dict[Path, Any] = {}
        for path in self.paths:
            header, metadata = read_header(path)
            self.metadata |= metadata
            for name, entry in header.items():
                if name in self._entries:
                    raise CheckpointError(f"{path}: tensor {name!r} is in {self._entries[name][0].name} as well")
                self._entries[name] = path, entry
        self.unread = set(self._entries)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """All names, in the files' order."""
        return list(self._entries)

    def where(self, name: str) -> str:
        """`FILE: tensor NAME`, how messages begin."""
        path = self._entries[name][0] if name in self._entries else self.paths[0]
        return f"{path}: tensor {name!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header. Raises CheckpointError if there is no such tensor."""
        return tuple(self._entry(name)[1]["shape"])

    def read(self, name: str, shape: tuple[int, ...] | None = None, dtypes: Iterable[torch.dtype] = FLOATS) -> Tensor:
        """One tensor, checked: shape (None: any), dtype, and no NaN or infinity. Raises CheckpointError."""
        path, entry = self._entry(name)
        if shape is not None and tuple(entry["shape"]) != shape:
            raise CheckpointError(f"{self.where(name)} has shape {tuple(entry['shape'])}, expected {shape}")
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._handles[path].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.where(name)} cannot be read: {error}") from error
        dtypes = tuple(dtypes)
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(f"{self.where(name)} is {tensor.dtype}, expected {wanted}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.where(name)} holds NaN or infinity")
        self.unread.discard(name)
        return tensor

    def _entry(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in self._entries:
            files = ", ".join(str(path) for path in self.paths)
            raise CheckpointError(f"{files}: tensor {name!r} is missing; {nearest(name, self._entries)}")
        return self._entries[name]
