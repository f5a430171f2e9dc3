"""Files and folders appear whole or not at all; a damaged one is refused by the tensor's name."""

from pathlib import Path

import pytest
import torch

from loragraft.disk import replacing_folder
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

TENSORS = {
    "first": torch.arange(6.0).view(2, 3),
    "second": torch.zeros(100, dtype=torch.uint8),
    "none": torch.empty(0, 4),
}


def test_roundtrip(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", TENSORS, {"a": "b"})
    tensors, metadata = read_tensors(tmp_path / "w.safetensors")
    assert metadata == {"a": "b"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_whoever_may_read_the_folder_may_read_the_file(tmp_path: Path) -> None:
    """safetensors 0.8 leaves files that their owner alone can read, and a cache or a run is often shared."""
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_truncation_names_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_tensors(file, TENSORS, {})
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=r"truncated: tensor 'second'"):
        read_tensors(file)
    file.write_bytes(whole[:40])
    with pytest.raises(CheckpointError, match="truncated inside its header"):
        read_tensors(file)
    for junk in (b"", b"GIF89a", b"x" * 1000):
        file.write_bytes(junk)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            read_tensors(file)
    with pytest.raises(CheckpointError, match="no file"):
        read_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, .* `git lfs pull`"),
        ("<!DOCTYPE html><html>Not found</html>", "a web page"),
        ("<html><body>Sign in</body></html>", "a web page"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(tmp_path: Path, content: str, remedy: str) -> None:
    (tmp_path / "w.safetensors").write_text(content)
    with pytest.raises(CheckpointError, match=rf"w\.safetensors is not a safetensors file but {remedy}"):
        read_tensors(tmp_path / "w.safetensors")


def _interrupted_write(folder: Path) -> None:
    with replacing_folder(folder, overwrite=True) as scratch:
        (scratch / "x").write_text("half")
        raise OSError("No space left on device")


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replacing_folder(folder, overwrite=False) as scratch:
        (scratch / "x").write_text("old")
    with pytest.raises(FileExistsError, match="overwrite=True"), replacing_folder(folder, overwrite=False):
        pass
    with pytest.raises(OSError, match="No space"):
        _interrupted_write(folder)
    assert (folder / "x").read_text() == "old"
    with replacing_folder(folder, overwrite=True) as scratch:
        (scratch / "x").write_text("new")
    assert (folder / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
