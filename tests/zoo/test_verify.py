"""What `zoo verify` finds out, and that hostile or damaged files are refused before anything is done with them."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loragraft.zoo.contents import WEIGHTS, collect, entry_with_files
from loragraft.zoo.entry import ENTRY, Entry, ZooError, entry_from_bytes
from loragraft.zoo.file_place import open_files
from loragraft.zoo.publish import publish
from loragraft.zoo.pull import pull
from loragraft.zoo.verify import verify_folder


@pytest.fixture
def pulled(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    place = open_files(str(tmp_path / "zoo"))
    publish(make_run(), place)
    return pull(place, "marketing", tmp_path / "out", say=lambda _: None)


def findings(folder: Path, **options: Any) -> dict[str, bool | None]:
    return {finding.question: finding.passed for finding in verify_folder(folder, **options)}


def last(folder: Path, **options: Any) -> str:
    """The sentence of the finding that failed."""
    finding = list(verify_folder(folder, **options))[-1]
    assert finding.passed is False, finding
    return f"{finding.question}: {finding.text}"


def rewrite(folder: Path, weights: bytes | None = None, **claims: Any) -> None:
    """A dishonest publisher: other weights or claims, and an entry whose sums are right."""
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
    plain = json.loads((folder / ENTRY).read_bytes()) | claims
    entry: Entry = entry_from_bytes(json.dumps(plain).encode(), ENTRY)
    (folder / ENTRY).unlink()
    (folder / ENTRY).write_bytes(entry_with_files(entry, folder).to_bytes())


def test_an_honest_adapter_passes(pulled: Path) -> None:
    assert findings(pulled) == {"files": True, "signature": None, "weights": True, "claims": True, "base": None}


@pytest.mark.parametrize("name", ["README.md", WEIGHTS, "images/0000.png"])
def test_a_changed_byte_is_named(pulled: Path, name: str) -> None:
    content = bytearray((pulled / name).read_bytes())
    content[-1] ^= 1
    (pulled / name).write_bytes(content)
    assert f"{name} has sha256" in last(pulled)


def test_missing_foreign_and_linked_files_are_named(pulled: Path, tmp_path: Path) -> None:
    (pulled / "run_me.py").write_text("print('hello')")
    assert "run_me.py is not in the entry" in last(pulled)
    (pulled / "run_me.py").unlink()
    (pulled / "README.md").rename(tmp_path / "elsewhere.md")
    assert "README.md is missing" in last(pulled)
    (pulled / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert "README.md is missing" in last(pulled)


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"rank": 16}, "weights: rank 4"),
        ({"parameters": 5}, "parameters, the entry says"),
        ({"contract": "compensating"}, "claims: contract"),
        ({"recipe_hash": "00" * 32}, "claims: recipe_hash"),
        ({"data_fingerprint": "00" * 32}, "claims: data_fingerprint"),
        ({"name": "poster"}, "claims: name"),
        ({"base": {"name": "pocket", "id": "00" * 32, "profile": "native", "repository": None}}, "claims: base_id"),
        ({"base": {"name": "pocket", "id": "ab" * 32, "profile": "16bit", "repository": None}}, "claims: profile"),
    ],
)
def test_an_entry_that_claims_what_the_weights_do_not_say(pulled: Path, claims: dict[str, Any], said: str) -> None:
    rewrite(pulled, **claims)
    assert said in last(pulled)


def hostile(tmp_path: Path, kind: str) -> bytes:
    """The bytes of a weights file that wants something."""
    path = tmp_path / "hostile.safetensors"
    pair = {
        "transformer.a.lora_A.weight": torch.ones(4, 96),
        "transformer.a.lora_B.weight": torch.ones(96, 4),
    }
    if kind == "pickle":
        return pickle.dumps({"transformer.a.lora_A.weight": print})
    if kind == "giant header":
        return (1 << 40).to_bytes(8, "little") + b"{}"
    if kind == "header past the end":
        return (1 << 20).to_bytes(8, "little") + b"{}"
    if kind == "header of garbage":
        return (8).to_bytes(8, "little") + b"\xff" * 8
    if kind == "NaN":
        pair["transformer.a.lora_A.weight"][0, 0] = float("nan")
    if kind == "no float":
        pair["transformer.a.lora_A.weight"] = torch.ones(4, 96, dtype=torch.int64)
    if kind == "foreign key":
        pair["../../etc/passwd"] = torch.ones(1)
    if kind == "ranks differ":
        pair["transformer.a.lora_B.weight"] = torch.ones(96, 5)
    save_file(pair, path)
    content = path.read_bytes()
    return content[: len(content) // 2] if kind == "truncated" else content


REFUSALS = {
    "pickle": "not (a )?safetensors",
    "giant header": "not a safetensors file",
    "header past the end": "truncated inside its header",
    "header of garbage": "not JSON",
    "NaN": "holds NaN or infinity",
    "no float": "expected (a float matrix|floats)",
    "foreign key": "etc/passwd",
    "ranks differ": "ranks differ",
    "truncated": "is truncated",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_hostile_weights_are_refused_though_their_sums_are_right(pulled: Path, tmp_path: Path, kind: str) -> None:
    rewrite(pulled, hostile(tmp_path, kind))
    text = last(pulled)
    assert text.startswith("weights: ")
    assert re.search(REFUSALS[kind], text)


@pytest.mark.parametrize("kind", REFUSALS)
def test_hostile_weights_are_not_published_either(make_run: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    run = make_run(score=False)
    (run / "adapter" / WEIGHTS).write_bytes(hostile(tmp_path, kind))
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match=REFUSALS[kind]):
        collect(run, tmp_path / "staged")


def test_a_folder_that_nobody_published(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"has no loragraft\.json"):
        list(verify_folder(tmp_path))


def test_a_signature_that_was_asked_for_and_is_not_there(pulled: Path, tmp_path: Path) -> None:
    assert last(pulled, key=tmp_path / "alice.pub") == "signature: it is not signed, and --key asks for a signature"
