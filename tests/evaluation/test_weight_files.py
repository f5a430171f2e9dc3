"""Weights of standard metrics: the right file, or a sentence that says which, from where and with which content."""

import hashlib
from pathlib import Path

import pytest

from loragraft.evaluation.weight_files import CLIP_FILES, IMAGE_REWARD, INCEPTION, WeightFile, WeightFolder

CONTENT = b"published weights"
FILE = WeightFile("net/weights.pt", "https://example.org/weights.pt", hashlib.sha256(CONTENT).hexdigest())


def put(root: Path, name: str, content: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_published_file_is_found_and_its_digest_stated(tmp_path: Path) -> None:
    path = put(tmp_path, FILE.name, CONTENT)
    folder = WeightFolder(tmp_path)
    assert folder.path(FILE) == path
    assert folder.digest(FILE) == FILE.sha256


@pytest.mark.parametrize("file", [INCEPTION, CLIP_FILES[0], IMAGE_REWARD])
def test_a_missing_file_is_named_with_source_and_content(tmp_path: Path, file: WeightFile) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        WeightFolder(tmp_path).path(file)
    message = str(caught.value)
    assert file.name in message and file.source in message and "--allow-download" in message
    assert (file.sha256 or "sha256 not published") in message


def test_another_content_is_refused(tmp_path: Path) -> None:
    put(tmp_path, FILE.name, CONTENT + b"!")
    with pytest.raises(ValueError, match=f"(?s)not the published file.*{FILE.sha256}.*wrong name.*example.org"):
        WeightFolder(tmp_path).path(FILE)


def test_a_file_of_another_name_is_not_taken_but_mentioned(tmp_path: Path) -> None:
    put(tmp_path, "net/weights-1.pt", CONTENT)
    with pytest.raises(FileNotFoundError, match=r"weights-1\.pt has another name"):
        WeightFolder(tmp_path).path(FILE)


def test_fetching_is_on_request_and_checked(tmp_path: Path) -> None:
    source = put(tmp_path, "server/weights.pt", CONTENT)
    file = WeightFile(FILE.name, source.as_uri(), FILE.sha256)
    assert WeightFolder(tmp_path / "a", allow_download=True).path(file).read_bytes() == CONTENT
    source.write_bytes(b"something else")
    with pytest.raises(ValueError, match="another content than expected"):
        WeightFolder(tmp_path / "b", allow_download=True).path(file)
    assert not (tmp_path / "b" / file.name).exists()
    source.unlink()
    with pytest.raises(ValueError, match="could not be fetched"):
        WeightFolder(tmp_path / "c", allow_download=True).path(file)
