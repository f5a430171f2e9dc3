"""Signatures by a local key: over everything, by that key only, and not over what may change."""

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loragraft.zoo.entry import ENTRY, SIGNATURE, Status, ZooError
from loragraft.zoo.file_place import open_files
from loragraft.zoo.publish import publish
from loragraft.zoo.pull import pull
from loragraft.zoo.signing import make_keys, sign, verify_signature

pytest.importorskip("model_signing", reason='pip install "loragraft[signing]"')


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private = tmp_path / "keys" / "me.pem"
    return private, make_keys(private)


@pytest.fixture
def signed(make_run: Callable[..., Path], tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A published and pulled folder."""
    place = open_files(str(tmp_path / "zoo"))
    assert publish(make_run(), place, key=keys[0]).signed
    place.set_status("marketing", "1.0.0", Status(deprecated="status is outside of the signature"))
    assert place.listed()[0].signed
    return pull(place, "marketing", tmp_path / "out", key=keys[1], say=lambda _: None)


def test_signed_published_pulled_verified(signed: Path, keys: tuple[Path, Path]) -> None:
    verify_signature(signed, keys[1])
    assert keys[0].stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) == 0


@pytest.mark.parametrize("name", [ENTRY, "README.md", "pytorch_lora_weights.safetensors", "images/0000.png"])
def test_one_changed_byte_is_no_signature(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(ZooError, match="is not a signature of these files"):
        verify_signature(signed, keys[1])


def test_a_file_more_or_less_is_no_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "extra.json").write_text("{}")
    with pytest.raises(ZooError, match="is not a signature"):
        verify_signature(signed, keys[1])
    (signed / "extra.json").unlink()
    (signed / "score.json").unlink()
    with pytest.raises(ZooError, match="is not a signature"):
        verify_signature(signed, keys[1])


def test_somebody_elses_key(signed: Path, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "keys" / "other.pem")
    with pytest.raises(ZooError, match="is not a signature"):
        verify_signature(signed, other)


def test_a_signature_that_is_none(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / SIGNATURE).write_text("{}")
    with pytest.raises(ZooError, match="is not a signature"):
        verify_signature(signed, keys[1])


def test_an_unsigned_adapter_does_not_pass_for_a_signed_one(
    make_run: Callable[..., Path], tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    place = open_files(str(tmp_path / "zoo"))
    publish(make_run(), place)
    with pytest.raises(ZooError, match="is not signed"):
        pull(place, "marketing", tmp_path / "out", key=keys[1], say=lambda _: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_keys_are_not_overwritten_and_must_be_keys(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(ZooError, match="never overwritten"):
        make_keys(keys[0])
    (tmp_path / "none.pem").write_text("no key")
    with pytest.raises(ZooError, match="is not a private key"):
        sign(tmp_path, tmp_path / SIGNATURE, tmp_path / "none.pem")
    with pytest.raises(ZooError, match="loragraft zoo key"):
        sign(tmp_path, tmp_path / SIGNATURE, tmp_path / "absent.pem")
    with pytest.raises(ZooError, match="is not a public key"):
        verify_signature(tmp_path, tmp_path / "none.pem")
    with pytest.raises(ZooError, match="no key"):
        verify_signature(tmp_path, tmp_path / "absent.pub")


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ZooError, match=r"loragraft\[signing\]"):
        make_keys(tmp_path / "me.pem")
