"""Synthetic adapter files in every dialect, tiny."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loragraft.quantization.tensor_file import write_tensors

WIDTH = 8


class Draw:
    """Random tensors, one stream a test."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def lora(self, module: str, inputs: int, outputs: int, rank: int = 2, names: tuple[str, str] = (".lora_down", ".lora_up")) -> dict[str, Tensor]:  # fmt: skip
        """Both factors of one module under a dialect's suffixes."""
        return {f"{module}{names[0]}.weight": self(rank, inputs), f"{module}{names[1]}.weight": self(outputs, rank)}


@pytest.fixture
def draw() -> Draw:
    return Draw()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor], header: dict[str, str] | None = None, name: str = "lora") -> Path:
        file = tmp_path / f"{name}.safetensors"
        write_tensors(file, tensors, header or {"format": "pt"})
        return file

    return write
