"""Entries and indexes: what is written is read back, and what somebody else wrote is checked first."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loragraft.zoo.contents import collect
from loragraft.zoo.entry import (
    ENTRY,
    Entry,
    Listed,
    Status,
    ZooError,
    check,
    entry_from_bytes,
    index_from_bytes,
    index_to_bytes,
    statuses_from_bytes,
    statuses_to_bytes,
)


@pytest.fixture
def entry(make_run: Callable[..., Path], tmp_path: Path) -> Entry:
    (tmp_path / "staged").mkdir()
    return collect(make_run(), tmp_path / "staged")


def changed(entry: Entry, key: str, value: Any) -> bytes:
    """`entry` with the value at a key a:b:c replaced."""
    plain = json.loads(entry.to_bytes())
    *path, last = key.split(":")
    inner = plain
    for part in path:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[last] = value
    return json.dumps(plain).encode()


def test_an_entry_and_an_index_read_back_as_they_were(entry: Entry) -> None:
    assert entry_from_bytes(entry.to_bytes(), "here") == entry
    later = dataclasses.replace(entry, version="1.10.0")
    rows = [
        Listed(entry=e, entry_sha256=e.sha256, signed=False, status=Status(yanked=why))
        for e, why in ((later, "wrong"), (dataclasses.replace(entry, version="1.9.0"), ""))
    ]
    content = index_to_bytes(rows)
    found = index_from_bytes(content, "here")
    assert [item.entry.version for item in found] == ["1.9.0", "1.10.0"]
    assert found[1].status.yanked == "wrong"
    assert index_to_bytes(found) == content == index_to_bytes(list(reversed(rows)))


def test_a_status_that_says_nothing_is_not_written() -> None:
    content = statuses_to_bytes({"1.0.0": Status(), "1.0.1": Status(deprecated="take 2.0.0")})
    assert statuses_from_bytes(content, "here") == {"1.0.1": Status(deprecated="take 2.0.0")}


RECORD = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "../evil", "name"),
        ("name", "evil\n", "name"),
        ("name", "a/b", "name"),
        ("version", "1.0", "version"),
        ("version", "01.0.0", "version"),
        ("files:../../.bashrc.md", RECORD, "files"),
        ("files", {"/etc/passwd.md": RECORD}, "files"),
        ("files", {"images\\0.png": RECORD}, "files"),
        ("files", {"model.bin": RECORD}, "files"),
        ("files", {"weights.pt": RECORD}, "files"),
        ("files:README.md", {"sha256": "0" * 63, "size": 1}, "README.md"),
        ("files:README.md", {"sha256": "0" * 64, "size": -1}, "README.md"),
        ("rank", 0, "rank"),
        ("rank", "16", "rank"),
        ("surprise", 1, "surprise"),
        ("base:id", "short", "base.id"),
        ("scores:0:value", "good", "scores.0.value"),
    ],
)
def test_what_no_zoo_writes_is_refused_by_its_key(entry: Entry, key: str, value: Any, said: str) -> None:
    with pytest.raises(ZooError, match=r"(?s)^here: ") as refused:
        entry_from_bytes(changed(entry, key, value), "here")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "not the JSON"),
        (b'{"schema": NaN}', "NaN is no number"),
        (b"\x80\x04pickle", "not the JSON"),
        (b" " * ((1 << 20) + 1), "no loragraft.json is larger"),
        (b'{"schema": 2}', "update Loragraft"),
    ],
)
def test_bytes_that_are_no_entry_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(ZooError, match=said):
        entry_from_bytes(content, "here")


def test_an_index_is_no_way_around_the_entrys_schema(entry: Entry) -> None:
    plain = json.loads(index_to_bytes([Listed(entry=entry, entry_sha256=entry.sha256, signed=False)]))
    plain["adapters"][0]["entry"]["files"]["../up.md"] = RECORD
    with pytest.raises(ZooError, match="up"):
        index_from_bytes(json.dumps(plain).encode(), "here")


def test_nan_is_never_written(entry: Entry) -> None:
    score = dataclasses.replace(entry.scores[0], value=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(entry, scores=(score,)).to_bytes()
    check(json.loads(entry.to_bytes()), ENTRY, "here")
