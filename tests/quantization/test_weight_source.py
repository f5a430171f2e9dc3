"""Weights read one at a time: shards, single files, and what is refused by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import FileSource, TensorInfo

TENSORS = {
    "a.weight": torch.randn(6, 4).to(torch.bfloat16),
    "a.bias": torch.randn(6),
    "b.weight": torch.arange(8, dtype=torch.float16).view(2, 4),
    "empty": torch.zeros(0, 3),
}


def _sharded(folder: Path) -> Path:
    folder.mkdir()
    index = {}
    for number, name in enumerate(TENSORS):
        file = f"model-{number}.safetensors"
        save_file({name: TENSORS[name]}, folder / file)
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text('{"_class_name": "X"}')
    return folder


def test_folder_and_file_read_the_same(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    for source in (FileSource(_sharded(tmp_path / "folder")), FileSource(tmp_path / "one.safetensors")):
        assert source.tensors == {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert torch.equal(source.read(name), tensor)
    assert FileSource(tmp_path / "folder").config == {"_class_name": "X"}
    assert FileSource(tmp_path / "one.safetensors").config is None


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    before = FileSource(tmp_path / "one.safetensors").identity
    assert FileSource(tmp_path / "one.safetensors").identity == before
    save_file({**TENSORS, "a.bias": torch.zeros(6)}, tmp_path / "one.safetensors")
    os.utime(tmp_path / "one.safetensors", (1, 1))  # a clock of milliseconds would show both writes as one
    assert FileSource(tmp_path / "one.safetensors").identity != before


def test_refusals_name_file_and_tensor(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "folder")
    shard = folder / "model-0.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors is truncated: tensor 'a\.weight'"):
        FileSource(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard model-0\.safetensors .* is missing"):
        FileSource(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"found model-1\.safetensors, model-2\.safetensors"):
        FileSource(folder)
    with pytest.raises(CheckpointError, match="no file or folder"):
        FileSource(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        FileSource(tmp_path / "weights.bin")


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "folder")
    save_file({"a.weight": torch.ones(2)}, folder / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.weight' is in model-0\.safetensors and in model-1\.safetensors"):
        FileSource(folder)


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    source = FileSource(tmp_path / "one.safetensors")
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-60])
    with pytest.raises(CheckpointError, match="it was changed while it was read"):
        [source.read(name) for name in TENSORS]
