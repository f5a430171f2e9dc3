"""Tensors one at a time: checked as they are read, and each complaint names file and tensor."""

from pathlib import Path

import pytest
import torch

from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.tensor_file import CheckpointError, write_tensors


def test_several_files_are_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2, 3)}, {"config": "{}"})
    write_tensors(tmp_path / "b.safetensors", {"y": torch.zeros(4, dtype=torch.uint8)}, {})
    with TensorFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]) as files:
        assert (files.names, files.metadata) == (["x", "y"], {"config": "{}"})
        assert ("x" in files, "z" in files) == (True, False)
        assert files.shape("y") == (4,)
        assert torch.equal(files.read("x", (2, 3)), torch.ones(2, 3))
        assert files.unread == {"y"}
        assert files.read("y", (4,), (torch.uint8,)).dtype == torch.uint8
        assert files.unread == set()


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"layer.weight": torch.ones(2, 3), "bad": torch.tensor([torch.inf])}, {})
    files = TensorFiles([path])
    for read, message in (
        (
            lambda: files.read("layer.wight"),
            r"a\.safetensors: tensor 'layer\.wight' is missing; nearest: layer\.weight",
        ),
        (lambda: files.read("layer.weight", (3, 2)), r"tensor 'layer\.weight' has shape \(2, 3\), expected \(3, 2\)"),
        (lambda: files.read("layer.weight", None, (torch.int8,)), r"'layer\.weight' is torch\.float32, expected int8"),
        (lambda: files.read("bad"), "'bad' holds NaN or infinity"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()
    assert files.unread == {"layer.weight", "bad"}
    write_tensors(tmp_path / "b.safetensors", {"bad": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'bad' is in a\.safetensors as well"):
        TensorFiles([path, tmp_path / "b.safetensors"])
    with pytest.raises(CheckpointError, match="no file"):
        TensorFiles([tmp_path / "c.safetensors"])
