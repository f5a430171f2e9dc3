"""A file written piece by piece: the library's own bytes, whatever the order, and what a journal may be trusted with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragraft.quantization.partial_file import JOURNAL, PartialFile
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import TensorInfo

TENSORS = {
    "x.qweight": torch.arange(35, dtype=torch.uint8).view(5, 7),
    "x.row_scale": torch.randn(5),
    "x.smooth": torch.randn(7).to(torch.bfloat16),
    "y.bias": torch.randn(3).to(torch.float16),
    "z": torch.zeros(0, 2),
}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
PIECES = {"x": [n for n in TENSORS if n.startswith("x.")], "y": ["y.bias"], "z": ["z"]}


def _write(file: PartialFile, piece: str) -> None:
    file.write(piece, {name: TENSORS[name] for name in PIECES[piece]}, {"number": len(piece)})


@pytest.mark.parametrize("order", ["xyz", "zyx"])
def test_equals_the_librarys_file(tmp_path: Path, order: str) -> None:
    with PartialFile(tmp_path / "f", "w.safetensors", INFOS, "key") as file:
        for piece in order:
            _write(file, piece)
    save_file(TENSORS, tmp_path / "library.safetensors", {"format": "pt"})
    assert (tmp_path / "f" / "w.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    found = load_file(tmp_path / "f" / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_goes_on_where_the_journal_ends(tmp_path: Path) -> None:
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        assert file.done == {}
        _write(file, "x")
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"piece": "y", "res')  # killed within a line
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        assert file.done == {"x": {"number": 1}}
        _write(file, "y")
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        assert list(file.done) == ["x", "y"]


def test_without_a_whole_first_line_it_begins_anew(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"ke')
    (tmp_path / "w.safetensors").write_bytes(b"rubbish" * 100)
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        assert file.done == {}
        for piece in PIECES:
            _write(file, piece)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["x.row_scale"], TENSORS["x.row_scale"])


def test_another_key_another_file_and_another_process_are_refused(tmp_path: Path) -> None:
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        with pytest.raises(CheckpointError, match="another process is writing"):
            PartialFile(tmp_path, "w.safetensors", INFOS, "key")
        _write(file, "x")
    with pytest.raises(CheckpointError, match="other weights, settings, device or version"):
        PartialFile(tmp_path, "w.safetensors", INFOS, "other")
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not the file of its journal"):
        PartialFile(tmp_path, "w.safetensors", INFOS, "key")


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    with PartialFile(tmp_path, "w.safetensors", INFOS, "key") as file:
        with pytest.raises(ValueError, match=r"'y\.bias' is .*float32.* the header of w\.safetensors says .*float16"):
            file.write("y", {"y.bias": torch.zeros(3)}, {})
        with pytest.raises(ValueError, match="'foreign'"):
            file.write("y", {"foreign": torch.zeros(3)}, {})
        assert file.done == {}
