"""Whole or not at all, and a full disk in one sentence: with a disk that is really full, and with one that says so."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loragraft.disk import DiskFullError, naming_full_disk, replacing_folder, sweep, write_atomic
from loragraft.outcome import guarded
from loragraft.quantization.tensor_file import read_tensors, write_tensors

SENTENCE = r"is not written: no space is left on the disk \(it takes 97\.7 KiB and .* are left\).*same command again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root; the portable test below covers the message")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_file_and_says_so(small_disk: Path) -> None:
    write_atomic(small_disk / "f", b"old")
    with pytest.raises(DiskFullError, match=SENTENCE):
        write_atomic(small_disk / "f", bytes(100_000))
    assert [(p.name, p.read_bytes()) for p in small_disk.iterdir()] == [("f", b"old")]


def test_a_full_disk_under_a_weight_file(small_disk: Path) -> None:
    """The safetensors library reports it in words only."""
    file = small_disk / "w.safetensors"
    write_tensors(file, {"x": torch.ones(3)}, {})
    with pytest.raises(DiskFullError, match=SENTENCE):
        write_tensors(file, {"x": torch.zeros(25_000)}, {})
    assert torch.equal(read_tensors(file)[0]["x"], torch.ones(3))
    assert list(small_disk.iterdir()) == [file]


def _fill(folder: Path) -> None:
    with replacing_folder(folder, overwrite=True) as scratch:
        for i in range(30):
            (scratch / f"{i}").write_bytes(bytes(10_000))


def test_a_full_disk_under_a_folder(small_disk: Path) -> None:
    with replacing_folder(small_disk / "model", overwrite=False) as scratch:
        (scratch / "x").write_text("old")
    with pytest.raises(DiskFullError, match=r"model is not written: no space is left"):
        _fill(small_disk / "model")
    assert [str(p.relative_to(small_disk)) for p in small_disk.rglob("*")] == ["model", "model/x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_atomic(tmp_path / "f", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFullError, match=r"f is not written: .*it takes 3 bytes and .*B are left"):
        write_atomic(tmp_path / "f", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no", "x")
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "f", b"")


def test_sweep_removes_old_scratch_and_nothing_else(tmp_path: Path) -> None:
    names = [".a.00000000.writing", ".tmpAbC123", ".b.11111111.writing", "c.writing", ".hidden"]
    for name in names:
        (tmp_path / name).mkdir() if name.startswith(".b") else (tmp_path / name).write_text("x")
    sweep(tmp_path, older_than_hours=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path, older_than_hours=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "c.writing"]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("a sentence"), 2, "error: a sentence\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), 2, "error: /runs/x: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: a file is not written: no space is left on the disk."),
        (KeyboardInterrupt(), 130, "give the same command again to go on"),
    ],
)
def test_outcomes(error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise error

    assert guarded(run) == code
    assert sentence in capsys.readouterr().err


def test_a_reader_who_has_gone_is_no_mistake() -> None:
    """`| head` closes the pipe; what is written after that neither fails nor leaves a traceback."""
    many = "from loragraft.outcome import guarded; raise SystemExit(guarded(lambda: print('x' * 10**6) or 0))"
    writer = subprocess.Popen([sys.executable, "-c", many], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.read(1)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(timeout=60) == 141
    with pytest.raises(BrokenPipeError, match="elsewhere"):  # a pipe that is not standard output
        guarded(_broken)


def _broken() -> int:
    raise BrokenPipeError("elsewhere")


def test_defects_and_whoever_asks_keep_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect() -> int:
        raise RuntimeError("a defect")

    def mistake() -> int:
        raise ValueError("a mistake")

    with pytest.raises(RuntimeError, match="a defect"):
        guarded(defect)
    monkeypatch.setenv("LORAGRAFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a mistake"):
        guarded(mistake)
