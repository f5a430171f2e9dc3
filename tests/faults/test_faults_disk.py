"""A disk that fills up under the run or under the caches: one sentence with file, sizes and remedy; then the run goes on.

Once on a real small disk (needs root to mount one), once with a limit on file sizes, which needs nothing.
"""

import gc
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe

if TYPE_CHECKING:
    from conftest import User

SENTENCE = re.compile(
    r"error: \S+/(?P<file>\S+) is not written: .* \((it takes [\d.]+ \w+ and )?[\d.]+ \w+ are left\)\. .*again"
)


def full(code: int, error: str) -> str:
    """The file's name in the sentence about a full disk, which must be the last line."""
    found = SENTENCE.match(error.strip().splitlines()[-1])
    assert code == 2, error
    assert found, error
    assert "Traceback" not in error
    return found["file"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """`disk(folder, size)` mounts a tmpfs of that size there, or resizes it."""
    mounted: list[str] = []

    def make(folder: str, size: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        options = f"remount,size={size}" if folder in mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs needs root; the test with a limit on file sizes covers the messages")
        mounted.append(folder)

    yield make
    gc.collect()  # mapped shards go with the objects that read them
    for folder in set(mounted):
        subprocess.run(["umount", folder], check=True)


def losses(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()


def test_disks_that_are_full_and_grow(user: "User", disk: Callable[[str, str], None]) -> None:
    cache, runs = str(user.root / "cache"), str(user.root / "runs")
    disk(cache, "64k")
    assert full(*user.train()).endswith(".safetensors")  # the shard of encoded images
    assert user.tree("runs").keys() == {"runs/mine/recipe.yaml"}
    assert not [name for name in user.tree("cache") if ".writing" in name]
    disk(cache, "8m")
    disk(runs, "256k")
    assert full(*user.train()) == "checkpoint.pt"
    assert len(losses(user.run).splitlines()) == 1
    disk(runs, "64m")
    assert user.train()[0] == 0
    assert user.train("--out", "uninterrupted")[0] == 0
    assert losses(user.run) == losses(user.root / "uninterrupted")


def test_limits_on_every_file_in_turn(user: "User", limit_file_size: Callable[[int], None]) -> None:
    """Recipe, shard, checkpoint, adapter, samples: whichever meets the limit is named, and nothing is half written."""
    assert user.train("--out", "uninterrupted")[0] == 0
    sizes = {path.stat().st_size for path in (user.root / "uninterrupted").rglob("*") if path.is_file()}
    sizes |= {path.stat().st_size for path in (user.root / "cache").rglob("*") if path.is_file()}
    shutil.rmtree(user.root / "cache")
    named = []
    for size in sorted(sizes | {4096}):
        limit_file_size(size)
        code, error = user.train()
        limit_file_size(-1)
        if code == 0:
            break
        named.append(full(code, error))
        assert not [name for name in user.tree() if ".writing" in name]
    else:
        assert user.train()[0] == 0
    kinds = [kind for kind in ("recipe.yaml", ".safetensors", "checkpoint.pt") if any(kind in name for name in named)]
    assert kinds == ["recipe.yaml", ".safetensors", "checkpoint.pt"], named
    assert losses(user.run) == losses(user.root / "uninterrupted")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (user.run, user.root / "uninterrupted")]
    assert summaries[0]["validation_loss_end"] == summaries[1]["validation_loss_end"]


def test_a_domain_that_does_not_fit(user: "User", disk: Callable[[str, str], None]) -> None:
    cache = str(user.root / "cache")
    disk(cache, "48k")
    assert "marketing-" in full(*user.command("train", "--recipe", "marketing", "--cpu", "data.count=24"))
    assert user.tree("cache") == {}
    disk(cache, "8m")
    assert len(open_source(load_recipe("marketing", ["data.count=24"]).data, 128, Path(cache))) == 24


def test_a_file_where_the_run_should_be_is_one_sentence(user: "User", loaded: object) -> None:
    (user.root / "runs").write_text("a file")
    code, error = user.train()
    assert (code, error) == (2, "error: runs/mine: Not a directory\n")
    assert (user.root / "runs").read_text() == "a file"
